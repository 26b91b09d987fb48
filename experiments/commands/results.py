"""`ictjax results DIR --format NAME`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from experiments.command import parse, run_by_position, run_main
from experiments.remote_run import readable

_DESCRIPTION = (
    "Gives the results of a run's evaluations to other programs: the tables as CSV (every number of"
    " every arm and comparison, a line each), LaTeX (booktabs) or Markdown; or the episodes as logs"
    " that `inspect view` shows. All numbers and verdicts are those of evaluation.json."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResultsArgs:
    """All arguments."""

    run_dir: Annotated[
        pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help_behavior_hint="")
    ]
    """An evaluated run, for example runs/demo, or a bundle of one."""
    format: Literal["csv", "latex", "markdown", "inspect"] = "markdown"
    """What is written. inspect needs the extra of that name."""
    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: tables are printed)"),
    ] = None
    """A file for the tables; a new folder for logs."""
    force: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Replace a file that is there."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence where there are no results, or something that
    is not replaced.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to write the results.")


def _main(argv: list[str]) -> None:
    args = parse(ResultsArgs, "results", _DESCRIPTION, run_by_position(argv))
    # what reads runs takes a moment to load
    from experiments.report_data import load_run
    from experiments.results import check_out, write_results

    check_out(args)
    with readable(args.run_dir) as run_dir:
        sys.stdout.write(write_results(load_run(run_dir), args))
