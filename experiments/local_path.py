"""Paths that people type: of this machine, in names that every library can open. Run directories
may be addresses, see `experiments.remote_run`. And how this program is typed itself.
"""

import dataclasses
import itertools
import pathlib
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, TypeVar

_Args = TypeVar("_Args")
# pathlib has made one slash of two; a drive letter is no scheme
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
RUN_ADDRESS = re.compile(r"(gs|s3|az):/+([^/].*)")  # of stores that run directories may lie in


def as_written(run_dir: pathlib.Path) -> str:
    """A run directory as people wrote it: an address with both of its slashes."""
    found = RUN_ADDRESS.fullmatch(str(run_dir))
    return str(run_dir) if found is None else f"{found[1]}://{found[2]}"


def typed(run_dir: pathlib.Path) -> str:
    """A run directory as it is typed in a shell: `as_written`, and quoted."""
    return shlex.quote(as_written(run_dir))


def command_line(command: str) -> str:
    """A command as it can be pasted into the shell that this program was started from: `ictjax`
    where that is found, else as people typed it (.venv/bin/ictjax, python -m experiments).

    Args:
      command: its words behind `ictjax`, each quoted where it must be.
    """
    started = pathlib.Path(sys.argv[0])
    if shutil.which("ictjax") is not None:
        program = "ictjax"
    elif started.name == "ictjax":
        program = shlex.quote(sys.argv[0])
    elif started.parts[-2:] == ("experiments", "__main__.py"):
        program = f"{shlex.quote(sys.orig_argv[0])} -m experiments"
    else:  # from another program
        program = "ictjax"
    return f"{program} {command}"


def local_path(text: str, flag: str) -> str:
    """The path with the home folder in the place of a leading `~`, which shells leave alone behind
    `--flag=`.

    Args:
      flag: what it stands behind.

    Raises:
      ValueError: an address (gs://, s3://), a home folder of nobody, or a name that is not UTF-8.
    """
    shown = text.encode("utf-8", "backslashreplace").decode()
    if found := _ADDRESS.match(text):
        address = f"{found[0]}/{text[found.end() :].lstrip('/')}"
        raise ValueError(
            f"{flag} {address!r} is an address, no path of this machine: name a local folder, or"
            " the one where that place is mounted."
        )
    try:
        path = str(pathlib.Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        raise ValueError(
            f"{flag} {shown} begins with the home folder of nobody here: write the path out."
        ) from None
    if shown != text or not _is_utf8(str(pathlib.Path(path).absolute())):
        raise ValueError(
            f"{flag} {shown} is not UTF-8, in its name or in that of a folder above it, and cannot"
            " be opened by every library: name another."
        )
    return path


def check_place(folder: pathlib.Path, flag: str) -> None:
    """Raises ValueError, by the flag that names it, where a folder cannot be made or written to.
    Nothing stays behind.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be made or written to ({error.strerror}): name another folder."
        ) from error


def with_local_paths(args: _Args, argv: Sequence[str] = ()) -> _Args:
    """Flags with every path in them as `local_path` gives it back. Raises ValueError as it does,
    and for a path that was given as nothing, which Python takes for the current folder.
    """
    if not dataclasses.is_dataclass(args) or isinstance(args, type):
        return args
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), f"--{field.name.replace('_', '-')}"
        given = value if isinstance(value, tuple) else (value,)
        empty = any(isinstance(path, pathlib.Path) and not path.parts for path in given)
        if empty and _is_empty(flag, argv):
            raise ValueError(f"{flag} is empty: name a path, or . for the current folder.")
        if isinstance(value, pathlib.Path) and not _is_run(field.name, value):
            changed[field.name] = pathlib.Path(local_path(str(value), flag))
        elif isinstance(value, tuple) and any(isinstance(item, pathlib.Path) for item in value):
            changed[field.name] = tuple(
                path
                if _is_run(field.name, path)
                else pathlib.Path(local_path(str(path), "The run"))
                for path in value
            )
    return dataclasses.replace(args, **changed)


def _is_empty(flag: str, argv: Sequence[str]) -> bool:
    words = [word.replace("_", "-") for word in argv]
    return f"{flag}=" in words or (flag, "") in itertools.pairwise(words)


def _is_run(name: str, path: pathlib.Path) -> bool:
    """Whether this is an address of a run, which may lie in a store."""
    return name in ("run_dir", "run_dirs") and RUN_ADDRESS.fullmatch(str(path)) is not None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
