"""Plays the same games with both engines, ours and the stock one, and compares everything that a
player sees.

    python -m envs.alfworld.differential --split valid_seen --json seen.json         # all 140
    python -m envs.alfworld.differential --split train --limit 600 --json train.json # 600 of them
    python -m envs.alfworld.differential --data generated --split test --limit 60
    python -m envs.alfworld.differential --split valid_seen --limit 24 --stock plain # as is

Compared after every action: the text, the admissible commands in their order, whether the game is
won, and the reward. The stock score is cumulative (1 from the win on), so the reward of a step must
be the difference of two scores. With --json the run goes on where it was stopped.
The exit code is 1 when anything differs.
"""

import argparse
import collections
import json
import pathlib
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from envs.alfworld import ALFWorld
from envs.alfworld.engine import Answer
from envs.alfworld.game import AlfworldGame
from envs.alfworld.sources import load_game
from envs.api import GameId
from envs.files import replacing

PAST_END = 3  # actions after the win
_JUNK = (
    "",
    " ",
    "\n",
    "\x00",
    "look\x00",
    "\ud800",
    "öffne die Tür",
    "¿?",
    "{o.name}",
    "#task#",
    "go to",
    "take  from ",
    "help me",
    "x" * 100_000,
)

LastAnswer = Callable[[], Answer]


def expert(
    rng: random.Random, walkthrough: Sequence[str], steps: int, last_answer: LastAnswer
) -> Iterator[str]:
    """The walkthrough that comes with the game."""
    yield from walkthrough


def detour(
    rng: random.Random, walkthrough: Sequence[str], steps: int, last_answer: LastAnswer
) -> Iterator[str]:
    """The walkthrough with other actions in between, seldom such that it cannot go on: into states
    that random play hardly reaches.
    """
    for command in walkthrough:
        while rng.random() < 0.6 and steps:
            harmless = [
                other
                for other in last_answer().commands
                if not other.startswith(("go ", "take ", "move ", "close "))
            ]
            yield any_verb(rng, harmless if rng.random() < 0.9 else last_answer().commands)
            steps -= 1
        yield command


def at_random(
    rng: random.Random, walkthrough: Sequence[str], steps: int, last_answer: LastAnswer
) -> Iterator[str]:
    """Admissible commands, every verb as likely as the others."""
    for _ in range(steps):
        yield any_verb(rng, last_answer().commands)


def junk(
    rng: random.Random, walkthrough: Sequence[str], steps: int, last_answer: LastAnswer
) -> Iterator[str]:
    """What no one should type, commands in other spellings, and now and then a command, so that the
    junk meets many states.
    """
    for _ in range(steps):
        command = any_verb(rng, last_answer().commands)
        spellings = (
            command.upper(),
            command.title(),
            f"  {command}\t\n",
            command.replace(" ", "  "),
            f"{command}.",
            command[:-1],
            "examine " + command,
        )
        yield rng.choice(
            (command, command, rng.choice(spellings), rng.choice(spellings), rng.choice(_JUNK))
        )


POLICIES: Mapping[str, Callable[..., Iterator[str]]] = {
    "expert": expert,
    "detour": detour,
    "random": at_random,
    "junk": junk,
}


def any_verb(rng: random.Random, commands: Sequence[str]) -> str:
    """One command; verbs are equally likely, so that taking is not lost among thirty ways to go."""
    verbs = sorted({command.partition(" ")[0] for command in commands})
    verb = rng.choice(verbs)
    return rng.choice([command for command in commands if command.partition(" ")[0] == verb])


def play_both(
    game: GameId, content: Mapping[str, Any], stock_game: Any, policy: str, *, seed: int, steps: int
) -> dict[str, Any]:
    """One episode on both engines. Returns the number of steps, whether it was won, and the first
    difference (empty when there is none).

    `stock_game` is what `StockEngine.load` returned for this content.
    """
    ours = AlfworldGame(game.family, lambda key: content)
    observation, answer = ours.reset(game), stock_game.reset()
    difference = _difference(Answer(observation.text, observation.actions, False), 0.0, answer, 0.0)
    rng = random.Random(f"{seed} {policy} {game}")
    taken: list[str] = []
    past = [rng.choice((*answer.commands, "look", "")) for _ in range(PAST_END)]
    actions = POLICIES[policy](rng, content["walkthrough"], steps, lambda: answer)
    while not difference:
        action = (past.pop() if past else None) if answer.won else next(actions, None)
        if action is None:
            break
        score = stock_game.score
        step, answer = ours.step(action), stock_game.step(action)
        taken.append(action)
        seen = Answer(step.observation.text, step.observation.actions, step.outcome is not None)
        difference = _difference(seen, step.reward, answer, stock_game.score - score)
    if difference:
        difference["actions"] = [action[:80] for action in taken]
    return {"steps": len(taken), "won": answer.won, "difference": difference}


def _difference(
    ours: Answer, our_reward: float, stock: Answer, stock_reward: float
) -> dict[str, Any]:
    """By field, what the two engines say, where they do not say the same."""
    fields = zip(
        (*Answer._fields, "reward"), (*ours, our_reward), (*stock, stock_reward), strict=True
    )
    return {
        field: {"ours": mine, "stock": theirs} for field, mine, theirs in fields if mine != theirs
    }


