"""`ictjax games list | pack | generate | check`."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Literal

import tyro

from experiments.command import Flags, parse_subcommand, run_main
from experiments.console import Terminal
from ictjax.ranges import Range

DEFAULT = "minihack"  # the environment of commands that are not told one
_DESCRIPTION = "Lists, packs, generates and checks games."
_PLAIN_WIDTH = 120  # of tables that go to a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentArgs:
    """Of which games."""

    env: str = DEFAULT
    """Name or import path of the environment."""
    options: Annotated[str, tyro.conf.arg(metavar="KEY=VALUE,...", help_behavior_hint="")] = ""
    """Its options, for example data=generated,rooms=small."""
    families: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="(default: all)")
    ] = ()
    """Only these families."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListGames(EnvironmentArgs):
    """Families, splits and counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackGames:
    """Packs downloaded ALFWorld games into one file, for `data=FILE` or $ALFWORLD_DATA."""

    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE")]
    """The file to write."""
    data: str = "official"
    """The download: a folder, or "official" for $ALFWORLD_DATA, then ~/.cache/alfworld."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateGames(Flags):
    """Writes generated ALFWorld games in the official layout, for the stock environment: train,
    select as valid_seen, test as valid_unseen.
    """

    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")]
    """A folder that holds no games yet."""
    games: Annotated[int, Range(1, 1_000_000)] = 50
    """Games of each family in train; select and test get as many, up to 200."""
    rooms: Literal["full", "small"] = "full"
    """Rooms as in the official games, or small ones."""
    families: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]", help_behavior_hint="(default: all)")
    ] = ()
    """Only these families."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckGames(EnvironmentArgs, Flags):
    """Starts games and compares their initial states across splits; exit code 1 when a state is
    shared or a game is not won.
    """

    games: Annotated[int, Range(0, 1_000_000_000)] = 0
    """At most so many of each family and split; 0 for all."""
    solve: bool = False
    """Also play the walkthrough of every ALFWorld game with the engine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solve and self.env != "alfworld":
            raise ValueError(f"--solve plays the walkthroughs of alfworld, {self.env} has none.")


_WORDS: Mapping[str, type] = MappingProxyType(
    {"list": ListGames, "pack": PackGames, "generate": GenerateGames, "check": CheckGames}
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "nothing half-written counts; start it again.")


def _main(argv: list[str]) -> None:
    args = parse_subcommand(_WORDS, "games", _DESCRIPTION, argv)
    console = Terminal(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    # ALFWorld's rules and games
    from experiments import games

    actions = {
        ListGames: games.list_games,
        PackGames: games.pack_games,
        GenerateGames: games.generate_games,
        CheckGames: games.check_games,
    }
    actions[type(args)](args, console)
