"""Orbax checkpoints of a run: a pytree of arrays and a JSON record of the host's state, saved
together or not at all.
"""

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from envs.stopping import held
from ictjax.digests import changed, digests
from ictjax.mesh import gathered, whole_on_host

_SLACK_BYTES = 16 * 2**20  # metadata, and what the file system rounds up
_LAST_READS_S = 2.0  # that a failed restore waits for its other reads
_LONGEST_WRITE_S = 24 * 3600  # after which Orbax gives a write up
_CHECK_BYTES = 2**28  # of a checkpoint, that are read back at once
_PLAIN = re.compile(r"[\w/.,+=@ -]+")  # paths that Orbax and TensorStore take as they are
_DESCRIPTORS = pathlib.Path("/proc/self/fd")
_HOST_MEMORY = "pinned_host"
_REMAINS = (".orbax-checkpoint-tmp", ".removed")  # of saves, and of removals, that were killed


def _nothing() -> None:
    """Where nobody waits for anybody."""


class CheckpointReader:
    """The checkpoints under one folder, for whoever only reads them. A context manager.

    Makes and removes nothing, so that it may stand beside the `Checkpointer` of a running program:
    what is being saved does not count yet, and what is removed meanwhile is no longer there.

    Args:
      folder: may be missing: there are no checkpoints then.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = pathlib.Path(folder).absolute()
        here = jax.process_index()  # reading, hosts do not wait for each other
        self._orbax = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler("state", "host"),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"host{here}"
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees what Orbax holds. Idempotent."""
        self._orbax.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint; None if there is none."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> tuple[int, ...]:
        """All complete checkpoints, ascending, as they are on disk now."""
        return tuple(sorted(int(path.name) for path in self._entries() if _is_step(path.name)))

    def _entries(self) -> list[pathlib.Path]:
        try:
            return list(self._folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def restore(
        self, step: int | None, template: Any, read: Callable[[], None] = _nothing
    ) -> tuple[Any, dict[str, Any]]:
        """Reads the checkpoint of `step`, or the latest for None.

        Args:
          step: which one. Several hosts name the same.
          template: a pytree of arrays or ShapeDtypeStructs, as saved; the arrays come back in its
            structure, and with its shardings where it has them.
          read: called between what each of several hosts does for itself and the comparison with
            the digests, which they compute together.

        Returns:
          The state and the host's record.

        Raises:
          ValueError: there is no such checkpoint, or none any more; it cannot be read, or it is of
            other shapes.
        """
        return self._restore(step, template, read, partly=False)

    def restore_part(
        self, step: int | None, template: Any, read: Callable[[], None] = _nothing
    ) -> tuple[Any, dict[str, Any]]:
        """`restore` of some leaves: `template` holds those that are wanted, under the names that
        they have in the whole (a dict may stand for a NamedTuple). Nothing else is read.
        """
        return self._restore(step, template, read, partly=True)

    def _restore(
        self, wanted: int | None, template: Any, read: Callable[[], None], *, partly: bool
    ) -> tuple[Any, dict[str, Any]]:
        while True:
            step = self.latest_step if wanted is None else wanted
            if step is None or step not in self.steps:
                found = ", ".join(map(str, self.steps)) or "none"
                raise ValueError(
                    f"No checkpoint {'at all' if step is None else f'of step {step}'} in"
                    f" {self._folder} (there: {found})."
                )
            try:
                return self._read(step, template, read, partly=partly)
            except ValueError:
                if step in self.steps:
                    raise
                # the run went on meanwhile and kept newer ones only: look again

    def _read(
        self, step: int, template: Any, read: Callable[[], None], *, partly: bool
    ) -> tuple[Any, dict[str, Any]]:
        record = self._record(step)
        wanted, leaves = _describe(template), record["leaves"]
        if partly:
            leaves = {name: leaf for name, leaf in leaves.items() if name in wanted}
        difference = _first_difference(wanted, leaves)
        if difference:
            raise ValueError(
                f"{self._where(step)} does not fit this model and optimizer: {difference}. Use its"
                " configuration, or another run directory."
            )
        shapes = _by_name(jax.tree.map(_abstract, template))
        restored = self._arrays(
            step,
            ocp.args.PyTreeRestore(
                shapes,
                restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
                partial_restore=partly,
            ),
        )
        read()
        self._check(step, record, restored)
        leaves = [_in_its_memory(restored.pop(name)) for name in _names(template)]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), record["host"]

    def _record(self, step: int) -> dict[str, Any]:
        """What stands beside the arrays: host, leaves and digests; no digests in what was saved
        before there were any.
        """
        record = self._load(step, host=ocp.args.JsonRestore())["host"]
        if (
            isinstance(record, dict)
            and set(record) == {"host", "leaves"}
            and all(isinstance(part, dict) for part in record.values())
        ):
            return {**record, "digests": {}}
        if not isinstance(record, dict) or record != _sealed(
            {name: value for name, value in record.items() if name != "sha256"}
        ):
            raise ValueError(
                f"{self._where(step)} is damaged: its record is not what was saved."
                f" {self._instead(step)}"
            )
        return record

    def _arrays(self, step: int, wanted: ocp.args.PyTreeRestore) -> dict[str, Any]:
        return self._load(step, state=wanted)["state"]

    def _check(self, step: int, record: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        expected = record["digests"]
        if not expected:
            return
        if name := changed(expected, arrays):
            raise ValueError(
                f"{self._where(step)} is damaged: {name} is not what was saved."
                f" {self._instead(step)}"
            )

    def _load(self, step: int, **items: Any) -> Any:
        try:
            with _plainly_named(self._folder) as folder, _QUIET:
                return self._orbax.restore(folder / str(step), args=ocp.args.Composite(**items))
        except Exception as error:
            raise ValueError(
                f"{self._where(step)} cannot be read ({_reason(error)}). {self._instead(step)}"
            ) from error

    def _where(self, step: int) -> str:
        return f"The checkpoint of step {step} in {self._folder}"

    def _instead(self, step: int) -> str:
        """What to do without this one."""
        others = [other for other in self.steps if other != step]
        if not others:
            return "There is no other: put back a copy, or start again in another run directory."
        return (
            f"Name another with --step ({', '.join(map(str, others))}), or remove"
            f" {self._folder / str(step)}: training goes on from step {others[-1]} then."
        )


class Checkpointer(CheckpointReader):
    """Checkpoints under one folder, one sub-folder per step, for the one program that writes them.

    A save returns when the arrays are copied on the host, so that they may be donated; it is
    written meanwhile, beside its final place, and renamed there when it is complete: a process
    killed at any moment leaves the previous checkpoint as the latest, and the next `Checkpointer`
    removes the remains. While one is written only a second signal ends the process.

    Args:
      folder: made if missing.
      keep_last: how many of the newest checkpoints stay.
      keep_every: the multiples of this step stay as well; 0 for none.
      keep_best: so many with the highest scores stay as well.
      own_copies: of several hosts each has a folder of its own. The first alone writes, all of
        every array, which all hosts send it within `save`; the others only read.

    Raises:
      ValueError: for a count that is too low, or a folder that cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
        own_copies: bool = False,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"Keep at least 1 checkpoint: got keep_last={keep_last}.")
        if keep_every < 0:
            raise ValueError(f"Keep every step of a positive number: got keep_every={keep_every}.")
        if keep_best < 0:
            raise ValueError(f"Keep a positive number of the best: got keep_best={keep_best}.")
        super().__init__(folder)
        self._keep_last, self._keep_every, self._keep_best = keep_last, keep_every, keep_best
        self._own_copies = own_copies
        self._scores: dict[int, float] = {}  # of checkpoints that are there
        self._checked = False  # whether a checkpoint of this place has been read back
        self._first = jax.process_index() == 0  # of several hosts, who alone removes and checks
        self._writer = _writer(alone=own_copies) if self._first or not own_copies else None
        self._finishing: threading.Thread | None = None
        self._failed: Exception | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"Cannot make the checkpoint folder {self._folder}: {error.strerror}. Choose"
                " another."
            ) from error
        if self._first:
            self._remove_remains()

    def close(self) -> None:
        """Waits for what is written, then frees what Orbax holds. Idempotent. Raises ValueError as
        `wait` does.
        """
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
            super().close()

    def save(
        self, step: int, state: Any, host: Mapping[str, Any], *, score: float | None = None
    ) -> None:
        """Begins to save `state`, a pytree of arrays, and `host`, a JSON-able mapping, once the
        save before is complete; returns when both are copied. The first save is read back and
        compared.

        Args:
          score: by which it may be one of the best; None for none.

        Raises:
          ValueError: the step is there already, `host` is not JSON, the disk is too full or cannot
            be written to, or the save before has failed; nothing is changed then.
        """
        self.wait()
        if step in self.steps:
            raise ValueError(
                f"Step {step} is already in {self._folder}: remove it to save it again."
            )
        arrays = _by_name(state)
        record = _sealed(
            {
                "host": _jsonable(host),
                "leaves": _describe(state),
                "digests": digests(arrays),  # as they lie: any number of hosts can compare them
                **({} if score is None else {"score": score}),
            }
        )
        if self._writer is None:
            for array in arrays.values():  # for the first host; nothing of it stays here
                gathered(array)
            return
        copied = whole_on_host if self._own_copies else _apart
        arrays = {name: copied(array) for name, array in arrays.items()}
        needed = checkpoint_bytes(state)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise ValueError(_too_full(step, self._folder, needed, free))
        with contextlib.ExitStack() as stack:
            stack.enter_context(held())
            stack.enter_context(_QUIET)
            folder = stack.enter_context(_plainly_named(self._folder))
            try:
                self._writer.save(
                    folder / str(step),
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeSave(arrays), host=ocp.args.JsonSave(record)
                    ),
                )
            except Exception as error:
                if self._first:
                    self._remove_remains()
                raise self._not_written(step, error, needed) from error
            shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
            # a daemon: `close` waits for it, an end that is forced does not
            self._finishing = threading.Thread(
                target=self._finish,
                args=(step, shapes, needed, score, stack.pop_all()),
                name="checkpoint",
                daemon=True,
            )
            self._finishing.start()

    def wait(self) -> None:
        """Returns when what is being saved is complete.

        Raises:
          ValueError: it has failed: the disk is full, cannot be written to, or holds something else
            when it is read back. Nothing of it is left then. Raised once.
        """
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _finish(
        self,
        step: int,
        shapes: Mapping[str, jax.ShapeDtypeStruct],
        needed: int,
        score: float | None,
        resources: contextlib.ExitStack,
    ) -> None:
        """What follows when the arrays are copied, in a thread of its own."""
        with resources:
            try:
                self._commit(step, shapes, needed)
                if score is not None:
                    self._scores[step] = score
                if self._first:
                    self._remove_old()
            except Exception as error:  # for the program's own thread
                self._failed = error

    def _commit(self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct], needed: int) -> None:
        try:
            assert self._writer is not None
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._not_written(step, error, needed) from error
        finally:
            if self._first:
                self._remove_remains()  # of a save that failed; of one that did not there are none
        if self._checked or not self._first:
            return
        try:
            self._read_back(step, shapes)
        except ValueError as error:
            self._remove(step)
            raise ValueError(
                f"What was saved as the checkpoint of step {step} is not what {self._folder}"
                " holds when it is read back: check that disk, or choose another run directory."
            ) from error
        self._checked = True

    def _not_written(self, step: int, error: Exception, needed: int) -> ValueError:
        return ValueError(
            _too_full(step, self._folder, needed, shutil.disk_usage(self._folder).free)
            if _error_number(error) in (errno.ENOSPC, errno.EDQUOT)
            else f"The checkpoint of step {step} cannot be written to {self._folder}"
            f" ({_reason(error)}): make that possible, or choose another run directory."
        )

    def _remove_old(self) -> None:
        steps = self.steps
        best = sorted(self._scored(steps), reverse=True)[: self._keep_best]
        kept = {*steps[-self._keep_last :], *(step for _, step in best)}
        for step in steps:
            if step not in kept and (not self._keep_every or step % self._keep_every):
                self._remove(step)

    def _scored(self, steps: Sequence[int]) -> Iterator[tuple[float, int]]:
        """The scores that are known, of equal ones the newest first in descending order."""
        for step in steps if self._keep_best else ():
            if step not in self._scores:  # of an earlier life of this run
                with contextlib.suppress(ValueError):  # whoever restores it will hear of it
                    self._scores[step] = self._record(step).get("score", -math.inf)
            if self._scores.get(step, -math.inf) > -math.inf:
                yield self._scores[step], step

    def _remove(self, step: int) -> None:
        # out of sight at first: a killed process leaves no half of a checkpoint
        (self._folder / str(step)).rename(self._folder / f"{step}.removed")
        self._remove_remains()

    def _read_back(self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Compares what is on disk with its digests, a part at a time, on the host."""
        record, part, size = self._record(step), dict[str, Any](), 0
        for number, (name, shape) in enumerate(shapes.items(), start=1):
            part[name] = shape
            size += shape.size * shape.dtype.itemsize
            if size >= _CHECK_BYTES or number == len(shapes):
                as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in part}
                wanted = ocp.args.PyTreeRestore(part, restore_args=as_numpy, partial_restore=True)
                self._check(step, record, self._arrays(step, wanted))
                part, size = {}, 0

    def _remove_remains(self) -> None:
        for path in self._entries():
            if path.name.endswith(_REMAINS) and _is_step(path.name.partition(".")[0]):
                shutil.rmtree(path, ignore_errors=True)


