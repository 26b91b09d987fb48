"""One table of several runs' evaluations."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from experiments.commands.compare import main
from experiments.evaluation_results import read_results, result_files
from experiments.local_path import typed
from experiments.run_dir import read_config
from experiments.wording import interval, p_value, percent, points

_SHOWN = ("untrained", "trained")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row per run, evaluation and split, held-out families first: games won per arm, the paired
    difference with its interval, p and verdict; and what could not be read, a sentence each.
    """

    table: Table
    left_out: tuple[str, ...]


def compare(run_dirs: tuple[Path, ...]) -> Comparison:
    """The evaluations of all runs that can be read.

    Raises ValueError where none can, with what is wrong with each.
    """
    table = Table(
        title="Games won, %; trained - untrained with its 95 % interval",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    for name in ("run", "seed"):
        table.add_column(name, no_wrap=True)
    table.add_column("benchmark", overflow="fold", min_width=len("benchmark"))
    table.add_column("families", no_wrap=True)
    for name in (*_SHOWN, "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", min_width=len("verdict"))
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
            f"{run_dir} has no evaluation.json: run `ictjax evaluate --run-dir {typed(run_dir)}`"
            " first."
        )
    return found


def _rows(path: Path, seed: str, trained_on: str, iterations: int | None) -> Iterator[list[str]]:
    results = read_results(path)
    benchmark = path.stem.removeprefix("evaluation").removeprefix("-") or trained_on
    step = results["protocol"]["checkpoint"]
    if step != iterations:
        benchmark += f", iteration {step}"
    for split, numbers in results["overall"].items():
        if "trained_vs_untrained" not in numbers["tests"]:
            raise ValueError(
                f"{path} holds not both arms that are compared, untrained and trained: evaluate"
                " again with these."
            )
        yield [seed, benchmark, split, *_numbers(numbers)]


def _numbers(split: Mapping[str, Any]) -> list[str]:
    test = split["tests"]["trained_vs_untrained"]
    difference = f"{points(test['difference'])} {interval(test['ci95'], signed=True)}"
    means = [percent(split["arms"][arm]["mean"]) for arm in _SHOWN]
    return [*means, difference, p_value(test["p_corrected"]), test["verdict"]]


if __name__ == "__main__":
    main()
