"""The official games of a downloaded tree.

`alfworld-download` makes `json_2.1.1/<split>/<task>/<trial>/{game.tw-pddl,traj_data.json}`.

Reading 3,700 games takes seconds, so the index is cached as JSON under `$XDG_CACHE_HOME/ictjax`
(default `~/.cache/ictjax`), with a stamp of the sizes and times of all files: a tree that changed
is read again.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from typing import Any

from envs.alfworld.index import (
    FAMILY_OF,
    MAX_GAME_BYTES,
    OFFICIAL_SPLITS,
    Index,
    check_game,
    check_key,
    remedy,
    shown,
)
from envs.alfworld.tables import FAMILIES
from envs.cache_files import cache_file, write_json

FOLDER = "json_2.1.1"

_FORMAT = 2  # of the cached index
_GAME, _TRAJECTORY = "game.tw-pddl", "traj_data.json"
_TAIL_BYTES = 4096
# inside a JSON string the quotes would be escaped
_SOLVABLE = re.compile(rb'"solvable":\s*(true|false)')
_TASK_TYPE = re.compile(rb'"task_type":\s*"(\w+)"')


class Tree:
    """A tree in the official layout; `path` is the folder that holds `json_2.1.1`, or that folder
    itself.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._root = path / FOLDER if (path / FOLDER).is_dir() else path

    @property
    def path(self) -> pathlib.Path:
        """The folder given."""
        return self._path

    @staticmethod
    def fits(path: pathlib.Path) -> bool:
        """Whether there is such a tree at `path`, complete or not."""
        return any(
            (root / split).is_dir() for root in (path / FOLDER, path) for split in OFFICIAL_SPLITS
        )

    def index(self) -> Index:
        """The playable games, from the cache where the tree is unchanged. Unreadable games are
        listed in `damaged`.
        """
        return _cached_index(str(self._root.absolute()))

    def load(self, key: str) -> dict[str, Any]:
        """The content of one game."""
        check_key(key)
        path = self._root / key / _GAME
        try:
            return check_game(_load(path))
        except FileNotFoundError:
            raise ValueError(
                f"There is no game {key} in {self._path}: {remedy(self._path)} fetches the"
                " official games."
            ) from None
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The game file {path} is damaged ({error}): {remedy(self._path, '-f')}"
                " fetches it again."
            ) from error

    def trials(self) -> Iterator[tuple[str, os.stat_result | None, os.stat_result | None]]:
        """Every trial that has a trajectory, in order: key, and what the file system says of its
        two files. A task folder that cannot be listed is given by its own name. Raises ValueError
        when that is so of a split.
        """
        for split in OFFICIAL_SPLITS:
            try:
                tasks = _folders(f"{self._root}/{split}")
            except OSError as error:
                raise ValueError(
                    f"The ALFWorld games in {self._root}/{split} cannot be listed"
                    f" ({error.strerror}): check the folder and its permissions."
                ) from error
            for task in tasks:
                try:
                    trials = _folders(f"{self._root}/{split}/{task}")
                except OSError:
                    yield f"{split}/{task}", None, None
                    continue
                for trial in trials:
                    folder = f"{self._root}/{split}/{task}/{trial}"
                    trajectory = _stat(f"{folder}/{_TRAJECTORY}")
                    if trajectory is not None:
                        yield f"{split}/{task}/{trial}", _stat(f"{folder}/{_GAME}"), trajectory


@functools.cache
def _cached_index(root: str) -> Index:
    tree = Tree(pathlib.Path(root))
    trials = list(tree.trials())
    stamp = hashlib.sha256()
    for key, *stats in trials:
        times = [(found.st_size, found.st_mtime_ns) if found else None for found in stats]
        stamp.update(os.fsencode(f"{key} {times}\n"))
    path = _cache_path(root)
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
        if cached["stamp"] == stamp.hexdigest():
            return Index.from_json(cached["index"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    index = _read_index(pathlib.Path(root), trials)
    # a read-only home costs the time to read the tree again, no more
    with contextlib.suppress(OSError):
        write_json(path, {"stamp": stamp.hexdigest(), "index": index.to_json()})
    return index


def _read_index(
    root: pathlib.Path, trials: list[tuple[str, os.stat_result | None, os.stat_result | None]]
) -> Index:
    games: dict[str, dict[str, list[str]]] = {
        split: {family: [] for family in FAMILIES} for split in OFFICIAL_SPLITS
    }
    left_out: dict[str, int] = {}
    damaged = []
    manifest = hashlib.sha256()
    for key, found, _ in sorted(trials, key=lambda trial: trial[0]):
        try:
            reason, family, tail = _judge(root / check_key(key), key, found)
        except (OSError, ValueError):
            damaged.append(shown(key))
            continue
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        games[key.split("/")[0]][family].append(key)
        manifest.update(f"{key} {found.st_size if found else 0} ".encode() + tail + b"\n")
    return Index(
        games={
            split: {family: tuple(keys) for family, keys in of.items()}
            for split, of in games.items()
        },
        manifest=manifest.hexdigest(),
        left_out=dict(sorted(left_out.items())),
        damaged=tuple(damaged),
    )


def _judge(folder: pathlib.Path, key: str, found: os.stat_result | None) -> tuple[str, str, bytes]:
    """(why a trial is not playable or "", its family, the end of its game file). Raises OSError or
    ValueError when it cannot be read.
    """
    if "movable" in key or "Sliced" in key:
        return "movable receptacle or slicing", "", b""
    if found is None:
        return "no game file", "", b""
    trajectory = _read(folder / _TRAJECTORY)
    task_type = _TASK_TYPE.search(trajectory)
    # a list may hold the words too
    if task_type and trajectory.lstrip().startswith(b"{"):
        task = task_type[1].decode("ascii", "replace")
    else:
        task = _object(folder / _TRAJECTORY).get("task_type")
    if not isinstance(task, str) or task not in FAMILY_OF:
        return "other task type", "", b""
    _check_file(folder / _GAME)
    with open(folder / _GAME, "rb") as file:
        file.seek(max(found.st_size - _TAIL_BYTES, 0))
        tail = file.read(_TAIL_BYTES)
    solvable = _SOLVABLE.search(tail)
    # The key stands near the end of a whole file; a file cut short ends without a brace.
    if solvable is None or not tail.rstrip().endswith(b"}"):
        content = _object(folder / _GAME)
        if "solvable" not in content:
            return "no solvable key", "", b""
        playable = bool(content["solvable"])
    else:
        playable = solvable[1] == b"true"
    return "" if playable else "not solvable", FAMILY_OF[task], tail


def _object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError or ValueError."""
    content = _load(path)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def _load(path: pathlib.Path) -> Any:
    """The JSON in a file. Raises OSError or ValueError."""
    try:
        return json.loads(_read(path))
    except RecursionError:
        raise ValueError("it nests without end") from None


def _read(path: pathlib.Path) -> bytes:
    """Raises OSError, or ValueError for what is no file or too large."""
    _check_file(path)
    return path.read_bytes()


def _check_file(path: pathlib.Path) -> None:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise ValueError("it is no file")
    if found.st_size > MAX_GAME_BYTES:
        raise ValueError(
            f"it has {found.st_size:,} bytes, more than the {MAX_GAME_BYTES:,} that are read"
        )


def _folders(path: str) -> list[str]:
    """The folders in a folder, sorted; none where there is no such folder. Raises OSError."""
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if os.path.isdir(f"{path}/{name}"))


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _cache_path(root: str) -> pathlib.Path:
    return cache_file(
        f"alfworld-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}-{_FORMAT}.json"
    )
