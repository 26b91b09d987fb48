"""Prompts that nobody writes anew: the first one, and an expert's."""

import dataclasses

from experiments.arms.arm import Asks, History, Place, Reads, written
from experiments.wishes import Steps
from ictjax.records import Candidate, Context


@dataclasses.dataclass(frozen=True)
class Initial:
    """The actor's first prompt stays."""

    asks: Asks = "nobody"
    reads: Reads = "first"
    settings: tuple[str, ...] = ()

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        yield from ()
        return written(None)


@dataclasses.dataclass(frozen=True)
class Expert:
    """A prompt by people who know how the games are won (`evaluation.expert_prompt`, else the
    environment's), from the first meta-turn on: about what a reflector could reach.
    """

    asks: Asks = "nobody"
    reads: Reads = "nothing"
    settings: tuple[str, ...] = ("expert_prompt",)

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        yield from ()
        return written(place.evaluation.expert_prompt or place.expert_prompt)
