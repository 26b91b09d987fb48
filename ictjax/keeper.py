"""When the state of a run is saved: every so many iterations, after the last one, and, whatever
ends the run, after the last that was finished.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from envs.stopping import held
from ictjax.checkpoint import Checkpointer
from ictjax.learner import LearnerState


class _Finished(NamedTuple):
    iteration: int
    state: LearnerState
    host: Mapping[str, Any]


class Keeper:
    """Saves finished iterations. A context manager, inside of that of its checkpointer.

    While a finished iteration is not saved only a second signal ends the process.

    Args:
      checkpointer: where to.
      every: iterations from save to save.
      last: the iteration that is saved in any case.
    """

    def __init__(self, checkpointer: Checkpointer, *, every: int, last: int):
        self._checkpointer, self._every, self._last = checkpointer, every, last
        self._unsaved: _Finished | None = None
        self._holding = contextlib.ExitStack()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._holding:
            if self._unsaved is not None:
                self._save(self._unsaved)

    def let_go(self) -> None:
        """The state of the last iteration is about to be donated."""
        self._unsaved = None

    def finish(self, iteration: int, state: LearnerState, host: Mapping[str, Any]) -> None:
        """Saves an iteration whose files are written, now or, when the run ends before the next,
        then. Raises ValueError as `Checkpointer.save` does.
        """
        finished = _Finished(iteration, state, host)
        if iteration % self._every == 0 or iteration == self._last:
            self._save(finished)
            self._holding.close()
        else:
            self._unsaved = finished
            self._holding.enter_context(held())

    def _save(self, finished: _Finished) -> None:
        self._unsaved = None  # first: what cannot be saved is not tried twice
        with held():
            self._checkpointer.save(*finished)
