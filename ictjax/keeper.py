"""When the state of a run is saved: every so many iterations, after the last one, and, whatever
ends the run, after the last that was finished.
"""

import collections
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from envs.stopping import held
from ictjax.checkpoint import Checkpointer
from ictjax.learner import LearnerState

_SCORED = 5  # iterations whose mean reward is the score of a checkpoint


class _Finished(NamedTuple):
    iteration: int
    state: LearnerState
    host: Mapping[str, Any]


class Keeper:
    """Saves finished iterations, which are written while the next are played. A context manager,
    inside of that of its checkpointer.

    While a finished iteration is not saved only a second signal ends the process.

    A checkpoint's score is the mean training reward of the last iterations up to it. No evaluation
    decides which are kept: its games are those on which results are reported.

    Args:
      checkpointer: where to.
      every: iterations from save to save.
      last: the iteration that is saved in any case.
      alone: whether what was finished last is saved when the run ends before it is due; several
        hosts do not end at the same iteration.
      rewards: of the iterations so far, None where there was none.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        every: int,
        last: int,
        alone: bool = True,
        rewards: Sequence[float | None] = (),
    ):
        self._checkpointer, self._every, self._last = checkpointer, every, last
        self._alone = alone
        self._rewards = collections.deque(rewards, _SCORED)
        self._unsaved: _Finished | None = None
        self._blocked_s = 0.0
        self._holding = contextlib.ExitStack()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._holding:
            if self._unsaved is not None:
                self._save(self._unsaved)
            with held():
                self._checkpointer.wait()

    def let_go(self) -> None:
        """The state of the last iteration is about to be donated."""
        self._unsaved = None

    def settle(self) -> float:
        """Waits for what is being written; before the files of the next iteration are, so that no
        record is ahead of a checkpoint that was due.

        Returns:
          The seconds that saves have held up the run since the last call.

        Raises:
          ValueError: the last save has failed, see `Checkpointer.wait`.
        """
        start = time.perf_counter()
        self._checkpointer.wait()
        blocked_s, self._blocked_s = self._blocked_s + time.perf_counter() - start, 0.0
        return blocked_s

    def finish(
        self,
        iteration: int,
        state: LearnerState,
        host: Mapping[str, Any],
        reward: float | None = None,
    ) -> None:
        """Saves an iteration whose files are written, now or, when the run ends before the next,
        then. Raises ValueError as `Checkpointer.save` does.
        """
        self._rewards.append(reward)
        finished = _Finished(iteration, state, host)
        if iteration % self._every == 0 or iteration == self._last:
            self._save(finished)
            self._holding.close()
        elif self._alone:
            self._unsaved = finished
            self._holding.enter_context(held())

    def _save(self, finished: _Finished) -> None:
        self._unsaved = None  # first: what cannot be saved is not tried twice
        known = [reward for reward in self._rewards if reward is not None]
        score = sum(known) / len(known) if known else None
        start = time.perf_counter()
        with held():
            self._checkpointer.save(*finished, score=score)
        self._blocked_s += time.perf_counter() - start
