"""One trainer per run directory: a lock file that names its holder, and is free again soon after
the holder is gone.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import secrets
import socket
import threading
import time

from envs.api import CannotGoOn
from envs.stopping import at_end

FILE_NAME = "trainer.lock"
BEAT_S = 20.0  # between two signs of life
SILENT_S = 300.0  # after which the trainer of another machine counts as gone
_LONGEST = 300  # characters of a text in it
_TRIES, _WAIT_S = 50, 0.02  # to take a lock that changes hands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Who trains in a run directory."""

    host: str = "an unknown machine"
    pid: int = 0
    started: int = 0  # of the process, in ticks since boot: tells one from another with its number
    machine: str = ""  # the boot and the process numbers that `pid` is one of; empty: not known
    since: str = "an unknown time"
    token: str = ""  # no two locks share one


class RunLost(CannotGoOn):
    """A run is this process's no more: of several hosts the first one alone finds that."""


class RunLock:
    """The right to train in a run directory, as a context manager.

    The holder touches its file every `BEAT_S`. On the holder's own machine a lock is free when that
    process is gone, however it ended; elsewhere, when the file was not touched for `SILENT_S`, by
    the clock of the disk. Nothing depends on locks of the file system, which network disks lack.

    Args:
      run_dir: exists.

    Raises:
      ValueError: somebody else trains there, or the file cannot be written.
    """

    def __init__(self, run_dir: pathlib.Path, *, beat_s: float = BEAT_S):
        self._run_dir, self._beat_s = run_dir, beat_s
        self._path, self._guard = run_dir / FILE_NAME, run_dir / f"{FILE_NAME}.takeover"
        self._holder = Holder(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_of(os.getpid()) or 0,
            machine=_machine(),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            token=secrets.token_hex(8),
        )
        self._lost_to: Holder | None = None
        self._ended = threading.Event()
        self._forget = _nothing
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            self._take()
        except OSError as error:
            raise ValueError(
                f"Cannot write the lock file {self._path} ({error.strerror}): choose another"
                " --run-dir."
            ) from error
        self._forget = at_end(self.release)  # another machine would wait for our signs of life
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets others train here. Idempotent."""
        self._forget()
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):  # the disk is gone, or the whole directory
            if self.is_held:
                self._path.unlink()

    @property
    def is_held(self) -> bool:
        """Whether the directory is still ours."""
        try:
            return _read(self._path) == self._holder
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises RunLost when somebody else has taken the directory over, who thought this
        process gone: a machine that slept, a network disk that was away.
        """
        if self._lost_to is not None:
            raise RunLost(
                f"{self._run_dir} was taken over by {_who(self._lost_to)} while this machine gave"
                " no sign of life: this training stops; the other one goes on."
            )

    def _take(self) -> None:
        mine = self._beside()
        try:
            self._write(mine)
            for _ in range(_TRIES):
                if self._place(mine, self._path):
                    self._tidy(mine)
                    return
                try:
                    holder, silent_s = _read(self._path), _later(mine, self._path)
                except FileNotFoundError:  # it was free just now
                    continue
                if _lives(holder, silent_s):
                    raise _held(self._run_dir, holder, silent_s)
                self._remove(holder, mine)
        finally:
            mine.unlink(missing_ok=True)
        raise ValueError(
            f"{self._path} changes hands all the time: leave one training of {self._run_dir}."
        )

    def _write(self, path: pathlib.Path) -> None:
        with path.open("x", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self._holder), file)

    def _place(self, mine: pathlib.Path, path: pathlib.Path) -> bool:
        """Makes a file if there is none: whole, where the disk knows hard links."""
        try:
            os.link(mine, path)
        except FileExistsError:
            return mine.stat().st_nlink > 1  # NFS: done, but the answer was lost
        except OSError:
            try:
                self._write(path)
            except FileExistsError:
                return False
        return True

    def _remove(self, gone: Holder, mine: pathlib.Path) -> None:
        """Removes the lock of one who is gone. Of several who find it one does, so that nobody
        removes what another has just put there.
        """
        if not self._place(mine, self._guard):
            with contextlib.suppress(FileNotFoundError):
                if not _lives(_read(self._guard), _later(mine, self._guard)):
                    self._guard.unlink()
            time.sleep(_WAIT_S)
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                if _read(self._path) == gone:
                    self._path.unlink()
        finally:
            self._guard.unlink(missing_ok=True)

    def _beside(self) -> pathlib.Path:
        return self._path.with_name(f"{FILE_NAME}.{secrets.token_hex(8)}.tmp")

    def _tidy(self, mine: pathlib.Path) -> None:
        """Removes what was left by processes that were killed while they asked for the lock."""
        for path in self._run_dir.glob(f"{FILE_NAME}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if not _lives(_read(path), _later(mine, path)):
                    path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            # a disk that is full or away for a while does not end a training
            with contextlib.suppress(OSError):
                try:
                    holder = _read(self._path)
                except FileNotFoundError:  # somebody tidied up
                    self._take_again()
                    continue
                if holder != self._holder:
                    self._lost_to = holder
                    return
                os.utime(self._path)

    def _take_again(self) -> None:
        mine = self._beside()
        try:
            self._write(mine)
            self._place(mine, self._path)
        finally:
            mine.unlink(missing_ok=True)


def check_free(run_dir: pathlib.Path) -> None:
    """Raises ValueError where somebody trains now, as far as can be told without writing there."""
    path = run_dir / FILE_NAME
    try:
        holder = _read(path)
        silent_s = time.time() - path.stat().st_mtime
    except OSError:  # there is none
        return
    if _lives(holder, silent_s):
        raise _held(run_dir, holder, silent_s)


def _held(run_dir: pathlib.Path, holder: Holder, silent_s: float) -> ValueError:
    """The refusal of a directory in which somebody else trains."""
    if holder.machine and holder.machine == _machine():
        return ValueError(
            f"{run_dir} is being trained by {_who(holder)}: wait until it ends, stop it (kill"
            f" {holder.pid}), or choose another --run-dir."
        )
    return ValueError(
        f"{run_dir} is being trained by {_who(holder)}, whose last sign of life is"
        f" {max(silent_s, 0):.0f} s old: stop it there, or choose another --run-dir; if that"
        f" machine is gone, the directory is free {SILENT_S / 60:.0f} minutes after the last sign."
    )


def _nothing() -> None:
    pass


def _who(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host} (since {holder.since})"


def _later(one: pathlib.Path, other: pathlib.Path) -> float:
    """Seconds from the last change of the other file to that of the one, by the disk's clock."""
    return one.stat().st_mtime - other.stat().st_mtime


def _read(path: pathlib.Path) -> Holder:
    """Raises OSError where there is no file; what cannot be read names nobody."""
    text = path.read_bytes()
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return Holder()
    fields = dataclasses.asdict(holder)
    numbers = [fields.pop(name) for name in ("pid", "started")]
    readable = all(type(number) is int and number >= 0 for number in numbers) and all(
        isinstance(text, str) and text.isprintable() and len(text) <= _LONGEST
        for text in fields.values()
    )
    return holder if readable else Holder()


def _lives(holder: Holder, silent_s: float) -> bool:
    if holder.machine and holder.machine == _machine():
        return _runs(holder.pid, holder.started)
    return silent_s < SILENT_S


def _runs(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's, who may hide the rest
        return _start_of(pid) in (None, started)
    return _start_of(pid) == started


def _start_of(pid: int) -> int | None:
    """When a process of this machine began, in ticks since boot; None if it is gone or hidden."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, *rest = stat[stat.rindex(b")") + 2 :].split()
    return None if state in (b"Z", b"X") else int(rest[18])


def _machine() -> str:
    """What process numbers are unique in: a boot, and the container's own numbers; empty where the
    system does not say.
    """
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {pathlib.Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
