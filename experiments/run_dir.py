"""Run directories, which are never overwritten by mistake, and the games of a run."""

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from envs.api import Environment
from envs.files import replacing
from envs.pool import WorkerPool
from envs.registry import known_names, load_environment
from experiments.command import unknown
from experiments.evaluation_results import is_number, prompts_file, read_results, read_rows
from experiments.manifest import games_sha256
from experiments.resume import check_changes, newest_checkpoint, newest_record
from experiments.run_lock import FILE_NAME as LOCK
from experiments.run_lock import RunLock, check_free
from ictjax.metrics import FILE_NAME as METRICS
from ictjax.run_config import EnvironmentConfig, TrainConfig, from_dict, to_dict
from ictjax.run_files import FOLDERS, write_lines
from ictjax.trackers import FILE_NAME as TRACKING

Start = Literal["new", "go on", "restart"]
"""How a training begins: in a directory that is made, with a run that is there, or anew after that
run is moved aside.
"""

_TRAINED = (
    "config.json",
    "manifest.json",
    METRICS,
    TRACKING,
    "tensorboard",
    "checkpoints",
    *FOLDERS,
)
_STAGED = ".ictjax-start"  # how the name of a directory ends that is being made
_FORGOTTEN_S = 3600.0  # after which one that was never finished is removed

_MIN_FREE_BYTES = 32 * 2**20  # beside the checkpoints, see ictjax.checkpoint.check_space


def open_environment(name: str, options: Mapping[str, str]) -> Environment:
    """An environment that somebody typed the name of. Raises ValueError for one that cannot be
    found, with the nearest of the names there are, or that cannot be built.
    """
    names = known_names()
    if ":" not in name and name not in names:
        raise unknown(
            f"Unknown environment {name!r}", name, [*names, "an import path package.module:Class"]
        )
    return load_environment(name, options)


def check_families(environment: Environment, families: Sequence[str]) -> None:
    """Raises ValueError for a family that the environment does not have."""
    for family in families:
        if family not in environment.families:
            raise unknown(
                f"Unknown family {family!r} of {environment.name}",
                family,
                environment.families,
                f"ictjax games list --env {environment.name}",
            )


def check_run(run_dir: pathlib.Path, config: TrainConfig, environment: Environment) -> Start:
    """Whether the run directory is one of this configuration that goes on, or a new one can be made
    there. What a start left that came to nothing is no run. Changes nothing.

    Raises:
      ValueError: it is being trained, belongs to another configuration or to other games, has lost
        its checkpoints, holds something else, or the disk is too full.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is no directory: {_elsewhere()}.")
    for name in (*FOLDERS, "checkpoints", "tensorboard"):
        if (path := run_dir / name).exists() and not path.is_dir():
            raise ValueError(
                f"{path} is a file, where a run has a folder: move it away, or {_elsewhere()}."
            )
    check_free(run_dir)
    if _came_to_nothing(run_dir):
        _check_disk(run_dir)
        return "new"
    if not (run_dir / "config.json").is_file():
        raise ValueError(
            f"{run_dir} exists and is no run directory (it has no config.json): {_elsewhere()}."
        )
    manifest = read_manifest(run_dir)
    remedy = f"{_elsewhere()}, or move this one aside with --restart"
    found = read_config(run_dir)
    try:
        before = from_dict(found)
    except ValueError as error:
        raise ValueError(
            f"{run_dir} is a run of another configuration ({str(error).rstrip('.')}): {remedy}."
        ) from error
    check_changes(run_dir, before, config, manifest.get("models", {}), remedy)
    _check_games(run_dir, manifest, config.task.environment, environment, remedy)
    _check_checkpoints(run_dir, before, manifest)
    return "go on"


def check_restart(run_dir: pathlib.Path) -> Start:
    """Whether there is a run that can be moved aside. Changes nothing.

    Raises:
      ValueError: it is being trained, or is no run.
    """
    check_free(run_dir)
    if _came_to_nothing(run_dir):
        return "new"
    if not (run_dir / "config.json").is_file() and not all(
        _of_a_start(path.name) for path in run_dir.iterdir()
    ):
        raise ValueError(
            f"{run_dir} is no run directory (it has no config.json), so --restart leaves it alone:"
            f" {_elsewhere()}."
        )
    return "restart"


def _check_checkpoints(
    run_dir: pathlib.Path, before: TrainConfig, manifest: Mapping[str, Any]
) -> None:
    """A run that was killed before its first checkpoint was complete begins again; one that has
    lost them would remove all that it has done.
    """
    recorded = newest_record(run_dir)
    if newest_checkpoint(run_dir) or not recorded:
        return
    if (
        not (run_dir / "checkpoints").is_dir()
        or recorded > before.checkpoint_every  # see `ictjax.keeper.Keeper.settle`
        or "finished" in manifest
        or any(entry.get("from_iteration") for entry in manifest.get("resumed", []))
        or any(run_dir.glob("evaluation*"))
    ):
        raise ValueError(
            f"{run_dir / 'checkpoints'} holds no checkpoint, but {recorded} iterations were"
            " trained: restore it; or begin at iteration 1 with --restart, which moves this run"
            " aside."
        )


def _came_to_nothing(run_dir: pathlib.Path) -> bool:
    """Whether there is nothing in a directory, or only what a start has left that was stopped
    before it had made anything. config.json alone is somebody's own.
    """
    if _kept(run_dir):
        return False
    if (run_dir / "config.json").is_file():
        return (run_dir / "manifest.json").is_file()
    return all(_of_a_start(path.name) for path in _entries(run_dir))


def _kept(run_dir: pathlib.Path) -> bool:
    """Whether a run has anything that took time to make."""
    metrics = run_dir / METRICS
    return (
        newest_checkpoint(run_dir) > 0
        or (metrics.is_file() and metrics.stat().st_size > 0)
        or any(path.suffix != ".tmp" for name in FOLDERS for path in _entries(run_dir / name))
    )


def _of_a_start(name: str) -> bool:
    """Whether a training puts something of this name into its directory."""
    return name in _TRAINED or name.startswith(LOCK) or name.endswith(".tmp")


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def read_config(run_dir: pathlib.Path) -> dict[str, Any]:
    """The config.json of a run as it stands there. Raises ValueError where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is no run directory (it has no config.json): train first, or name another."
        )
    return read_json(path)


