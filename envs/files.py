"""Files that appear whole or not at all."""

import contextlib
import io
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator

from envs.stopping import at_end


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new, empty file beside `path` to write to, and moves it there once it is on disk.

    Whatever the block raises, Ctrl-C included, removes that file and leaves `path` as it was; only
    a killed process leaves it behind, with a name that ends in `.tmp`. No two writers share one, so
    of several at the same time the last wins. The permissions are those of any new file, whatever
    the block did to them. Raises OSError with the name of `path`, for example where the folder does
    not exist or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    forget = at_end(lambda: temporary.unlink(missing_ok=True))
    try:
        # Made here, not with `tempfile`, whose files only their owner can read.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        with temporary.open("rb") as file:
            os.fchmod(file.fileno(), mode)  # safetensors puts a file of its own there
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # a write that fails names no file, and nobody knows the temporary one
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        forget()


def append(file: io.FileIO, data: bytes) -> None:
    """Writes at the end of an unbuffered file and waits until everything is on disk. Whatever is
    raised on the way leaves the file as it was. Raises OSError with the name of the file.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), size)
        if isinstance(error, OSError):
            error.filename = str(file.name)
        raise
