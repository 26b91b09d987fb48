"""Which games an evaluation plays: STREAM to reflect on, SELECT to choose a prompt by, TEST to
score it on; and which games were played before.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from envs.api import Environment, Extensible, GameId, Pool
from experiments.pretraining import taught_games
from experiments.run_dir import read_manifest
from ictjax import keys
from ictjax.json_lines import read_records
from ictjax.metrics import read_metrics
from ictjax.ranges import shown
from ictjax.run_config import EvaluationConfig, TrainConfig

_UNKNOWN = "restore it, without it nobody knows which games training has seen"
_CHUNK = 64  # games that are started at once to see their initial states


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyGames:
    """The games of one family, run by run, and their initial states."""

    stream: tuple[tuple[tuple[GameId, ...], ...], ...]  # a batch for every meta-turn
    select: tuple[tuple[GameId, ...], ...]  # none with the protocol "paper"
    test: tuple[tuple[GameId, ...], ...]
    states: Mapping[GameId, str]  # their hashes

    def hashes(self, games: Sequence[Sequence[GameId]]) -> list[list[str]]:
        """The initial states of some games, run by run."""
        return [[self.states[game] for game in run] for run in games]


class Shortfall(NamedTuple):
    """What a family lacks: so many games for a use, of those that are asked for."""

    family: str
    split: str
    there: int
    wanted: int

    def __str__(self) -> str:
        return f"{self.family} has {self.there} for {_USES[self.split]}, of {self.wanted}"


class TooFewGames(ValueError):
    """Families have fewer games than an evaluation asks for."""

    def __init__(self, evaluation: EvaluationConfig, shortfalls: Sequence[Shortfall]):
        self.shortfalls = tuple(shortfalls)
        less = sorted({_LESS[found.split] for found in shortfalls})
        if not evaluation.shares_games:
            less = [
                "--evaluation.runs",
                *less,
                "let all runs share games (--evaluation.games shared)",
            ]
        super().__init__(
            "There are fewer games whose initial states are new than the evaluation asks for"
            f" ({'; '.join(map(str, shortfalls))}): lower {', '.join(less)}, or leave"
            f" {'these families' if len({f.family for f in shortfalls}) > 1 else 'this family'} out"
            " (--evaluation.families)."
        )


def games_per_context(config: TrainConfig) -> int:
    """k: how many games a reflector reads about in a meta-turn of an evaluation."""
    return config.evaluation.games_per_context or config.meta.games_per_context


def choose_games(
    environment: Environment,
    pool: Pool,
    config: TrainConfig,
    family: str,
    seen: frozenset[str],
    key: keys.Key,
) -> FamilyGames:
    """Draws the games of every run, of one family. All have initial states that are pairwise
    different, and that occur neither among those seen nor among those taught in pretraining, where
    that is recorded.

    STREAM games of families that were trained on are made anew where the environment can
    (`envs.api.Extensible`): they do not depend on what this or that run was trained with. Other
    games come from their splits, and are made anew where these are too small.

    Args:
      environment: that is played.
      pool: of it.
      config: of the run, on the task that is played.
      family: of the games.
      seen: initial states of the games of training.
      key: of the evaluation.

    Raises:
      TooFewGames: there are fewer such games than the evaluation asks for.
    """
    evaluation, per_batch = config.evaluation, games_per_context(config)
    turns, runs = evaluation.meta_turns, evaluation.runs
    sets = 1 if evaluation.shares_games else runs
    taken = {*seen, *state_hashes(pool, taught_games(config, environment, family))}
    states: dict[GameId, str] = {}
    draw = _Draw(environment, pool, family, taken, states, key)
    strict = evaluation.protocol == "strict"
    wanted = {
        "test": sets * evaluation.test_games,
        "select": sets * evaluation.select_games * strict,
        "train": sets * turns * per_batch,
    }
    trained = family in config.task.environment.train_families
    drawn = {
        split: draw(split, count, anew=trained and split == "train")
        for split, count in wanted.items()
        if count
    }
    if shortfalls := [
        Shortfall(family, split, len(games), wanted[split])
        for split, games in drawn.items()
        if len(games) < wanted[split]
    ]:
        raise TooFewGames(evaluation, shortfalls)
    test, select, stream = (drawn.get(split, []) for split in ("test", "select", "train"))

    def own(games: Sequence[GameId], run: int) -> tuple[GameId, ...]:
        size = len(games) // sets
        return tuple(games[run * size : (run + 1) * size] if sets > 1 else games)

    def streamed(run: int) -> tuple[tuple[GameId, ...], ...]:
        games = own(stream, run)
        if sets == 1:
            games = tuple(shuffled(games, keys.fold(key, "stream order", family, run)))
        return tuple(tuple(batch) for batch in _chunks(games, per_batch))

    return FamilyGames(
        stream=tuple(map(streamed, range(runs))),
        select=tuple(own(select, run) for run in range(runs)),
        test=tuple(own(test, run) for run in range(runs)),
        states=states,
    )


def in_several_families(games: Mapping[str, FamilyGames]) -> tuple[int, int]:
    """Initial states that TEST games of more than one family have, and those that any have. Each
    family's games are drawn by themselves, and a renaming (`envs.renamings`) plays its family's.
    """
    states = collections.Counter(
        digest
        for of_family in games.values()
        for digest in {state for run in of_family.hashes(of_family.test) for state in run}
    )
    return sum(count > 1 for count in states.values()), len(states)


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Draws games of one family, each with an initial state that was not taken before."""

    environment: Environment
    pool: Pool
    family: str
    taken: set[str]
    states: dict[GameId, str]  # filled
    key: keys.Key

    def __call__(self, split: str, wanted: int, *, anew: bool) -> list[GameId]:
        """So many games of a split, or as many as there are; those made `anew` first, or only where
        there are too few others.
        """
        drawn: list[GameId] = []
        for chunk in self._candidates(split, wanted, anew):
            for game, digest in zip(chunk, state_hashes(self.pool, chunk), strict=True):
                if digest and digest not in self.taken and len(drawn) < wanted:
                    self.taken.add(digest)
                    self.states[game] = digest
                    drawn.append(game)
            if len(drawn) == wanted:
                break
        return drawn

    def _candidates(self, split: str, wanted: int, anew: bool) -> Iterator[Sequence[GameId]]:
        there = tuple(self.environment.games(self.family, split))
        known = shuffled(there, keys.fold(self.key, f"{split} games", self.family))
        if not anew:
            yield from _chunks(known, _CHUNK)
        if isinstance(self.environment, Extensible):
            count, before = len(there), None
            while before != len(there):
                before, count = len(there), count + max(wanted, _CHUNK)
                there = tuple(self.environment.more_games(self.family, split, count))
                yield from _chunks(there[before:], _CHUNK)
        if anew:
            yield from _chunks(known, _CHUNK)


