"""Paths of the machine that a run was made on, which are nobody else's business: marks in their
place.
"""

import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
_NO_PATH_BEFORE = r"(?:(?<=file://)|(?<![\w.~/<>-]))"
_HOMES = re.compile(
    _NO_PATH_BEFORE + r"(?:(?:/home|/Users)/[^/\s\"'=,:;]+|/root|~[\w.-]+(?=/))(?![\w-]|\.\w)"
)
_SHIPPED = re.compile(
    _NO_PATH_BEFORE + r"(?:/[^\s/\"'=,:;<>|]+)+(?=/experiments/(?:pocket|smollm)/)"
)
_ABSOLUTE = re.compile(_NO_PATH_BEFORE + r"(?:/[^\s/\"'=,:;<>|]+){2,}/?")
# what people and models wrote: here a slash means many things
_PROSE = ("initial_prompt", "expert_prompt")


class MachinePaths:
    """The folders of this machine by which a run can be told to be of somebody, and their marks.

    Args:
      run_dir: of the run, "<run>"; beside it "<home>", "<checkout>" and "<python>".
    """

    def __init__(self, run_dir: pathlib.Path) -> None:
        folders = {
            "<run>": run_dir,
            "<checkout>": _CHECKOUT,
            "<python>": pathlib.Path(sys.prefix),
            "<home>": pathlib.Path.home(),
        }
        self._marks = {
            str(path): mark
            for mark, folder in folders.items()
            for path in (folder.absolute(), folder.resolve())
            if len(path.parts) > 1
        }
        longest_first = sorted(self._marks, key=len, reverse=True)
        known = "|".join(map(re.escape, longest_first))
        self._known = re.compile(rf"(?<![\w.~-])(?:{known})(?![\w-]|\.\w)")

    def marked(self, value: Any) -> Any:
        """A value of JSON with a mark in the place of each of these folders. What an environment
        said of an error is looked through as `described` is.
        """
        if isinstance(value, Mapping):
            return {
                self._in_text(name): self.described(item) if name == "error" else self.marked(item)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self.marked(item) for item in value]
        return self._in_text(value) if isinstance(value, str) else value

    def described(self, value: Any) -> Any:
        """The same for what describes a run (settings, command lines): no absolute path at all is
        left, of this machine or of another. Of unknown ones the last name stays, unless it is all
        there is below one folder.
        """
        if isinstance(value, Mapping):
            return {
                name: self.marked(item) if name in _PROSE else self.described(item)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self.described(item) for item in value]
        if not isinstance(value, str):
            return value
        text = _SHIPPED.sub("<checkout>", self._in_text(value))
        return _ABSOLUTE.sub(_last_name, _HOMES.sub("<home>", text))

    def _in_text(self, text: str) -> str:
        return self._known.sub(lambda found: self._marks[found[0]], text)


def _last_name(found: re.Match[str]) -> str:
    *folders, last = found[0].strip("/").split("/")
    return f"<path>/{last}" if len(folders) > 1 else "<path>"
