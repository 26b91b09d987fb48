"""Metrics of a run: one JSON line per iteration, always; TensorBoard when it is installed; and
whoever else is to get the numbers.
"""

import contextlib
import json
import math
import os
import time as clocks
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from envs.files import append, replacing
from ictjax.json_lines import to_json_line

FILE_NAME = "metrics.jsonl"


class Mirror(Protocol):
    """Gets the numbers of every iteration as well."""

    last: int  # the newest iteration that it has

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl`, and mirrors numbers to `run_dir/tensorboard` if
    tensorboardX is installed. A context manager.

    Args:
      run_dir: made if missing.
      last_iteration: the last one a restored run has done: lines past it are dropped. None drops
        every line (a fresh run).
      mirrors: get the same numbers, and first those of earlier lines that they lack; closed with
        this.

    Raises:
      ValueError: a line before the last is not what `write` writes.
      OSError: the directory cannot be written to.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        last_iteration: int | None = None,
        mirrors: Sequence[Mirror] = (),
    ) -> None:
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        _truncate(path, last_iteration)
        self._events = None
        with contextlib.suppress(ImportError):  # optional: the JSON lines hold everything
            # not at the top: it loads PyTorch where that is installed, and readers need neither
            from ictjax.events import EventLog

            self._events = EventLog(folder / "tensorboard", last_iteration)
        self._file = path.open("ab", buffering=0)
        self._mirrors = tuple(mirrors)
        if self._mirrors:
            for record in _records(path):
                for mirror in self._mirrors:
                    if record["iteration"] > mirror.last:
                        mirror.write(record["iteration"], _flat(record))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def write(
        self, iteration: int, values: Mapping[str, Any], time: Mapping[str, float] | None = None
    ) -> None:
        """Writes one line and waits until it is on disk; a disk that refuses it leaves the file as
        it was.

        Args:
          iteration: which iteration the numbers are of.
          values: numbers, JAX or numpy scalars included, and any other JSON values. NaN and
            infinities become null.
          time: seconds and rates, everything that depends on the wall clock: kept under the key
            "time", so that two runs can be compared.

        Raises:
          ValueError: `values` uses a reserved key, or holds something JSON cannot.
          OSError: the disk is full, or cannot be written to.
        """
        for key in ("iteration", "time"):
            if key in values:
                raise ValueError(f"The metric name {key!r} is reserved: choose another.")
        seconds = _plain(time or {})
        record = {"iteration": iteration, **_plain(values), "time": seconds}
        append(self._file, (to_json_line(record) + "\n").encode())
        if self._events is not None:
            self._events.write(iteration, _flat(record))
        for mirror in self._mirrors:
            mirror.write(iteration, _flat(record))

    def close(self) -> None:
        """Closes all files. Idempotent."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        for mirror in self._mirrors:
            mirror.close()


class Clock:
    """Seconds per phase of one iteration."""

    def __init__(self):
        self.times: dict[str, float] = {}
        self._last = clocks.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap under `name`."""
        now = clocks.perf_counter()
        self.times[name], self._last = now - self._last, now


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file (or of the one in a run directory), in order; [] if there is
    none.

    A last line that a killed process left half-written is ignored.

    Raises:
      ValueError: any other line is no record, or not of a later iteration than the one before it.
    """
    path = Path(path)
    # by name: a run directory may come into being right now
    return _records(path if path.suffix == ".jsonl" else path / FILE_NAME)


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # a whole last line leaves "" behind its newline
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    del torn
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # numbers of thousands of digits, deep nesting
            record = None
        if not isinstance(record, dict) or type(record.get("iteration")) is not int:
            raise ValueError(
                f"Line {number} of {path} is not a metrics record: {line[:80]!r}. Remove it, or"
                " restore the file."
            )
        if records and record["iteration"] <= records[-1]["iteration"]:
            raise ValueError(
                f"Line {number} of {path} is of iteration {record['iteration']}, which comes twice"
                f" or after a later one: remove it, or restore the file."
            )
        records.append(record)
    return records


def _truncate(path: Path, last_iteration: int | None) -> None:
    """Rewrites the file, atomically, without the lines past `last_iteration` and without a torn
    last line.
    """
    kept = (
        []
        if last_iteration is None
        else [record for record in _records(path) if record["iteration"] <= last_iteration]
    )
    if not path.exists() and not kept:
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(to_json_line(record) + "\n" for record in kept)


def _plain(value: Any) -> Any:
    """`value` in JSON types; scalars of numpy and JAX become Python numbers, numbers that are not
    finite become None.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _plain(value.item())
    raise ValueError(
        "A metric must be a number, a string, None, or a list or mapping of these; got"
        f" {type(value).__name__}: {value!r:.80}."
    )


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by name, times behind "time/"; those of records within it are left
    out.
    """
    flat = {**_numbers(record, ()), **_numbers(record.get("time", {}), ("time",))}
    del flat["iteration"]
    return flat


def _numbers(record: Mapping[str, Any], prefix: tuple[str, ...]) -> dict[str, float]:
    return {
        "/".join((*prefix, name)): value
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
