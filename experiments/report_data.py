"""What a report shows, read from the files of a run directory and summarised: no drawing, no
HTML.
"""

import contextlib
import dataclasses
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluation_results import (
    SPLITS,
    is_number,
    prompts_file,
    read_object,
    read_results,
    read_rows,
    result_files,
)
from experiments.pocket_models import CONTENT_HASHES
from ictjax.metrics import read_metrics

_REMOVE = "write it again by the command that made it, or remove it"
_EVALUATE = "run the evaluation again, or remove the file"
_LARGEST_PLACE = 10**9  # of an iteration, a loop or a meta-turn

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that was evaluated."""

    folder: Path | None  # None where it is not here
    name: str  # of its directory
    label: str  # what it is called among the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a run, with the prompts and episodes behind it. "evaluation" is that of the
    task trained on. What is by arm and family holds only those of the results.
    """

    name: str
    results: Json  # NAME.json
    prompts: list[Json]  # the last of every loop: arm, family, run, system_prompt, success
    turns: list[Json]  # the same of all meta-turns, with "turn", "select_success", "analysis"
    episodes: Mapping[tuple[str, str], list[Json]]  # of the last prompts on TEST
    contexts: Mapping[tuple[str, str], list[Json]]  # what the reflector read
    runs: tuple[TrainedRun, ...]  # in the order in which they were given
    models: Json  # hashes of what they hold, by role; empty in older evaluations

    def run_label(self, number: int, count: int) -> str:
        """What the trained run of this number, from 0, of so many is called."""
        # another count: who is who is not known
        return self.runs[number].label if len(self.runs) == count else _nth(number, count)

    @property
    def families(self) -> dict[str, Json]:
        return self.results["families"]

    @property
    def environment(self) -> Json:
        """Which games were played: name, options, and what the environment says of itself."""
        return self.results["environment"]

    @property
    def changes(self) -> list[str]:
        """What was no longer as it was in training, and accepted; a sentence each."""
        return self.results["changes"]

    @property
    def checkpoint(self) -> int:
        """The iteration that was evaluated."""
        return self.results["protocol"]["checkpoint"]

    @property
    def label(self) -> str:
        """Which task, with its options, when it is another than the one trained on; else empty."""
        return self.name.removeprefix("evaluation").removeprefix("-")

    @property
    def about(self) -> str:
        """The label as it stands behind a noun."""
        return f" of {self.label}" if self.label else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunData:
    """The files of a run; empty where one is not written yet."""

    folder: Path
    config: Json
    manifest: Json
    metrics: list[Json]
    candidates: list[Json]  # prompts/: iteration, family, replay_reward, fresh_reward, reward
    contexts: list[Json]  # what the reflector read in the newest iteration
    evaluations: tuple[Evaluation, ...]  # of the task trained on first, then others by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What one training has written."""

    label: str  # which of several trained runs; empty where there is no other
    config: Json
    metrics: list[Json]
    candidates: list[Json]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """The families of one split, and the numbers over all of them, as in evaluation.json."""

    name: str  # a key of SPLITS
    title: str
    families: Mapping[str, Json]
    overall: Json


def load_run(folder: Path) -> RunData:
    """Reads a run directory. Raises ValueError, naming the file, when it is no run or a file is
    damaged.
    """
    if not folder.is_dir():
        raise ValueError(
            f"There is no run directory {str(folder)!r}: train first, or name one with --run-dir."
        )
    about = ("config.json", "metrics.jsonl")
    if not any((folder / name).exists() for name in about) and not result_files(folder):
        raise ValueError(
            f"{str(folder)!r} holds no run (no config.json, metrics.jsonl or evaluation.json): name"
            " another with --run-dir."
        )
    newest = max(folder.glob("contexts/iteration_*.jsonl"), default=None)
    own = _training(folder, folder.name)
    return RunData(
        folder=folder,
        config=own.config,
        manifest=_about(folder / "manifest.json", "environment"),
        metrics=own.metrics,
        candidates=own.candidates,
        contexts=[] if newest is None else read_rows(newest, _is_context, _REMOVE),
        evaluations=tuple(
            read_evaluation(folder, path.stem, read_results(path)) for path in result_files(folder)
        ),
    )


def training_folders(run: RunData) -> tuple[dict[Path, str], list[str]]:
    """The run directories behind a page, each with the label of its training, and the names of
    those that are not here.

    That is a run's own; of an evaluation of several runs all of them, where they are as they were
    named, seen from here, or beside this one. A directory counts only if it has kept its parts of
    that evaluation: others may have the same name.
    """
    found = {run.folder.resolve(): ""} if run.config or run.metrics else {}
    absent: list[str] = []
    for evaluation in run.evaluations:
        several = len(evaluation.runs) > 1
        if not several and found:  # its own
            continue
        for one in evaluation.runs:
            if one.folder is None:
                absent.append(one.name)
            elif not found.get(one.folder):
                found[one.folder] = one.label if several else ""
    if len(found) > 1:  # the run's own beside others
        found = {folder: label or _label(folder.name, folder) for folder, label in found.items()}
    return found, list(dict.fromkeys(absent))


