"""`ictjax bundle DIR`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.filesize import decimal

from experiments.command import parse, run_by_position, run_main
from experiments.console import Terminal
from experiments.local_path import check_place
from experiments.packed_folder import ENDINGS, stem
from experiments.remote_run import is_remote, readable, steps_of

_DESCRIPTION = (
    "Puts together what others need to check the results of a run: prompts, contexts, episodes,"
    " metrics, settings, manifest and evaluations, without weights, and with marks in the place of"
    " this machine's paths. `ictjax report`, `compare` and `watch` read a bundle as they read a"
    " run, packed or not. The same run gives the same bytes."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleArgs:
    """All arguments."""

    run_dir: Annotated[
        pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR", help_behavior_hint="")
    ]
    """The run, for example runs/demo, finished or not."""
    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: DIR.tar.gz)"),
    ] = None
    """A file that ends in .tar.gz, or a folder."""
    force: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Replace a bundle that is there."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence where there is no run, or something that is
    not replaced.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to write the bundle.")


def _main(argv: list[str]) -> None:
    args = parse(BundleArgs, "bundle", _DESCRIPTION, run_by_position(argv))
    # what reads runs takes a moment to load
    from experiments.bundle import check_out, write_bundle

    console, named = Terminal(), args.run_dir
    if not is_remote(named):
        named = named.resolve()
    name = (stem(named) if named.is_file() else named.name) or "run"
    out = args.out or (pathlib.Path() if is_remote(named) else named.parent) / (name + ENDINGS[0])
    check_out(out, named, force=args.force)
    check_place(out.parent, "--out")
    with readable(args.run_dir) as run_dir:
        written = write_bundle(run_dir, name, steps_of(args.run_dir), out)
    console.print(
        f"Wrote {written.num_files} files to {out}: {decimal(written.on_disk)}"
        f" ({decimal(written.num_bytes)} of text), without weights.",
        soft_wrap=True,
    )
    for sentence in written.unfinished:
        console.print(f"Not finished: {sentence}", soft_wrap=True)
