"""One table of several runs' evaluations."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    """A row per run (or joint results of several), evaluation and split, held-out families first:
    games won per arm, the paired
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
    table.add_column("run", overflow="fold", min_width=len("seed0"))  # of several runs: long
    table.add_column("seed", no_wrap=True)
    table.add_column("benchmark", overflow="fold", min_width=len("benchmark"))
    table.add_column("families", no_wrap=True)
    for name in (*_SHOWN, "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold", min_width=len("verdict"))
    left_out: list[str] = []
    for run_dir in run_dirs:
        try:
            about = _about(run_dir)
            paths = _result_files(run_dir)
        except ValueError as error:
            left_out.append(str(error))
            continue
        for path in paths:
            try:
                rows = list(_rows(path, about))
            except ValueError as error:
                left_out.append(str(error))
                continue
            for row in rows:
                table.add_row(run_dir.name, *row)
    if not table.rows:
        raise ValueError(" ".join(left_out))
    return Comparison(table=table, left_out=tuple(left_out))


class _About(NamedTuple):
    """What the row of a run begins with, and how many iterations it was to have."""

    seed: str
    benchmark: str
    iterations: int | None


def _about(run_dir: Path) -> _About | None:
    """None for the results of several runs, which alone know what they are of. Raises ValueError
    for what is neither.
    """
    if not (run_dir / "config.json").is_file() and result_files(run_dir):
        return None
    config = read_config(run_dir)
    try:
        return _About(
            seed=str(config["seed"]),
            benchmark=str(config["task"]["environment"]["name"]),
            iterations=config.get("iterations"),
        )
    except (KeyError, TypeError):
        raise ValueError(
            f"{run_dir / 'config.json'} is not the configuration of a run: restore it."
        ) from None


def _about_results(results: Mapping[str, Any]) -> _About:
    """Of the results of several runs: "of 4", trained seeds, in the place of a seed."""
    seeds = next(iter(results["overall"].values())).get("seeds")
    return _About(
        seed=f"of {seeds}" if isinstance(seeds, int) else "",
        benchmark=str(results["environment"].get("name", "")),
        iterations=results["protocol"].get("iterations"),
    )


def _result_files(run_dir: Path) -> list[Path]:
    found = result_files(run_dir)
    if not found:
        raise ValueError(
            f"{run_dir} has no evaluation.json: run `ictjax evaluate --run-dir {typed(run_dir)}`"
            " first."
        )
    return found


def _rows(path: Path, of_run: _About | None) -> Iterator[list[str]]:
    results = read_results(path)
    about = of_run or _about_results(results)
    benchmark = path.stem.removeprefix("evaluation").removeprefix("-") or about.benchmark
    step = results["protocol"]["checkpoint"]
    if step != about.iterations:
        benchmark += f", iteration {step}"
    for split, numbers in results["overall"].items():
        if "trained_vs_untrained" not in numbers["tests"]:
            raise ValueError(
                f"{path} holds not both arms that are compared, untrained and trained: evaluate"
                " again with these."
            )
        yield [about.seed, benchmark, split, *_numbers(numbers)]


def _numbers(split: Mapping[str, Any]) -> list[str]:
    test = split["tests"]["trained_vs_untrained"]
    difference = f"{points(test['difference'])} {interval(test['ci95'], signed=True)}"
    means = [percent(split["arms"][arm]["mean"]) for arm in _SHOWN]
    return [*means, difference, p_value(test["p_corrected"]), test["verdict"]]


if __name__ == "__main__":
    main()