_USES = {"train": "STREAM", "select": "SELECT", "test": "TEST"}
_LESS = {
    "train": "--evaluation.meta-turns or --evaluation.games-per-context",
    "select": "--evaluation.select-games",
    "test": "--evaluation.test-games",
}


def state_hashes(pool: Pool, games: Sequence[GameId]) -> list[str]:
    """The hash of every game's initial state; empty for a game that the environment cannot
    start.
    """
    places = {pool.reset(game, max_steps=1): index for index, game in enumerate(games)}
    hashes = [""] * len(games)
    waiting = set(places)
    while waiting:
        for event in pool.poll(1.0):
            hashes[places[event.ticket]] = event.state_hash
            pool.release(event.ticket)
            waiting.discard(event.ticket)
    return hashes


def hashes_of_training(run_dir: pathlib.Path, last_iteration: int) -> frozenset[str]:
    """Initial states of all games that training has played; none of a run that was adopted, of
    which nobody knows.

    Args:
      run_dir: of the run, which may go on meanwhile.
      last_iteration: up to which files are compared with what metrics.jsonl counted.

    Raises:
      ValueError: a file is missing, damaged or shorter than it was: its games would count as never
        seen.
    """
    if "adopted" in read_manifest(run_dir):
        return frozenset()
    counted = {record["iteration"]: record.get("episodes") for record in read_metrics(run_dir)}
    seen = {
        path: _state_hashes(path)
        for pattern in ("episodes/iteration_*.jsonl", "contexts/*.jsonl")
        for path in run_dir.glob(pattern)
    }
    for iteration in range(1, last_iteration + 1):
        files = [
            run_dir / folder / f"iteration_{iteration:05d}.jsonl"
            for folder in ("contexts", "episodes")
        ]
        for path in files:
            if path not in seen:
                raise ValueError(f"{path} is missing: {_UNKNOWN}.")
        there = sum(len(seen[path]) for path in files)
        if counted.get(iteration, there) != there:
            raise ValueError(
                f"{files[0]} and {files[1]} hold {there} episodes,"
                f" {shown(counted[iteration])} were played: {_UNKNOWN}."
            )
    return frozenset(digest for hashes in seen.values() for digest in hashes)


def _state_hashes(path: pathlib.Path) -> list[str]:
    """Of every episode in a line file of episodes or contexts."""
    try:
        return [
            str(played["state_hash"])
            for record in read_records(path).values
            for played in record.get("trajectories", [record])
        ]
    except FileNotFoundError:  # training was started again, and makes it anew
        return []
    except (TypeError, KeyError):
        raise ValueError(f"{path} holds no episodes: {_UNKNOWN}.") from None


def shuffled(games: Sequence[GameId], key: keys.Key) -> list[GameId]:
    """The same games in an order of the key."""
    return [games[i] for i in keys.generator(key).permutation(len(games))]


def _chunks(games: Sequence[GameId], size: int) -> Iterator[Sequence[GameId]]:
    return (games[i : i + size] for i in range(0, len(games), size))
