"""Frozen host records of one In-context Training run, and their JSON."""

import collections
import dataclasses
import enum
import json
from collections.abc import Iterable, Sequence
from typing import Any

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
    NO_REPLY = "no_reply"  # the speaker failed: a call of an API, for example


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


def writable(text: str) -> str:
    """Text that every file and tokenizer takes: JSON and Python can hold half a character (a lone
    surrogate), UTF-8 cannot; it becomes "?", as in the environments' workers.
    """
    return text if text.isascii() else text.encode(errors="replace").decode()


def to_json(record: Any) -> str:
    """One line of JSON for any record above; see `ictjax.json_lines`."""
    return to_json_line(dataclasses.asdict(record))


def trajectory_from_json(text: str) -> Trajectory:
    """Reads what `to_json` wrote for a Trajectory."""
    return _trajectory(json.loads(text))


def context_from_json(text: str) -> Context:
    """Reads what `to_json` wrote for a Context."""
    return context_from_dict(json.loads(text))


def context_from_dict(data: dict[str, Any]) -> Context:
    """As `context_from_json`, of parsed JSON."""
    return Context(**{**data, "trajectories": tuple(_trajectory(t) for t in data["trajectories"])})


def _trajectory(data: dict[str, Any]) -> Trajectory:
    turns = tuple(
        Turn(
            **{
                **t,
                "actions": tuple(t["actions"]),
                "failure": ParseFailure(t["failure"]) if t["failure"] else None,
            }
        )
        for t in data["turns"]
    )
    return Trajectory(
        **{
            **data,
            "game": GameId(**data["game"]),
            "turns": turns,
            "outcome": Outcome(data["outcome"]),
        }
    )
