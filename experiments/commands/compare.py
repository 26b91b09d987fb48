"""`ictjax compare DIR ...`."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.command import parse, run_by_position, run_main
from experiments.console import Terminal
from experiments.remote_run import readable

_DESCRIPTION = (
    "Prints one table of the evaluations of several runs, for example of one preset under several"
    " seeds."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArgs:
    """All arguments."""

    run_dirs: Annotated[
        tuple[pathlib.Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="DIR ...", help_behavior_hint=""),
    ] = ()
    """Evaluated runs, for example runs/seed0 runs/seed1, bundles, or results of several runs."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 where no run is evaluated."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to print the table.")


def _main(argv: list[str]) -> None:
    args = parse(CompareArgs, "compare", _DESCRIPTION, run_by_position(argv))
    if not args.run_dirs:
        raise ValueError(
            "No run is named: give evaluated run directories, for example `ictjax compare"
            " runs/seed0 runs/seed1`."
        )
    # figures and statistics take a second to load
    from experiments.compare import compare

    with contextlib.ExitStack() as stack:
        run_dirs = tuple(stack.enter_context(readable(run_dir)) for run_dir in args.run_dirs)
        console, comparison = Terminal(), compare(run_dirs, args.run_dirs)
    console.print(comparison.table)
    if comparison.other_settings:
        differing = "; ".join(comparison.other_settings)
        console.print(f"* Other settings: {differing}.", highlight=False, markup=False)
    for reason in comparison.left_out:
        console.print(f"Left out: {reason}", highlight=False, markup=False, soft_wrap=True)