def plays_pocket(run: RunData) -> bool:
    """Whether a player, of this run or of any that was evaluated, is one of the pocket models that
    ship with the package: by what it is called, or by what it holds. Raises ValueError, naming the
    file, for a config.json that is damaged.
    """
    configs = [run.config]
    configs += [_config(folder) for folder in training_folders(run)[0]]
    return any(
        "pocket" in str(config.get(role, ""))
        for config in configs
        for role in ("actor", "reflector", "preset")
    ) or any(
        str(held) in CONTENT_HASHES
        for evaluation in run.evaluations
        for held in evaluation.models.values()
    )


def trainings(run: RunData) -> tuple[list[Training], list[str]]:
    """The trainings behind a page, and the names of the directories that are not here or have no
    finished iteration: see `training_folders`. Raises ValueError, naming the file, for one that is
    damaged.
    """
    folders, absent = training_folders(run)
    found = []
    for folder, label in folders.items():
        training = _training(folder, label)
        if training.metrics:
            found.append(training)
        elif label:
            absent.append(folder.name)
    return found, absent


def _trained_runs(folder: Path, results: Json) -> Iterator[TrainedRun]:
    named = results["protocol"].get("run_dirs")
    paths = [Path(str(name)) for name in named] if isinstance(named, list) else []
    names = [path.name for path in paths]
    for number, path in enumerate(paths):
        found = _folder_of(folder, path, results["folder"])
        which = _nth(number, len(paths))
        label = _label(path.name, found) if path.name else which
        if path.name and names.count(path.name) > 1:
            label = f"{label} ({which})"
        yield TrainedRun(folder=found, name=path.name or which, label=label)


def _label(name: str, folder: Path | None) -> str:
    """A run by its own name, with the seed that it was trained with where that is known."""
    seed = None if folder is None else _config(folder).get("seed")
    return f"run {name}, seed {seed}" if type(seed) is int else f"run {name}"


def _nth(number: int, count: int) -> str:
    """Not called a seed: it would look like one of --seed, and is none."""
    return f"run {number + 1} of {count}"


def _folder_of(folder: Path, named: Path, place: str) -> Path | None:
    for path in (named, folder.resolve().parent / named.name):
        # whatever the file holds may be no path at all
        with contextlib.suppress(OSError, ValueError):
            if (path / place).is_dir():
                return path.resolve()
    return None


def _config(folder: Path) -> Json:
    return _about(folder / "config.json", "meta")


def _training(folder: Path, label: str) -> Training:
    return Training(
        label=label,
        config=_config(folder),
        metrics=_metrics(folder),
        candidates=[
            row
            for path in sorted(folder.glob("prompts/iteration_*.jsonl"))
            for row in read_rows(path, _is_candidate, _REMOVE)
        ],
    )


def read_evaluation(folder: Path, name: str, results: Json) -> Evaluation:
    """What lies behind the results of a run, or of several. Raises ValueError, naming the file, for
    one that is damaged.
    """
    turns = prompts_file(folder, results).with_name("turns.jsonl")
    return Evaluation(
        name=name,
        results=results,
        prompts=read_rows(prompts_file(folder, results), _is_prompt, _EVALUATE),
        turns=read_rows(turns, _is_turn_prompt, _EVALUATE),
        episodes=_by_part(folder, results, "episodes", _is_episode),
        contexts=_by_part(folder, results, "contexts", _is_context),
        runs=tuple(_trained_runs(folder, results)),
        models=_about(folder / results["folder"] / "settings.json", "models").get("models", {}),
    )


def _by_part(
    folder: Path, results: Json, kind: str, is_row: Callable[[Mapping[str, Any]], bool]
) -> dict[tuple[str, str], list[Json]]:
    """The rows of every ARM_FAMILY.jsonl; parts that the results do not count are of others."""
    arms = {arm for split in results["overall"].values() for arm in split["arms"]}
    found = {}
    for path in sorted((folder / results["folder"] / kind).glob("*.jsonl")):
        arm, _, family = path.stem.partition("_")
        family = urllib.parse.unquote(family)
        if arm in arms and family in results["families"]:
            found[arm, family] = read_rows(path, is_row, _EVALUATE)
    return found


def _about(path: Path, *records: str) -> Json:
    """A file that describes the run, with mappings, where they are there, under these names."""
    data = read_object(path, _REMOVE) if path.exists() else {}
    for name in records:
        if not isinstance(data.get(name, {}), Mapping):
            raise ValueError(f"{path} holds no record under {name!r}: {_REMOVE}.")
    return data


