"""`python -m experiments.compare RUN_DIR ...`: one table of several runs' evaluations, for example
of the same preset under several seeds.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import report_page
from experiments.run_dir import run_main

_ARMS = ("initial", "untrained", "trained")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """Prints one table of the evaluations of several runs."""

    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Evaluated run directories, for example runs/seed0 runs/seed1."""


def compare(run_dirs: tuple[Path, ...]) -> Table:
    """A row per run, evaluation and split: games won per arm, the paired difference, its interval
    and p.

    Raises ValueError where an evaluation is missing.
    """
    table = Table(
        title="Games won, %; paired difference with its 95 % interval",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("run", "seed", "families"):
        table.add_column(name, no_wrap=True)
    for name in (*_ARMS, "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for run_dir in run_dirs:
        path = run_dir / "evaluation.json"
        if not path.is_file():
            raise ValueError(
                f"{run_dir} has no evaluation.json: run python -m experiments.evaluate --run-dir"
                f" {run_dir} first."
            )
        seed = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["seed"]
        for evaluated in (path, *sorted(run_dir.glob("evaluation-*.json"))):
            about = evaluated.stem.removeprefix("evaluation").replace("-", " ", 1)
            for split, numbers in json.loads(evaluated.read_text(encoding="utf-8"))[
                "overall"
            ].items():
                test = numbers["tests"]["trained_vs_untrained"]
                difference = (
                    f"{report_page.points(test['difference'])}"
                    f" {report_page.interval(test['ci95'], signed=True)}".replace("[", r"\[")
                )
                means = (report_page.percent(numbers["arms"][arm]["mean"]) for arm in _ARMS)
                table.add_row(
                    run_dir.name,
                    str(seed),
                    split + about,
                    *means,
                    difference,
                    report_page.p_value(test["p"]),
                )
    return table


def main() -> None:
    """The command line; exit code 2 with one sentence for a run that is not evaluated."""
    args = tyro.cli(CompareArgs, description=CompareArgs.__doc__)
    run_main(lambda: Console().print(compare(args.run_dirs)), "")


if __name__ == "__main__":
    main()
