"""JSON that is cheap to keep and costly to make again, under `$XDG_CACHE_HOME/ictjax` (default
`~/.cache/ictjax`).
"""

import json
import os
import pathlib
import tempfile
from typing import Any


def cache_file(name: str) -> pathlib.Path:
    """Where the file of a name is, or would be."""
    return (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        / "ictjax"
        / name
    )


def write_json(path: pathlib.Path, data: Any) -> None:
    """Writes the file whole or not at all, its folder included. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
