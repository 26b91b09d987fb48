"""What a sampler keeps on its devices: the weights, the KV cache, and the programs that work on
them, compiled ahead.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from ictjax.config import SamplerConfig
from ictjax.models.cache import KVCache
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params
from ictjax.sampler.blueprint import Blueprint, TurnShape, turn_shapes
from ictjax.sampler.state import blank_rows
from ictjax.sampler.weights import check_tree, sampling_weights


class Programs:
    """One `turn` per combination of sizes, and the copy of a cache row.

    Compiled ahead of their first call, not on it, so that nothing else can ever cause a
    recompilation. The cache is donated to every call and replaced by its result, so it has no other
    owner. `close` frees it; nothing may be called afterwards.

    Args:
      config: the model.
      params: its weights, see `load`.
      sizes: of the sampler.
      pad_id: fills unused positions.
      mesh: the devices to work on; None for the one that the weights are on.
      unused: ids that are never sampled.

    Raises:
      ValueError: sizes that do not fit the mesh, or weights of another model.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        sizes: SamplerConfig,
        pad_id: int,
        mesh: Mesh | None,
        unused: Sequence[range] = (),
    ) -> None:
        self._blueprint = Blueprint(
            config=config, sizes=sizes, pad_id=pad_id, mesh=mesh, unused=unused
        )
        self._cache: KVCache = jax.jit(
            self._blueprint.make_cache, out_shardings=self._blueprint.cache_sharding
        )()
        self._params: Params = {}
        self._turns: dict[TurnShape, Compiled] = {}
        self._row_copy: Compiled | None = None
        self.compile_count = 0
        self.load(params)

    def close(self) -> None:
        """Frees the cache, and lets go of weights and programs. Idempotent."""
        self._cache = KVCache(k=(), v=())
        self._params = {}
        self._turns.clear()
        self._row_copy = None

    @property
    def slots_per_shard(self) -> int:
        """See `Blueprint`."""
        return self._blueprint.slots_per_shard

    @property
    def num_shards(self) -> int:
        """Copies of the weights."""
        return self._blueprint.num_shards

    def load(self, params: Params) -> None:
        """Replaces the weights; those in the form of `weights.sampling_weights` are used where they
        are. Raises ValueError if the tree is not that of the config.
        """
        blueprint = self._blueprint
        check_tree(blueprint.config, params)
        self._params = {}  # frees converted weights before others are made
        self._params = sampling_weights(blueprint.config, params, blueprint.mesh)

    def programs(self) -> list[Callable[[], object]]:
        """One call for every program that any sequence of calls can need, which compiles it."""
        turns = [
            functools.partial(self._compiled_turn, shape)
            for shape in turn_shapes(self._blueprint.sizes)
        ]
        return [*turns, self._compiled_copy]

    def blank(self, num_rows: int, length: int) -> np.ndarray:
        """The packed matrix of a dispatch, all padding, to be filled by `state.pack_row`."""
        return blank_rows(
            num_rows,
            length,
            num_stop_ids=self._blueprint.sizes.max_stop_ids,
            num_bias=self._blueprint.sizes.max_bias_ids,
            num_slots=self.slots_per_shard,
            pad_id=self._blueprint.pad_id,
        )

    def turn(self, packed: np.ndarray, length: int, attended: int) -> np.ndarray:
        """Does one dispatch (see `step.turn`) of a matrix that `blank` made for this length, and
        waits for it.

        Returns: Packed samples (state.unpack_samples), on the host.
        """
        program = self._compiled_turn(TurnShape(len(packed), length, attended))
        samples, self._cache = program(self._params, self._cache, packed)
        return np.asarray(samples)

    def copy_row(self, source: int, target: int) -> None:
        """Copies one row of the cache over another."""
        self._cache = self._compiled_copy()(self._cache, np.int32(source), np.int32(target))

    def _compiled_turn(self, shape: TurnShape) -> Compiled:
        if shape not in self._turns:
            self._turns[shape] = self._compiled(
                self._blueprint.turn(self._params, self._cache, shape)
            )
        return self._turns[shape]

    def _compiled_copy(self) -> Compiled:
        if self._row_copy is None:
            self._row_copy = self._compiled(self._blueprint.copy(self._cache))
        return self._row_copy

    def _compiled(self, program: Lowered) -> Compiled:
        self.compile_count += 1
        return program.compile()
