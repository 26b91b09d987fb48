"""Prompts that GEPA finds (https://arxiv.org/abs/2507.19457), by its authors' package."""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.api import GameId
from experiments import wishes
from experiments.arms.arm import Asks, History, Place, Reads, written
from experiments.turns import in_turns
from experiments.wishes import Steps, Wish
from ictjax import keys
from ictjax.extras import install
from ictjax.records import Candidate, Context, Trajectory
from ictjax.rollout import Episode

_COMPONENT = "system_prompt"  # all that is evolved
_MINIBATCH = 3  # games of a mutation, as in the package


def check_gepa() -> None:
    """Raises ValueError where the package is not installed."""
    if importlib.util.find_spec("gepa") is None:
        raise ValueError(
            "The arm gepa runs the package gepa, which is not installed: in the clone, run"
            f" `{install('gepa')}`."
        )


@dataclasses.dataclass(frozen=True)
class Gepa:
    """The package `gepa` evolves the prompt in force on the context's own games (its training and
    validation set) with as many games as best-of-n replays, `evaluation.candidates` x k: reflective
    mutation of prompts on its Pareto front, a minibatch that a mutation must improve, then all
    games. The best one by these stays. It ends early where a prompt wins all of them.

    Deviates from GEPA's usual use: it begins anew in every meta-turn, on few games; its reflection
    model is the reflector with its own question, which keeps to the limits; the first evaluation is
    the context, which is not played again; a game that the environment failed counts as lost.
    """

    asks: Asks = "untrained"
    reads: Reads = "own"
    settings: tuple[str, ...] = ("candidates",)

    def reflect(self, context: Context, history: History, place: Place) -> Steps[Candidate]:
        return (yield from in_turns(lambda wish: _Adapter(context, place, wish).best()))


class _Silent:
    """A log that nobody reads: the wishes are counted, and shown, as those of all arms."""

    def log(self, message: str) -> None:
        pass


class _Adapter:
    """What `gepa` calls, in a thread of its own: see `gepa.core.adapter.GEPAAdapter`."""

    def __init__(self, context: Context, place: Place, wish: Callable[[Wish], Any]):
        check_gepa()
        from gepa.core.adapter import EvaluationBatch  # an optional package

        self._batch = EvaluationBatch
        self._context, self._place, self._wish = context, place, wish
        self._num_evaluations = self._num_replayed = 0
        self._written: list[Candidate] = []

    def best(self) -> Candidate:
        """Runs GEPA. Without a better prompt the one in force stays."""
        import gepa

        context, minibatch = self._context, min(_MINIBATCH, len(self._context.games))
        budget = self._place.evaluation.candidates * len(context.games)
        # of an iteration: a parent on a minibatch, its mutation there and then on the other games
        most = minibatch + len(context.games)

        def over(state: Any) -> bool:
            won_all = max(state.program_full_scores_val_set) >= 1
            return won_all or self._num_replayed + most > budget

        found = gepa.optimize(
            seed_candidate={_COMPONENT: context.system_prompt},
            trainset=list(context.games),
            adapter=self,
            reflection_minibatch_size=minibatch,
            stop_callbacks=over,
            cache_evaluation=True,
            logger=_Silent(),
            seed=int(keys.generator(keys.fold(self._place.key, "gepa")).integers(2**31)),
        )
        prompt = found.candidates[found.best_idx][_COMPONENT]
        rate = found.val_aggregate_scores[found.best_idx]
        if found.best_idx:
            wrote = next(one for one in self._written if one.system_prompt == prompt)
            return dataclasses.replace(wrote, replay_reward=rate)
        if self._written and all(one.system_prompt is None for one in self._written):
            return self._written[-1]
        return written(None)

    def evaluate(
        self, batch: Sequence[GameId], candidate: Mapping[str, str], capture_traces: bool = False
    ) -> Any:
        """Plays games under a prompt; at first the context, which has been played."""
        played = self._context.trajectories
        if self._num_evaluations:
            played = self._play(batch, candidate[_COMPONENT])
        self._num_evaluations += 1
        scores = [float(trajectory.success) for trajectory in played]
        return self._batch(outputs=list(played), scores=scores, trajectories=list(played))

    def _play(self, games: Sequence[GameId], prompt: str) -> list[Trajectory]:
        """The trajectories; what fills a minibatch up is not played twice."""
        different = list(dict.fromkeys(games))
        self._num_replayed += len(different)
        key = keys.fold(self._place.key, "gepa", self._num_evaluations)
        episodes = [
            Episode(game=game, system_prompt=prompt, key=keys.fold(key, str(game)))
            for game in different
        ]
        played = dict(zip(different, self._wish(wishes.Play(episodes)), strict=True))
        return [played[game] for game in games]

    def make_reflective_dataset(
        self, candidate: Mapping[str, str], eval_batch: Any, components_to_update: Sequence[str]
    ) -> dict[str, list[dict[str, Trajectory]]]:
        """The episodes of a minibatch."""
        return {_COMPONENT: [{"episode": episode} for episode in eval_batch.trajectories]}

    def propose_new_texts(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Trajectory]]],
        components_to_update: Sequence[str],
    ) -> dict[str, str]:
        """Asks the reflector about a minibatch; nothing new where its reply cannot be used."""
        about = dataclasses.replace(
            self._context,
            system_prompt=candidate[_COMPONENT],
            trajectories=tuple(one["episode"] for one in reflective_dataset[_COMPONENT]),
        )
        # the first is what the arm without a choice writes
        key = self._place.key
        if self._written:
            key = keys.fold(key, "candidate", len(self._written))
        (wrote,) = self._wish(wishes.Reflect(about, [key]))
        self._written.append(wrote)
        return {} if wrote.system_prompt is None else {_COMPONENT: wrote.system_prompt}
