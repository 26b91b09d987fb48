"""Dynamic sampling: groups whose rewards hold no signal get other contexts and candidates.

Host logic only, as `ictjax.loops`.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from ictjax import keys
from ictjax.loops import Arena, LoopState, Scored, collect, propose, score
from ictjax.records import Candidate, Context


class Refilled(NamedTuple):
    """An iteration's contexts after groups without signal were replaced, and what it took."""

    contexts: list[Context]
    scored: Scored
    rounds: int  # that were needed
    thrown_away: int  # groups that were scored and are not learned from
    episodes: int  # played in these rounds

    @property
    def counts(self) -> dict[str, int]:
        """As metrics."""
        return {
            "refill_rounds": self.rounds,
            "refill_thrown_away": self.thrown_away,
            "refill_episodes": self.episodes,
        }


def refill(
    arena: Arena,
    state: LoopState,
    contexts: Sequence[Context],
    scored: Scored,
    iteration: int,
    *,
    max_rounds: int,
    collected: Sequence[Context] | None,
) -> tuple[Refilled, LoopState]:
    """Replaces groups whose rewards are all equal (DAPO's dynamic sampling, equation 11): in every
    round each of them gets another context and candidates, until none is left or the rounds are
    used up.

    The other context is a new batch of games of the same loop under the same prompt, or another one
    of `collected`, drawn by iteration and round. Contexts are numbered on round by round, so all
    randomness is keyed by iteration and round, and a resumed run repeats it.

    Args:
      contexts, scored: of the iteration, to begin with.
      collected: the precollected contexts; None where contexts are of the loops.
    """
    size, group_size = len(contexts), len(scored.groups[0])
    contexts = list(contexts)
    scored = Scored(list(scored.groups), list(scored.played), list(scored.baselines))
    seen = {(context.loop, context.meta_turn) for context in contexts}
    rounds = thrown_away = episodes = 0
    for number in range(1, max_rounds + 1):
        dead = [q for q, group in enumerate(scored.groups) if is_dead(group)]
        more: list[Context] = []
        if collected is not None:
            more = _others(arena, collected, seen, (iteration, number))[: len(dead)]
            dead = dead[: len(more)]
        if not dead:
            break
        numbers = [number * size + q for q in dead]
        if collected is None:
            more, state = collect(arena, state, iteration, numbers)
            episodes += sum(len(context.trajectories) for context in more)
        seen |= {(context.loop, context.meta_turn) for context in more}
        groups = propose(arena, more, group_size, iteration, numbers)
        new, state = score(arena, state, more, groups, iteration, numbers)
        rounds, thrown_away = number, thrown_away + len(dead)
        episodes += len(new.trajectories)
        for at, q in enumerate(dead):
            if not is_dead(new.groups[at]):
                contexts[q] = more[at]
                scored.groups[q], scored.played[q] = new.groups[at], new.played[at]
                if new.baselines:
                    scored.baselines[q] = new.baselines[at]
    return Refilled(contexts, scored, rounds, thrown_away, episodes), state


def is_dead(group: Sequence[Candidate]) -> bool:
    """Whether the rewards of a group, as the estimator sees them, hold no signal."""
    return len({np.float32(c.reward) for c in group if c.reward is not None}) < 2


def _others(
    arena: Arena,
    collected: Sequence[Context],
    seen: Collection[tuple[int, int]],
    when: tuple[int, int],
) -> list[Context]:
    """The precollected contexts that an iteration has not seen, in an order of the round."""
    order = keys.generator(keys.fold(arena.key, "refill", *when)).permutation(len(collected))
    shuffled = [collected[index] for index in order]
    return [context for context in shuffled if (context.loop, context.meta_turn) not in seen]
