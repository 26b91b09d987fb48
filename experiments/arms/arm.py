"""What an arm is: who writes the next system prompt of a loop, from what it has read."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from experiments.wishes import Steps
from ictjax import keys
from ictjax.config import ReflectorConfig
from ictjax.records import Candidate, Context
from ictjax.run_config import EvaluationConfig, TaskConfig

Asks = Literal["nobody", "untrained", "trained", "taught"]
"""Whose reflector an arm asks: none; that before training; that of the checkpoint; one that was
taught the best candidates of the run (`experiments.best_candidates`).
"""

OF_A_RUN: frozenset[Asks] = frozenset({"trained", "taught"})
"""What there is once per trained seed, and what depends on the checkpoint."""

Reads = Literal["own", "other", "nothing", "first"]
"""What an arm reads about: STREAM games of the loop's family, those of another family, none; or the
first batch alone, which all arms have in common and which is played with the arm "initial".
"""


class MetaTurn(NamedTuple):
    """One past meta-turn of a loop: what was read, and what was written."""

    context: Context
    written: Candidate


History = Sequence[MetaTurn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where an arm writes: in which loop and meta-turn, with which settings."""

    family: str
    run: int
    meta_turn: int
    key: keys.Key  # of this loop and meta-turn, the same for all arms
    task: TaskConfig
    evaluation: EvaluationConfig
    reflection: ReflectorConfig
    expert_prompt: str  # of the environment, in the style of its text; empty where it has none
    num_tokens: Callable[[str], int]  # of a prompt, for the actor


class Arm(Protocol):
    """Writes system prompts. Adding one: a small module with a class like this, and its line in
    `experiments.arms.ARMS`.
    """

    @property
    def asks(self) -> Asks: ...

    @property
    def reads(self) -> Reads: ...

    @property
    def settings(self) -> Sequence[str]:
        """The fields of `EvaluationConfig` that this arm alone reads."""
        ...

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        """The next prompt, as a generator: `candidates = yield from wishes.reflect(...)` asks its
        reflector, `trajectories = yield from wishes.play(...)` plays games.

        Args:
          context: the prompt in force, and the episodes played under it on the STREAM games of this
            meta-turn (none for those who read nothing).
          history: of the loop, the first meta-turn first.
          place: where this is.

        Returns:
          What was written; without a system prompt the one in force stays, and with a `failure` it
          counts as malformed.
        """
        ...


def written(system_prompt: str | None, analysis: str = "") -> Candidate:
    """A prompt that no reflector wrote; None keeps the one in force."""
    return Candidate(
        prompt_ids=(),
        reply_ids=(),
        logprobs=(),
        reply="",
        analysis=analysis,
        system_prompt=system_prompt,
    )