def _metrics(folder: Path) -> list[Json]:
    lines = read_metrics(folder)
    for number, line in enumerate(lines, start=1):
        times = line.get("time", {})
        if not (
            is_number(line["iteration"])
            and isinstance(times, Mapping)
            and all(map(is_number, times.values()))
        ):
            raise ValueError(
                f"Line {number} of {folder / 'metrics.jsonl'} holds no iteration and its times:"
                " restore the file."
            )
    return lines


def _is_prompt(row: Mapping[str, Any]) -> bool:
    return (
        _texts(row, "arm", "family", "system_prompt")
        and _is_place(row.get("run", 0))
        and (row.get("success") is None or is_number(row["success"]))
    )


def _is_turn_prompt(row: Mapping[str, Any]) -> bool:
    select = row.get("select_success")
    return (
        _is_prompt(row)
        and _is_place(row.get("turn"))
        and (select is None or is_number(select))
        and isinstance(row.get("analysis", ""), str | None)
    )


def _is_candidate(row: Mapping[str, Any]) -> bool:
    return (
        _texts(row, "family")
        and _is_place(row.get("iteration"))
        and all(
            row.get(name) is None or is_number(row[name])
            for name in ("replay_reward", "fresh_reward", "reward")
        )
    )


def _is_context(row: Mapping[str, Any]) -> bool:
    played = row.get("trajectories")
    return (
        _texts(row, "family")
        and all(_is_place(row.get(name)) for name in ("loop", "meta_turn"))
        and isinstance(played, list)
        and all(isinstance(episode, Mapping) and _is_episode(episode) for episode in played)
    )


def _is_episode(row: Mapping[str, Any]) -> bool:
    game, turns = row.get("game"), row.get("turns")
    return (
        _texts(row, "outcome", "system_prompt", "final_observation")
        and isinstance(game, Mapping)
        and _texts(game, "env", "family", "key")
        and isinstance(turns, list)
        and all(isinstance(turn, Mapping) and _is_turn(turn) for turn in turns)
    )


def _is_turn(turn: Mapping[str, Any]) -> bool:
    return (
        _texts(turn, "observation", "action")
        and isinstance(turn.get("reply", ""), str)
        and isinstance(turn.get("actions", []), list)
    )


def _is_place(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_PLACE


def _texts(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


def games_played(environment: Mapping[str, Any]) -> str:
    """Which games, in a few words: "alfworld, generated games, rooms=small"; empty when nothing is
    known.
    """
    name, source, given = (environment.get(key) for key in ("name", "source", "options"))
    options = (
        f"{key}={value}"
        for key, value in sorted(given.items() if isinstance(given, Mapping) else ())
        if value != source
    )
    return ", ".join(filter(None, (name and str(name), source and f"{source} games", *options)))


def split_summaries(evaluation: Evaluation) -> list[SplitSummary]:
    """All splits that an evaluation holds, the headline's first."""
    return [
        SplitSummary(
            name=split,
            title=SPLITS[split] + evaluation.about,
            families={name: evaluation.families[name] for name in overall["families"]},
            overall=overall,
        )
        for split, overall in evaluation.results["overall"].items()
    ]


def series(metrics: Sequence[Json], name: str) -> list[float | None]:
    """One metric over the iterations; None where a line lacks it."""
    return [value if is_number(value := record.get(name)) else None for record in metrics]


def counter_total(metrics: Sequence[Json], name: str) -> float:
    """What a counter among the times reached in all, when every process of a resumed run counts
    from zero again: by the iteration that its process began with ("process_began"), and, in files
    of earlier versions, where it falls.
    """
    times = [record.get("time", {}) for record in metrics]
    total, last, began = 0.0, 0.0, None
    for value, process in zip(series(times, name), series(times, "process_began"), strict=True):
        if value is not None:
            total += value if value < last or process != began else value - last
            last, began = value, process
    return total


def phase_seconds(metrics: Sequence[Json]) -> dict[str, float]:
    """Total seconds per phase over all iterations: the keys of "time" that end in "_s", longest
    first.
    """
    totals: dict[str, float] = {}
    for record in metrics:
        for name, value in record.get("time", {}).items():
            if name.endswith("_s") and isinstance(value, (int, float)):
                totals[name.removesuffix("_s")] = totals.get(name.removesuffix("_s"), 0.0) + value
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def nested(metrics: Sequence[Json], *names: str) -> list[float | None]:
    """As `series`, of a number within a record of that name."""
    *path, last = names
    for name in path:
        metrics = [
            inner if isinstance(inner := record.get(name), Mapping) else {} for record in metrics
        ]
    return series(metrics, last)


def game_name(trajectory: Json) -> str:
    """The id of the game that a trajectory is of."""
    return "|".join(trajectory["game"][field] for field in ("env", "family", "key"))
