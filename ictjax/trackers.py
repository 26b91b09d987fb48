"""Experiment trackers, which get what metrics.jsonl holds. Whatever one of them does, the run goes
on: each works in a thread of its own, and one that fails is said once and then left alone.
"""

import importlib.util
import json
import logging
import pathlib
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from envs.files import replacing
from ictjax.extras import install
from ictjax.json_lines import to_json_text
from ictjax.run_config import TrainConfig, to_dict

FILE_NAME = "tracking.json"  # in the run directory: which tracked run it is, and how far

_PATIENCE_S = 60.0  # for what a tracker has still to send at the end
_LOGIN_S = 30  # that wandb waits for somebody to type a key
_LOG = logging.getLogger(__name__)
_NOTING = threading.Lock()  # trackers of one run share a file


class Run(Protocol):
    """What runs of wandb and of trackio have in common."""

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


Open = Callable[[str, str, dict[str, Any]], Run]
"""Project, id and configuration -> the run of that id, begun or gone on with."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker whose package is not installed."""
    for name in names:
        try:
            found = importlib.util.find_spec(name) is not None
        except ValueError:  # imported, by nobody knows whom
            found = True
        if not found:
            raise ValueError(
                f"--track {name} needs the package {name}, which is not installed: in the clone,"
                f" run `{install(name)}`."
            )


def open_trackers(config: TrainConfig, run_dir: pathlib.Path) -> list["TrackedRun"]:
    """The trackers that a run is configured with."""
    return [
        TrackedRun(name, _OPEN[name], config.track_project, to_dict(config), run_dir)
        for name in config.track
    ]


class TrackedRun:
    """A run at one tracker, the same one whenever training goes on in that directory. What it
    lacks of the iterations before is sent first (`last` says which it has).

    Args:
      name: of the tracker.
      open_run: begins it or goes on with it.
      project: that it belongs to there.
      config: kept beside it there.
      run_dir: holds `FILE_NAME`.
    """

    def __init__(
        self,
        name: str,
        open_run: Open,
        project: str,
        config: dict[str, Any],
        run_dir: pathlib.Path,
    ):
        self._name, self._path = name, run_dir / FILE_NAME
        known = _read(self._path).get(name, {})
        run_id, self.last = known.get("id"), known.get("iteration")
        if not isinstance(run_id, str) or type(self.last) is not int:
            run_id, self.last = f"{secrets.token_hex(4)}-{run_dir.resolve().name}", 0
        self._id = run_id
        self._open = lambda: open_run(project, run_id, config)
        self._waiting: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Leaves the numbers of an iteration to be sent. Iterations that are there already, which a
        resumed run makes again with the same numbers, are not sent twice.
        """
        if iteration > self.last and self._thread.is_alive():
            self.last = iteration
            self._waiting.put((iteration, dict(numbers)))

    def close(self) -> None:
        """Waits a while for what is still to be sent. Idempotent."""
        self._waiting.put(None)
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            _LOG.warning(
                "%s has not taken all metrics within %.0f s: they are in metrics.jsonl, and are"
                " sent when this run goes on.",
                self._name,
                _PATIENCE_S,
            )

    def _work(self) -> None:
        try:
            run = self._open()
            while (item := self._waiting.get()) is not None:
                iteration, numbers = item
                run.log(numbers, step=iteration)
                self._note(iteration)
            run.finish()
        except (Exception, SystemExit) as error:
            _LOG.warning(
                "%s gets no metrics of this run any more (%s: %s): they are in metrics.jsonl, and"
                " are sent when this run is started again with --track %s.",
                self._name,
                type(error).__name__,
                " ".join(str(error).split())[:300],
                self._name,
            )

    def _note(self, iteration: int) -> None:
        with _NOTING, replacing(self._path) as temporary:
            noted = _read(self._path) | {self._name: {"id": self._id, "iteration": iteration}}
            temporary.write_text(to_json_text(noted, indent=1) + "\n", encoding="utf-8")


def _read(path: pathlib.Path) -> dict[str, Any]:
    """What is noted; nothing where the file is missing or damaged: another run begins there."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return {name: known for name, known in noted.items() if isinstance(known, dict)}
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}


def _wandb(project: str, run_id: str, config: dict[str, Any]) -> Run:
    import wandb  # an optional package, and slow to import

    number, _, name = run_id.partition("-")
    settings = {"login_timeout": _LOGIN_S, "finish_timeout": _PATIENCE_S}
    return wandb.init(
        project=project, id=number, name=name, config=config, resume="allow", settings=settings
    )


def _trackio(project: str, run_id: str, config: dict[str, Any]) -> Run:
    import trackio  # an optional package, and slow to import

    return trackio.init(
        project=project,
        name=run_id,
        config=config,
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )


_OPEN: Mapping[str, Open] = MappingProxyType({"wandb": _wandb, "trackio": _trackio})
