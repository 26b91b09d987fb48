"""The parts of an evaluation, an arm on a family each: which there are, and how those that are
missing are played side by side.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from envs.api import Pool
from experiments.arms import arm_named, at_endpoint, is_played_by_each
from experiments.best_candidates import BestCandidates
from experiments.console import LiveProgress
from experiments.deletions import shortened
from experiments.evaluation_folder import EvaluationFolder
from experiments.evaluation_games import FamilyGames
from experiments.played_games import PlayedGames
from experiments.protocol import LoopRecord, Part, last_success, outcomes
from experiments.wishes import Together, run_together
from ictjax import keys
from ictjax.endpoint_speaker import EndpointSpeaker
from ictjax.hosts import Hosts
from ictjax.loops import Arena
from ictjax.models.transformer import Params
from ictjax.players import Players, initial_weights, open_players
from ictjax.reflector import Reflector
from ictjax.run_config import EvaluationConfig, TrainConfig

_FIRST, _UNTRAINED, _AT_ENDPOINT, _TRAINED, _TAUGHT = range(5)  # stages
_ROUNDS = 8  # episodes side by side, for each that is played at a time: few wait for the last one


class PartKey(NamedTuple):
    """Which part; `seed` counts the trained runs, and is 0 for what is not played for each."""

    arm: str
    family: str
    seed: int = 0


class Deletion(NamedTuple):
    """A loop whose last prompt is played without each of its sentences."""

    seed: int  # counts the trained runs
    run: int
    prompt: str
    whole: list[int | None]  # the outcomes of its TEST games under the whole prompt


def part_keys(
    arms: Sequence[str], families: Sequence[str], num_seeds: int, draws: str = "shared"
) -> list[PartKey]:
    """All parts, in the order in which they are played: "initial" first, which the others begin
    with, trained ones last, seed by seed.
    """
    keys = [
        PartKey(arm, family, seed)
        for arm in arms
        for family in families
        for seed in range(num_seeds if is_played_by_each(arm, draws) else 1)
    ]
    return sorted(keys, key=_stage)


def _stage(key: PartKey) -> tuple[int, int]:
    """Parts of one stage are played side by side: they ask the same reflector."""
    if key.arm == "initial":
        return _FIRST, 0
    if at_endpoint(key.arm):
        return _AT_ENDPOINT, 0
    asks = arm_named(key.arm).asks
    if asks == "taught":
        return _TAUGHT, key.seed
    return (_TRAINED, key.seed) if asks == "trained" else (_UNTRAINED, 0)


def evaluation_key(evaluation: EvaluationConfig) -> keys.Key:
    """What all randomness of an evaluation is keyed by."""
    return keys.fold(keys.root_key(evaluation.seed), "evaluation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Plays parts. All it holds is fixed.

    Args:
      config: on the task that is played, its models by their folders.
      pool: of the environment.
      games: of every family.
      folders: where parts are kept, trained run by trained run.
      draws: by number of the run, what its keys of replies are drawn with; None: all draw alike.
      trained: the weights of a trained run, by its number.
      taught: what was taught the best candidates of a run, by its number.
      expert_prompt: of the environment; may be empty.
      hosts: that play together.
      progress: is told of every part.
    """

    config: TrainConfig
    pool: Pool
    games: Mapping[str, FamilyGames]
    folders: Sequence[EvaluationFolder]
    draws: Sequence[int] | None
    trained: Callable[[int], Params]
    taught: Mapping[int, BestCandidates]
    expert_prompt: str
    hosts: Hosts
    progress: LiveProgress

    def play(self, missing: Sequence[PartKey]) -> None:
        """Plays the parts that are missing, stage by stage, and keeps each as soon as it has ended;
        one that is stopped midway is played again, the others are not.

        Raises:
          ValueError: the environment failed all test games of a part; when all others are kept.
        """
        failed: dict[PartKey, str] = {}
        played = PlayedGames()
        with contextlib.ExitStack() as stack:
            players = stack.enter_context(self._players())
            for stage in sorted({_stage(part) for part in missing}):
                reflector = players.reflector
                if stage[0] == _AT_ENDPOINT:
                    with self.hosts.told():
                        reflector = stack.enter_context(self._endpoint())
                elif stage[0] == _TRAINED:
                    players.set_trained(self.trained(stage[1]))
                elif stage[0] == _TAUGHT:
                    players.set_trained(self.taught[stage[1]].weights())
                # what has no first prompt with a score is not begun
                together = [
                    part
                    for part in missing
                    if _stage(part) == stage and PartKey("initial", part.family) not in failed
                ]
                begun = (self._together(part, players) for part in together)
                arena = self._arena(players, reflector)
                for part, loops in run_together(arena, begun, room=self._room, played=played):
                    if error := self._keep(part, players, loops):
                        failed[part] = error
                self.hosts.meet()  # others read what the first one has kept
        if failed:
            raise ValueError(next(iter(failed.values())))

    def play_deletions(self, wanted: Mapping[str, Sequence[Deletion]]) -> None:
        """Plays the TEST games of loops under their last prompts without each of the sentences, and
        keeps what came of every family as soon as it is played.

        Args:
          wanted: by family, of the trained reflectors of all runs.
        """
        played = PlayedGames()
        with self._players() as players:
            arena = self._arena(players, players.reflector)
            for family, deletions in wanted.items():
                part = self._part(PartKey("trained", family), players)
                batches = [
                    (deletion, text, part.on_test(deletion.run, rest))
                    for deletion in deletions
                    for text, rest in shortened(deletion.prompt)
                ]
                episodes = [episode for _, _, batch in batches for episode in batch]
                found = iter(played.play(arena, episodes, f"{family} without sentences"))
                sentences: dict[tuple[int, int], list[dict[str, Any]]] = {
                    (deletion.seed, deletion.run): [] for deletion in deletions
                }
                for deletion, text, batch in batches:
                    won = outcomes([next(found) for _ in batch])
                    place = deletion.seed, deletion.run
                    sentences[place].append({"text": text, "outcomes": won})
                if self.hosts.first:
                    with self.hosts.told():
                        self._keep_deletions(family, deletions, sentences)
                self.hosts.meet()
                self.progress.one_more(f"{family}: {len(batches)} sentences left out")

    def _keep_deletions(
        self,
        family: str,
        deletions: Sequence[Deletion],
        sentences: Mapping[tuple[int, int], list[dict[str, Any]]],
    ) -> None:
        """Keeps, with each run, what its prompts won without each of these sentences."""
        for seed in sorted({deletion.seed for deletion in deletions}):
            loops = [
                {
                    "run": deletion.run,
                    "prompt": deletion.prompt,
                    "whole": deletion.whole,
                    "sentences": sentences[seed, deletion.run],
                }
                for deletion in deletions
                if deletion.seed == seed
            ]
            self.folders[seed].keep_deletions(family, self.games[family], loops)

    def _players(self) -> contextlib.AbstractContextManager[Players]:
        """The actor, and the reflector as it was before training."""
        weights = initial_weights(self.config, self.hosts)
        return open_players(self.config, weights, self.progress.reading, hosts=self.hosts)

    def _arena(self, players: Players, reflector: Reflector) -> Arena:
        return Arena(
            actor=players.actor,
            reflector=dataclasses.replace(
                reflector, temperature=self.config.evaluation.temperature
            ),
            pool=self.pool,
            task=self.config.task,
            games={},
            key=evaluation_key(self.config.evaluation),
            meta=self.config.meta,
            hosts=self.hosts,
            progress=self.progress.phase,
        )

    @contextlib.contextmanager
    def _endpoint(self) -> Iterator[Reflector]:
        evaluation = self.config.evaluation
        with EndpointSpeaker(evaluation.endpoint, evaluation.endpoint_model) as speaker:
            yield Reflector(speaker, self.config.reflection)

    @property
    def _room(self) -> int:
        at_a_time = self.config.actor_sampler.num_slots
        if self.config.actor.endpoint.url:
            at_a_time = self.config.actor.endpoint.concurrency
        return _ROUNDS * at_a_time

    def _part(self, key: PartKey, players: Players) -> Part:
        families = list(self.games)
        other = families[(families.index(key.family) + 1) % len(families)]
        return Part(
            arm_name=key.arm,
            arm=arm_named(key.arm),
            family=key.family,
            other=other,
            games=self.games[key.family],
            other_games=self.games[other],
            config=self.config,
            key=evaluation_key(self.config.evaluation),
            draw=None if self.draws is None else self.draws[key.seed],
            expert_prompt=self.expert_prompt,
            num_tokens=players.actor.num_tokens,
        )

    def _together(self, key: PartKey, players: Players) -> Together[PartKey, LoopRecord]:
        starts = None
        if key.arm != "initial":
            with self.hosts.told():
                starts = self.folders[0].starts(key.family, self.games[key.family])
        return Together(key, self._part(key, players).loops(starts))

    def _keep(self, key: PartKey, players: Players, loops: Sequence[LoopRecord]) -> str:
        """Keeps a part; says what was wrong with it, on every host."""
        folder, games = self.folders[key.seed], self.games[key.family]
        record, error = self._part(key, players).record(loops), ""
        if arm_named(key.arm).asks == "taught":
            record["budget"] |= self.taught[key.seed].budget()
        if self.hosts.first:
            with self.hosts.told():
                folder.keep_part(key.arm, key.family, games, record, loops)
        known = [rate for rate in last_success(record) if rate is not None]
        if known:
            won = f"{100 * sum(known) / len(known):.1f} %"
        else:
            won, error = "none", folder.failure(key.arm, key.family)
        seed = f" (run {key.seed + 1})" if key.seed else ""
        self.progress.one_more(f"{key.arm} on {key.family}{seed}: {won} of test games won")
        return error
