"""`ictjax sweep FILE`."""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.command import parse, run_main
from experiments.console import Terminal
from experiments.local_path import check_place
from experiments.wording import counted

_DESCRIPTION = (
    "Trains variants of a preset with several seeds each, evaluates them, and says what each wins"
    " beside the first one: ablations, or a search for settings. FILE (TOML) names a preset, the"
    " seeds, and of every variant the flags of `ictjax train`; experiments/pocket/ablations.toml is"
    " one. What is there already is not made again, so a sweep that was stopped goes on, and a file"
    " may get more variants and seeds later."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepArgs:
    """All arguments."""

    file: Annotated[
        pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help_behavior_hint="")
    ]
    """What is compared."""
    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/NAME of the file)"),
    ] = None
    """The folder of all runs, DIR/VARIANT/seedN, and of sweep.json and sweep.html."""
    check: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Check every flag of the file, say what would be trained, and end."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input, 1 where a variant failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to go on with what is missing.")


def _main(argv: list[str]) -> None:
    args = parse(SweepArgs, "sweep", _DESCRIPTION, argv)
    out = args.out or pathlib.Path("runs") / args.file.stem
    check_place(out, "--out")
    # flags of two other commands
    from experiments.sweep_file import read_sweep

    sweep, console = read_sweep(args.file), Terminal()
    runs = counted(len(sweep.variants) * len(sweep.seeds), "run")
    console.print(
        f"{counted(len(sweep.variants), 'variant')} x {counted(len(sweep.seeds), 'seed')} = {runs},"
        f" in {out}.",
        soft_wrap=True,
    )
    if args.check:
        for variant in sweep.variants:
            console.print(
                f"  {variant.name}: {shlex.join(variant.flags) or 'no flags'}", soft_wrap=True
            )
        return
    # statistics take a second to load
    from experiments.sweep import run_sweep

    run_sweep(sweep, out, console)