def read_run(run_dir: pathlib.Path) -> TrainConfig:
    """The configuration of a run. Raises ValueError where there is none, or one of another
    version.
    """
    return from_dict(read_config(run_dir))


def run_prompt(run_dir: pathlib.Path, family: str, arm: str) -> str:
    """A system prompt of a run's actor in a family.

    Args:
      run_dir: of the run.
      family: of the games.
      arm: "initial"; or "untrained" or "trained", whose prompt is that of the evaluation's first
        loop in the family. Before an evaluation "trained" is the candidate that earned most in the
        last iteration that has one of the family.

    Raises:
      ValueError: the run has no such prompt.
    """
    if arm == "initial":
        return read_run(run_dir).task.initial_prompt
    for line in _scored_prompts(run_dir):
        if (line["arm"], line["family"]) == (arm, family):
            return line["system_prompt"]
    if arm == "trained":
        for path in sorted((run_dir / "prompts").glob("iteration_*.jsonl"), reverse=True):
            written = [
                line
                for line in read_rows(path, _is_written, "restore it, or remove it")
                if line["family"] == family and line["system_prompt"] is not None
            ]
            if written:
                return max(written, key=lambda line: line["reward"] or 0.0)["system_prompt"]
    raise ValueError(
        f"{run_dir} has no prompt of the arm {arm!r} for {family!r}: evaluate it first (ictjax"
        f" evaluate --run-dir {run_dir}), or name another --family or --arm."
    )


def _is_scored(line: Mapping[str, Any]) -> bool:
    return all(isinstance(line.get(name), str) for name in ("arm", "family", "system_prompt"))


def _is_written(line: Mapping[str, Any]) -> bool:
    """Whether this is a line of `run_files.prompt_line`."""
    prompt, reward = line.get("system_prompt"), line.get("reward")
    return (
        {"system_prompt", "reward"} <= line.keys()
        and isinstance(line.get("family"), str)
        and (prompt is None or isinstance(prompt, str))
        and (reward is None or is_number(reward))
    )


def _scored_prompts(run_dir: pathlib.Path) -> list[dict[str, Any]]:
    """Those of the evaluation, a line each; none before it."""
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return []
    prompts = prompts_file(run_dir, read_results(path))
    return read_rows(prompts, _is_scored, "evaluate again, or remove it")


def read_manifest(run_dir: pathlib.Path) -> dict[str, Any]:
    """The manifest of a run; empty where there is none. Raises ValueError for one that is damaged
    in what is read of it.
    """
    path = run_dir / "manifest.json"
    if not path.is_file():
        return {}
    manifest = read_json(path)
    models, resumed = manifest.get("models", {}), manifest.get("resumed", [])
    whole = {
        "models": isinstance(models, dict) and all(isinstance(h, str) for h in models.values()),
        "resumed": isinstance(resumed, list) and all(isinstance(time, dict) for time in resumed),
        "preset": isinstance(manifest.get("preset"), str | None),
    }
    for field in whole:
        if not whole[field]:
            raise ValueError(f"{path} is damaged (its field {field}): restore it.")
    return manifest


