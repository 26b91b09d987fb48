"""Where the games of ALFWorld come from: a tree, a packed file, or the generator."""

import os
import pathlib
from typing import Any

from envs.alfworld.generate import generate, parse_key
from envs.alfworld.index import Source
from envs.alfworld.tree import FOLDER, Tree

_DEFAULT = "~/.cache/alfworld"


def open_source(data: str = "auto") -> Source | None:
    """The official games that `data` asks for; None when games are to be generated.

    `data` is "auto" ($ALFWORLD_DATA, or where that is not set ~/.cache/alfworld, else None),
    "official" (the same, and they must be there), "generated", or the path of a tree or a packed
    file. Raises ValueError when what it asks for is not there, or $ALFWORLD_DATA names no games.
    """
    if data == "generated":
        return None
    if data not in ("auto", "official"):
        source = _source_at(data)
        if source is None:
            raise ValueError(
                f"There are no ALFWorld games at {data!r}: give a folder that holds {FOLDER}, or a"
                " file that `ictjax games pack` wrote."
            )
        return source
    named = os.environ.get("ALFWORLD_DATA", "")
    source = _source_at(named) or _source_at(os.path.expandvars(named)) if named else None
    if source is None:
        source = _source_at(_DEFAULT)
        # the package names its default place itself, whether or not there is anything
        if named and os.path.expanduser(named) != os.path.expanduser(_DEFAULT):
            raise ValueError(
                f"There are no ALFWorld games at ALFWORLD_DATA={named!r}: correct it, unset it, or"
                " choose with data=generated or data=FOLDER."
            )
    if source is None and data == "official":
        raise ValueError(
            "No official ALFWorld games are in $ALFWORLD_DATA or ~/.cache/alfworld:"
            " alfworld-download fetches them; data=generated needs none."
        )
    return source


def load_game(key: str, data: str = "auto") -> dict[str, Any]:
    """The content of a game by its key, official ("train/TASK/TRIAL") or generated
    ("generated/ROOMS/SEED").

    Raises ValueError, naming it, for a game that does not exist or is damaged.
    """
    if key.startswith("generated/"):
        rooms, seed = parse_key(key)
        return generate(seed, rooms)
    source = open_source("official" if data == "auto" else data)
    if source is None:
        raise ValueError(f"The game {key} is no generated one: data={data} has only those.")
    return source.load(key)


def _source_at(place: str) -> Source | None:
    path = pathlib.Path(os.path.expanduser(place))
    if path.is_file():
        from envs.alfworld.pack import Pack  # SQLite is for those who have a packed file

        return Pack(path)
    return Tree(path) if Tree.fits(path) else None