def checkpoint_bytes(state: Any) -> int:
    """The disk space that a checkpoint of these arrays, or shapes, takes at most."""
    return _SLACK_BYTES + sum(
        leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state)
    )


def check_space(folder: str | os.PathLike[str], state: Any, num_checkpoints: int) -> None:
    """Compares the disk with what so many checkpoints of these arrays, or shapes, need; those that
    are there already count.

    Raises:
      ValueError: too little is free.
    """
    with CheckpointReader(folder) as reader:
        missing = max(num_checkpoints - len(reader.steps), 1)
    place = pathlib.Path(folder).absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    needed, free = missing * checkpoint_bytes(state), shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"Too little disk for the checkpoints in {folder}: {missing} of"
            f" {_mebibytes(checkpoint_bytes(state))} each need {_mebibytes(needed)}, and"
            f" {_mebibytes(free)} are free. Free some space, keep fewer checkpoints (--keep-last,"
            " --keep-every, --keep-best), or choose another --run-dir."
        )


def _writer(*, alone: bool) -> ocp.AsyncCheckpointer:
    """What writes a checkpoint: of several hosts all together, or the first one alone, which does
    not wait for the others then.
    """
    hosts = ocp.options.MultiprocessingOptions()
    if alone:
        hosts = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
        )
    options = ocp.CompositeOptions(multiprocessing_options=hosts)
    items = ocp.CompositeCheckpointHandler("state", "host", composite_options=options)
    if alone or jax.process_count() == 1:
        # what `alone` is given is copied already, and nobody else's: one copy of all weights, not
        # two; of what several devices hold, one is copied: a part of each is a program for each
        as_it_is = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=not alone)
        whole = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
        state = ocp.PyTreeCheckpointHandler(
            multiprocessing_options=hosts,
            type_handler_registry=ocp.type_handlers.create_type_handler_registry(
                (np.ndarray, as_it_is), (jax.Array, whole)
            ),
        )
        items = ocp.CompositeCheckpointHandler("host", state=state, composite_options=options)
    return ocp.AsyncCheckpointer(
        items,
        async_options=ocp.options.AsyncOptions(
            timeout_secs=_LONGEST_WRITE_S, create_directories_asynchronously=False
        ),
        multiprocessing_options=hosts,
    )