def preset_of(run_dir: pathlib.Path) -> str | None:
    """The preset that a run started from, whose models decide what the name of a task means; None
    where its manifest is missing or names none.
    """
    return read_manifest(run_dir).get("preset")


@contextlib.contextmanager
def new_run(
    run_dir: pathlib.Path, config: TrainConfig, manifest: Mapping[str, Any]
) -> Iterator[RunLock]:
    """Makes the run directory with config.json and manifest.json, and holds its lock. A directory
    that is not there yet appears whole; into one that is there config.json comes last, which makes
    it a run. When the body raises before the run has anything to keep (an episode, a context),
    everything is as it was.

    Raises:
      ValueError: the directory cannot be made, or somebody else has just begun there.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    files = {"manifest.json": manifest, "config.json": to_dict(config)}
    try:
        if made:
            _appear(run_dir, files)
    except OSError as error:
        raise ValueError(
            f"Cannot make the run directory {run_dir} ({error.strerror}): {_elsewhere()}."
        ) from error
    try:
        with RunLock(run_dir) as lock:
            if _kept(run_dir):
                raise ValueError(f"Another run has just begun in {run_dir}: {_elsewhere()}.")
            old: dict[pathlib.Path, bytes] = {}
            try:
                if not made:
                    old = _clear(run_dir)
                    _write(run_dir, files)
                yield lock
            except BaseException:  # a signal that stops the program too
                if lock.is_held and not _kept(run_dir):
                    _clear(run_dir)
                    for path, data in old.items():
                        with replacing(path) as temporary:
                            temporary.write_bytes(data)
                raise
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()
        raise


def set_aside(run_dir: pathlib.Path) -> pathlib.Path:
    """Moves a run beside itself, so that its name is free, and returns where it is now.

    Raises:
      ValueError: it is being trained, or cannot be moved.
    """
    place = run_dir.resolve()
    number = 1
    while (aside := place.with_name(f"{place.name}.old-{number}")).exists():
        number += 1
    with RunLock(place):
        try:
            place.rename(aside)
        except OSError as error:
            raise ValueError(
                f"{run_dir} cannot be moved to {aside} ({error.strerror}): move its files yourself,"
                f" or {_elsewhere()}."
            ) from error
        (aside / LOCK).unlink(missing_ok=True)
    return aside


def _appear(run_dir: pathlib.Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    for path in run_dir.parent.iterdir():  # of starts that were killed within these lines
        if path.name.endswith(_STAGED) and time.time() - path.lstat().st_mtime > _FORGOTTEN_S:
            shutil.rmtree(path, ignore_errors=True)
    staged = run_dir.with_name(f".{secrets.token_hex(8)}{_STAGED}")
    staged.mkdir()
    try:
        _write(staged, files)
        staged.rename(run_dir)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _write(folder: pathlib.Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, data in files.items():
        write_lines(folder / name, [json.dumps(data, indent=1)])


def _clear(run_dir: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Removes what a start has made, and returns the small files of it."""
    old = {}
    for path in _entries(run_dir):
        if path.name.startswith(LOCK) or path.is_symlink():  # to another disk, for example
            continue
        if _of_a_start(path.name):
            if path.suffix == ".json":
                old[path] = path.read_bytes()
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return old


def write_manifest(run_dir: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest of a run."""
    _write(run_dir, {"manifest.json": manifest})


def _elsewhere() -> str:
    """How to say where else a run may go; make, where it started this program, takes a variable."""
    make = " (with make: RUN=name)" if "MAKELEVEL" in os.environ else ""
    return f"choose another --run-dir{make}"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file of a run. Raises ValueError for what is no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, or nested without an end
        raise ValueError(f"{path} is not readable ({error}): restore it.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object: restore it.")
    return data


def _check_disk(run_dir: pathlib.Path) -> None:
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < _MIN_FREE_BYTES:
        raise ValueError(
            f"Only {free / 2**20:.0f} MiB of disk are free for {run_dir}, a run needs"
            f" {_MIN_FREE_BYTES / 2**20:.0f}: free some space, or {_elsewhere()}."
        )


def open_pool(settings: EnvironmentConfig) -> WorkerPool:
    """The worker pool that a configuration asks for; use it as a context manager."""
    return WorkerPool(
        settings.name,
        num_workers=settings.num_workers,
        max_live_games=settings.max_live_games,
        deadline_s=settings.deadline_s,
        options=settings.options,
    )


def _check_games(
    run_dir: pathlib.Path,
    manifest: Mapping[str, Any],
    settings: EnvironmentConfig,
    environment: Environment,
    remedy: str,
) -> None:
    if manifest and manifest.get("games_sha256") != games_sha256(settings, environment):
        raise ValueError(
            f"The games of {settings.name!r} are no longer those that {run_dir} was started with (a"
            f" download or a package has changed): {remedy}."
        )
