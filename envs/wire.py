"""What the pool and its workers say to each other, and how. Frames are a 4-byte length, then a JSON
array of messages in ASCII. No pickle.

The first message to a worker is its `Setup`, as an object. Every other one is an array:

| from the pool | from a worker |
|---|---|
| `[RESET, ticket, game id]` | `[NO_TICKET, READY]` |
| `[STEP, ticket, action]` | `[NO_TICKET, UNUSABLE, cause]` |
| `[REPLAY, ticket, game id, actions]` | `[ticket, PLAYED, step, digest]` |
| `[RELEASE, ticket]` | `[ticket, REPLAYED, digests]` |
| `[CLOSE, NO_TICKET]` | `[ticket, RAISED, cause]` |

A game runs in its worker's process and may write to its pipe, so nothing that comes from there is
used before `unpack_answers` has looked at it.

The marker is a shared memory map of two integers that the pool reads without asking: the ticket
whose call is running, plus one (0 between calls), and a count of calls.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

from envs.api import Observation, Outcome, Step

# what a request asks
RESET, STEP, REPLAY, RELEASE, CLOSE = "reset", "step", "replay", "release", "close"
# what an answer tells
READY, PLAYED, REPLAYED, RAISED, UNUSABLE = "ready", "played", "replayed", "raised", "unusable"
NO_TICKET = -1  # of a message about the worker itself

MARKER_BYTES = 16
RUNNING, CALLS = 0, 1  # the places of the two integers

MAX_STEP_CHARS = 5_000_000  # of one step: its texts, actions and hash together
MAX_REWARD = 1e9  # of one step; sums of more would be no finite numbers for long
FLUSH_BYTES = 1 << 20  # a worker begins a new frame beyond this
# one step in which every character is two escapes, behind a frame that was nearly full
MAX_FRAME_BYTES = 1 << 26

_LENGTH_BYTES = 4
_STEP_TYPES = (str, list, float, (str, type(None)), str, str)  # of what `encode_step` writes
_OUTCOMES = frozenset(Outcome)
# made once: json.dumps makes one per call
_to_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker is told before its first request; JSON as `dataclasses.asdict` writes it."""

    environment: str
    options: dict[str, str]
    sys_path: list[str]  # where the parent finds its modules
    temp_root: str  # the pool's folder, which an orphan removes
    parent_pid: int
    deadline_s: float
    max_games: int


def pack(messages: list[Any]) -> bytes:
    """One frame with all messages."""
    return frame(_to_json(messages))


def frame(body: str) -> bytes:
    """One frame with a JSON array that is encoded already."""
    data = body.encode("ascii")
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def unpack(buffer: bytearray) -> list[Any]:
    """The messages of all complete frames in `buffer`, which keeps only what follows them. Raises
    ValueError for frames that are too long or hold no JSON array.
    """
    messages: list[Any] = []
    start = 0
    while len(buffer) >= start + _LENGTH_BYTES:
        body = start + _LENGTH_BYTES
        length = int.from_bytes(buffer[start:body], "little")
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"A frame has at most {MAX_FRAME_BYTES} bytes, got {length}.")
        if len(buffer) < body + length:
            break
        try:
            found = json.loads(buffer[body : body + length].decode("ascii"))
        except RecursionError:
            raise ValueError("A frame holds arrays within arrays without end.") from None
        if not isinstance(found, list):
            raise ValueError(f"A frame holds an array of messages, got {type(found).__name__}.")
        messages.extend(found)
        start = body + length
    del buffer[:start]
    return messages


def unpack_answers(buffer: bytearray) -> list[list[Any]]:
    """`unpack` for what a worker sent. Raises ValueError also for what is no answer."""
    answers = unpack(buffer)
    for answer in answers:
        if not _is_answer(answer):
            raise ValueError("A worker sent what is no answer.")
    return answers


def _is_answer(answer: Any) -> bool:
    """Whether a message has the form of the table above."""
    if not (isinstance(answer, list) and len(answer) >= 2 and type(answer[0]) is int):
        return False
    match answer:
        case [_, str(kind), list(step), str()] if kind == PLAYED:
            return _is_step(step)
        case [_, str(kind), list(digests)] if kind == REPLAYED:
            return all(isinstance(digest, str) for digest in digests)
        case [_, str(kind), str()]:
            return kind in (RAISED, UNUSABLE)
        case [ticket, str(kind)]:
            return kind == READY and ticket == NO_TICKET
    return False


def _is_step(fields: list[Any]) -> bool:
    """Whether parsed JSON is what `encode_step` writes."""
    if len(fields) != len(_STEP_TYPES) or not all(map(isinstance, fields, _STEP_TYPES)):
        return False
    _, actions, reward, outcome, _, _ = fields
    return (
        all(isinstance(action, str) for action in actions)
        and math.isfinite(reward)
        and (outcome is None or outcome in _OUTCOMES)
    )


def encode_step(step: Step, state_hash: str = "") -> str:
    """A step as JSON; two steps are equal when these strings are."""
    observation, actions = step.observation, step.observation.actions
    fields = (
        clean(observation.text),
        actions if "".join(actions).isascii() else [clean(action) for action in actions],
        float(step.reward),
        None if step.outcome is None else Outcome(step.outcome).value,
        clean(step.error),
        state_hash,
    )
    return _to_json(fields)


def decode_step(fields: list[Any]) -> tuple[Step, str]:
    """What `encode_step` was given, from its parsed JSON."""
    text, actions, reward, outcome, error, state_hash = fields
    observation = Observation(text=text, actions=tuple(actions))
    return (
        Step(
            observation=observation,
            reward=reward,
            outcome=None if outcome is None else Outcome(outcome),
            error=error,
        ),
        state_hash,
    )


def digest(encoded_step: str) -> str:
    """A short hash of `encode_step`'s string, kept for every step so that a replay can be proven
    equal.
    """
    return hashlib.blake2b(encoded_step.encode("ascii"), digest_size=8).hexdigest()


def clean(text: str) -> str:
    """Text that every UTF-8 encoder takes: lone surrogates become '?'."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
