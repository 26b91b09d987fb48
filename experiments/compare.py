"""One table of several runs' evaluations."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from experiments.commands.compare import main
from experiments.evaluation_results import read_results, result_files
from experiments.local_path import as_written, command_line, typed
from experiments.run_dir import read_config
from experiments.wording import interval, p_value, percent, points

_SHOWN = ("untrained", "trained")
# What decides a number beside its families, by its name in "protocol", and how it is said.
_SETTINGS = {
    "meta_turns": "{} meta-turns",
    "runs": "{} loops",
    "test_games": "{} test games",
    "select_games": "{} select games",
    "games_per_context": "k {}",
    "protocol": "protocol {}",
    "scored": "{} prompts scored",
    "games": "games {}",
    "draws": "draws {}",
    "temperature": "temperature {}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row per run (or joint results of several), evaluation and split, held-out families first:
    games won per arm, the paired
    difference with its interval, p and verdict; and what could not be read, a sentence each.

    A row whose split has a star is of other settings than most rows of that benchmark and split (of
    two, than the first); `other_settings` says which, a clause for each such evaluation.
    """

    table: Table
    left_out: tuple[str, ...]
    other_settings: tuple[str, ...]


def compare(run_dirs: tuple[Path, ...], named: tuple[Path, ...] = ()) -> Comparison:
    """The evaluations of all runs that can be read; `named`: what people call them, where some are
    copies.

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
    found: list[_Row] = []
    for run_dir, called in zip(run_dirs, named or run_dirs, strict=True):
        try:
            about = _about(run_dir)
            paths = _result_files(run_dir, called)
        except ValueError as error:
            left_out.append(str(error))
            continue
        for path in paths:
            try:
                found += list(_rows(path, run_dir.name, about))
            except ValueError as error:
                left_out.append(str(error))
    if not found:
        raise ValueError(" ".join(left_out))
    others = [_other_settings(row, found) for row in found]
    for row, differing in zip(found, others, strict=True):
        star = "*" if differing else ""
        table.add_row(row.run, row.seed, row.about, f"{row.split}{star}", *row.numbers)
    return Comparison(
        table=table, left_out=tuple(left_out), other_settings=tuple(_said(found, others))
    )


class _Row(NamedTuple):
    """A row, with what decides its numbers."""

    run: str
    seed: str
    benchmark: str
    about: str  # the benchmark, and what else is said of the evaluation beside it
    split: str
    numbers: list[str]
    families: tuple[str, ...]
    protocol: Mapping[str, Any]


def _other_settings(row: _Row, rows: Sequence[_Row]) -> list[str]:
    """What decides the numbers of a row and is not as in most of those beside it, a few words each;
    where as many have one as another, the first counts.
    """
    beside = [
        other for other in rows if (other.benchmark, other.split) == (row.benchmark, row.split)
    ]
    usual = _most([tuple(sorted(other.families)) for other in beside])
    found = []
    if usual != tuple(sorted(row.families)):
        number, most = len(row.families), len(usual)
        how = f"{number} of {most}" if set(row.families) < set(usual) else f"{number} other"
        found.append(f"{how} {row.split} families")
    for name, words in _SETTINGS.items():
        value, most = row.protocol.get(name), _most([other.protocol.get(name) for other in beside])
        if value is not None and most is not None and value != most:
            found.append(f"{_counted(words, value)} (others {most})")
    return found


def _counted(words: str, value: Any) -> str:
    said = words.format(value)
    return said.removesuffix("s") if value == 1 else said


def _most(values: Sequence[Any]) -> Any:
    # the first of those that are as many
    return collections.Counter(values).most_common(1)[0][0]


def _said(rows: Sequence[_Row], others: Sequence[Sequence[str]]) -> Iterator[str]:
    """A clause for all evaluations that differ in the same."""
    of_evaluation: dict[tuple[str, str], dict[str, None]] = {}
    for row, differing in zip(rows, others, strict=True):
        if differing:
            of_evaluation.setdefault((row.run, row.benchmark), {}).update(dict.fromkeys(differing))
    several = len({row.benchmark for row in rows}) > 1
    named: dict[tuple[str, ...], list[str]] = {}
    for (run, benchmark), differing in of_evaluation.items():
        name = f"{run} ({benchmark})" if several else run
        named.setdefault(tuple(differing), []).append(name)
    for differing, names in named.items():
        yield f"{', '.join(names)}: {', '.join(differing)}"


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


def _result_files(run_dir: Path, named: Path) -> list[Path]:
    found = result_files(run_dir)
    if not found:
        raise ValueError(
            f"{as_written(named)} has no evaluation.json: run"
            f" `{command_line(f'evaluate --run-dir {typed(named)}')}` first."
        )
    return found


def _rows(path: Path, run: str, of_run: _About | None) -> Iterator[_Row]:
    results = read_results(path)
    about = of_run or _about_results(results)
    benchmark = path.stem.removeprefix("evaluation").removeprefix("-") or about.benchmark
    step = results["protocol"]["checkpoint"]
    iteration = "" if step == about.iterations else f", iteration {step}"
    for split, numbers in results["overall"].items():
        if "trained_vs_untrained" not in numbers["tests"]:
            raise ValueError(
                f"{path} holds not both arms that are compared, untrained and trained: evaluate"
                " again with these."
            )
        yield _Row(
            run=run,
            seed=about.seed,
            benchmark=benchmark,
            about=benchmark + iteration,
            split=split,
            numbers=_numbers(numbers),
            families=tuple(numbers["families"]),
            protocol=results["protocol"],
        )


def _numbers(split: Mapping[str, Any]) -> list[str]:
    test = split["tests"]["trained_vs_untrained"]
    difference = f"{points(test['difference'])} {interval(test['ci95'], signed=True)}"
    means = [percent(split["arms"][arm]["mean"]) for arm in _SHOWN]
    return [*means, difference, p_value(test["p_corrected"]), test["verdict"]]


if __name__ == "__main__":
    main()
