"""Where compiled programs are kept between runs. JAX is not imported here: it reads the environment
when it is loaded.
"""

import hashlib
import pathlib
import platform
from collections.abc import MutableMapping

FOLDER = "JAX_COMPILATION_CACHE_DIR"
_SWITCH = "JAX_ENABLE_COMPILATION_CACHE"


def keep_compiled(environment: MutableMapping[str, str]) -> None:
    """Has JAX keep what it compiles below the user's cache directory, one folder for each kind of
    processor; does nothing where the environment already says where, or whether.
    """
    if FOLDER in environment or _SWITCH in environment:
        return
    home = environment.get("XDG_CACHE_HOME") or environment.get("HOME")
    if not home:
        return
    base = pathlib.Path(home) if environment.get("XDG_CACHE_HOME") else pathlib.Path(home, ".cache")
    environment[FOLDER] = str(base / "ictjax" / "xla" / _processor())


def _processor() -> str:
    """Programs for one processor may not run on another, with which it shares a home."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
