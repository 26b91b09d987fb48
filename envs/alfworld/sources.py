"""Where the games of ALFWorld come from: a tree, a packed file, or the generator."""

import os
import pathlib
from typing import Any

from envs.alfworld.generate import generate, parse_key
from envs.alfworld.index import Source
from envs.alfworld.tree import FOLDER, Tree


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
                f"There are no ALFWorld games at {data!r}: give a folder that holds {FOLDER}, or a"
                " file that `ictjax games pack` wrote."
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
        rooms, seed = parse_key(key)
        return generate(seed, rooms)
    source = open_source("official" if data == "auto" else data)
    if source is None:
        raise ValueError(f"The game {key} is no generated one: data={data} has only those.")
    return source.load(key)


def _source_at(path: pathlib.Path) -> Source | None:
    if path.is_file():
        from envs.alfworld.pack import Pack  # SQLite is for those who have a packed file

        return Pack(path)
    return Tree(path) if Tree.fits(path) else None
