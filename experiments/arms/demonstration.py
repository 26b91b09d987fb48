"""The agent's own best episode as its prompt."""

import dataclasses
from collections.abc import Iterable

from experiments.arms.arm import Asks, History, Place, Reads, written
from experiments.wishes import Steps
from ictjax.records import Candidate, Context, Trajectory, Turn
from ictjax.reflector import compact_text


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """Pastes the best own episode so far below the first prompt: a won one, with the fewest turns;
    the prompt stays while none is won. No longer than a reflector may write: the first turns are
    left out where it is too long.
    """

    asks: Asks = "nobody"
    reads: Reads = "own"
    settings: tuple[str, ...] = ()

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        yield from ()
        read = [*(turn.context for turn in history), context]
        won = [t for some in read for t in some.trajectories if t.success and t.turns]
        if not won:
            return written(None)
        return written(_prompt(min(won, key=lambda t: len(t.turns)), place))


def _prompt(best: Trajectory, place: Place) -> str | None:
    full = place.reflection.style != "compact"
    limit = place.reflection.max_prompt_tokens
    for start in range(len(best.turns)):
        turns = best.turns[start:]
        text = _full(turns, place) if full else _compact(turns, place)
        if place.num_tokens(text) <= limit:
            return text
    return None


def _full(turns: Iterable[Turn], place: Place) -> str:
    lines = [f"Observation: {turn.observation}\nAction: {turn.action}" for turn in turns]
    return "\n\n".join(
        [place.task.initial_prompt, "This is how you won a game of this kind:", *lines]
    )


def _compact(turns: Iterable[Turn], place: Place) -> str:
    # word-level models have no words for how an example is introduced
    parts = [f"{turn.observation} action : {turn.action} ." for turn in turns]
    return compact_text(" ".join([place.task.initial_prompt, *parts]))
