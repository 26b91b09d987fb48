"""Run directories at an address (gs://, s3://): a working copy on this machine, and what is sent.

Object stores know no rename, no append and no lock, so a run is written in a folder of this machine
as every other, with all that this guarantees, and its files are sent after each iteration, and
whenever a piece of the contexts before the first is there: the records, then complete checkpoints,
then an index that names all of them with their checksums. The index is one object, which appears
whole: what it does not name does not count, so an upload that was cut off leaves the run as it was.
Whoever goes on elsewhere fetches what the index names. Of several hosts each has a working copy,
and the first alone sends.

Two indices: one of what training writes, for whoever holds the lock of the address; one of
evaluations and reports, which may come from other machines meanwhile.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, Literal

from etils import epath

from envs.api import CannotGoOn, Refusal
from envs.files import replacing
from envs.stopping import held
from experiments.local_path import RUN_ADDRESS
from experiments.packed_folder import unpacked
from experiments.run_lock import BEAT_S, SILENT_S, RunLost
from experiments.run_lock import FILE_NAME as LOCK
from ictjax.run_files import write_lines

CACHE_VARIABLE = "ICTJAX_CACHE"  # the folder of working copies

_TRAINED, _MEASURED = "index.json", "index-evaluation.json"
_BLOCK = 2**22  # bytes that are copied at once
_CHECKPOINT = re.compile(r"checkpoints/(\d+)/")

Files = dict[str, tuple[int, str]]
"""Size and CRC-32 by the name in the run directory."""


def is_remote(run_dir: pathlib.Path | None) -> bool:
    """Whether this is an address, of which `pathlib` has made one slash of two."""
    return run_dir is not None and RUN_ADDRESS.fullmatch(str(run_dir)) is not None


class RemoteRun:
    """One address and its working copy.

    Args:
      address: of the run, for example gs://bucket/runs/a.
      purpose: a folder of the cache: those who train and those who read have a copy each.

    Raises:
      ValueError: for what is no address, or one that no library here can open.
    """

    def __init__(self, address: pathlib.Path, purpose: str) -> None:
        found = RUN_ADDRESS.fullmatch(str(address))
        if found is None:
            raise ValueError(f"{address} is no address: name one like gs://bucket/runs/a.")
        self.address = f"{found[1]}://{found[2].rstrip('/')}"
        self._store = epath.Path(self.address)
        about = hashlib.sha256(self.address.encode()).hexdigest()[:10]
        cache = os.environ.get(CACHE_VARIABLE) or pathlib.Path.home() / ".cache" / "ictjax"
        self._folder = pathlib.Path(cache) / "runs" / f"{self._store.name}-{about}" / purpose
        self.path = self._folder / self._store.name
        self._seen: dict[
            str, tuple[tuple[int, int], tuple[int, str]]
        ] = {}  # by stat: what was read

    def refuse(self, error: Exception) -> Refusal:
        """The sentence for what the store, its library or the disk of the working copy answers."""
        if isinstance(error, ImportError):
            return Refusal(
                f"{self.address} needs a library that is not installed ({error.name or error}):"
                " install gcsfs (gs://) or s3fs (s3://)."
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Refusal(
                f"Too little disk for a working copy of {self.address} in {self._folder}: free some"
                f" space, or name another folder with {CACHE_VARIABLE}."
            )
        return Refusal(
            f"{self.address} cannot be reached ({' '.join(str(error).split())[:200]}): check the"
            f" address and who may use it; what was done here is kept in {self.path}."
        )

    def index(self, name: str = _TRAINED) -> dict[str, Any]:
        """What is there: "token" and "files"; empty where nothing is."""
        with self._reaching():
            if not self._store.joinpath(name).exists():
                return {"token": "", "files": {}}
            data = self._store.joinpath(name).read_bytes()
        try:
            index = json.loads(data)
            files = {
                str(path): (int(size), str(crc)) for path, (size, crc) in index["files"].items()
            }
            token = str(index["token"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{self.address}/{name} is damaged: restore it.") from None
        if any(pathlib.PurePath(path).is_absolute() or ".." in path.split("/") for path in files):
            raise ValueError(f"{self.address}/{name} names files outside of the run: restore it.")
        return {"token": token, "files": files}

    def fetch(self, name: str, wanted: Callable[[str], bool] = lambda path: True) -> None:
        """Makes the wanted files of an index those of the working copy: fetches what differs, and
        removes checkpoints and iterations that it does not name.

        Raises:
          ValueError: the store cannot be reached, or a checkpoint there is damaged.
        """
        files: Files = self.index(name)["files"]
        if name == _TRAINED:
            for path in self._local(_of_training):
                if path not in files:
                    (self.path / path).unlink()
        for path, about in files.items():
            if wanted(path) and self._about(path) != about:
                with self._reaching():
                    there = self._store.joinpath(path).exists()
                if not there:
                    raise ValueError(
                        f"{self.address} changed while it was fetched: start it again."
                    )
                self._download(path, about)
        self._drop_empty_steps()

    def fetch_newest(self) -> None:
        """`fetch` of what training has sent, its newest checkpoint alone: a copy for a host that
        trains with the one that sends.
        """
        newest = max(_steps(self.index()["files"]), default=None)
        self.fetch(_TRAINED, lambda path: _step_of(path) in (None, newest))

    def fetch_measured(self) -> None:
        """`fetch` of evaluations and reports."""
        self.fetch(_MEASURED)

    def push_measured(self) -> None:
        """`push` of evaluations and reports."""
        self.push(_MEASURED)

    def fetch_for_training(self) -> None:
        """Brings the working copy up to date, unless it is ahead of what was sent from it."""
        there = self.index()["token"]
        if there in self._tokens() or (not there and not self._tokens()):
            return
        shutil.rmtree(self.path, ignore_errors=True)  # another machine went on
        self.fetch(_TRAINED)
        self._remember(there)

    def push(self, name: str = _TRAINED) -> None:
        """Sends what is new, then the index, then removes what it no longer names.

        Raises ValueError where the store cannot be reached; what it holds is as before then.
        """
        mine = _of_training if name == _TRAINED else _of_evaluation
        before: Files = self.index(name)["files"]
        steps = self._complete_steps()  # first: their records are there
        after: Files = {} if name == _TRAINED else dict(before)
        paths = [path for path in self._local(mine) if not _CHECKPOINT.match(path)]
        for path in paths:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                after[path] = self._sent(path, before)
        for step in steps if name == _TRAINED else ():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, as too old
                folder = self.path / "checkpoints" / step
                names = [f"checkpoints/{step}/{path}" for path in _files_below(folder)]
                after |= {path: self._sent(path, before) for path in names}
        if after == before:
            return
        token = secrets.token_hex(8)
        if name == _TRAINED:
            self._remember(*self._tokens(), token)  # either counts, if it ends between the two
        with self._reaching():
            text = json.dumps({"token": token, "files": after})
            self._store.joinpath(name).write_bytes(text.encode())
        if name == _TRAINED:
            self._remember(token)
        for path in before.keys() - after.keys():
            with contextlib.suppress(Exception):  # all is sent, and it counts for nothing
                self._store.joinpath(path).unlink()

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # libraries of stores have their own kinds
            raise self.refuse(error) from error

    def _sent(self, path: str, before: Files) -> tuple[int, str]:
        about = self._about(path)
        if about is None:
            raise FileNotFoundError(path)
        if before.get(path) == about:
            return about
        with (self.path / path).open("rb") as source, self._reaching():
            place = self._store.joinpath(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as target:
                return _copied(source, target)

    def _download(self, path: str, about: tuple[int, str]) -> None:
        local = self.path / path
        local.parent.mkdir(parents=True, exist_ok=True)
        with replacing(local) as temporary:
            with (
                self._reaching(),
                self._store.joinpath(path).open("rb") as source,
                temporary.open("wb") as target,
            ):
                found = _copied(source, target)
            # records that an upload was replacing when it was cut off are newer, and whole
            if found != about and _CHECKPOINT.match(path):
                raise ValueError(
                    f"{self.address}/{path} is not what was sent: start it again, or name another"
                    " checkpoint with --step."
                )

    def _about(self, path: str) -> tuple[int, str] | None:
        """Size and checksum of a local file; None where there is none."""
        try:
            stat = (self.path / path).stat()
            key = stat.st_size, stat.st_mtime_ns
            if path not in self._seen or self._seen[path][0] != key:
                with (self.path / path).open("rb") as file:
                    self._seen[path] = key, _copied(file, None)
            return self._seen[path][1]
        except FileNotFoundError:
            return None

    def _local(self, mine: Callable[[str], bool]) -> list[str]:
        return [path for path in _files_below(self.path) if mine(path)]

    def _complete_steps(self) -> list[str]:
        folder = self.path / "checkpoints"
        names = os.listdir(folder) if folder.is_dir() else []
        return sorted((name for name in names if name.isdecimal()), key=int)

    def _drop_empty_steps(self) -> None:
        for step in self._complete_steps():
            folder = self.path / "checkpoints" / step
            if not _files_below(folder):
                shutil.rmtree(folder)

    def _tokens(self) -> list[str]:
        """The indices that the working copy is of."""
        path = self._folder / "sent.json"
        try:
            return [str(token) for token in json.loads(path.read_text())]
        except (OSError, ValueError, TypeError):
            return []

    def _remember(self, *tokens: str) -> None:
        write_lines(self._folder / "sent.json", [json.dumps(tokens)])


def _files_below(folder: pathlib.Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def _of_evaluation(path: str) -> bool:
    return path.startswith(("evaluation", "report")) and not path.endswith(".tmp")


def _of_training(path: str) -> bool:
    return (
        not path.startswith((LOCK, "evaluation", "report"))
        and not path.endswith(".tmp")
        and (not path.startswith("checkpoints/") or _CHECKPOINT.match(path) is not None)
    )


def _copied(source: IO[bytes], target: IO[bytes] | None) -> tuple[int, str]:
    """Copies a file, or only reads it; its size and checksum."""
    size, crc = 0, 0
    while block := source.read(_BLOCK):
        size, crc = size + len(block), zlib.crc32(block, crc)
        if target is not None:
            target.write(block)
    return size, f"{crc:08x}"


@contextlib.contextmanager
def readable(
    run_dir: pathlib.Path, *, checkpoint: int | Literal["newest"] | None = None, host: int = 0
) -> Iterator[pathlib.Path]:
    """A run directory on this machine: itself, what a packed bundle holds, or what was fetched of
    an address; evaluations and reports that are made there are sent back.

    Args:
      checkpoint: the step of the checkpoint that is needed; "newest", or None for none.
      host: of several that read together, each a copy of its own; the first alone sends.

    Raises:
      ValueError: the store cannot be reached, or has no such checkpoint; a bundle has none.
    """
    if run_dir.is_file():
        if checkpoint is not None:
            raise ValueError(
                f"{run_dir} is a file, and bundles hold no weights: name the directory of the run."
            )
        with unpacked(run_dir) as folder:
            yield folder
        return
    if not is_remote(run_dir):
        yield run_dir
        return
    remote = RemoteRun(run_dir, copy_of_host("reading", host))
    files = remote.index()["files"]
    if not files:
        raise ValueError(f"{remote.address} holds no run: train first, or name another.")
    steps = _steps(files)
    if isinstance(checkpoint, int) and checkpoint not in steps:
        raise ValueError(
            f"{remote.address} has no checkpoint of iteration {checkpoint}: --step can be"
            f" {', '.join(map(str, steps))}."
        )
    newest = steps[-1] if steps and checkpoint == "newest" else None
    step = checkpoint if isinstance(checkpoint, int) else newest

    remote.fetch(_TRAINED, lambda path: _step_of(path) in (None, step))
    remote.fetch_measured()
    yield remote.path
    if host == 0:
        with held():
            remote.push_measured()


def copy_of_host(purpose: Literal["training", "reading"], host: int) -> str:
    """The folder of the working copy of one of several hosts, which may share a disk even so."""
    return purpose if host == 0 else f"{purpose}-{host}"


def steps_of(run_dir: pathlib.Path) -> list[int]:
    """The iterations of which a run has checkpoints, here or at its address."""
    if is_remote(run_dir):
        return _steps(RemoteRun(run_dir, "reading").index()["files"])
    folder = run_dir / "checkpoints"
    return _steps(f"checkpoints/{path.name}/" for path in folder.glob("*/"))


def _steps(paths: Iterable[str]) -> list[int]:
    return sorted({step for path in paths if (step := _step_of(path)) is not None})


def _step_of(path: str) -> int | None:
    """The step of the checkpoint that a file is part of; None for a record."""
    found = _CHECKPOINT.match(path)
    return int(found[1]) if found else None


class RemoteLock:
    """The right to train at an address, as a context manager: an object that its holder writes anew
    every `beat_s`, and whose age is told by the clock of the store.

    Stores do not write an object only where there is none: of two who begin at the same time the
    one who wrote last has it, and the other finds that out before it sends anything.

    Raises:
      ValueError: somebody else trains there, or the store cannot be reached.
    """

    def __init__(
        self, remote: RemoteRun, *, beat_s: float = BEAT_S, about: Mapping[str, Any]
    ) -> None:
        self._remote, self._beat_s = remote, beat_s
        self._place = epath.Path(remote.address) / LOCK
        self._about = {**about, "token": secrets.token_hex(8)}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="remote lock", daemon=True)

    def __enter__(self) -> "RemoteLock":
        try:
            holder = self._holder()
            if holder is not None:
                mine = self._place.with_name(f"{LOCK}.{self._about['token']}")
                mine.write_bytes(b"{}")
                silent_s = mine.stat().mtime - self._place.stat().mtime
                mine.unlink()
                if silent_s < SILENT_S:
                    raise ValueError(
                        f"{self._remote.address} is being trained on"
                        f" {holder.get('host', 'another machine')!s:.100}, whose last sign of life"
                        f" is {max(silent_s, 0):.0f} s old: stop it there, or choose another"
                        f" --run-dir; it is free {SILENT_S / 60:.0f} minutes after the last sign."
                    )
            self._write()
        except ValueError:
            raise
        except Exception as error:
            raise self._remote.refuse(error) from error
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # free after a while
            if self.is_held:
                self._place.unlink()

    @property
    def is_held(self) -> bool:
        """Whether the address is still ours."""
        return self._holder() == self._about

    def check(self) -> None:
        """Raises RunLost when somebody else has taken the address over, ValueError where the
        store cannot be reached.
        """
        try:
            held = self.is_held
        except Exception as error:  # libraries of stores have their own kinds
            raise self._remote.refuse(error) from error
        if not held:
            raise RunLost(
                f"{self._remote.address} was taken over by another machine: this training stops,"
                f" and sends nothing more; what it has done is in {self._remote.path}."
            )

    def _holder(self) -> dict[str, Any] | None:
        try:
            holder = json.loads(self._place.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _write(self) -> None:
        self._place.parent.mkdir(parents=True, exist_ok=True)
        self._place.write_bytes(json.dumps(self._about).encode())

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(Exception):  # a store that is away does not end a training
                if not self.is_held:
                    return
                self._write()


class Sender:
    """Sends a run in a thread of its own, whenever it is told that there is something new. A
    context manager: at its end all is sent.

    Args:
      remote: what is sent.
      lock: of its address, held.
      say: is told, in a sentence, what failed and is tried again.
    """

    def __init__(self, remote: RemoteRun, lock: RemoteLock, say: Callable[[str], None]) -> None:
        self._remote, self._lock, self._say = remote, lock, say
        self._new, self._ended = threading.Event(), False
        self._pushing = threading.Lock()
        self._lost: CannotGoOn | None = None
        self._thread = threading.Thread(target=self._send, name="sender", daemon=True)

    @property
    def path(self) -> pathlib.Path:
        """The working copy."""
        return self._remote.path

    def __enter__(self) -> "Sender":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended = True
        self._new.set()
        with held():
            self._thread.join()
            self.check()
            self._push()

    def poke(self) -> None:
        """There is something new. Raises CannotGoOn where the address belongs to another now."""
        self.check()
        self._new.set()

    def send(self) -> None:
        """Sends what is new, and returns when it is there. Raises CannotGoOn as `poke`, ValueError
        where the store cannot be reached.
        """
        self.check()
        self._push()

    def check(self) -> None:
        """Raises CannotGoOn where the address belongs to another now."""
        if self._lost is not None:
            raise self._lost

    def _send(self) -> None:
        while True:
            self._new.wait()
            self._new.clear()
            if self._ended:
                return
            try:
                self._push()
            except CannotGoOn as lost:
                self._lost = lost
                return
            except Exception as error:  # the next iteration tries again
                self._say(f"{error} It is tried again.")

    def _push(self) -> None:
        with self._pushing:
            self._lock.check()
            self._remote.push()


@contextlib.contextmanager
def sending(run_dir: pathlib.Path, say: Callable[[str], None]) -> Iterator[Sender]:
    """The working copy of an address to train in: brought up to date, and sent while it grows.

    Raises:
      ValueError: somebody else trains there, or the store cannot be reached.
    """
    remote = RemoteRun(run_dir, "training")
    about = {"host": socket.gethostname(), "pid": os.getpid()}
    with RemoteLock(remote, about=about) as lock:
        remote.fetch_for_training()
        with Sender(remote, lock, say) as sender:
            yield sender
