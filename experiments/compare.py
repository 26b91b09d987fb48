"""One table of several runs' evaluations."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments import report_page
from experiments.commands.compare import main
from experiments.evaluation_results import ARMS, read_results, result_files
from experiments.run_dir import read_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row per run, evaluation and split: games won per arm, the paired difference, its interval
    and p; and what could not be read, a sentence each.
    """

    table: Table
    left_out: tuple[str, ...]


def compare(run_dirs: tuple[Path, ...]) -> Comparison:
    """The evaluations of all runs that can be read.

    Raises ValueError where none can, with what is wrong with each.
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
    for name in (*ARMS, "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    left_out: list[str] = []
    for run_dir in run_dirs:
        try:
            config = read_config(run_dir)
            about = _about(run_dir, config)
            paths = _result_files(run_dir)
        except ValueError as error:
            left_out.append(str(error))
            continue
        for path in paths:
            try:
                rows = list(_rows(path, *about))
            except ValueError as error:
                left_out.append(str(error))
                continue
            for row in rows:
                table.add_row(run_dir.name, *row)
    if not table.rows:
        raise ValueError(" ".join(left_out))
    return Comparison(table=table, left_out=tuple(left_out))


def _about(run_dir: Path, config: Mapping[str, Any]) -> tuple[str, str, int | None]:
    """Seed, benchmark and iterations of a run."""
    try:
        return (
            str(config["seed"]),
            str(config["task"]["environment"]["name"]),
            config.get("iterations"),
        )
    except (KeyError, TypeError):
        raise ValueError(
            f"{run_dir / 'config.json'} is not the configuration of a run: restore it."
        ) from None


def _result_files(run_dir: Path) -> list[Path]:
    found = result_files(run_dir)
    if run_dir / "evaluation.json" not in found:
        raise ValueError(
            f"{run_dir} has no evaluation.json: run `ictjax evaluate --run-dir {run_dir}` first."
        )
    return found


def _rows(path: Path, seed: str, trained_on: str, iterations: int | None) -> Iterator[list[str]]:
    results = read_results(path)
    benchmark = path.stem.removeprefix("evaluation").removeprefix("-") or trained_on
    step = results.get("protocol", {}).get("checkpoint")
    if step not in (None, iterations):
        benchmark += f", iteration {step}"
    splits = results.get("overall", {})
    if not splits:
        raise ValueError(f"{path} holds no results over all families: evaluate again.")
    for split, numbers in splits.items():
        arms, tests = numbers.get("arms", {}), numbers.get("tests", {})
        if not {*ARMS} <= arms.keys() or "trained_vs_untrained" not in tests:
            raise ValueError(f"{path} holds not all arms of {split!r}: evaluate again.")
        yield [seed, benchmark, split, *_numbers(numbers)]


def _numbers(split: Mapping[str, Any]) -> list[str]:
    test = split["tests"]["trained_vs_untrained"]
    difference = (
        f"{report_page.points(test['difference'])}"
        f" {report_page.interval(test['ci95'], signed=True)}"
    )
    means = [report_page.percent(split["arms"][arm]["mean"]) for arm in ARMS]
    return [*means, difference, report_page.p_value(test["p"])]


if __name__ == "__main__":
    main()
