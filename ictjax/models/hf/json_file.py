"""The small JSON files of a model folder."""

import json
import pathlib
from typing import Any

_MAX_BYTES = 2**26  # the index of a model with a million tensors has as much


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises ValueError for anything else."""
    remedy = "take the file that the checkpoint was published with"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path} has more than {_MAX_BYTES >> 20} MB: {remedy}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): {remedy}") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {remedy}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is JSON nested too deeply to be read: {remedy}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is no JSON object: {remedy}")
    return data
