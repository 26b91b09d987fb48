"""Processes that games started: none outlives the worker that played them."""

import contextlib
import os
import signal
from pathlib import Path

_MAX_ROUNDS = 5  # a stray that starts others is faster than one look


def kill_strays(temp_folder: str) -> None:
    """Kills every other process whose TMPDIR is this folder or lies in it, which each child of a
    worker inherits: so those too that a game put into a session of their own. Does nothing where
    the system has no /proc.
    """
    for _ in range(_MAX_ROUNDS):
        found = [pid for pid in _other_pids() if _lives_in(pid, temp_folder)]
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return


def _other_pids() -> list[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    return [int(name) for name in names if name.isdecimal() and int(name) != os.getpid()]


def _lives_in(pid: int, folder: str) -> bool:
    place = os.fsencode(folder)
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or somebody else's
        return False
    return b"TMPDIR=" + place in variables or any(
        variable.startswith(b"TMPDIR=" + place + b"/") for variable in variables
    )