@contextlib.contextmanager
def _plainly_named(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Another name of a folder whose own name Orbax would misread: as a pattern ("[1]"), as a URL
    ("gs:"), or not at all (a backslash, bytes that are no UTF-8).
    """
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    if not _DESCRIPTORS.is_dir():
        raise ValueError(f"Checkpoints cannot lie in {folder} here: use letters and digits only.")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _DESCRIPTORS / str(descriptor)
    finally:
        os.close(descriptor)


class _EndedLoop(asyncio.SelectorEventLoop):
    """Ends what still runs in it when it is closed. Orbax closes its loop as soon as one read of
    many has failed; the others would complain of that later, each with a traceback.
    """

    def close(self) -> None:
        if not self.is_closed() and not self.is_running():
            self.set_exception_handler(lambda loop, context: None)
            if tasks := asyncio.all_tasks(self):
                # TensorStore complains of what is cancelled, too
                self.run_until_complete(asyncio.wait(tasks, timeout=_LAST_READS_S))
            if tasks := asyncio.all_tasks(self):
                for task in tasks:
                    task.cancel()
                self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


class _EndedLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _EndedLoop()


class _Quiet:
    """While any thread is inside, neither Orbax's own lines nor its tracebacks: what fails is
    raised as well, and told once.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._logger = logging.getLogger("absl")
        self._before: tuple[bool, asyncio.AbstractEventLoopPolicy] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._before is None:
                self._before = self._logger.disabled, asyncio.get_event_loop_policy()
                self._logger.disabled = True
                asyncio.set_event_loop_policy(_EndedLoops())
            self._inside += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._before is not None:
                self._logger.disabled, policy = self._before
                asyncio.set_event_loop_policy(policy)
                self._before = None


_QUIET = _Quiet()  # logger and policy are of the whole process


def _apart(array: Any) -> Any:
    """The same array in memory that nobody donates or changes. A device's own memory is copied to
    the host by Orbax, before its save returns; where that memory is the host's, Orbax copies
    nothing.
    """
    if not isinstance(array, jax.Array):
        return np.array(array)
    if any(device.platform != "cpu" for device in array.sharding.device_set):
        return array
    shards = [
        jax.device_put(np.array(shard.data), shard.data.sharding)
        for shard in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def _is_step(name: str) -> bool:
    return name.isdecimal() and name == str(int(name))


def _names(tree: Any) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves under their paths: independent of how Orbax treats tuples, NamedTuples and empty
    nodes.
    """
    return dict(zip(_names(tree), jax.tree.leaves(tree), strict=True))


def _describe(tree: Any) -> dict[str, str]:
    return {
        name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for name, leaf in _by_name(tree).items()
    }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _in_its_memory(leaf: Any) -> Any:
    """An array in the host's memory as JAX's programs take it: the type of one that is put together
    from parts, as Orbax does, says that it is in the device's.
    """
    if isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == _HOST_MEMORY:
        return jax.device_put(leaf, jax.memory.Space.Host)
    return leaf


def _jsonable(host: Mapping[str, Any]) -> dict[str, Any]:
    """`host` as JSON reads it back: tuples are lists then."""
    try:
        return json.loads(json.dumps(host, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"The checkpoint's host must be JSON: {error}.") from error


def _first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first leaf that differs, in words; empty if none does."""
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found:
            return f"it has no {name}"
        if name not in expected:
            return f"it has {name}, which is not expected"
        if expected[name] != found[name]:
            return f"{name} is {found[name]!r}, expected {expected[name]!r}"
    return ""


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    text = json.dumps(record, sort_keys=True)
    return {**record, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _error_number(error: BaseException) -> int | None:
    """The operating system's number; TensorStore has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def _reason(error: BaseException) -> str:
    number = _error_number(error)
    return "its files are incomplete or damaged" if number is None else os.strerror(number)


def _too_full(step: int, folder: pathlib.Path, needed: int, free: int) -> str:
    return (
        f"Too little disk for the checkpoint of step {step}: {folder} needs {_mebibytes(needed)}"
        f" and has {_mebibytes(free)} free. Free some space, keep fewer checkpoints, or choose"
        " another run directory."
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
