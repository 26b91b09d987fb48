"""`ictjax pretrain`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from experiments.command import Flags, parse, run_main
from experiments.local_path import check_place
from ictjax.ranges import Range

_OUT = pathlib.Path(__file__).parents[1] / "pocket" / "checkpoints" / "both"
_DESCRIPTION = (
    "Trains the pocket models from scripted play, and measures them. Everything is made here: the"
    " episodes (scripted players in real MiniHack and ALFWorld games), the tokenizer, the actor,"
    " the reflector. The actor learns to search its prompt on MiniHack alone, then goes on with"
    " both benchmarks in equal shares. The same seed on the same machine gives the same weights. On"
    " two CPU cores the actor takes about 40 minutes for each of the two parts, the reflector 10."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainArgs(Flags):
    """What to train and how long.

    The pair in `checkpoints/both` was made with `--start checkpoints/actor` in three parts while
    the compact text still changed: 5,500 joint steps at 2e-3, 3,400 at 1.3e-3, 1,000 at 7e-4, and
    650 steps of the reflector before the last; the defaults do the same work in one go.
    """

    stage: Literal["all", "actor", "reflector", "measure"] = "all"
    """Train both models and measure them, or do one part with what the output folder holds."""
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")] = _OUT
    """Where the folders `actor` and `reflector` and measurements.json go."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Of the scripted players, the rows and the initial weights."""
    # An actor that knows MiniHack already: its weights replace the first part of the actor's
    # training. Words that it lacks are added.
    start: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = (
        None
    )
    minihack_games: Annotated[int, Range(1, 1_000_000)] = 80
    """Training games of a MiniHack family that the scripted players play, each in four ways."""
    alfworld_games: Annotated[int, Range(1, 1_000_000)] = 300
    """The same for a family of ALFWorld, whose rooms differ more."""
    minihack_steps: Annotated[int, Range(0, 1_000_000_000)] = 7000
    """Updates of the actor on MiniHack alone, about 2,000 tokens each."""
    joint_steps: Annotated[int, Range(0, 1_000_000_000)] = 9000
    """Updates of the actor on both benchmarks after that."""
    learning_rate: Annotated[float, Range(0, 1000)] = 2e-3
    """Peak of the actor's."""
    reflector_steps: Annotated[int, Range(0, 1_000_000_000)] = 1000
    """Updates of the reflector, about 4,000 tokens each."""
    right_share: Annotated[float, Range(0, 1)] = 0.31
    """Share of the reflector's targets that name the right thing and give its lesson."""
    vague_share: Annotated[float, Range(0, 1)] = 0.4
    """Share of its other targets that name nothing."""
    test_games: Annotated[int, Range(1, 1_000_000)] = 40
    """Games per family and prompt when the actor is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start is not None:
            if self.stage not in ("all", "actor"):
                raise ValueError(
                    f"--start is where an actor begins, and --stage {self.stage} has none: drop it."
                )
            if not _is_model(self.start):
                raise ValueError(
                    f"--start {self.start} holds no model (config.json is missing): name the"
                    " folder of an actor."
                )
        needed = {"reflector": ("actor",), "measure": ("actor", "reflector")}.get(self.stage, ())
        for name in needed:
            if not _is_model(self.out / name):
                raise ValueError(
                    f"--stage {self.stage} goes on with {self.out / name}, which holds no"
                    f" model: make it with --stage {name}, or name another --out."
                )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: name a folder.")
        check_place(self.out, "--out")


def _is_model(folder: pathlib.Path) -> bool:
    return (folder / "config.json").is_file()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "the stage that was under way starts again from its beginning.")


def _main(argv: list[str]) -> None:
    args = parse(PretrainArgs, "pretrain", _DESCRIPTION, argv)
    # JAX, transformers and the games
    from experiments.pretrain_pocket import pretrain

    pretrain(args)
