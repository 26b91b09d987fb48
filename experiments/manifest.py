"""What a run was made from and with, and each time it went on: manifest.json."""

import datetime
import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from envs.api import Environment
from envs.registry import describe
from experiments.console import counting_bar
from ictjax.run_config import EnvironmentConfig, TrainConfig

PACKAGES = (  # that decide what a run computes
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
    return {**about, "games_sha256": games_sha256(settings, environment)}


def games_sha256(settings: EnvironmentConfig, environment: Environment) -> str:
    """A hash of the names of all games, split by split."""
    parts = [
        (family, split)
        for family in (*settings.train_families, *settings.heldout_families)
        for split in ("train", "test")
    ]
    games = hashlib.sha256()
    with counting_bar("finding games") as advance:  # the first time an index is made
        for done, part in enumerate(parts):
            advance(done, len(parts))
            names = "\n".join(map(str, environment.games(*part)))
            games.update(names.encode("utf-8", "surrogateescape"))
    return games.hexdigest()


def make_manifest(
    preset: str | None,
    config: TrainConfig,
    environment: Environment,
    devices: Sequence[str],
    models: Mapping[str, str],
    attention: str,
    sampling: Mapping[str, str],
) -> dict[str, Any]:
    """What a new run says of itself.

    Args:
      preset: what the configuration started from, where known.
      devices: that the run is on.
      models: see `contents.content_hashes`.
      attention: the implementation that the update uses.
      sampling: that of every sampler, by role.
    """
    games = describe_games(config.task.environment, environment)
    return {
        "started": now(),
        "preset": preset,
        "argv": program(),
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "devices": list(devices),
        "attention": attention,
        "sampling_attention": dict(sampling),
        "seeds": {"training": config.seed, "evaluation": config.evaluation.seed},
        "models": dict(models),
        "games_sha256": games.pop("games_sha256"),
        "environment": games,
    }


def now() -> str:
    """The date and the time of day, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def program() -> list[str]:
    """How this program was started."""
    return [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]


def git_revision() -> str | None:
    """The commit of this program, with "-dirty" where files differ from it; None where it is
    installed without its repository.
    """
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
