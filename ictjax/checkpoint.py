"""Orbax checkpoints of a run: a pytree of arrays and a JSON record of the host's state, saved
together or not at all.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_SLACK_BYTES = 16 * 2**20  # metadata, and what the file system rounds up


class Checkpointer:
    """Checkpoints under one folder, one sub-folder per step. A context manager.

    A save is written beside its final place and renamed there when it is complete: a process killed
    at any moment leaves the previous checkpoint as the latest, and the next `Checkpointer` removes
    the remains. Saves are synchronous: the arrays may be donated as soon as `save` returns.

    Args:
      folder: made if missing.
      keep_last: how many of the newest checkpoints stay.

    Raises:
      ValueError: for a count below 1, or a folder that cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"Keep at least 1 checkpoint: got keep_last={keep_last}.")
        self._folder = Path(folder).absolute()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"Cannot make the checkpoint folder {self._folder}: {error.strerror}. Choose"
                " another."
            ) from error
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep_last),
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
            item_names=("state", "host"),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees Orbax's threads. Idempotent."""
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> tuple[int, ...]:
        """All complete checkpoints, ascending."""
        return tuple(sorted(self._manager.all_steps()))

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Saves `state`, a pytree of arrays, and `host`, a JSON-able mapping; returns when both are
        in place.

        Raises:
          ValueError: the step is there already, `host` is not JSON, or the disk is too full;
            nothing is changed then.
        """
        if step in self.steps:
            raise ValueError(
                f"Step {step} is already in {self._folder}: remove it to save it again."
            )
        record = {"host": _jsonable(host), "leaves": _describe(state)}
        needed = (
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) + _SLACK_BYTES
        )
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise ValueError(_too_full(step, self._folder, needed, free))
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_by_name(state)), host=ocp.args.JsonSave(record)
                ),
                force=True,
            )
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                _too_full(step, self._folder, needed, shutil.disk_usage(self._folder).free)
            ) from error
        assert saved, f"Orbax did not save step {step}"

    def restore(self, step: int | None, template: Any) -> tuple[Any, dict[str, Any]]:
        """Reads the checkpoint of `step`, or the latest for None.

        Args:
          step: which one.
          template: a pytree of arrays or ShapeDtypeStructs, as saved; the arrays come back in its
            structure, and with its shardings where it has them.

        Returns:
          The state and the host's record.

        Raises:
          ValueError: there is no such checkpoint, it cannot be read, or it is of other shapes.
        """
        return self._restore(step, template, partly=False)

    def restore_part(self, step: int | None, template: Any) -> tuple[Any, dict[str, Any]]:
        """`restore` of some leaves: `template` holds those that are wanted, under the names that
        they have in the whole (a dict may stand for a NamedTuple). Nothing else is read.
        """
        return self._restore(step, template, partly=True)

    def _restore(
        self, step: int | None, template: Any, *, partly: bool
    ) -> tuple[Any, dict[str, Any]]:
        if step is None:
            step = self.latest_step
        if step is None or step not in self.steps:
            found = ", ".join(map(str, self.steps)) or "none"
            raise ValueError(
                f"No checkpoint {'at all' if step is None else f'of step {step}'} in {self._folder}"
                f" (there: {found})."
            )
        where = f"The checkpoint of step {step} in {self._folder}"
        record = self._read(where, step, host=ocp.args.JsonRestore())["host"]
        wanted, leaves = _describe(template), record["leaves"]
        if partly:
            leaves = {name: leaf for name, leaf in leaves.items() if name in wanted}
        difference = _first_difference(wanted, leaves)
        if difference:
            raise ValueError(
                f"{where} does not fit this model and optimizer: {difference}. Use its"
                " configuration, or another run directory."
            )
        shapes = _by_name(jax.tree.map(_abstract, template))
        read = ocp.args.PyTreeRestore(
            shapes,
            restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
            partial_restore=partly,
        )
        restored = self._read(where, step, state=read)["state"]
        leaves = [restored[name] for name in _names(template)]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), record["host"]

    def _read(self, where: str, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise ValueError(
                f"{where} cannot be read ({_first_line(error)}): remove that folder and resume from"
                " an earlier one."
            ) from error


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


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _too_full(step: int, folder: Path, needed: int, free: int) -> str:
    return (
        f"Too little disk for the checkpoint of step {step}: {folder} needs {needed / 2**20:.0f}"
        f" MiB and has {free / 2**20:.0f} MiB free. Free some space, keep fewer checkpoints, or"
        " choose another run directory."
    )
