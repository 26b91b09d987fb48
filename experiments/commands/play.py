"""`ictjax play --family eat`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from envs.api import Environment, GameId
from experiments.command import parse, run_main, unknown
from experiments.commands.games import DEFAULT
from experiments.console import Terminal
from experiments.presets import check_model
from experiments.run_dir import check_families, open_environment

_DESCRIPTION = (
    "Plays one game in the terminal: you, a scripted expert, chance, or a model. The text is the"
    " very text that an actor is shown. --record keeps the episode as one line of JSON, an"
    " ictjax.records.Trajectory."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlayArgs:
    """All flags."""

    env: Annotated[
        str,
        tyro.conf.arg(
            metavar="NAME", help_behavior_hint=f"(default: that of --game, else {DEFAULT})"
        ),
    ] = ""
    """Environment: a short name or an import path."""
    family: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Family of games; `ictjax games list` lists them."""
    split: str = "train"
    """Where the game is taken from."""
    seed: int = 0
    """Which game of the split, counted from 0; experts and chance draw from it too."""
    game: Annotated[str, tyro.conf.arg(metavar="KEY", help_behavior_hint="")] = ""
    """Instead of --split: a game's key, or its whole id 'env|family|key'."""
    options: Annotated[
        dict[str, str], tyro.conf.arg(metavar="[NAME VALUE ...]", help_behavior_hint="")
    ] = dataclasses.field(default_factory=dict)
    """Of the environment, NAME VALUE ..., for example: text compact."""
    policy: Literal["human", "expert", "random"] = "human"
    """Who plays."""
    model: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """Folder of an actor in Hugging Face layout, which then plays."""
    prompt: Annotated[
        str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: the environment's own)")
    ] = ""
    """System prompt of the model, or a file that holds it."""
    max_steps: int = 50
    """Actions until the episode ends."""
    max_turn_tokens: int = 500
    """Tokens of one reply of the model."""
    temperature: float = 0.0
    """Of the model; 0 is greedy."""
    show_actions: bool = False
    """Show the available actions below every observation."""
    record: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = (
        None
    )
    """Write the episode to this file."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed must be 0 or more, got {self.seed}.")
        if self.max_steps < 1:
            raise ValueError(f"--max-steps must be at least 1, got {self.max_steps}.")
        if self.max_turn_tokens < 1:
            raise ValueError(f"--max-turn-tokens must be at least 1, got {self.max_turn_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"--temperature must be 0 (greedy) or above, got {self.temperature}.")
        if self.model and self.policy != "human":
            raise ValueError(
                f"--model and --policy {self.policy} exclude each other: give one of them."
            )
        if self.record is not None and (
            self.record.is_dir() or not self.record.absolute().parent.is_dir()
        ):
            raise ValueError(
                f"--record {self.record} cannot be written: name a file in a folder that exists."
            )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "what was played is in the file of --record, if you named one.")


def choose(args: PlayArgs, environment: Environment) -> GameId:
    """The game that the flags name. Raises ValueError for an unknown family, split or id."""
    if "|" in args.game:
        game = GameId.parse(args.game)
        if game.env != environment.name or args.family not in ("", game.family):
            raise ValueError(
                f"--game {args.game} is not of --env {environment.name} --family"
                f" {args.family or game.family}: drop one of them."
            )
        check_families(environment, [game.family])
        return game
    if not args.family:
        raise unknown(
            "--family is missing",
            "",
            environment.families,
            f"ictjax games list --env {environment.name}",
        )
    check_families(environment, [args.family])
    if args.game:
        return GameId(env=environment.name, family=args.family, key=args.game)
    games = environment.games(args.family, args.split)
    if args.seed >= len(games):
        raise ValueError(
            f"Split {args.split!r} of {args.family} has {len(games)} games, counted from 0: --seed"
            f" {args.seed} is none."
        )
    return games[args.seed]


def _main(argv: list[str]) -> None:
    args = parse(PlayArgs, "play", _DESCRIPTION, argv)
    name = args.env or (args.game.partition("|")[0] if "|" in args.game else DEFAULT)
    environment = open_environment(name, args.options)
    game_id = choose(args, environment)
    if args.model:
        check_model(args.model, "--model")
    # a model that plays is JAX; flags are right when it is loaded
    from experiments.play import show_game

    show_game(args, name, environment, game_id, Terminal())
