"""`ictjax report --run-dir DIR`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.command import parse, run_main
from experiments.console import Terminal
from experiments.local_path import command_line, typed
from experiments.packed_folder import stem
from experiments.remote_run import is_remote, readable

_DESCRIPTION = (
    "Writes one self-contained page, DIR/report.html, and prints the table of results. Reads the"
    " files of the run only; what is not there yet is said on the page, so a report can be made at"
    " any moment of a run."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportArgs:
    """All flags."""

    run_dir: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")]
    """The run to report on, for example runs/demo, or a bundle of one."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on a directory that cannot be reported
    on.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to write the report.")


def _main(argv: list[str]) -> None:
    args = parse(ReportArgs, "report", _DESCRIPTION, argv)
    with readable(args.run_dir) as run_dir:
        _report(run_dir, named=args.run_dir)


def _report(run_dir: pathlib.Path, *, named: pathlib.Path) -> None:
    console = Terminal()
    # figures and statistics take a second to load
    from experiments.report import tables, write_report
    from experiments.report_data import load_run

    run = load_run(run_dir)
    # of a packed bundle beside it: what it was unpacked to is removed
    beside = named.with_name(f"{stem(named)}-report.html") if named.is_file() else None
    path = write_report(run, beside)
    results = tables(run)
    if not results:
        console.print(
            "No evaluation yet: run"
            f" `{command_line(f'evaluate --run-dir {typed(named)}')}` for the table.",
            soft_wrap=True,
        )
    for table in results:
        console.print(table, "")
    if is_remote(named):
        console.print(f"Report: {typed(named)}/{path.name}", soft_wrap=True)
        console.print(f"A copy of it here: {path}", soft_wrap=True)
    else:
        console.print(f"Report: {path}", soft_wrap=True)
