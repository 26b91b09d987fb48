"""What a model or adapter folder holds, as one short text: to notice that it is another one."""

import fnmatch
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from ictjax.models.hf.hub import CONFIGS, WEIGHTS

_WHOLE = 2**26  # bytes up to which a file is read whole, which takes a tenth of a second
_BLOCK = 2**12  # bytes read at each place of a larger one
_NUM_PLACES = 256  # spread over a larger file, beside the beginning of every tensor
_LONGEST_HEADER = 10**8  # bytes; safetensors' own limit


def file_sha256(path: pathlib.Path) -> str:
    """Of all bytes of a file: 64 hexadecimal digits. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(folder: pathlib.Path) -> str:
    """A hash of the files that a model or an adapter is read from: 64 hexadecimal digits.

    It says nothing of where the folder lies, of links, of times, or of other files in it. Names,
    sizes and, up to 64 MiB, contents count whole; of larger files the header, 4 KiB of every tensor
    and as much at 256 places: what was trained on, quantised or exchanged differs everywhere.
    Takes about a second for 14 GB on a local disk.

    Raises:
      ValueError: no such folder, or a file in it that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _counts(entry))
        for name in names:
            path = folder / name
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{len(os.fsencode(name))} {size} ".encode() + os.fsencode(name))
                for start, length in _parts(file, size):
                    file.seek(start)
                    digest.update(file.read(length))
    except OSError as error:
        raise ValueError(
            f"{error.filename or folder} cannot be read ({error.strerror}): give a folder with a"
            " model or an adapter whose files can be read"
        ) from error
    return digest.hexdigest()


def _counts(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() and any(fnmatch.fnmatch(entry.name, p) for p in (*CONFIGS, WEIGHTS))


def _parts(file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Where a file is read, and how many bytes there."""
    if size <= _WHOLE:
        yield 0, size
        return
    data, starts = _tensors(file, size)
    yield 0, data
    yield size - _BLOCK, _BLOCK
    for start in (*starts, *range(data, size, size // _NUM_PLACES)):
        yield start, _BLOCK


def _tensors(file: BinaryIO, size: int) -> tuple[int, list[int]]:
    """Where the data of a safetensors file begin, and each of its tensors; nothing in other files.
    https://github.com/huggingface/safetensors
    """
    length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        return 0, []
    try:
        header = json.loads(file.read(length))
        starts = [
            8 + length + int(tensor["data_offsets"][0])
            for name, tensor in header.items()
            if name != "__metadata__"
        ]
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError, OverflowError):
        return 0, []
    return 8 + length, sorted(start for start in starts if 0 <= start < size)
