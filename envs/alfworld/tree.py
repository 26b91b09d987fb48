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
from collections.abc import Iterator
from typing import Any

from envs.alfworld.index import (
    FAMILY_OF,
    OFFICIAL_SPLITS,
    Index,
    check_game,
    check_key,
    remedy,
)
from envs.alfworld.tables import FAMILIES
from envs.cache_files import cache_file, write_json

FOLDER = "json_2.1.1"

_FORMAT = 1  # of the cached index
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
            return check_game(json.loads(path.read_bytes()))
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

    def trials(self) -> Iterator[tuple[str, os.stat_result | None, os.stat_result]]:
        """Every trial that has a trajectory, in order: key, and what the file system says of its
        two files.
        """
        for split in OFFICIAL_SPLITS:
            for task in _folders(f"{self._root}/{split}"):
                for trial in _folders(f"{self._root}/{split}/{task}"):
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
        times = [(stat.st_size, stat.st_mtime_ns) if stat else None for stat in stats]
        stamp.update(f"{key} {times}\n".encode())
    path = _cache_path(root)
    try:
        cached = json.loads(path.read_text(encoding="utf-8"))
        if cached["stamp"] == stamp.hexdigest():
            return Index.from_json(cached["index"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    index = _read_index(pathlib.Path(root), trials)
    # a read-only home costs the time to read the tree again, no more
    with contextlib.suppress(OSError):
        write_json(path, {"stamp": stamp.hexdigest(), "index": index.to_json()})
    return index


def _read_index(
    root: pathlib.Path, trials: list[tuple[str, os.stat_result | None, os.stat_result]]
) -> Index:
    games: dict[str, dict[str, list[str]]] = {
        split: {family: [] for family in FAMILIES} for split in OFFICIAL_SPLITS
    }
    left_out: dict[str, int] = {}
    damaged = []
    manifest = hashlib.sha256()
    for key, stat, _ in sorted(trials, key=lambda trial: trial[0]):
        try:
            reason, family, tail = _judge(root / key, key, stat)
        except (OSError, ValueError):
            damaged.append(key)
            continue
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        games[key.split("/")[0]][family].append(key)
        manifest.update(f"{key} {stat.st_size if stat else 0} ".encode() + tail + b"\n")
    return Index(
        games={
            split: {family: tuple(keys) for family, keys in of.items()}
            for split, of in games.items()
        },
        manifest=manifest.hexdigest(),
        left_out=dict(sorted(left_out.items())),
        damaged=tuple(damaged),
    )


def _judge(folder: pathlib.Path, key: str, stat: os.stat_result | None) -> tuple[str, str, bytes]:
    """(why a trial is not playable or "", its family, the end of its game file). Raises OSError or
    ValueError when it cannot be read.
    """
    if "movable" in key or "Sliced" in key:
        return "movable receptacle or slicing", "", b""
    if stat is None:
        return "no game file", "", b""
    found = _TASK_TYPE.search((folder / _TRAJECTORY).read_bytes())
    task = (
        found[1].decode()
        if found
        else json.loads((folder / _TRAJECTORY).read_bytes()).get("task_type")
    )
    if task not in FAMILY_OF:
        return "other task type", "", b""
    with open(folder / _GAME, "rb") as file:
        file.seek(max(stat.st_size - _TAIL_BYTES, 0))
        tail = file.read()
    solvable = _SOLVABLE.search(tail)
    # The key stands near the end of a whole file; a file cut short ends without a brace.
    if solvable is None or not tail.rstrip().endswith(b"}"):
        content = json.loads((folder / _GAME).read_bytes())
        if "solvable" not in content:
            return "no solvable key", "", b""
        playable = bool(content["solvable"])
    else:
        playable = solvable[1] == b"true"
    return "" if playable else "not solvable", FAMILY_OF[task], tail


def _folders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _cache_path(root: str) -> pathlib.Path:
    return cache_file(f"alfworld-{hashlib.sha256(root.encode()).hexdigest()[:16]}-{_FORMAT}.json")
