"""Frames between the pool and its workers: a 4-byte length, then a JSON array of messages in ASCII.
No pickle.
"""

import hashlib
import json
from typing import Any

from envs.api import Observation, Outcome, Step

_LENGTH_BYTES = 4
# made once: json.dumps makes one per call
_to_json = json.JSONEncoder(separators=(",", ":")).encode


def pack(messages: list[Any]) -> bytes:
    """One frame with all messages."""
    return frame(_to_json(messages))


def frame(body: str) -> bytes:
    """One frame with a JSON array that is encoded already."""
    data = body.encode("ascii")
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def unpack(buffer: bytearray) -> list[Any]:
    """The messages of all complete frames in `buffer`, which keeps only what follows them."""
    messages: list[Any] = []
    start = 0
    while len(buffer) >= start + _LENGTH_BYTES:
        body = start + _LENGTH_BYTES
        end = body + int.from_bytes(buffer[start:body], "little")
        if len(buffer) < end:
            break
        messages.extend(json.loads(buffer[body:end].decode("ascii")))
        start = end
    del buffer[:start]
    return messages


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
