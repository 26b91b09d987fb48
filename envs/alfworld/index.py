"""The official games of a downloaded tree: which are playable, by split and family, and what is in
them.

`alfworld-download` makes `json_2.1.1/<split>/<task>/<trial>/{game.tw-pddl,traj_data.json}`.
Playable is what the stock `AlfredTWEnv` plays: no "movable" and no "Sliced" in the path, one of the
six task types in traj_data.json, and a game file with a true `solvable` key.

Reading 3,700 games takes seconds, so the index is cached as JSON under `$XDG_CACHE_HOME/ictjax`
(default `~/.cache/ictjax`), with a stamp of the sizes and times of all files: a tree that changed
is read again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from envs.alfworld.tables import FAMILIES
from envs.cache_files import cache_file, write_json

OFFICIAL_SPLITS = ("train", "valid_seen", "valid_unseen")
COUNTS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "train": {"clean": 650, "cool": 533, "heat": 459, "look": 308, "pick_two": 813, "put": 790},
        "valid_seen": {"clean": 27, "cool": 25, "heat": 16, "look": 13, "pick_two": 24, "put": 35},
        "valid_unseen": {
            "clean": 31,
            "cool": 21,
            "heat": 23,
            "look": 18,
            "pick_two": 17,
            "put": 24,
        },
    }
)
"""Playable games in a complete download."""

GAME_FIELDS = ("pddl_domain", "grammar", "pddl_problem", "walkthrough", "solvable")

# how experiments.games names the folders of generated games in a tree
GENERATED_TRIAL = "trial_generated_"

_FORMAT = 1
_FOLDER, _GAME, _TRAJECTORY = "json_2.1.1", "game.tw-pddl", "traj_data.json"
_FAMILY_OF = {task: family for family, task in FAMILIES.items()}
_TAIL_BYTES = 4096
# inside a JSON string the quotes would be escaped
_SOLVABLE = re.compile(rb'"solvable":\s*(true|false)')
_TASK_TYPE = re.compile(rb'"task_type":\s*"(\w+)"')
_KEY = re.compile(r"(?:train|valid_seen|valid_unseen)/[^/|]+/[^/|]+")
_SELECT_SHARE = 10  # one in so many task folders of official train is held out for SELECT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """The playable games of a download."""

    games: Mapping[str, Mapping[str, tuple[str, ...]]]  # official split -> family -> keys, sorted
    # sha256 over the sorted keys, each with the size and the last 4 KiB of its game file
    manifest: str
    left_out: Mapping[str, int]  # why a trial is no playable game -> how many
    damaged: tuple[str, ...] = ()  # keys of game files that cannot be read

    @property
    def official(self) -> bool:
        """Whether the benchmark's own games are among them; a tree that experiments.games wrote has
        none.
        """
        keys = (key for of in self.games.values() for family in of.values() for key in family)
        return any(not key.split("/")[-1].startswith(GENERATED_TRIAL) for key in keys)

    def count(self, split: str) -> int:
        """Playable games of an official split."""
        return sum(map(len, self.games.get(split, {}).values()))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Index":
        """Raises KeyError, TypeError or AttributeError for what `to_json` did not write."""
        return cls(
            games={
                split: {family: tuple(keys) for family, keys in of.items()}
                for split, of in data["games"].items()
            },
            manifest=data["manifest"],
            left_out=dict(data["left_out"]),
            damaged=tuple(data["damaged"]),
        )


class Source(Protocol):
    """Where official games come from: a tree or a packed file."""

    @property
    def path(self) -> pathlib.Path:
        """The folder or file."""
        ...

    def index(self) -> Index:
        """Its playable games."""
        ...

    def load(self, key: str) -> dict[str, Any]:
        """The content of one game (GAME_FIELDS). Raises ValueError, naming it, when it is missing
        or damaged.
        """
        ...


class Tree:
    """A tree in the official layout; `path` is the folder that holds `json_2.1.1`, or that folder
    itself.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._root = path / _FOLDER if (path / _FOLDER).is_dir() else path

    @property
    def path(self) -> pathlib.Path:
        """The folder given."""
        return self._path

    @staticmethod
    def fits(path: pathlib.Path) -> bool:
        """Whether there is such a tree at `path`, complete or not."""
        return any(
            (root / split).is_dir() for root in (path / _FOLDER, path) for split in OFFICIAL_SPLITS
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
            return check_game(json.loads(path.read_bytes()), str(path))
        except FileNotFoundError:
            raise ValueError(
                f"There is no game {key} in {self._path}: {_remedy(self._path)} fetches the"
                " official games."
            ) from None
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The game file {path} is damaged ({error}): {_remedy(self._path, force=True)}"
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


def open_source(data: str = "auto") -> Source | None:
    """The official games that `data` asks for; None when games are to be generated.

    `data` is "auto" ($ALFWORLD_DATA, then ~/.cache/alfworld, else None), "official" (the same, and
    they must be there), "generated", or the path of a tree or a packed file. Raises ValueError when
    what it asks for is not there.
    """
    if data == "generated":
        return None
    if data not in ("auto", "official"):
        source = _source_at(pathlib.Path(data).expanduser())
        if source is None:
            raise ValueError(
                f"There are no ALFWorld games at {data!r}: give a folder that holds {_FOLDER}, or a"
                " file that experiments.games pack wrote."
            )
        return source
    places = [os.environ.get("ALFWORLD_DATA"), "~/.cache/alfworld"]
    for place in filter(None, places):
        source = _source_at(pathlib.Path(os.path.expandvars(place)).expanduser())
        if source is not None:
            return source
    if data == "official":
        raise ValueError(
            "No official ALFWorld games are in $ALFWORLD_DATA or ~/.cache/alfworld:"
            " alfworld-download fetches them; data=generated needs none."
        )
    return None


def load_game(key: str, data: str = "auto") -> dict[str, Any]:
    """The content of a game by its key, official ("train/TASK/TRIAL") or generated
    ("generated/ROOMS/SEED").

    Raises ValueError, naming it, for a game that does not exist or is damaged.
    """
    if key.startswith("generated/"):
        from envs.alfworld.generate import generate, parse_key

        rooms, seed = parse_key(key)
        return generate(seed, rooms)
    source = open_source("official" if data == "auto" else data)
    if source is None:
        raise ValueError(f"The game {key} is no generated one: data={data} has only those.")
    return source.load(key)


def key_family(key: str) -> str:
    """The family of an official key, by its task folder. Raises ValueError for a key of another
    form.
    """
    task = check_key(key).split("/")[1].partition("-")[0]
    if task not in _FAMILY_OF:
        raise ValueError(
            f"The ALFWorld game {key!r} is of no family that is played here"
            f" ({', '.join(FAMILIES)})."
        )
    return _FAMILY_OF[task]


def held_out(key: str) -> bool:
    """Whether a game of official train belongs to SELECT: whole task folders do, by the hash of
    their name.
    """
    return int(hashlib.sha256(key.split("/")[1].encode()).hexdigest()[:8], 16) % _SELECT_SHARE == 0


def what_is_missing(index: Index, path: pathlib.Path) -> str:
    """One sentence on what a download lacks, with counts and the command that completes it; empty
    when nothing is missing.

    Of a tree of generated games only damaged ones are missed.
    """
    if index.count("train") and not index.official:
        first = f"the first is {index.damaged[0]}" if index.damaged else ""
        return (
            f"{len(index.damaged)} games in {path} are damaged, {first}: generate them again."
            if first
            else ""
        )
    expected = {split: sum(COUNTS[split].values()) for split in OFFICIAL_SPLITS}
    if (
        all(index.count(split) >= expected[split] for split in OFFICIAL_SPLITS)
        and not index.damaged
    ):
        return ""
    counts = ", ".join(
        f"{split} {index.count(split):,} of {expected[split]:,}" for split in OFFICIAL_SPLITS
    )
    damaged = (
        f" ({len(index.damaged)} damaged, the first is {index.damaged[0]})" if index.damaged else ""
    )
    return (
        f"The ALFWorld games in {path} are incomplete: {counts}{damaged};"
        f" {_remedy(path, force=bool(index.damaged))} completes them."
    )


def check_key(key: str) -> str:
    """The key of an official game, as given. Raises ValueError for anything that is none."""
    if not _KEY.fullmatch(key) or ".." in key.split("/"):
        raise ValueError(
            "A key of an ALFWorld game reads 'SPLIT/TASK/TRIAL' or 'generated/ROOMS/SEED', got"
            f" {key!r}."
        )
    return key


def check_game(content: Any, name: str) -> dict[str, Any]:
    """The content, as given. Raises ValueError when a field of GAME_FIELDS is missing or of another
    type.
    """
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    for field in GAME_FIELDS:
        wanted = {"walkthrough": list, "solvable": bool}.get(field, str)
        if not isinstance(content.get(field), wanted):
            raise ValueError(f"its field {field!r} is missing or no {wanted.__name__}")
    return content


# --- the index of a tree ---


def _source_at(path: pathlib.Path) -> Source | None:
    if path.is_file():
        from envs.alfworld.pack import Pack

        return Pack(path)
    return Tree(path) if Tree.fits(path) else None


@functools.cache
def _cached_index(root: str) -> Index:
    tree = Tree(pathlib.Path(root))
    trials = list(tree.trials())
    stamp = hashlib.sha256()
    for key, *stats in trials:
        times = [(each.st_size, each.st_mtime_ns) if each else None for each in stats]
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
    for key, stat, _ in sorted(trials, key=lambda each: each[0]):
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
    if task not in _FAMILY_OF:
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
    return "" if playable else "not solvable", _FAMILY_OF[task], tail


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


def _remedy(path: pathlib.Path, force: bool = False) -> str:
    if path.is_file():
        return "`python -m experiments.games pack` of a complete download"
    return f"`alfworld-download --data-dir {path}{' -f' if force else ''}`"


def _cache_path(root: str) -> pathlib.Path:
    return cache_file(f"alfworld-{hashlib.sha256(root.encode()).hexdigest()[:16]}-{_FORMAT}.json")
