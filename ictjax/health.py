"""Notices that nothing can be learned, so that a run ends with the reason instead of going on
without any.
"""

from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from envs.api import CannotGoOn, Outcome
from ictjax.learner import Params
from ictjax.ranges import shown
from ictjax.records import Candidate, ParseFailure, Trajectory


def not_finite(params: Params) -> str:
    """The name of the first weight that holds a NaN or an infinity; empty where none does."""
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    finite = jax.device_get(_finite([leaf for _, leaf in named]))
    return next((name for (name, _), whole in zip(named, finite, strict=True) if not whole), "")


@jax.jit
def _finite(leaves: Sequence[Array]) -> list[Bool[Array, ""]]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def check_loaded(params: Params, source: str) -> None:
    """Raises ValueError for weights that were read with a NaN or an infinity among them."""
    if name := not_finite(params):
        raise ValueError(
            f"The weight {name} of the model {source} holds values that are not finite: get the"
            " model again, or name another."
        )


class Health:
    """Watches the iterations of a run.

    Args:
      patience: so many iterations in a row without anything to learn from end the run.
    """

    def __init__(self, patience: int):
        self._patience, self._in_vain = patience, 0

    def check_rewards(self, iteration: int, groups: Sequence[Sequence[Candidate]]) -> None:
        """Raises CannotGoOn for a reward that is not finite."""
        rewards = [c.reward for group in groups for c in group if c.reward is not None]
        if not np.isfinite(rewards).all():
            raise CannotGoOn(
                f"A reward of iteration {iteration} is not finite{_NOT_SAVED} repair the game that"
                " gave it, or meta.malformed_reward, and start it again."
            )

    def check_samples(
        self, iteration: int, groups: Sequence[Sequence[Candidate]], step: int
    ) -> None:
        """Raises CannotGoOn for a candidate that was not sampled with the weights of this step of
        the learner. Weights are set after every update, so other ones are a fault, never lag: a
        count would let a run learn from stale samples to its end.
        """
        found = {c.weights_step for group in groups for c in group} - {step}
        if found:
            raise CannotGoOn(
                f"Candidates of iteration {iteration} were sampled with weights of step"
                f" {shown(min(found, key=str))}, the learner is at step {step}{_NOT_SAVED} the new"
                " weights did not reach the sampler, start it again with the same flags."
            )

    def check_update(
        self, iteration: int, params: Params, bad_leaves: np.ndarray, loss: np.ndarray
    ) -> None:
        """Raises CannotGoOn where an update has left weights, or begun with a loss, that are not
        finite. A gradient alone that is not, was left out and is counted.
        """
        what = ""
        if bad_leaves:
            what = f"The weight {not_finite(params)}"
        elif not np.isfinite(loss):
            what = "The loss"
        if what:
            raise CannotGoOn(
                f"{what} is not finite in iteration {iteration}{_NOT_SAVED} another run with a"
                " lower optimizer.learning_rate may go further."
            )

    def check_iteration(
        self,
        iteration: int,
        groups: Sequence[Sequence[Candidate]],
        trajectories: Sequence[Trajectory],
        *,
        updated: bool,
    ) -> None:
        """Books a finished iteration.

        Args:
          iteration: its number.
          groups: its candidates.
          trajectories: the episodes that rewarded them.
          updated: whether a step of the optimizer was taken.

        Raises:
          CannotGoOn: it was the last of `patience` in a row with nothing to learn from.
        """
        why = _in_vain(groups, trajectories) or (
            "" if updated else "no gradient was finite, and so no step was taken"
        )
        self._in_vain = self._in_vain + 1 if why else 0
        if self._in_vain >= self._patience:
            times = (
                f"{self._patience} iterations in a row" if self._patience > 1 else "an iteration"
            )
            raise CannotGoOn(
                f"Nothing could be learned in {times}, up to {iteration}, which is saved: {why};"
                " repair that and start it again with the same flags, and with more --iterations"
                " where none are left."
            )


_NOT_SAVED = ", which was not saved:"


def _in_vain(groups: Sequence[Sequence[Candidate]], trajectories: Sequence[Trajectory]) -> str:
    """Why nothing can be learned from these; empty where something may be."""
    if trajectories and all(t.outcome is Outcome.FAILED for t in trajectories):
        return f"every game failed ({most_frequent_error(trajectories)})"
    candidates = [candidate for group in groups for candidate in group]
    if candidates and all(c.system_prompt is None for c in candidates):
        kinds = Counter(c.failure for c in candidates)
        return f"no reply of the reflector held a usable prompt (mostly {_most(kinds)})"
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    if turns and all(turn.failure is not None for turn in turns):
        kinds = Counter(turn.failure for turn in turns)
        return f"no reply of the actor held a usable action (mostly {_most(kinds)})"
    return ""


def most_frequent_error(trajectories: Sequence[Trajectory]) -> str:
    """Why most of the failed episodes failed, without a full stop; empty where none did."""
    errors = Counter(t.error for t in trajectories if t.outcome is Outcome.FAILED)
    if not errors:
        return ""
    error = _most(errors).rstrip(".")
    return error if len(error) <= _MAX_ERROR_CHARS else error[: _MAX_ERROR_CHARS - 3] + "..."


_MAX_ERROR_CHARS = 300


def _most(kinds: "Counter[ParseFailure | None] | Counter[str]") -> str:
    return str(kinds.most_common(1)[0][0])
