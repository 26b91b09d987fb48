"""`ictjax adopt --preset NAME --adapter DIR --run-dir DIR`."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.command import run_main
from experiments.commands.train import RunArgs, read_flags, with_local_models
from experiments.console import Terminal
from experiments.local_path import check_place, command_line, local_path, typed
from experiments.presets import adapter_folder
from experiments.run_dir import check_families, check_run, open_environment

_DESCRIPTION = (
    "Makes the directory of a run whose reflector was trained elsewhere: an adapter in PEFT's"
    " format takes the place of the training, so that evaluate, report, compare, export and serve"
    " take it as they take a run."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdoptArgs(RunArgs):
    """All flags."""

    adapter: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """The trained adapter: of the reflector's model, with its rank, alpha and targets."""
    run_dir: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = (
        None
    )
    """The directory to make."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again to make the directory.")


def _main(argv: list[str]) -> None:
    args, name = read_flags(AdoptArgs, "adopt", _DESCRIPTION, argv)
    for flag, given in (("--adapter", args.adapter), ("--run-dir", args.run_dir)):
        if not given:
            raise ValueError(f"{flag} is missing: name a folder.")
    assert args.run_dir is not None
    check_place(args.run_dir, "--run-dir")
    config = with_local_models(args.settings)
    adapter = adapter_folder(local_path(args.adapter, "--adapter"), "--adapter")
    settings = config.task.environment
    environment = open_environment(settings.name, settings.options)
    check_families(environment, (*settings.train_families, *settings.heldout_families))
    if args.run_dir.exists() and check_run(args.run_dir, config, environment) != "new":
        raise ValueError(f"{args.run_dir} holds a run: name another --run-dir.")
    # JAX; flags are right when it is loaded
    from experiments.adopt import adopt

    adopt(name, config, pathlib.Path(adapter), args.run_dir, environment)
    Terminal().print(
        f"{args.run_dir} is a run whose reflector is {args.adapter}: try"
        f" `{command_line(f'evaluate --run-dir {typed(args.run_dir)}')}`.",
        highlight=False,
        soft_wrap=True,
    )
