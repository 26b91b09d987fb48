"""Prompts and episodes that hold nothing to learn from: what still helps is not reflection."""

import dataclasses
import itertools

from envs.api import Outcome
from experiments import wishes
from experiments.arms.arm import Asks, History, Place, Reads
from experiments.wishes import Steps
from ictjax.records import Candidate, Context, Trajectory

# True of any game, and of no use in one.
_GENERIC = (
    "Take your time and read every line before you act.",
    "Think about what you have seen so far and what may come next.",
    "Be careful, stay calm and keep your goal in mind.",
    "Good players are patient and look at the whole picture.",
    "Do your best in every game, whatever happens.",
    "Remember that every game can teach you something.",
)
_GENERIC_COMPACT = ("good luck .", "do this now .", "think , then act .")


@dataclasses.dataclass(frozen=True)
class Flipped:
    """The reflector reads its own episodes with their outcomes exchanged: won ones as lost, lost
    ones as won. Only what it is told of outcomes is false, the texts of the game stay.
    """

    asks: Asks
    reads: Reads = "own"
    settings: tuple[str, ...] = ()

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        flipped = tuple(map(_flipped, context.trajectories))
        asked = dataclasses.replace(context, trajectories=flipped)
        (candidate,) = yield from wishes.reflect(asked, [place.key])
        return candidate


@dataclasses.dataclass(frozen=True)
class Generic:
    """The reflector is asked, and what it writes is exchanged for phrases that fit any game, behind
    the first prompt, until they have as many of the actor's tokens: a placebo for length.
    """

    asks: Asks = "untrained"
    reads: Reads = "own"
    settings: tuple[str, ...] = ()

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        (candidate,) = yield from wishes.reflect(context, [place.key])
        if candidate.system_prompt is None:
            return candidate
        prompt = generic_prompt(place, place.num_tokens(candidate.system_prompt))
        return dataclasses.replace(candidate, system_prompt=prompt)


def generic_prompt(place: Place, num_tokens: int) -> str:
    """The first prompt, and phrases behind it while all have at most so many tokens."""
    prompt = place.task.initial_prompt
    phrases = _GENERIC if place.reflection.style != "compact" else _GENERIC_COMPACT
    for phrase in itertools.cycle(phrases):
        longer = f"{prompt} {phrase}"
        if place.num_tokens(longer) > num_tokens:
            return prompt
        prompt = longer
    raise AssertionError("phrases never end")


def _flipped(trajectory: Trajectory) -> Trajectory:
    """An episode that the environment failed stays as it is."""
    if trajectory.outcome is Outcome.FAILED or not trajectory.turns:
        return trajectory
    won = not trajectory.success
    *before, last = trajectory.turns
    turns = [dataclasses.replace(turn, reward=0.0) for turn in before]
    turns.append(dataclasses.replace(last, reward=float(won)))
    outcome = Outcome.SUCCESS if won else Outcome.STEP_LIMIT
    return dataclasses.replace(trajectory, turns=tuple(turns), outcome=outcome)
