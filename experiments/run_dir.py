"""What the entry points share: flags, signals, and run directories that are never overwritten by
mistake.
"""

import contextlib
import datetime
import hashlib
import importlib.metadata
import io
import json
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import tyro

from envs.api import Environment
from envs.pool import WorkerPool
from envs.registry import describe
from ictjax.run_config import EnvironmentConfig, TrainConfig, differences, to_dict
from ictjax.run_files import write_lines

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
_Args = TypeVar("_Args")


class Stopped(BaseException):
    """A signal asked the program to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def run_main(body: Callable[[], None], remedy: str) -> None:
    """Runs an entry point: bad input ends with one sentence and exit code 2, SIGINT and SIGTERM
    with a word on how to go on.
    """

    def stop(number: int, _frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)  # a second signal ends the program at once
        raise Stopped(number)

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        body()
    except ValueError as error:
        print(f"ictjax: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"\nictjax: stopped by {stopped}; {remedy}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def parse(
    args_type: type[_Args], description: str, argv: Sequence[str], default: _Args | None = None
) -> _Args:
    """Flags -> a dataclass. Raises ValueError, with what the parser says in one line, for flags and
    values that do not exist.
    """
    extra = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args, unknown = tyro.cli(
                args_type,
                description=description,
                args=list(argv),
                return_unknown_args=True,
                **extra,
            )
    except SystemExit as ended:
        if not ended.code:
            raise
        text = " ".join(
            re.sub("[\u2500-\u257f]|-{4,}", " ", complaint.getvalue())
            .partition("For full helptext")[0]
            .split()
        )
        raise ValueError(
            f"{text.partition('Error parsing ')[2] or text} (--help lists the flags)."
        ) from None
    if unknown:
        raise ValueError(f"Unknown flag {unknown[0]!r}: --help lists the flags.")
    return args


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag that has to be known before the others are parsed (it decides their
    defaults).
    """
    for index, each in enumerate(argv):
        if each == flag and index + 1 < len(argv):
            return argv[index + 1]
        if each.startswith(f"{flag}="):
            return each.partition("=")[2]
    return None


def check_families(environment: Environment, families: Sequence[str]) -> None:
    """Raises ValueError for a family that the environment does not have."""
    for family in families:
        if family not in environment.families:
            raise ValueError(
                f"Unknown family {family!r} of {environment.name}: use some of"
                f" {', '.join(environment.families)}."
            )


def open_run(
    run_dir: pathlib.Path, preset: str, config: TrainConfig, environment: Environment
) -> bool:
    """Makes the run directory with config.json and manifest.json, or checks that it is of this
    configuration; True if it is new.

    Raises:
      ValueError: it belongs to another configuration or to other games, holds something else, or
        the disk is too full. Nothing is changed then.
    """
    wanted, path = to_dict(config), run_dir / "config.json"
    if path.is_file():
        try:
            found = differences(json.loads(path.read_text(encoding="utf-8")), wanted)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not readable ({error}): choose a new --run-dir."
            ) from error
        if found:
            raise ValueError(
                f"{run_dir} is a run of another configuration ({', '.join(found[:4])} differ):"
                " choose a new --run-dir."
            )
        _check_games(run_dir, config.task.environment, environment)
        return False
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(
            f"{run_dir} exists and is no run directory (it has no config.json): choose a new"
            " --run-dir."
        )
    _check_disk(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"Cannot make the run directory {run_dir} ({error.strerror}): choose another --run-dir."
        ) from error
    write_lines(
        run_dir / "manifest.json", [json.dumps(_manifest(preset, config, environment), indent=1)]
    )
    # last: from here on the directory counts as a run
    write_lines(path, [json.dumps(wanted, indent=1)])
    return True


def _check_disk(run_dir: pathlib.Path) -> None:
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < _MIN_FREE_BYTES:
        raise ValueError(
            f"Only {free / 2**20:.0f} MiB of disk are free for {run_dir}, a run needs"
            f" {_MIN_FREE_BYTES / 2**20:.0f}: free some space or choose another --run-dir."
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
    before = json.loads(path.read_text(encoding="utf-8"))
    if before.get("games_sha256", "") != _games_sha256(settings, environment):
        raise ValueError(
            f"The games of {settings.name!r} are no longer those that {run_dir} was started with (a"
            " download or a package has changed): choose a new --run-dir."
        )


def _manifest(preset: str, config: TrainConfig, environment: Environment) -> dict[str, Any]:
    games = describe_games(config.task.environment, environment)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "preset": preset,
        "argv": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
        "devices": [str(device) for device in jax.devices()],
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
