"""One table of several runs' evaluations."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments import report_page
from experiments.commands.compare import main
from experiments.run_dir import read_config, read_json

_ARMS = ("initial", "untrained", "trained")


def compare(run_dirs: tuple[Path, ...]) -> Table:
    """A row per run, evaluation and split: games won per arm, the paired difference, its interval
    and p.

    Raises ValueError where an evaluation is missing.
    """
    table = Table(
        title="Games won, %; paired difference with its 95 % interval",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for name in ("run", "seed"):
        table.add_column(name, no_wrap=True)
    table.add_column("benchmark", overflow="fold", min_width=len("benchmark"))
    table.add_column("families", no_wrap=True)
    for name in (*_ARMS, "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for run_dir in run_dirs:
        config = read_config(run_dir)
        path = run_dir / "evaluation.json"
        if not path.is_file():
            raise ValueError(
                f"{run_dir} has no evaluation.json: run `ictjax evaluate --run-dir {run_dir}`"
                " first."
            )
        for evaluated in (path, *sorted(run_dir.glob("evaluation-*.json"))):
            report = read_json(evaluated)
            about = evaluated.stem.removeprefix("evaluation").removeprefix("-")
            benchmark = about or config["task"]["environment"]["name"]
            for split, numbers in report["overall"].items():
                table.add_row(
                    run_dir.name, str(config["seed"]), benchmark, split, *_numbers(numbers)
                )
    return table


def _numbers(split: Mapping[str, Any]) -> list[str]:
    test = split["tests"]["trained_vs_untrained"]
    difference = (
        f"{report_page.points(test['difference'])}"
        f" {report_page.interval(test['ci95'], signed=True)}"
    )
    means = [report_page.percent(split["arms"][arm]["mean"]) for arm in _ARMS]
    return [*means, difference, report_page.p_value(test["p"])]


if __name__ == "__main__":
    main()
