"""A folder of files in one packed file (.tar.gz): equal bytes from equal files, and unpacked with
care, for it may come from anybody.
"""

import contextlib
import errno
import gzip
import io
import pathlib
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator

from envs.files import replacing
from envs.stopping import at_end

ENDINGS = (".tar.gz", ".tgz")

_MOST_FILES = 1_000_000
_MOST_BYTES = 2**36  # of all files together; a small file can hold zeros without an end
_BLOCK = 2**20
_BAD_NAMES = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


def is_packed(path: pathlib.Path) -> bool:
    """Whether a file of this name is a packed folder."""
    return path.name.endswith(ENDINGS)


def stem(path: pathlib.Path) -> str:
    """The name of a packed file without its ending."""
    return next(
        (path.name.removesuffix(end) for end in ENDINGS if path.name.endswith(end)), path.stem
    )


def pack(path: pathlib.Path, folder: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes one file that holds a folder with these files, whole or not at all. Whoever packs the
    same contents in the same order gets the same bytes: no times, owners or permissions are kept.

    Args:
      path: of the packed file.
      folder: its name inside.
      files: name within the folder, and contents.
    """
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, data in files:
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@contextlib.contextmanager
def unpacked(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder that a packed file holds, in a temporary place. Nothing but plain files below one
    folder is taken: no links, devices or names that lead elsewhere.

    Raises:
      ValueError: it is damaged, or holds anything else.
    """
    with tempfile.TemporaryDirectory(prefix="ictjax-") as place:
        forget = at_end(lambda: shutil.rmtree(place, ignore_errors=True))
        try:
            yield _unpack(path, pathlib.Path(place))
        finally:
            forget()


def _unpack(path: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    try:
        return place / _take(path, place)
    # what the standard library raises for damaged archives is not all its own
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
    except OSError as error:
        if error.errno not in _BAD_NAMES and not isinstance(error, gzip.BadGzipFile):
            raise
        reason = error.strerror or str(error)
    raise ValueError(
        f"{path} is no bundle that can be unpacked ({reason:.200}): get it again, or make another"
        " with `ictjax bundle`."
    )


def _take(path: pathlib.Path, place: pathlib.Path) -> str:
    """Writes the files of an archive below a folder; returns the name of the one they are all in.
    Raises whatever `tarfile` does, and ExtractError for what is not taken.
    """
    left, folder = _MOST_BYTES, ""
    with gzip.open(path) as squeezed, tarfile.open(fileobj=squeezed, mode="r|") as archive:
        for number, member in enumerate(archive):
            if reason := _reason_against(member):
                raise tarfile.ExtractError(f"{member.name!r:.100} {reason}")
            of_member = member.name.split("/")[0]
            if of_member != (folder := folder or of_member):
                raise tarfile.ExtractError("it holds several folders")
            left -= member.size
            if number >= _MOST_FILES or left < 0:
                raise tarfile.ExtractError("it holds more than any run")
            if member.isfile():
                _write(archive, member, place / member.name)
        while block := squeezed.read(_BLOCK):  # to the end, where the checksum is
            left -= len(block)
            if left < 0:
                raise tarfile.ExtractError("it holds more than any run")
    if not folder:
        raise tarfile.ExtractError("it is empty")
    (place / folder).mkdir(exist_ok=True)
    return folder


def _reason_against(member: tarfile.TarInfo) -> str:
    """Why this is not unpacked; empty where it is."""
    if not (member.isdir() or (member.type in _PLAIN and not member.issparse())):
        return "is no plain file"
    parts = member.name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        return "leads out of its folder"
    if member.isfile() and len(parts) < 2:
        return "is in no folder"
    return "has no size" if member.size < 0 else ""


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None, "a plain file"
    with source, target.open("xb") as file:
        shutil.copyfileobj(source, file, _BLOCK)
