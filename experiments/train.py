"""`python -m experiments.train --preset NAME --run-dir DIR`: trains a reflector, or goes on where
an earlier start was stopped.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from envs.registry import load_environment
from experiments import plan_shapes
from experiments.console import LiveProgress
from experiments.presets import PRESETS, in_folders, on_named_mesh, preset, task
from experiments.run_dir import check_families, flag_value, open_pool, open_run, parse, run_main
from experiments.tasks import with_options
from ictjax.metrics import read_metrics
from ictjax.run_config import TrainConfig
from ictjax.train import train

_DESCRIPTION = (
    "Trains a reflector by GRPO to write better system prompts for a frozen actor. A run that was"
    " stopped goes on when it is started again with the same flags. Every field of the preset can"
    " be overridden, for example --meta.fresh-games 5."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Command line of experiments.train."""

    preset: str
    """Which configuration to start from."""
    run_dir: pathlib.Path | None = None
    """Where the run is written [default: runs/PRESET]."""
    train_env: str | None = None
    """Another task to train the preset's models on, for example alfworld."""
    train_options: str = ""
    """Options of the environment as KEY=VALUE,KEY=VALUE, for example data=generated."""
    mesh: str | None = None
    """Devices by name, for example v5e-8 [default: one device, or what --actor.mesh and
    --reflector.mesh say].
    """
    check: bool = False
    """Build model, cache and update on shapes alone, print parameters and memory, and end."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """Fields of the preset."""


def start(preset_name: str, config: TrainConfig, run_dir: pathlib.Path, console: Console) -> None:
    """Trains, or continues, one run."""
    folders = in_folders(config)
    settings = config.task.environment
    environment = load_environment(settings.name, settings.options)
    check_families(environment, (*settings.train_families, *settings.heldout_families))
    open_run(run_dir, preset_name, config, environment)
    lines = read_metrics(run_dir)
    done = lines[-1]["iteration"] if lines else 0
    if done == config.iterations and (run_dir / "checkpoints" / str(done)).is_dir():
        console.print(
            f"{run_dir} is finished: {done} iterations. Another --run-dir starts another run.",
            highlight=False,
            soft_wrap=True,
        )
        return
    pool = open_pool(settings)
    with (
        pool,
        LiveProgress("iterations", done=done, total=config.iterations, console=console) as progress,
    ):
        train(folders, run_dir, environment=environment, pool=pool, progress=progress)
    console.print(
        f"Trained {config.iterations} iterations. Results: {run_dir / 'metrics.jsonl'}",
        highlight=False,
        soft_wrap=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    run_main(
        lambda: _main(argv), "start it again with the same flags to go on from its last checkpoint."
    )


def _main(argv: list[str]) -> None:
    name = flag_value(argv, "--preset")
    if name is None:
        if not {"--help", "-h"} & set(argv):
            raise ValueError(f"--preset is missing: use one of {', '.join(PRESETS)}.")
        name = "pocket-minihack"  # whose numbers --help then shows
    train_env, config = flag_value(argv, "--train-env"), preset(name)
    chosen = config.task if train_env is None else task(name, train_env)
    other = flag_value(argv, "--task.environment.name")
    # options are of the environment that they were written for
    if other not in (None, chosen.environment.name):
        chosen = dataclasses.replace(
            chosen, environment=dataclasses.replace(chosen.environment, name=other, options={})
        )
    config = config.on(with_options(chosen, flag_value(argv, "--train-options") or ""))
    devices = flag_value(argv, "--mesh")
    default = TrainArgs(
        preset=name, config=config if devices is None else on_named_mesh(config, devices)
    )
    args = parse(TrainArgs, f"{_DESCRIPTION} Presets: {', '.join(PRESETS)}.", argv, default)
    console = Console()
    if args.check:
        plan_shapes.check(args.config, console)
        return
    start(args.preset, args.config, args.run_dir or pathlib.Path("runs") / args.preset, console)


if __name__ == "__main__":
    main()
