"""What an evaluation plays: the games of every family, and the loops of every arm on them.

Every arm plays the same games in the same order with the same keys, so differences are paired.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from envs.api import Environment, GameId, Outcome, Pool
from ictjax import keys
from ictjax.json_lines import read_records, to_json_line
from ictjax.loops import Arena
from ictjax.metrics import read_metrics
from ictjax.ranges import shown
from ictjax.records import Candidate, Context, Trajectory
from ictjax.rollout import Episode, parse_failures, success_rate
from ictjax.run_config import EvaluationConfig, TrainConfig
from ictjax.run_files import prompt_line

_UNKNOWN = "restore it, without it nobody knows which games training has seen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyGames:
    """The games of one family: per run, the batches of its meta-turns and the games of its
    score.
    """

    stream: tuple[tuple[tuple[GameId, ...], ...], ...]
    test: tuple[tuple[GameId, ...], ...]


def play_arm(
    arena: Arena, arm: str, family: str, games: FamilyGames, evaluation: EvaluationConfig
) -> tuple[dict[str, Any], list[Trajectory]]:
    """Runs all loops of one arm on one family side by side; returns its result and the TEST
    trajectories, run by run.
    """
    runs = range(evaluation.runs)
    prompts = [arena.task.initial_prompt] * evaluation.runs
    lines: list[tuple[Context, Candidate]] = []
    malformed = 0
    for meta_turn in range(evaluation.meta_turns if arm != "initial" else 0):
        contexts = _contexts(
            arena, family, prompts, [games.stream[run][meta_turn] for run in runs], meta_turn
        )
        # The same keys for every arm: what differs between arms is the weights alone.
        group_keys = [[keys.fold(arena.key, "reflection", family, run, meta_turn)] for run in runs]
        groups = arena.ask(contexts, group_keys)
        candidates = [group[0] for group in groups]
        malformed += sum(candidate.system_prompt is None for candidate in candidates)
        prompts = [
            candidate.system_prompt or prompt
            for candidate, prompt in zip(candidates, prompts, strict=True)
        ]
        lines = list(zip(contexts, candidates, strict=True))
    episodes = [
        Episode(
            game=game,
            system_prompt=prompts[run],
            key=keys.fold(arena.key, "test", family, run, str(game)),
        )
        for run in runs
        for game in games.test[run]
    ]
    trajectories = arena.play(episodes, f"{arm} on {family}")
    played = iter(trajectories)
    by_run = [[next(played) for _ in games.test[run]] for run in runs]
    success = [success_rate(trajectories) for trajectories in by_run]
    return {
        "success": success,
        "outcomes": [
            [None if t.outcome is Outcome.FAILED else int(t.success) for t in trajectories]
            for trajectories in by_run
        ],
        "num_games": len({game for batch in games.test for game in batch}),
        "malformed": malformed,
        "actor_failures": parse_failures(trajectories),
        "failed_episodes": sum(t.outcome is Outcome.FAILED for t in trajectories),
        "prompts": [
            _prompt_line(
                arm, family, run, prompts[run], success[run], lines[run] if lines else None
            )
            for run in runs
        ],
    }, trajectories


def _prompt_line(
    arm: str,
    family: str,
    run: int,
    prompt: str,
    success: float | None,
    last: tuple[Context, Candidate] | None,
) -> str:
    """The prompt that was scored, and what the reflector read and wrote in the loop's last
    meta-turn.
    """
    where = {"arm": arm, "family": family, "run": run, "success": success}
    wrote = {} if last is None else json.loads(prompt_line(*last))
    return to_json_line({**wrote, **where, "system_prompt": prompt})


def _contexts(
    arena: Arena,
    family: str,
    prompts: Sequence[str],
    batches: Sequence[Sequence[GameId]],
    meta_turn: int,
) -> list[Context]:
    episodes = [
        Episode(
            game=game,
            system_prompt=prompt,
            key=keys.fold(arena.key, "stream", family, run, meta_turn, str(game)),
        )
        for run, (prompt, batch) in enumerate(zip(prompts, batches, strict=True))
        for game in batch
    ]
    played = iter(arena.play(episodes, f"stream of {family}"))
    return [
        Context(
            loop=run,
            meta_turn=meta_turn,
            family=family,
            system_prompt=prompt,
            trajectories=tuple(next(played) for _ in batches[run]),
        )
        for run, prompt in enumerate(prompts)
    ]


def choose_games(
    environment: Environment,
    pool: Pool,
    config: TrainConfig,
    family: str,
    seen: frozenset[str],
    key: keys.Key,
) -> FamilyGames:
    """Draws the STREAM games of every run, then TEST games with initial states that are new and
    pairwise different.

    Runs share TEST games only when the split has too few. Raises ValueError when it has none.
    """
    evaluation, per_batch = config.evaluation, config.meta.games_per_context
    train = _shuffled(environment.games(family, "train"), keys.fold(key, "stream games", family))
    needed = evaluation.runs * evaluation.meta_turns * per_batch
    flat = [train[i % len(train)] for i in range(needed)]
    batches = [tuple(flat[i : i + per_batch]) for i in range(0, needed, per_batch)]
    taken = set(seen) | set(state_hashes(pool, flat))
    test: list[GameId] = []
    candidates = _shuffled(environment.games(family, "test"), keys.fold(key, "test games", family))
    wanted = evaluation.runs * evaluation.test_games
    for chunk in _chunks(candidates, wanted):
        for game, digest in zip(chunk, state_hashes(pool, chunk), strict=True):
            if digest and digest not in taken and len(test) < wanted:
                taken.add(digest)
                test.append(game)
        if len(test) == wanted:
            break
    if not test:
        raise ValueError(
            f"Family {family!r} has no test game whose initial state is new: leave it out of"
            " task.environment.heldout_families."
        )
    size, turns = min(evaluation.test_games, len(test)), evaluation.meta_turns
    return FamilyGames(
        stream=tuple(
            tuple(batches[run * turns : (run + 1) * turns]) for run in range(evaluation.runs)
        ),
        test=tuple(
            tuple(test[(run * size + i) % len(test)] for i in range(size))
            for run in range(evaluation.runs)
        ),
    )


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
    """Initial states of all games that training has played.

    Args:
      run_dir: of the run, which may go on meanwhile.
      last_iteration: up to which files are compared with what metrics.jsonl counted.

    Raises:
      ValueError: a file is missing, damaged or shorter than it was: its games would count as never
        seen.
    """
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


def _shuffled(games: Sequence[GameId], key: keys.Key) -> list[GameId]:
    return [games[i] for i in keys.generator(key).permutation(len(games))]


def _chunks(games: Sequence[GameId], size: int) -> Iterator[Sequence[GameId]]:
    return (games[i : i + size] for i in range(0, len(games), size))
