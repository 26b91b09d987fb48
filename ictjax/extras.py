"""How an extra of this project is installed for the interpreter that lacks it."""

import pathlib
import shlex
import sys


def install(extra: str) -> str:
    """The command, to be run in the clone: by this interpreter's pip, with the pins for its
    version.
    """
    pins = "constraints-py312.txt" if sys.version_info >= (3, 12) else "constraints.txt"
    python, here = pathlib.Path(sys.executable or "python"), pathlib.Path.cwd()
    if (here / pins).is_file() and python.is_relative_to(here):
        python = python.relative_to(here)
    return f"{shlex.quote(str(python))} -m pip install -c {pins} -e '.[{extra}]'"
