"""Run directories, which are never overwritten by mistake, and the games of a run."""

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from envs.api import Environment
from envs.pool import WorkerPool
from envs.registry import describe, known_names, load_environment
from experiments.command import unknown
from experiments.evaluation_results import prompts_file, read_results
from ictjax.json_lines import read_records
from ictjax.run_config import EnvironmentConfig, TrainConfig, differences, from_dict, to_dict
from ictjax.run_files import FOLDERS, write_lines

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
    "minihack",
    "nle",
    "alfworld",
)
_MIN_FREE_BYTES = 256 * 2**20


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


def check_run(run_dir: pathlib.Path, config: TrainConfig, environment: Environment) -> bool:
    """Whether the run directory is one of this configuration that goes on; False where a new one
    can be made. Changes nothing.

    Raises:
      ValueError: it belongs to another configuration or to other games, holds something else, or
        the disk is too full.
    """
    path = run_dir / "config.json"
    if path.is_file():
        found = differences(read_config(run_dir), to_dict(config))
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise ValueError(
                f"{run_dir} is a run of another configuration ({', '.join(found[:4])}{more}"
                f" differ): {_elsewhere()}."
            )
        _check_games(run_dir, config.task.environment, environment)
        return True
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(
            f"{run_dir} exists and is no run directory (it has no config.json): {_elsewhere()}."
        )
    _check_disk(run_dir)
    return False


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
    for line in read_records(_scored_prompts(run_dir)).values:
        if (line["arm"], line["family"]) == (arm, family):
            return line["system_prompt"]
    if arm == "trained":
        for path in sorted((run_dir / "prompts").glob("iteration_*.jsonl"), reverse=True):
            written = [
                line
                for line in read_records(path).values
                if line["family"] == family and line["system_prompt"] is not None
            ]
            if written:
                return max(written, key=lambda line: line["reward"] or 0.0)["system_prompt"]
    raise ValueError(
        f"{run_dir} has no prompt of the arm {arm!r} for {family!r}: evaluate it first (ictjax"
        f" evaluate --run-dir {run_dir}), or name another --family or --arm."
    )


def _scored_prompts(run_dir: pathlib.Path) -> pathlib.Path:
    path = run_dir / "evaluation.json"
    return prompts_file(run_dir, path.stem, read_results(path) if path.is_file() else {})


def preset_of(run_dir: pathlib.Path) -> str | None:
    """The preset that a run started from, whose models decide what the name of a task means; None
    where its manifest is missing or names none.
    """
    path = run_dir / "manifest.json"
    return read_json(path).get("preset") if path.is_file() else None


@contextlib.contextmanager
def new_run(
    run_dir: pathlib.Path,
    preset: str | None,
    config: TrainConfig,
    environment: Environment,
    devices: Sequence[str],
) -> Iterator[None]:
    """Makes the run directory with config.json and manifest.json. When the body raises before the
    run has anything to keep (an episode, a context), everything that was made is removed again.

    Args:
      preset: what the configuration started from, where known.
      devices: that the run is on, for the manifest.

    Raises:
      ValueError: the directory cannot be made.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Cannot make the run directory {run_dir} ({error.strerror}): {_elsewhere()}."
        ) from error
    try:
        manifest = _manifest(preset, config, environment, devices)
        write_lines(run_dir / "manifest.json", [json.dumps(manifest, indent=1)])
        # last: from here on the directory counts as a run
        write_lines(run_dir / "config.json", [json.dumps(to_dict(config), indent=1)])
        yield
    except Exception:
        if not any(path for name in FOLDERS for path in (run_dir / name).glob("*")):
            for path in run_dir.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in made:
                with contextlib.suppress(OSError):  # somebody else has put something there
                    folder.rmdir()
        raise


def _elsewhere() -> str:
    """How to say where else a run may go; make, where it started this program, takes a variable."""
    make = " (with make: RUN=name)" if "MAKELEVEL" in os.environ else ""
    return f"choose another --run-dir{make}"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file of a run. Raises ValueError for what is no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
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


def package_versions(names: Sequence[str]) -> dict[str, str | None]:
    """The installed version of each package; None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe_games(settings: EnvironmentConfig, environment: Environment) -> dict[str, Any]:
    """Which games are played: the environment with its options, what it says of itself (where games
    come from, how many), and their hash.
    """
    about = {"name": environment.name, "options": dict(settings.options), **describe(environment)}
    return {**about, "games_sha256": _games_sha256(settings, environment)}


def _games_sha256(settings: EnvironmentConfig, environment: Environment) -> str:
    games = hashlib.sha256()
    for family in (*settings.train_families, *settings.heldout_families):
        for split in ("train", "test"):
            games.update("\n".join(map(str, environment.games(family, split))).encode())
    return games.hexdigest()


def _check_games(
    run_dir: pathlib.Path, settings: EnvironmentConfig, environment: Environment
) -> None:
    path = run_dir / "manifest.json"
    if not path.is_file():
        return
    before = read_json(path)
    if before.get("games_sha256", "") != _games_sha256(settings, environment):
        raise ValueError(
            f"The games of {settings.name!r} are no longer those that {run_dir} was started with (a"
            f" download or a package has changed): {_elsewhere()}."
        )


def _manifest(
    preset: str | None, config: TrainConfig, environment: Environment, devices: Sequence[str]
) -> dict[str, Any]:
    games = describe_games(config.task.environment, environment)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "preset": preset,
        "argv": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
        "devices": list(devices),
        "seeds": {"training": config.seed, "evaluation": config.evaluation.seed},
        "games_sha256": games.pop("games_sha256"),
        "environment": games,
    }


def _git_revision() -> str | None:
    here = pathlib.Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
