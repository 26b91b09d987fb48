"""What a report shows, read from the files of a run directory and summarised: no drawing, no
HTML.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluation_results import (
    ARMS,
    SPLITS,
    episode_files,
    is_number,
    prompts_file,
    read_object,
    read_results,
    read_rows,
    result_files,
)
from ictjax.metrics import read_metrics

_REMOVE = "write it again by the command that made it, or remove it"
_EVALUATE = "run the evaluation again, or remove the file"

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a run, with the prompts and episodes behind it. "evaluation" is that of the
    task trained on.
    """

    name: str
    results: Json  # NAME.json
    prompts: list[Json]  # arm, family, run, system_prompt, success, analysis
    episodes: Mapping[str, list[Json]]  # by arm

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
    evaluations: tuple[Evaluation, ...]  # of the task trained on first, then others by name

    @property
    def pocket(self) -> bool:
        """Whether a player is one of the pocket models that ship with the package."""
        return any(
            "pocket" in str(self.config.get(role, "")) for role in ("actor", "reflector", "preset")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """The families of one split, and the numbers over all of them, as in evaluation.json."""

    name: str  # a key of SPLITS
    title: str
    families: Mapping[str, Json]
    overall: Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two records of one family to be shown side by side."""

    family: str
    before: Json
    after: Json


def load_run(folder: Path) -> RunData:
    """Reads a run directory. Raises ValueError, naming the file, when it is no run or a file is
    damaged.
    """
    if not folder.is_dir():
        raise ValueError(
            f"There is no run directory {str(folder)!r}: train first, or name one with --run-dir."
        )
    if not any(
        (folder / name).exists() for name in ("config.json", "metrics.jsonl", "evaluation.json")
    ):
        raise ValueError(
            f"{str(folder)!r} holds no run (no config.json, metrics.jsonl or evaluation.json): name"
            " another with --run-dir."
        )
    return RunData(
        folder=folder,
        config=_about(folder / "config.json", "meta"),
        manifest=_about(folder / "manifest.json", "environment"),
        metrics=_metrics(folder),
        evaluations=tuple(_load_evaluation(folder, path) for path in result_files(folder)),
    )


def _load_evaluation(folder: Path, path: Path) -> Evaluation:
    results = read_results(path)
    return Evaluation(
        name=path.stem,
        results=results,
        prompts=read_rows(prompts_file(folder, results), _is_prompt, _EVALUATE),
        episodes={
            arm: [
                row
                for file in episode_files(folder, results, arm)
                for row in read_rows(file, _is_episode, _EVALUATE)
            ]
            for arm in ARMS
        },
    )


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
        and isinstance(row.get("run", 0), int)
        and (row.get("success") is None or is_number(row["success"]))
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
    return _texts(turn, "observation", "action") and isinstance(turn.get("thought", ""), str)


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


def counter_total(values: Sequence[float | None]) -> float:
    """What a counter reached in all, when every process of a resumed run counts from zero again."""
    total, last = 0.0, 0.0
    for value in values:
        if value is not None:
            total += value - last if value >= last else value
            last = value
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


def gains(evaluation: Evaluation) -> list[str]:
    """Family names, held-out families first, each split by falling gain of trained over untrained
    (over initial where that is missing).
    """

    def order(name: str) -> tuple[bool, float]:
        arms = evaluation.families[name]["arms"]
        base = arms.get("untrained", arms.get("initial", {})).get("mean", math.nan)
        gain = arms.get("trained", {}).get("mean", math.nan) - base
        return (evaluation.families[name]["split"] == "train", -gain if gain == gain else 0.0)

    return sorted(evaluation.families, key=order)


def prompt_pairs(evaluation: Evaluation, limit: int) -> list[Pair]:
    """Untrained and trained prompts of the same family and loop, of the families that gained most,
    held-out ones first.
    """
    by_place: dict[tuple[str, Any], dict[str, Json]] = {}
    for row in evaluation.prompts:
        by_place.setdefault((row.get("family", ""), row.get("run")), {})[row.get("arm", "")] = row
    complete = [
        Pair(family=family, before=arms["untrained"], after=arms["trained"])
        for (family, _), arms in by_place.items()
        if {"untrained", "trained"} <= arms.keys()
    ]
    # A typical loop, not the best: the one in the middle by what its trained prompt won.
    found = []
    for family in gains(evaluation):
        rows = sorted(
            (pair for pair in complete if pair.family == family),
            key=lambda pair: pair.after.get("success") or 0.0,
        )
        if rows:
            found.append(rows[len(rows) // 2])
    return found[:limit]


def game_pairs(evaluation: Evaluation, limit: int) -> list[Pair]:
    """Games lost under the initial prompt and won under a trained one; per family the one with the
    fewest turns to show.
    """
    lost = {
        game_name(t): t
        for t in evaluation.episodes["initial"]
        if t["outcome"] not in ("success", "failed")
    }
    found: dict[str, Pair] = {}
    for won in evaluation.episodes["trained"]:
        before = lost.get(game_name(won))
        if won["outcome"] != "success" or before is None:
            continue
        pair = Pair(family=won["game"]["family"], before=before, after=won)
        known = found.get(pair.family)
        if known is None or _num_turns(pair) < _num_turns(known):
            found[pair.family] = pair
    return [found[family] for family in gains(evaluation) if family in found][:limit]


def game_name(trajectory: Json) -> str:
    """The id of the game that a trajectory is of."""
    return "|".join(trajectory["game"][field] for field in ("env", "family", "key"))


def _num_turns(pair: Pair) -> int:
    return len(pair.before["turns"]) + len(pair.after["turns"])
