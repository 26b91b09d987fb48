"""Scripted players of both benchmarks under one interface, and the table of how they do.

A player is a callable from a live game to the next action. The experts themselves are in
`envs.minihack.expert` and `envs.alfworld.expert`. The table of success, mean steps and random play:
`python -m envs.experts` (`--families eat zap --games 100 --steps 25`, or `--env alfworld --split
valid_seen`).
"""

import argparse
import collections
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from envs import alfworld
from envs.alfworld.expert import make_expert as make_alfworld_expert
from envs.alfworld.game import AlfworldGame
from envs.api import Game, GameId, Outcome
from envs.minihack.expert import make_expert as make_minihack_expert
from envs.minihack.expert import random_action
from envs.minihack.families import FAMILIES, step_limit
from envs.minihack.game import MiniHackGame

Player = Callable[[Any], str]  # from a live game to the next action

_ALFWORLD_STEPS = 50  # the usual limit of evaluations on it


def _minihack_player(family: str, rng: random.Random) -> Player:
    act = make_minihack_expert(family, rng)
    return lambda game: act(game.raw())


def _alfworld_player(family: str, rng: random.Random) -> Player:
    if family not in alfworld.FAMILIES:
        raise ValueError(
            f"Unknown family {family!r} of ALFWorld: use one of {', '.join(alfworld.FAMILIES)}."
        )
    act = make_alfworld_expert()

    def play_on(game: AlfworldGame) -> str:
        shown = game.official()
        return act(shown.text, shown.commands)

    return play_on


_PLAYERS: Mapping[str, Callable[[str, random.Random], Player]] = MappingProxyType(
    {"alfworld": _alfworld_player, "minihack": _minihack_player}
)


def make_player(environment: str, family: str, rng: random.Random) -> Player:
    """An expert for one episode of any environment that has experts. Raises ValueError for another
    environment or an unknown family.
    """
    if environment not in _PLAYERS:
        raise ValueError(
            f"There is no scripted expert for {environment!r}; there is one for:"
            f" {', '.join(sorted(_PLAYERS))}."
        )
    return _PLAYERS[environment](family, rng)


def random_player(rng: random.Random) -> Player:
    """Random play of MiniHack, whose games list patterns of actions only; see `random_action`."""
    return lambda game: random_action(game.raw(), rng)


def play_episode(
    game: Game, game_id: GameId, player: Player, *, max_steps: int
) -> tuple[Outcome, int]:
    """Plays one episode and returns how it ended and after how many actions."""
    game.reset(game_id)
    for turn in range(1, max_steps + 1):
        step = game.step(player(game))
        if step.outcome is not None:
            return step.outcome, turn
    return Outcome.STEP_LIMIT, max_steps


def measure(
    family: str, *, num_games: int, max_steps: int, first_seed: int = 10_000
) -> dict[str, float]:
    """Success of the MiniHack expert and of random play, and the expert's mean steps of its
    successes, over consecutive seeds.
    """
    ids = [
        GameId(env="minihack", family=family, key=str(seed))
        for seed in range(first_seed, first_seed + num_games)
    ]
    return _measure(MiniHackGame(family, style="compact"), ids, random_player, max_steps)


def measure_alfworld(
    family: str, *, environment: alfworld.ALFWorld, split: str, num_games: int, max_steps: int
) -> dict[str, float]:
    """The same for the first games of an ALFWorld family in a split."""

    def any_command(rng: random.Random) -> Player:
        return lambda game: rng.choice(game.official().commands)

    return _measure(
        environment.open(family),
        environment.games(family, split)[:num_games],
        any_command,
        max_steps,
    )


def _measure(
    game: Game, ids: Sequence[GameId], chance: Callable[[random.Random], Player], max_steps: int
) -> dict[str, float]:
    """Plays every game twice, as the expert and by chance, and closes `game`."""
    counts: collections.Counter = collections.Counter()
    try:
        for game_id in ids:
            expert = make_player(game_id.env, game_id.family, random.Random(game_id.key))
            outcome, steps = play_episode(game, game_id, expert, max_steps=max_steps)
            counts["expert"] += outcome is Outcome.SUCCESS
            counts["steps"] += steps * (outcome is Outcome.SUCCESS)
            by_chance = chance(random.Random(game_id.key))
            outcome, _ = play_episode(game, game_id, by_chance, max_steps=max_steps)
            counts["random"] += outcome is Outcome.SUCCESS
    finally:
        game.close()
    return {
        "expert": counts["expert"] / len(ids),
        "mean_steps": counts["steps"] / max(counts["expert"], 1),
        "random": counts["random"] / len(ids),
    }


def main(arguments: list[str] | None = None) -> int:
    """Writes the table of all or some families."""
    parser = argparse.ArgumentParser(
        description="Success of the scripted experts and of random play."
    )
    parser.add_argument("--env", choices=sorted(_PLAYERS), default="minihack")
    parser.add_argument("--families", nargs="*", help="default: all")
    parser.add_argument(
        "--games", type=int, default=100, help="per family; as many as there are, if fewer"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=(
            "actions per game (default: the MiniHack family's own limit, mostly 25; 50 for"
            " ALFWorld)"
        ),
    )
    parser.add_argument(
        "--split",
        default="test",
        help="of ALFWorld: train, select, test, valid_seen or valid_unseen",
    )
    parser.add_argument(
        "--data", default="auto", help="of ALFWorld: auto, official, generated or a path"
    )
    parser.add_argument("--rooms", default="full", help="of ALFWorld: full or small")
    options = parser.parse_args(arguments)
    sys.stdout.write("| family | expert % | mean steps | random % |\n|---|---|---|---|\n")
    environment = (
        alfworld.ALFWorld(data=options.data, rooms=options.rooms)
        if options.env == "alfworld"
        else None
    )
    for family in options.families or (environment.families if environment else FAMILIES):
        if environment:
            steps = options.steps or _ALFWORLD_STEPS
            row = measure_alfworld(
                family,
                environment=environment,
                split=options.split,
                num_games=options.games,
                max_steps=steps,
            )
        else:
            row = measure(
                family, num_games=options.games, max_steps=options.steps or step_limit(family)
            )
        sys.stdout.write(
            f"| {family} | {100 * row['expert']:.0f} | {row['mean_steps']:.1f} |"
            f" {100 * row['random']:.0f} |\n"
        )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
