"""The file that TensorBoard reads. Needs tensorboardX, for its records and checksums."""

import os
import pathlib
import re
import struct
import time
from collections.abc import Iterator, Mapping

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from envs.files import append, replacing

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
_VERSION = "brain.Event:2"


class EventLog:
    """One event file with every iteration of a run once, whatever was stopped and went on. A
    context manager.

    What an earlier process wrote moves to a new file, without what comes after `last_iteration`,
    and keeps its times; the old files are emptied. A TensorBoard that is running forgets what it
    has read of them and goes on with the new one.

    Args:
      folder: made if missing.
      last_iteration: the last one that counts; None for a run that begins.

    Raises:
      OSError: the folder cannot be written to.
    """

    def __init__(self, folder: pathlib.Path, last_iteration: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
        kept = b"".join(_kept(files, last_iteration)) if last_iteration is not None else b""
        newest = max((_stamp(path) for path in files), default=0)
        # TensorBoard goes on to files whose names are greater
        path = folder / f"events.out.tfevents.{max(int(time.time()), newest + 1)}.ictjax"
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        whole = folder / "events.whole"  # a name that TensorBoard takes no notice of
        with replacing(whole) as temporary:
            temporary.write_bytes(
                _record(event_pb2.Event(wall_time=time.time(), file_version=_VERSION))
                # what stands in files before this one does not count
                + _record(event_pb2.Event(wall_time=time.time(), step=0, session_log=start))
                + kept
            )
        whole.rename(path)
        for old in files:
            # not removed: a TensorBoard that reads it goes on to the next only while it is there
            os.truncate(old, 0)
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Writes the numbers of one iteration by their names, and waits until they are on disk.
        Raises OSError.
        """
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=number)
            for name, number in numbers.items()
        ]
        event = event_pb2.Event(
            wall_time=time.time(), step=iteration, summary=summary_pb2.Summary(value=values)
        )
        append(self._file, _record(event))

    def close(self) -> None:
        """Closes the file. Idempotent."""
        self._file.close()


def _stamp(path: pathlib.Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def _kept(files: list[pathlib.Path], last_iteration: int) -> list[bytes]:
    """The records that TensorBoard would show of these files, up to an iteration."""
    kept: list[tuple[int, bytes]] = []
    for path in files:
        for event, record in _events(path.read_bytes()):
            if event.HasField("session_log"):
                kept = [(step, earlier) for step, earlier in kept if step < event.step]
            elif not event.file_version and event.step <= last_iteration:
                kept.append((event.step, record))
    return [record for _, record in kept]


def _events(data: bytes) -> Iterator[tuple[event_pb2.Event, bytes]]:
    """Events with their records, up to the first that is damaged or cut off."""
    start = 0
    while start + 12 <= len(data):
        header = data[start : start + 8]
        (length,) = struct.unpack("<Q", header)
        end = start + 16 + length
        record = data[start:end]
        # TensorBoard would read no further than the first that is damaged
        if len(record) != 16 + length or record[8:12] != _checksum(header):
            return
        if record[-4:] != _checksum(record[12:-4]):
            return
        yield event_pb2.Event.FromString(record[12:-4]), record
        start = end


def _record(event: event_pb2.Event) -> bytes:
    """Length, its checksum, the event, its checksum: TFRecord's format."""
    data = event.SerializeToString()
    header = struct.pack("<Q", len(data))
    return header + _checksum(header) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
