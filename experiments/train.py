"""Starts a training run, or goes on with one, in its run directory."""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
from rich.console import Console

from envs.api import Environment
from experiments.commands.train import main
from experiments.console import LiveProgress
from experiments.contents import content_hashes
from experiments.host_differences import check_same_files
from experiments.limits import check_idle, check_limits, check_meshes, sampling_attention
from experiments.manifest import make_manifest, now
from experiments.memory import check_memory
from experiments.plan_run import check_plan
from experiments.presets import in_folders
from experiments.remote_run import Sender
from experiments.resume import check_models, going_on, incomplete, newest_checkpoint
from experiments.run_dir import (
    Start,
    new_run,
    open_pool,
    read_manifest,
    read_run,
    set_aside,
    write_manifest,
)
from experiments.run_lock import RunLock, RunLost
from experiments.shapes import model_shape
from experiments.watch import OwnScreen
from ictjax.checkpoint import check_space
from ictjax.hosts import ALONE, Hosts
from ictjax.mesh import open_mesh
from ictjax.metrics import read_metrics
from ictjax.models.attention_choice import platform_of, resolve
from ictjax.players import check_language, trained_shapes
from ictjax.run_config import TrainConfig
from ictjax.run_files import gaps
from ictjax.train import TrainProgress, train


def start(
    preset: str | None,
    config: TrainConfig,
    run_dir: pathlib.Path,
    environment: Environment,
    console: Console,
    *,
    how: Start,
    sender: Sender | None = None,
    hosts: Hosts = ALONE,
    even_so: bool = False,
) -> None:
    """Trains, or continues, one run.

    Args:
      preset: what the configuration started from, where known.
      how: what is in the directory (see `run_dir.check_run`), or to be done with it.
      sender: sends the run directory to the address that it belongs to.
      hosts: that train together, each calls this.
      even_so: begin although devices are left idle, or the plan says that memory does not suffice.

    Raises:
      ValueError: what does not fit together, before any weight is read. A new directory is gone
        again then.
    """
    if how == "go on":
        with hosts.told():
            lines = read_metrics(run_dir)
        done = lines[-1]["iteration"] if lines else 0
        if done == config.iterations == newest_checkpoint(run_dir):
            _say(
                console,
                f"{run_dir} is finished: {done} iterations. Give more --iterations to go on;"
                " another --run-dir starts another run.",
            )
            if lost := gaps(run_dir, done):
                _say(console, incomplete(run_dir, lost))
            return
    with hosts.told():
        check_limits(config)
        check_meshes(config)
        devices = jax.devices()  # of a CPU, one is as good as all
        check_idle(config, devices, even_so=even_so or devices[0].platform == "cpu")
        reflector = config.reflector
        attention = resolve(
            config.learner.attention, model_shape(reflector), platform_of(open_mesh(reflector.mesh))
        )
        sampling = sampling_attention(config)
        check_memory(config)
        if not even_so:
            check_plan(config, own_copies=hosts.own_copies)
        folders = in_folders(config)
        check_language(folders)
        if hosts.first or not hosts.own_copies:  # others keep the one that they have fetched
            check_space(
                run_dir / "checkpoints", trained_shapes(folders), config.num_kept_checkpoints
            )
        models = content_hashes(folders)
        named = [str(device) for device in devices]
        manifest = make_manifest(preset, config, environment, named, models, attention, sampling)
    check_same_files(hosts, models, manifest["games_sha256"])
    with contextlib.ExitStack() as resources:
        with hosts.told():
            lock = None
            if not hosts.first:
                pass  # the first host makes the directory, and holds it
            elif how == "go on":
                lock = resources.enter_context(RunLock(run_dir))
                manifest = read_manifest(run_dir) or manifest
                check_models(run_dir, manifest.get("models", {}), folders, models)
                resumed = resources.enter_context(
                    going_on(
                        run_dir,
                        lock,
                        config,
                        read_run(run_dir),
                        manifest,
                        models,
                        attention,
                        sampling,
                    )
                )
                for line in resumed.lines(run_dir):
                    _say(console, line)
            else:
                if how == "restart":
                    _say(console, f"The run that was in {run_dir} is now {set_aside(run_dir)}.")
                lock = resources.enter_context(new_run(run_dir, config, manifest))
        hosts.meet()
        kind = jax.devices()[0].device_kind
        _say(
            console,
            f"Training up to iteration {config.iterations} on {len(devices)} x {kind}; attention of"
            f" the update: {attention}.",
        )
        ways = "; ".join(f"{name} {way}" for name, way in sampling.items())
        _say(console, f"Attention of the samplers: {ways}.")
        with hosts.told():
            pool = resources.enter_context(open_pool(config.task.environment))
            progress = resources.enter_context(
                LiveProgress(
                    "iterations",
                    done=newest_checkpoint(run_dir),
                    total=config.iterations,
                    console=console,
                    screen=None if lock is None else OwnScreen(run_dir),
                )
            )
        train(
            folders,
            run_dir,
            environment=environment,
            pool=pool,
            progress=(
                progress
                if lock is None
                else _Locked(run_dir=run_dir, lock=lock, sender=sender, progress=progress)
            ),
            kept=None if sender is None else sender.poke,
            hosts=hosts,
        )
        if hosts.first:
            write_manifest(run_dir, read_manifest(run_dir) | {"finished": now()})
    _say(
        console,
        f"Trained {config.iterations} iterations. Results: {run_dir / 'metrics.jsonl'}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Locked:
    """Passes progress on as long as the run directory is ours, and where it was, and sends what is
    new in it.
    """

    run_dir: pathlib.Path
    lock: RunLock
    sender: Sender | None
    progress: TrainProgress

    def reading(self, finished: int, total: int) -> None:
        self._check()
        self.progress.reading(finished, total)

    def phase(self, name: str, finished: int, total: int) -> None:
        self._check()
        self.progress.phase(name, finished, total)

    def iteration(self, number: int, total: int, metrics: dict[str, Any]) -> None:
        self._check()
        if self.sender is not None:
            self.sender.poke()
        self.progress.iteration(number, total, metrics)

    def _check(self) -> None:
        self.lock.check()
        try:
            (self.run_dir / "config.json").stat()
        except FileNotFoundError:  # what is written next would make another directory of this name
            raise RunLost(
                f"{self.run_dir} was moved or removed while it was trained (it has no config.json):"
                " put it back, or name its new place with --run-dir, and start it again."
            ) from None
        except OSError:  # a network disk that is away for a moment
            pass


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
