"""Benchmark of the environments: in this process and through worker pools, beside the original
engines in the same run.

Every design plays the same games with the same actions, drawn beforehand: the original ones a part
of them, since they take seconds where ours take milliseconds. Rates count resets and steps apart.
"""

import contextlib
import functools
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from envs.api import Environment, Game, GameId, Outcome
from envs.minihack.families import GYM_IDS
from envs.pool import WorkerPool
from envs.registry import load_environment
from experiments.bench_run import Design, Note, Result, Stopwatch, interleave
from experiments.commands.bench import EnvsBench

# the order of MiniHack's own actions
_COMPASS = ("north", "east", "south", "west", "northeast", "southeast", "southwest", "northwest")
_HERE = "in process"
_ALL = "all families"


class Walk(NamedTuple):
    """A game, and what to do in it."""

    game: GameId
    actions: tuple[str, ...]


class TimedRun(NamedTuple):
    """Times and counts of one run."""

    reset_s: float
    step_s: float
    num_resets: int
    num_steps: int


# Ways to play.


def play_here(game: Game, walks: Sequence[Walk]) -> TimedRun:
    """One game after the other on one live game. Raises ValueError if a game fails."""
    reset_s, step_s, num_steps = Stopwatch(), Stopwatch(), 0
    for walk in walks:
        with reset_s.running():
            game.reset(walk.game)
        with step_s.running():
            for action in walk.actions:
                step = game.step(action)
                num_steps += 1
                if step.outcome is not None:
                    break
        if walk.actions and step.outcome is Outcome.FAILED:
            raise ValueError(f"A game failed while it was measured: {step.error}")
    return TimedRun(
        reset_s=reset_s.seconds, step_s=step_s.seconds, num_resets=len(walks), num_steps=num_steps
    )


def play_in_pool(pool: WorkerPool, walks: Sequence[Walk]) -> TimedRun:
    """All games at the same time: first all resets, then all steps. Raises ValueError if a game
    fails.
    """
    start = time.perf_counter()
    tickets = {
        pool.reset(walk.game, max_steps=len(walk.actions)): iter(walk.actions) for walk in walks
    }
    running = _answers(pool, len(tickets))
    middle = time.perf_counter()
    num_steps = 0
    for ticket in running:
        pool.step(ticket, next(tickets[ticket]))
    busy = len(running)
    while busy:
        busy -= len(events := pool.poll(10.0))
        num_steps += len(events)
        for event in events:
            if event.step.outcome is Outcome.FAILED:
                raise ValueError(f"A game failed while it was measured: {event.step.error}")
            if event.step.outcome is None:
                pool.step(event.ticket, next(tickets[event.ticket]))
                busy += 1
    end = time.perf_counter()
    for ticket in tickets:
        pool.release(ticket)
    return TimedRun(
        reset_s=middle - start, step_s=end - middle, num_resets=len(walks), num_steps=num_steps
    )


def _answers(pool: WorkerPool, number: int) -> list[int]:
    """The tickets of the next answers, to resets."""
    found: list[int] = []
    while len(found) < number:
        for event in pool.poll(10.0):
            if event.step.outcome is not None:
                raise ValueError(
                    f"A game could not be reset while it was measured: {event.step.error}"
                )
            found.append(event.ticket)
    return found


def play_published_way(walks: Sequence[Walk]) -> TimedRun:
    """`gym.make`, reset, one key per step and close for each MiniHack game, one after another in
    this process; the screen as text.
    """
    reset_s, step_s, num_steps = Stopwatch(), Stopwatch(), 0
    for walk in walks:
        seed = int(walk.game.key)
        with reset_s.running():
            env = _make(walk.game.family)
            env.unwrapped.seed(seed, seed, reseed=False)
            observation, _ = env.reset()
            _screen(observation)
        with step_s.running():
            for action in walk.actions:
                observation, _, terminated, truncated, _ = env.step(
                    _COMPASS.index(action.removeprefix("go "))
                )
                _screen(observation)
                num_steps += 1
                if terminated or truncated:
                    break
        with reset_s.running():
            env.close()
    return TimedRun(
        reset_s=reset_s.seconds, step_s=step_s.seconds, num_resets=len(walks), num_steps=num_steps
    )


