"""The index of official games: which are playable, by split and family, what is in each, and what
a place that holds them has to offer.

Playable is what the stock `AlfredTWEnv` plays: no "movable" and no "Sliced" in the path, one of the
six task types in traj_data.json, and a game file with a true `solvable` key.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from envs.alfworld.tables import FAMILIES

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

MAX_GAME_BYTES = 16 << 20  # of one game as JSON; the largest official ones have 0.5 MB
GAME_FIELDS = ("pddl_domain", "grammar", "pddl_problem", "walkthrough", "solvable")

# how experiments.games names the folders of generated games in a tree
GENERATED_TRIAL = "trial_generated_"

FAMILY_OF = {task: family for family, task in FAMILIES.items()}
# a name that holds '|' is no part of a game id; control characters and what is no UTF-8 break lines
# and encoders
_NAME = r"[^/|\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+"
_KEY = re.compile(f"(?:{'|'.join(OFFICIAL_SPLITS)})/{_NAME}/{_NAME}")
_SELECT_SHARE = 10  # one in so many task folders of official train is held out for SELECT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """The playable games of a download."""

    games: Mapping[str, Mapping[str, tuple[str, ...]]]  # official split -> family -> keys, sorted
    # sha256 over the sorted keys, each with the size and the last 4 KiB of its game file
    manifest: str
    left_out: Mapping[str, int]  # why a trial is no playable game -> how many
    # keys of games that cannot be read, with escapes for what cannot be shown
    damaged: tuple[str, ...] = ()

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
        """Raises KeyError, TypeError, AttributeError or ValueError for what `to_json` did not
        write.
        """
        return cls(
            games={
                split: {
                    family: tuple(
                        _key_of(key, split, family) for key in data["games"][split][family]
                    )
                    for family in FAMILIES
                }
                for split in OFFICIAL_SPLITS
            },
            manifest=_text(data["manifest"]),
            left_out={_text(reason): _count(count) for reason, count in data["left_out"].items()},
            damaged=tuple(map(_text, data["damaged"])),
        )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int:  # an infinite one has no int
        raise TypeError(f"{value!r:.40} is no count")
    return value


def _key_of(key: str, split: str, family: str) -> str:
    """A key, as given. Raises ValueError when it is of another split or family."""
    if key_family(_text(key)) != family or not key.startswith(f"{split}/"):
        raise ValueError(f"{key!r} is no key of {family} in {split}")
    return key


class Source(Protocol):
    """A place that holds official games: a tree or a packed file."""

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


def key_family(key: str) -> str:
    """The family of an official key, by its task folder. Raises ValueError for a key of another
    form.
    """
    task = check_key(key).split("/")[1].partition("-")[0]
    if task not in FAMILY_OF:
        raise ValueError(
            f"The ALFWorld game {key!r} is of no family that is played here"
            f" ({', '.join(FAMILIES)})."
        )
    return FAMILY_OF[task]


def shown(key: str) -> str:
    """The name of a folder as every encoder takes it and no line is broken by it."""
    text = os.fsencode(key).decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


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
        f" {remedy(path, *(['-f'] if index.damaged else []))} completes them."
    )


def check_key(key: str) -> str:
    """The key of an official game, as given. Raises ValueError for anything that is none."""
    if not _KEY.fullmatch(key) or ".." in key.split("/"):
        raise ValueError(
            "A key of an ALFWorld game reads 'SPLIT/TASK/TRIAL' or 'generated/ROOMS/SEED', got"
            f" {key!r}."
        )
    return key


def check_game(content: Any) -> dict[str, Any]:
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


def remedy(path: pathlib.Path, *flags: str) -> str:
    """The command that completes the games at a path, for the end of an error message."""
    if path.is_file():
        return "`ictjax games pack` of a complete download"
    return f"`{' '.join(('alfworld-download', '--data-dir', str(path), *flags))}`"
