"""Several prompts for every context, of which a replay takes the best."""

import dataclasses

from experiments import wishes
from experiments.arms.arm import Asks, History, Place, Reads
from experiments.wishes import Steps
from ictjax import keys
from ictjax.records import Candidate, Context
from ictjax.rollout import Episode, success_rate


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """`evaluation.candidates` replies to every context; the one stays that wins most of the
    context's own games when they are replayed under it (the reward of the paper), the first of
    equally good ones. What trained weights should beat at the same cost of games.
    """

    asks: Asks = "untrained"
    reads: Reads = "own"
    settings: tuple[str, ...] = ("candidates",)

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        # the first is what the arm without a choice writes
        others = range(1, place.evaluation.candidates)
        group_keys = [place.key, *(keys.fold(place.key, "candidate", n) for n in others)]
        candidates = yield from wishes.reflect(context, group_keys)
        usable = [candidate for candidate in candidates if candidate.system_prompt is not None]
        episodes = [
            Episode(
                game=game,
                system_prompt=candidate.system_prompt or "",
                key=keys.fold(place.key, "replay", n, str(game)),
            )
            for n, candidate in enumerate(usable)
            for game in context.games
        ]
        played = iter((yield from wishes.play(episodes)))
        best, most = [*usable, *candidates][0], -1.0
        for candidate in usable:
            rate = success_rate([next(played) for _ in context.games])
            if rate is not None and rate > most:
                best, most = dataclasses.replace(candidate, replay_reward=rate), rate
        return best