def choose(environment: ALFWorld, split: str, limit: int) -> list[GameId]:
    """`limit` games of a split (0 for all), in turn from every family and evenly spread within
    it.
    """
    by_family = []
    for family in environment.families:
        games = environment.games(family, split)
        wanted = min(len(games), -(-limit // len(environment.families))) if limit else len(games)
        by_family.append([games[index * len(games) // wanted] for index in range(wanted)])
    longest = max(map(len, by_family))
    mixed = [games[index] for index in range(longest) for games in by_family if index < len(games)]
    return mixed[:limit] if limit else mixed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default="auto",
        help="as in ALFWorld(data=...): auto, official, generated, or a path",
    )
    parser.add_argument(
        "--split", default="test", help="train, select, test, or official valid_seen, valid_unseen"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="so many games, spread over the families (0: all)"
    )
    parser.add_argument(
        "--policies", default=",".join(POLICIES), help=f"comma-separated, of {', '.join(POLICIES)}"
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="actions of one random or junk episode"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stock",
        choices=("cached", "plain"),
        default="cached",
        help="the stock engine with parse caches, or untouched (50 times slower)",
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        help="results by game; finished games in it are not played again",
    )
    options = parser.parse_args(argv)
    policies = options.policies.split(",")
    if unknown := set(policies) - set(POLICIES):
        parser.error(
            f"unknown policies {', '.join(sorted(unknown))}: use some of {', '.join(POLICIES)}"
        )
    settings = {
        "data": options.data,
        "policies": policies,
        "steps": options.steps,
        "seed": options.seed,
        "stock": options.stock,
    }
    try:
        games = choose(ALFWorld(data=options.data), options.split, options.limit)
        done = _read(options.json, settings)
    except ValueError as error:
        parser.error(str(error))

    from envs.alfworld.stock import StockEngine  # takes seconds: after the arguments were checked

    with StockEngine(cached=options.stock == "cached") as stock:
        for number, game in enumerate(games, 1):
            if str(game) in done:
                continue
            start = time.perf_counter()
            content = load_game(game.key, options.data)
            loaded = stock.load(content)
            done[str(game)] = {
                policy: play_both(
                    game, content, loaded, policy, seed=options.seed, steps=options.steps
                )
                for policy in policies
            }
            if options.json:
                _write(options.json, {"settings": settings, "games": done})
            wrong = sum(bool(episode["difference"]) for episode in done[str(game)].values())
            steps = sum(episode["steps"] for episode in done[str(game)].values())
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            seconds = time.perf_counter() - start
            sys.stderr.write(
                f"[{number}/{len(games)}] {game}: {steps} steps, {wrong} episodes differ"
                f" ({seconds:.1f} s, peak {peak_mb:.0f} MB)\n"
            )
    chosen = {str(game): done[str(game)] for game in games}
    sys.stdout.write(table(chosen, policies))
    wrong = {
        game: episodes
        for game, episodes in chosen.items()
        if any(episode["difference"] for episode in episodes.values())
    }
    for game, episodes in list(wrong.items())[:5]:
        for policy, episode in episodes.items():
            if episode["difference"]:
                sys.stdout.write(
                    f"\n{game} ({policy})"
                    f" differs:\n{json.dumps(episode['difference'], indent=1)[:3000]}\n"
                )
    return 1 if wrong else 0


def table(games: Mapping[str, Mapping[str, Any]], policies: Sequence[str]) -> str:
    """Episodes, steps, wins and differing episodes, by family and policy."""
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    for game, episodes in games.items():
        for policy in policies:
            episode = episodes[policy]
            row = {
                "games": 1,
                "steps": episode["steps"],
                "won": int(episode["won"]),
                "differ": int(bool(episode["difference"])),
            }
            for key in ((GameId.parse(game).family, policy), ("all", policy)):
                counts[key].update(row)
    columns = ("games", "steps", "won", "differ")
    lines = [f"{'family':10}{'policy':10}" + "".join(f"{column:>10}" for column in columns)]
    for family, policy in sorted(counts, key=lambda key: (key[0] == "all", key)):
        lines.append(
            f"{family:10}{policy:10}"
            + "".join(f"{counts[family, policy][column]:>10}" for column in columns)
        )
    return "\n".join(lines) + "\n"


def _read(path: pathlib.Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["settings"] == settings and _is_played(data["games"], settings):
            return data["games"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"{path} holds something else than a run with these settings: give another --json file, or"
        " the settings of that run."
    )


def _is_played(games: Any, settings: Mapping[str, Any]) -> bool:
    """Whether these are games with the episodes of each policy, see `play_both`."""
    return isinstance(games, dict) and all(
        isinstance(episodes, dict)
        and episodes.keys() >= set(settings.get("policies", ()))
        and all(
            isinstance(episode, dict)
            and isinstance(episode["steps"], int)
            and isinstance(episode["won"], bool)
            and isinstance(episode["difference"], dict | None)
            for episode in episodes.values()
        )
        for episodes in games.values()
    )


def _write(path: pathlib.Path, data: Mapping[str, Any]):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
