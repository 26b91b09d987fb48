"""What a run compiles: all of it before it begins, and a count of what comes later all the same."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped

from ictjax.batch import Batch, blank
from ictjax.config import BatchConfig
from ictjax.learner import LearnerState, Metrics
from ictjax.mesh import split_rows
from ictjax.models.transformer import Params

Compile = Callable[[], object]
CompileProgress = Callable[[int, int], None]  # programs compiled, and in all

_EVENT = "/jax/core/compile/backend_compile_duration"


class Updates:
    """An update, compiled ahead for every shape of a batch; called as the update itself.

    Args:
      update: see `ictjax.learner.make_update`.
      config: of the batches.
      mesh: that they are split over.
    """

    def __init__(self, update: Wrapped, config: BatchConfig, mesh: Mesh | None) -> None:
        self._update, self._config, self._mesh = update, config, mesh
        self._compiled: dict[tuple[int, ...], Compiled] = {}

    def programs(self, state: LearnerState, base: Params | None) -> list[Compile]:
        """One call for each shape, which compiles it."""

        def compile_shape(num_tokens: int, num_responses: int) -> None:
            batch = split_rows(blank(self._config, num_tokens, num_responses, 0), self._mesh)
            self._compiled[_shape(batch)] = self._update.lower(state, base, batch).compile()

        return [
            lambda tokens=tokens, responses=responses: compile_shape(tokens, responses)
            for tokens in self._config.token_buckets
            for responses in self._config.response_buckets
        ]

    def __call__(
        self, state: LearnerState, base: Params | None, batch: Batch
    ) -> tuple[LearnerState, Metrics]:
        batch = split_rows(batch, self._mesh)
        return self._compiled.get(_shape(batch), self._update)(state, base, batch)


def _shape(batch: Batch) -> tuple[int, ...]:
    return (*batch.tokens_nt.shape, *batch.target_br.shape)


MOST_PROGRAMS = 12
"""Of a run with a large model. Small models may have more, of which a run needs some."""


def compile_all(programs: Sequence[Compile], progress: CompileProgress | None = None) -> None:
    """Compiles one after another; more than `MOST_PROGRAMS` are left to be compiled when they are
    needed, so that a run of a small model begins at once.
    """
    if len(programs) > MOST_PROGRAMS:
        return
    for number, compile_one in enumerate(programs):
        if progress is not None:
            progress(number, len(programs))
        compile_one()
    if progress is not None:
        progress(len(programs), len(programs))


class Compilations:
    """How many programs were compiled while it was open, by any part of this process."""

    def __init__(self) -> None:
        self.count = 0

    def book(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Hears of everything that JAX measures."""
        del duration_secs
        self.count += event == _EVENT


@contextlib.contextmanager
def counted_compilations() -> Iterator[Compilations]:
    """Counts until it is left."""
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter.book)
    try:
        yield counter
    finally:
        jax.monitoring.unregister_event_duration_listener(counter.book)
