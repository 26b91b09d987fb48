"""JSON that is cheap to keep and costly to make again, under `$XDG_CACHE_HOME/ictjax` (default
`~/.cache/ictjax`).
"""

import json
import os
import pathlib
from typing import Any

from envs.files import replacing


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
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data), encoding="utf-8")
