"""JSON as this project writes and reads it: one value a line, whatever the text in it holds."""

import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_LOG = logging.getLogger(__name__)
# JSON lets these stand as they are. But readers that split a file at more than "\n" end a line at
# some of them, terminals obey others, and half a character (a lone surrogate) has no UTF-8.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX_SHOWN = 60  # characters of a damaged line


class Records(NamedTuple):
    """What a file of JSON objects held."""

    values: list[dict[str, Any]]
    torn: bool  # the last line was cut off, and is left out


def to_json_line(value: Any) -> str:
    """JSON in one line that any reader of lines takes, and any encoder.

    Separators of lines and lone surrogates become escapes, which reading undoes. Numbers that are
    not finite, which JSON does not have, become null.
    """
    return to_json_text(value, indent=None)


def to_json_text(value: Any, *, indent: int | None) -> str:
    """As `to_json_line`, with line breaks and so many spaces a level."""
    separators = (",", ":") if indent is None else None
    options: dict[str, Any] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "indent": indent,
        "separators": separators,
    }
    try:
        text = json.dumps(value, **options)
    except ValueError:
        text = json.dumps(_finite(value), **options)
    return text if text.isascii() else _UNSAFE.sub(_escape, text)


def read_records(path: str | os.PathLike[str]) -> Records:
    """The JSON objects of a file, one a line; none where there is no file.

    A last line that a stopped writer left half-written is left out, and a warning says so.

    Raises:
      ValueError: a line before it is no JSON object.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return Records([], torn=False)
    *lines, last = path.read_bytes().split(b"\n")
    values = []
    for number, line in enumerate(lines, start=1):
        value = _record(line)
        if value is None:
            shown = line[:_MAX_SHOWN].decode(errors="replace")
            raise ValueError(
                f"Line {number} of {path} is no JSON object ({shown!r}): restore the file, or"
                " remove it."
            )
        values.append(value)
    value = _record(last)
    if value is not None:  # whole, without its newline
        values.append(value)
    torn = value is None and bool(last.strip())
    if torn:
        _LOG.warning(
            "Line %d of %s is cut off: it is left out, and the %d lines before it are read.",
            len(lines) + 1,
            path,
            len(lines),
        )
    return Records(values, torn=torn)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested without an end
        return None
    return value if isinstance(value, dict) else None


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
