"""Frozen host records of one In-context Training run, and their JSON."""

import collections
import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from envs.api import GameId, Outcome
from ictjax.json_lines import to_json_line


class ParseFailure(enum.StrEnum):
    """Why a model's reply could not be used."""

    NO_ACTION = "no_action"  # the reply holds no `Action:` line
    EMPTY_ACTION = "empty_action"  # `Action:` with nothing behind it
    TRUNCATED = "truncated"  # the token limit or the context ended the reply before its stop token
    UNFINISHED_THOUGHT = "unfinished_thought"  # the reply ended before its `</think>`
    NO_ANALYSIS = "no_analysis"  # the reflector wrote no `ANALYSIS:` section
    NO_PROMPT = "no_prompt"  # the reflector wrote no `IMPROVED PROMPT:` section
    EMPTY_PROMPT = "empty_prompt"  # the section is there and empty
    SEVERAL_PROMPTS = "several_prompts"  # several sections, which differ
    PROMPT_TOO_LONG = "prompt_too_long"  # more tokens than the configured cap
    NO_OPERATION = "no_operation"  # of the arm insights: no line that changes its list
    NO_REPLY = "no_reply"  # the speaker failed: a call of an API, for example


_WORDS = (ParseFailure, Outcome)
_MAX_SHOWN = 60  # characters of what is not as it should be


def count_failures(
    usual: Sequence[ParseFailure], found: Iterable[ParseFailure | None]
) -> dict[str, int]:
    """How often each type occurred; 0 for usual ones that did not."""
    counts = collections.Counter(kind for kind in found if kind is not None)
    others = sorted(set(counts) - set(usual))
    return {str(kind): counts[kind] for kind in (*usual, *others)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One chat message; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One observation, the actor's reply to it, and what came of it."""

    observation: str
    actions: tuple[str, ...]  # available when the reply was written
    reply: str  # the model's text, whole
    thought: str
    action: str  # what the environment was given; empty after a parse failure
    reward: float
    failure: ParseFailure | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One episode of one game under one system prompt."""

    game: GameId
    system_prompt: str
    turns: tuple[Turn, ...]
    outcome: Outcome
    final_observation: str
    state_hash: str
    error: str = ""  # why `outcome` is FAILED

    @property
    def success(self) -> bool:
        return self.outcome is Outcome.SUCCESS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What the reflector reads: the prompt in force and the episodes played under it on a batch of
    games.
    """

    loop: int  # which In-context Training loop
    meta_turn: int  # 0 for the initial prompt
    family: str
    system_prompt: str
    trajectories: tuple[Trajectory, ...]

    @property
    def games(self) -> tuple[GameId, ...]:
        return tuple(trajectory.game for trajectory in self.trajectories)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One reply of the reflector to a context, with the tokens exactly as sampled."""

    prompt_ids: tuple[int, ...]
    reply_ids: tuple[int, ...]  # the stop token included
    logprobs: tuple[float, ...]  # of reply_ids, under the sampling policy
    reply: str
    analysis: str
    system_prompt: str | None  # None after a parse failure
    failure: ParseFailure | None = None
    replay_reward: float | None = None
    fresh_reward: float | None = None
    reward: float | None = None  # what GRPO sees
    weights_step: int | None = None  # of the learner, whose weights it was sampled with


def writable(text: str) -> str:
    """Text that every file and tokenizer takes: JSON and Python can hold half a character (a lone
    surrogate), UTF-8 cannot; it becomes "?", as in the environments' workers.
    """
    return text if text.isascii() else text.encode(errors="replace").decode()


def to_json(record: Any) -> str:
    """One line of JSON for any record above; see `ictjax.json_lines`."""
    return to_json_line(dataclasses.asdict(record))


def trajectory_from_json(text: str) -> Trajectory:
    """Reads what `to_json` wrote for a Trajectory. Raises ValueError for anything else."""
    return trajectory_from_dict(json.loads(text))


def trajectory_from_dict(data: dict[str, Any]) -> Trajectory:
    """As `trajectory_from_json`, of parsed JSON."""
    return _record(Trajectory, data, "")


def context_from_json(text: str) -> Context:
    """Reads what `to_json` wrote for a Context. Raises ValueError for anything else."""
    return context_from_dict(json.loads(text))


def context_from_dict(data: dict[str, Any]) -> Context:
    """As `context_from_json`, of parsed JSON."""
    return _record(Context, data, "")


def candidate_from_json(text: str) -> Candidate:
    """Reads what `to_json` wrote for a Candidate. Raises ValueError for anything else."""
    return _record(Candidate, json.loads(text), "")


_Record = TypeVar("_Record")


def _record(kind: type[_Record], data: Any, place: str) -> _Record:
    """A record from parsed JSON, field by field."""
    hints = _hints(kind)
    if not isinstance(data, dict):
        raise ValueError(f"{place.rstrip('.') or 'it'} is no JSON object")
    if unknown := [name for name in data if name not in hints]:
        raise ValueError(f"its field {place}{unknown[0][:_MAX_SHOWN]!r} is not known")
    values = {name: _value(hints[name], value, f"{place}{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except TypeError:
        raise ValueError(f"{place.rstrip('.') or 'it'} lacks a field") from None


def _value(hint: Any, value: Any, name: str) -> Any:
    parts = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return None if value is None else _value(parts[0], value, name)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_value(parts[0], item, name) for item in value)
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, f"{name}.")
    wanted = (int, float) if hint is float else str if hint in _WORDS else hint
    if typing.get_origin(hint) is tuple or not isinstance(value, wanted):
        raise ValueError(f"its field {name} holds {repr(value)[:_MAX_SHOWN]}")
    return hint(value) if hint in _WORDS else value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
