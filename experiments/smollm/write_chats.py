"""Writes the chats that SmolLM2's adapters are taught with: python -m
experiments.smollm.write_chats --out DIR. The same flags and versions give the same files.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from experiments.command import Flags, parse, run_main
from ictjax.ranges import Range

_DESCRIPTION = (
    "Plays MiniHack by script, and writes what an actor and a reflector in English are taught with:"
    " actor.jsonl and reflector.jsonl for `ictjax sft`, and pretraining.json, which says with which"
    " games, for the folder that holds the adapters."
)
_MAX_STEPS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatsArgs(Flags):
    """How much is written, and where."""

    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write to."""
    actor_chats: Annotated[int, Range(1, 1_000_000)] = 1300
    """Chats for the actor, of about 190 tokens."""
    reflector_chats: Annotated[int, Range(1, 1_000_000)] = 900
    """Chats for the reflector, of about 330 tokens."""
    games_per_family: Annotated[int, Range(1, 400)] = 60
    """Games that are played by script, four times each."""
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Of everything that is drawn."""


def write_chats(args: ChatsArgs) -> None:
    """Plays and writes both files."""
    from experiments.console import Terminal, counting_bar
    from experiments.pretraining import entry, write_record
    from experiments.smollm.chats import ActorChats, Chat, ReflectorChats
    from experiments.smollm.lessons import LESSONS, TRAIN_LESSONS
    from experiments.smollm.play import play_families
    from experiments.smollm.task import MINIHACK, REFLECTION, RENAMED
    from ictjax.run_files import write_lines

    console = Terminal()
    games = []
    total = 4 * args.games_per_family * len(LESSONS)
    with counting_bar("scripted play", console) as advance:
        for game in play_families(
            list(LESSONS),
            games_per_family=args.games_per_family,
            max_steps=_MAX_STEPS,
            seed=args.seed,
        ):
            games.append(game)
            advance(len(games), total)
    actor = ActorChats(games, seed=args.seed)
    trained = [game for game in games if game.family in TRAIN_LESSONS]
    reflector = ReflectorChats(trained, REFLECTION, seed=args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, count: int, draw: Callable[[], Chat]) -> None:
        write_lines(args.out / name, [json.dumps(draw()) for _ in range(count)])
        console.print(f"{count} chats in {args.out / name}.", soft_wrap=True, highlight=False)

    write("actor.jsonl", args.actor_chats, actor.draw)
    counts = itertools.cycle((1, 2, 2))  # short questions teach the form as well, and sooner
    write("reflector.jsonl", args.reflector_chats, lambda: reflector.draw(next(counts)))
    options = MINIHACK.environment.options
    taught = entry(options, [*LESSONS, *RENAMED], "train", args.games_per_family)
    write_record(args.out, {"minihack": taught})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(
        lambda: write_chats(parse(ChatsArgs, "write_chats", _DESCRIPTION, words)),
        "start it again to write the files.",
    )


if __name__ == "__main__":
    main()
