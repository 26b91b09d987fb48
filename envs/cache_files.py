"""JSON that is cheap to keep and costly to make again, under `$XDG_CACHE_HOME/ictjax` (default
`~/.cache/ictjax`).
"""

import json
import os
import pathlib
from typing import Any

from envs.files import replacing


def cache_file(name: str) -> pathlib.Path:
    """Where the file of a name is, or would be. Raises ValueError where nobody knows the home
    folder.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if not named:
        home = os.path.expanduser("~")
        if home == "~":
            raise ValueError(
                "There is no home folder for what is kept from run to run: set HOME or"
                " XDG_CACHE_HOME to a folder."
            )
        named = os.path.join(home, ".cache")
    return pathlib.Path(named) / "ictjax" / name


def write_json(path: pathlib.Path, data: Any) -> None:
    """Writes the file whole or not at all, its folder included. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data), encoding="utf-8")
