"""Starts a training run, or goes on with one, in its run directory."""

import contextlib
import pathlib

import jax
from rich.console import Console

from envs.api import Environment
from experiments.commands.train import main
from experiments.console import LiveProgress
from experiments.limits import check_limits, check_meshes
from experiments.presets import in_folders
from experiments.run_dir import new_run, open_pool
from ictjax.metrics import read_metrics
from ictjax.players import check_language
from ictjax.run_config import TrainConfig
from ictjax.train import train


def start(
    preset: str | None,
    config: TrainConfig,
    run_dir: pathlib.Path,
    environment: Environment,
    console: Console,
    *,
    goes_on: bool,
) -> None:
    """Trains, or continues, one run.

    Args:
      preset: what the configuration started from, where known.
      goes_on: the directory holds this run already (see `run_dir.check_run`).

    Raises:
      ValueError: what does not fit together, before any weight is read. A new directory is gone
        again then.
    """
    lines = read_metrics(run_dir)
    done = lines[-1]["iteration"] if lines else 0
    if done == config.iterations and (run_dir / "checkpoints" / str(done)).is_dir():
        console.print(
            f"{run_dir} is finished: {done} iterations. Another --run-dir starts another run.",
            highlight=False,
            soft_wrap=True,
        )
        return
    check_limits(config)
    check_meshes(config)
    folders = in_folders(config)
    check_language(folders)
    with contextlib.ExitStack() as resources:
        if not goes_on:
            devices = [str(device) for device in jax.devices()]
            resources.enter_context(new_run(run_dir, preset, config, environment, devices))
        pool = resources.enter_context(open_pool(config.task.environment))
        progress = resources.enter_context(
            LiveProgress(
                "iterations",
                done=done,
                total=config.iterations,
                console=console,
            )
        )
        train(folders, run_dir, environment=environment, pool=pool, progress=progress)
    console.print(
        f"Trained {config.iterations} iterations. Results: {run_dir / 'metrics.jsonl'}",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
