"""Writes the chats that SmolLM2's adapters are taught with: python -m
experiments.smollm.write_chats --out DIR. The same flags and versions give the same files.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from experiments.command import Flags, parse, run_main
from experiments.local_path import check_place
from experiments.smollm.lessons import GO_ON
from ictjax.ranges import Range

if TYPE_CHECKING:
    from experiments.console import Terminal
    from experiments.smollm.chats import Chat
    from ictjax.config import ReflectorConfig

_DESCRIPTION = (
    "Plays MiniHack or ALFWorld by script, and writes what an actor and a reflector in English are"
    " taught with: actor.jsonl and reflector.jsonl for `ictjax sft`, and pretraining.json, which"
    " says with which games, for the folder that holds the adapters."
)
_Share = Annotated[float, Range(0, 1)]
_MAX_STEPS = 10
_RENAMINGS = 9  # of each family of ALFWorld, beside its own names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatsArgs(Flags):
    """How much is written, and where."""

    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write to."""
    benchmark: Literal["minihack", "alfworld"] = "minihack"
    """What is played."""
    actor_chats: Annotated[int, Range(1, 1_000_000)] = 1300
    """Chats for the actor, of about 190 tokens."""
    reflector_chats: Annotated[int, Range(1, 1_000_000)] = 900
    """Chats for the reflector, of about 330 tokens."""
    concludes: bool = False
    """End the reflector's analyses with the verbs that won ("What won: nothing."); those of the
    adapters that ship do not."""
    explores: Annotated[tuple[_Share, _Share], tyro.conf.arg(metavar="SHARE SHARE")] = GO_ON
    """How often the reflector's replies ask to go on trying, where an episode was won and where
    none was."""
    episodes: Annotated[tuple[Annotated[int, Range(1, 8)], ...], tyro.conf.arg(metavar="N ...")] = (
        1,
        2,
        2,
    )
    """Of the reflector's chats, in turn; short ones teach the form as well, and sooner."""
    games_per_family: Annotated[int, Range(1, 400)] = 60
    """Games of a family that are played by script, four times each. Of those of ALFWorld, two at
    least, a tenth has the verbs' own names."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of everything that is drawn."""


def write_chats(args: ChatsArgs) -> None:
    """Plays and writes both files. Raises ValueError for a folder that cannot be written to, or no
    number of episodes, before the first game.
    """
    from experiments.console import Terminal
    from experiments.pretraining import write_record
    from ictjax.run_files import write_lines

    console = Terminal()
    if not args.episodes:
        raise ValueError("--episodes names no number: give one, or several in turn, such as 1 2 2.")
    check_place(args.out, "--out")
    made = _minihack(args, console) if args.benchmark == "minihack" else _alfworld(args, console)
    draw_actor, draw_reflector, taught = made
    args.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, count: int, draw: Callable[[], "Chat"]) -> None:
        write_lines(args.out / name, [json.dumps(draw()) for _ in range(count)])
        console.print(f"{count} chats in {args.out / name}.", soft_wrap=True, highlight=False)

    write("actor.jsonl", args.actor_chats, draw_actor)
    counts = itertools.cycle(args.episodes)
    write("reflector.jsonl", args.reflector_chats, lambda: draw_reflector(next(counts)))
    write_record(args.out, {args.benchmark: taught})


def _minihack(args: ChatsArgs, console: "Terminal"):
    """What draws chats for the actor, what draws those for the reflector of so many games, and the
    entry of the record.
    """
    from experiments.console import counting_bar
    from experiments.pretraining import entry
    from experiments.smollm.chats import ActorChats, ReflectorChats
    from experiments.smollm.lessons import LESSONS, TRAIN_LESSONS
    from experiments.smollm.play import play_families
    from experiments.smollm.task import MINIHACK, RENAMED

    games = []
    with counting_bar("scripted play", console) as advance:
        for game in play_families(
            list(LESSONS),
            games_per_family=args.games_per_family,
            max_steps=_MAX_STEPS,
            seed=args.seed,
        ):
            games.append(game)
            advance(len(games), 4 * args.games_per_family * len(LESSONS))
    trained = [game for game in games if game.family in TRAIN_LESSONS]
    options = MINIHACK.environment.options
    return (
        ActorChats(games, seed=args.seed).draw,
        ReflectorChats(trained, _reading(args), **_replies(args)).draw,
        entry(options, [*LESSONS, *RENAMED], "train", args.games_per_family),
    )


def _alfworld(args: ChatsArgs, console: "Terminal"):
    """The same for ALFWorld."""
    from experiments.console import counting_bar
    from experiments.pretraining import entry
    from experiments.smollm.house import ActorChats, ReflectorChats, play_families
    from experiments.smollm.lessons import HOUSE_LESSONS, HOUSE_TRAIN_LESSONS
    from experiments.smollm.task import ALFWORLD

    renamings = max(1, min(_RENAMINGS, args.games_per_family - 1))
    games_each = max(1, args.games_per_family // (renamings + 1))
    games_per_family = games_each * (renamings + 1)
    games = []
    with counting_bar("scripted play", console) as advance:
        for game in play_families(
            list(HOUSE_LESSONS),
            renamings=renamings,
            games_each=games_each,
            max_steps=ALFWORLD.rollout.max_steps,
            seed=args.seed,
        ):
            games.append(game)
            advance(len(games), 4 * games_per_family * len(HOUSE_LESSONS))
    trained = [(number, game) for number, game in games if game.family in HOUSE_TRAIN_LESSONS]
    environment = ALFWORLD.environment
    return (
        ActorChats(games, seed=args.seed).draw,
        ReflectorChats(trained, _reading(args), **_replies(args)).draw,
        entry(
            environment.options,
            sorted({*HOUSE_LESSONS, *environment.train_families, *environment.heldout_families}),
            "train",
            games_per_family,
        ),
    )


def _replies(args: ChatsArgs) -> dict[str, Any]:
    """What the reflector's replies are drawn with."""
    return {"seed": args.seed, "concludes": args.concludes, "explores": args.explores}


def _reading(args: ChatsArgs) -> "ReflectorConfig":
    """The limits of a reflector that reads so many episodes."""
    from experiments.smollm.task import REFLECTION

    wide = max(1, max(args.episodes) / 2)  # it is made for two
    return dataclasses.replace(
        REFLECTION, max_context_tokens=round(wide * REFLECTION.max_context_tokens)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(
        lambda: write_chats(parse(ChatsArgs, "write_chats", _DESCRIPTION, words)),
        "start it again to write the files.",
    )


if __name__ == "__main__":
    main()
