"""What training has kept of its candidates: the groups of an iteration, each with the context that
was read and the games that rewarded it.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from experiments.evaluation_results import is_number
from ictjax.json_lines import read_records

Json = dict[str, Any]

_ITERATION = re.compile(r"iteration_(\d+)\.jsonl")
_FOLDERS = ("prompts", "contexts", "episodes")
_REWARDS = ("reward", "replay_reward", "fresh_reward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The candidates of one context, as rows of the files."""

    iteration: int
    context: Json
    candidates: list[Json]
    # of every candidate its reward games, the same ones in the same order; none where it has no
    # usable prompt, or where episodes were not asked for
    episodes: list[list[Json]]

    @property
    def family(self) -> str:
        return self.context["family"]


def iterations(run_dir: pathlib.Path, last: int) -> list[int]:
    """Those up to `last` of which prompts and contexts are there, ascending."""
    there = [
        {
            int(found[1])
            for path in (run_dir / folder).glob("iteration_*.jsonl")
            if (found := _ITERATION.fullmatch(path.name))
        }
        for folder in ("prompts", "contexts")
    ]
    return sorted(number for number in there[0] & there[1] if 0 < number <= last)


def newest_within(run_dir: pathlib.Path, last: int, num_bytes: int) -> list[int]:
    """The newest of these whose files together are no larger; at least one where there is any."""
    chosen: list[int] = []
    for number in reversed(iterations(run_dir, last)):
        paths = [_file(run_dir, folder, number) for folder in _FOLDERS]
        num_bytes -= sum(path.stat().st_size for path in paths if path.exists())
        if chosen and num_bytes < 0:
            break
        chosen.append(number)
    return chosen[::-1]


def read_groups(run_dir: pathlib.Path, number: int) -> list[Group]:
    """The groups of one iteration, without their episodes; none where the files are not those of
    one iteration. Raises ValueError, naming the file, for a damaged line.
    """
    prompts, contexts = (
        read_records(_file(run_dir, folder, number)).values for folder in _FOLDERS[:2]
    )
    if not all(map(_is_candidate, prompts)) or not all(map(_is_context, contexts)):
        return []
    groups: list[list[Json]] = [[] for _ in contexts]
    for row in prompts:
        if row["context"] >= len(contexts):
            return []
        groups[row["context"]].append(row)
    return [
        Group(iteration=number, context=context, candidates=group, episodes=[[] for _ in group])
        for context, group in zip(contexts, groups, strict=True)
    ]


def with_episodes(
    run_dir: pathlib.Path, meta: Mapping[str, Any], groups: list[Group]
) -> list[Group]:
    """The groups of one iteration with the games that rewarded them; none where the file does not
    hold as many.

    Args:
      meta: of the run's config.json: which games there are.
    """
    if not groups:
        return []
    rows = read_records(_file(run_dir, "episodes", groups[0].iteration)).values
    weight, fresh = meta.get("replay_weight", 1), meta.get("fresh_games", 0)
    if not (is_number(weight) and type(fresh) is int):
        return []
    fresh = fresh if weight < 1 else 0
    played, found = iter(rows), []
    try:
        for group in groups:
            size = (len(group.context["trajectories"]) if weight > 0 else 0) + fresh
            episodes = [
                []
                if row["system_prompt"] is None
                else [_episode(next(played), row["system_prompt"]) for _ in range(size)]
                for row in group.candidates
            ]
            if meta.get("reward") == "improvement":  # of the previous prompt
                for _ in range(fresh):
                    _episode(next(played), group.context["system_prompt"])
            found.append(dataclasses.replace(group, episodes=episodes))
    except (StopIteration, _Other):
        return []
    return found if next(played, None) is None else []


class _Other(ValueError):
    """An episode under another prompt."""


def _episode(row: Json, prompt: str) -> Json:
    if row.get("system_prompt") != prompt or not isinstance(row.get("outcome"), str):
        raise _Other
    return row


def _file(run_dir: pathlib.Path, folder: str, number: int) -> pathlib.Path:
    return run_dir / folder / f"iteration_{number:05d}.jsonl"


def _is_candidate(row: Json) -> bool:
    return (
        type(row.get("context")) is int
        and row["context"] >= 0
        and isinstance(row.get("reply"), str)
        and isinstance(row.get("system_prompt", 0), str | None)
        and all(row.get(name, "") is None or is_number(row.get(name)) for name in _REWARDS)
    )


def _is_context(row: Json) -> bool:
    return (
        isinstance(row.get("family"), str)
        and isinstance(row.get("system_prompt"), str)
        and all(type(row.get(name)) is int for name in ("loop", "meta_turn"))
        and isinstance(row.get("trajectories"), list)
        and all(
            isinstance(episode, Mapping) and isinstance(episode.get("outcome"), str)
            for episode in row["trajectories"]
        )
    )