def _make(family: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gymnasium  # slow to import, and needed here only
        import minihack  # noqa: F401  (registers the tasks)

        logging.getLogger("nle").setLevel(logging.ERROR)
        return gymnasium.make(GYM_IDS[family])


def _screen(observation: Mapping[str, np.ndarray]) -> str:
    message = bytes(observation["message"]).split(b"\0", 1)[0]
    return "\n".join(bytes(line).decode("latin-1") for line in (message, *observation["chars"]))


def play_stock(environment: Environment, walks: Sequence[Walk]) -> TimedRun:
    """Stock TextWorld, one per process, on a live game that is made and freed outside the time."""
    with contextlib.closing(environment.open(walks[0].game.family)) as game:
        return play_here(game, walks)


# What to play.


def admissible_walks(
    environment: Environment, family: str, num_games: int, num_steps: int
) -> list[Walk]:
    """Random admissible actions in the first games of TRAIN, found by playing them."""
    walks = []
    with contextlib.closing(environment.open(family)) as game:
        for game_id in environment.games(family, "train")[:num_games]:
            rng, actions = random.Random(str(game_id)), []
            observation = game.reset(game_id)
            while len(actions) < num_steps:
                actions.append(rng.choice(observation.actions))
                step = game.step(actions[-1])
                observation = step.observation
                if step.outcome is not None:
                    break
            walks.append(Walk(game_id, tuple(actions)))
    return walks


def moving_walks(family: str, num_games: int, num_steps: int) -> list[Walk]:
    """Random moves in the MiniHack games of seeds 0, 1, 2, ..."""
    rng = random.Random(family)
    return [
        Walk(
            GameId(env="minihack", family=family, key=str(seed)),
            tuple(f"go {rng.choice(_COMPASS)}" for _ in range(num_steps)),
        )
        for seed in range(num_games)
    ]


# The benchmark.


def bench_envs(bench: EnvsBench, note: Note) -> Result:
    """Resets, steps and whole episodes per second, per engine and family."""
    rows, notes = [], []
    looks = [
        Walk(GameId(env="fake", family="door", key=str(key)), ("look",) * bench.steps)
        for key in range(bench.episodes)
    ]
    # what the pool itself costs
    rows += _measure(bench, load_environment("fake"), {}, {"door": looks}, None, note)
    if bench.alfworld:
        options = {"data": bench.data, "keep": "0"}  # every reset reads and compiles its game
        ours, stock = (
            load_environment("alfworld", {**options, "engine": engine})
            for engine in ("python", "textworld")
        )
        walks = {
            family: admissible_walks(ours, family, bench.episodes, bench.steps)
            for family in bench.alfworld
        }
        peer = (
            "stock TextWorld",
            functools.partial(
                _few, functools.partial(play_stock, stock), bench.stock_games, bench.stock_steps
            ),
        )
        found = list(_measure(bench, ours, options, walks, peer if bench.stock else None, note))
        rows += found
        notes.append(_targets([row for row in found if row["game"] == found[-1]["game"]]))
    if bench.minihack:
        walks = {
            family: moving_walks(family, bench.episodes, bench.steps) for family in bench.minihack
        }
        peer = (
            "gym.make per episode",
            functools.partial(_few, play_published_way, bench.published_games, bench.steps),
        )
        rows += _measure(
            bench, load_environment("minihack"), {}, walks, peer if bench.stock else None, note
        )
    notes.append(
        "A step is one action in words with its full text, and of ALFWorld the list of admissible"
        " actions. A reset of ALFWorld reads and compiles the game file (a replayed game is kept"
        " otherwise). A step of gym.make per episode is one key and the screen; its resets include"
        " making and closing the environment."
    )
    return Result(
        f"Environments: {bench.episodes} games of {bench.steps} random actions per family",
        "the original engine",
        rows,
        notes,
    )


def _few(
    play: Callable[[Sequence[Walk]], TimedRun],
    num_games: int,
    num_steps: int,
    walks: Sequence[Walk],
) -> TimedRun:
    return play([Walk(walk.game, walk.actions[:num_steps]) for walk in walks[:num_games]])


def _measure(
    bench: EnvsBench,
    environment: Environment,
    options: Mapping[str, str],
    walks: Mapping[str, Sequence[Walk]],
    peer: tuple[str, Callable[[Sequence[Walk]], TimedRun]] | None,
    note: Note,
) -> Iterator[dict[str, Any]]:
    """The rows of one environment: each family, and all together where there are several."""
    played: dict[str, dict[str, list[TimedRun]]] = {}
    name = environment.name
    with contextlib.ExitStack() as stack:
        pools = {
            f"pool, {workers} worker{'s' if workers > 1 else ''}": stack.enter_context(
                WorkerPool(
                    name,
                    num_workers=workers,
                    max_live_games=max(workers, bench.episodes * len(walks)),
                    options=options,
                )
            )
            for workers in bench.workers
        }
        for family, walks_of_family in walks.items():
            booked = played[family] = {}
            with contextlib.closing(environment.open(family)) as game:
                ways = {_HERE: functools.partial(play_here, game)}
                ways |= {
                    design: functools.partial(play_in_pool, pool) for design, pool in pools.items()
                }
                if peer is not None:
                    ways[peer[0]] = peer[1]
                designs: dict[str, Design] = {
                    design: functools.partial(
                        _booked,
                        booked.setdefault(design, []),
                        functools.partial(way, walks_of_family),
                    )
                    for design, way in ways.items()
                }
                interleave(
                    designs,
                    bench.repetitions,
                    lambda text, family=family: note(f"{name} {family}, {text}"),
                )
    if len(walks) > 1:
        designs_of_all = next(iter(played.values()))
        played[_ALL] = {
            design: [
                _sum(rounds)
                for rounds in zip(
                    *(rounds_by_design[design] for rounds_by_design in played.values()), strict=True
                )
            ]
            for design in designs_of_all
        }
    return (
        _row(
            f"{name} {family}",
            design,
            rounds[1:],
            rounds_by_design[peer[0]][1:] if peer is not None else None,
        )  # the first round opens the live games
        for family, rounds_by_design in played.items()
        for design, rounds in rounds_by_design.items()
    )


def _booked(rounds: list[TimedRun], run: Callable[[], TimedRun]) -> tuple[float, TimedRun]:
    rounds.append(found := run())
    return found.reset_s + found.step_s, found


def _sum(rounds: Sequence[TimedRun]) -> TimedRun:
    return TimedRun(*map(sum, zip(*rounds, strict=True)))


def _row(
    game: str, design: str, rounds: Sequence[TimedRun], peer: Sequence[TimedRun] | None
) -> dict[str, Any]:
    resets = [run.num_resets / run.reset_s for run in rounds]
    steps = [run.num_steps / run.step_s for run in rounds]
    median = statistics.median
    return {
        "design": design,
        "game": game,
        "resets_per_s": median(resets),
        "reset_ms": 1e3 / median(resets),
        "steps_per_s": median(steps),
        "step_us": 1e6 / median(steps),
        "episodes_per_s": median(run.num_resets / (run.reset_s + run.step_s) for run in rounds),
        "reset_speedup": (
            None
            if peer is None
            else median(r * p.reset_s / p.num_resets for r, p in zip(resets, peer, strict=True))
        ),
        "step_speedup": (
            None
            if peer is None
            else median(s * p.step_s / p.num_steps for s, p in zip(steps, peer, strict=True))
        ),
    }


def _targets(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was asked of ALFWorld, beside what was measured."""
    found = {row["design"]: row for row in rows}
    here, most = (
        found[_HERE],
        max(row["steps_per_s"] for design, row in found.items() if design.startswith("pool")),
    )
    against = (
        ""
        if here["step_speedup"] is None
        else f" {here['step_speedup']:,.0f} x the steps/s of stock TextWorld (500 x),"
    )
    asked = (
        f"reset {here['reset_ms']:.2f} ms (2 ms), step {here['step_us']:.0f} us (50 us),{against}"
        f" {most:,.0f} steps/s through a pool (10,000)"
    )
    return f"What was measured of {rows[0]['game']} and what was asked for: {asked}."
