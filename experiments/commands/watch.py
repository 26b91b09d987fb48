"""`ictjax watch DIR`."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.command import Flags, parse, run_by_position, run_main
from experiments.console import Terminal
from experiments.remote_run import readable
from ictjax.ranges import Range

_DESCRIPTION = (
    "Shows how a training goes, beside it or afterwards: rewards so far, what went wrong, where the"
    " time goes and how much is left, the best new prompt and a game played under it. Reads the"
    " files of the run and changes none."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchArgs(Flags):
    """All arguments."""

    run_dir: Annotated[
        pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help_behavior_hint="")
    ]
    """The directory of a run, for example runs/demo."""
    once: bool = False
    """Show it once, instead of until the training ends."""
    every: Annotated[float, Range(0.1, 3600)] = 2.0
    """Seconds between two looks at the files."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 where there is no run."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to go on watching.")


def _main(argv: list[str]) -> None:
    args = parse(WatchArgs, "watch", _DESCRIPTION, run_by_position(argv))
    from experiments.watch import watch  # flags are right when configurations are loaded

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(readable(args.run_dir))
        watch(folder, Terminal(), every=args.every, once=args.once, named=args.run_dir)
