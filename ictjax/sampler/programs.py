"""What a sampler keeps on its devices: the weights, the KV cache, and the programs that work on
them, compiled ahead.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

from ictjax.config import SamplerConfig
from ictjax.models.cache import KVCache
from ictjax.models.config import ModelConfig
from ictjax.models.cpu_kernels import use_large_pages
from ictjax.models.transformer import Params
from ictjax.sampler.blueprint import Blueprint, RowProgram, TurnShape, row_programs, turn_shapes
from ictjax.sampler.state import Left
from ictjax.sampler.weights import check_tree, packed_weights, sampling_weights


class Pending(Protocol):
    """An array on the devices that may still be computed; what is used of `jax.Array`."""

    def is_ready(self) -> bool: ...
    def block_until_ready(self) -> object: ...
    def __array__(self) -> np.ndarray: ...


class Programs:
    """One `turn` per combination of sizes, and those that move single rows of the cache.

    Compiled ahead of their first call, not on it, so that nothing else can ever cause a
    recompilation. The cache is donated to every call and replaced by its result, so it has no other
    owner, and the devices keep the order of the calls. `close` frees it; nothing may be called
    afterwards.

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
        if self._blueprint.kernels:
            use_large_pages(jax.tree.leaves(self._cache))
        self._left: Left = jax.jit(
            self._blueprint.make_left, out_shardings=self._blueprint.left_sharding
        )()
        # of one row of the cache, over all devices
        self.row_bytes = sum(leaf.nbytes // len(leaf) for leaf in jax.tree.leaves(self._cache))
        self._params: Params = {}
        self._turns: dict[TurnShape, Compiled] = {}
        self._of_rows: dict[RowProgram, Compiled] = {}
        self.compile_count = 0
        self.load(params)

    def close(self) -> None:
        """Frees the cache, and lets go of weights and programs. Idempotent."""
        self._cache = KVCache(k=(), v=())
        self._params = {}
        self._turns.clear()
        self._of_rows.clear()

    @property
    def slots_per_shard(self) -> int:
        """See `Blueprint`."""
        return self._blueprint.slots_per_shard

    @property
    def num_shards(self) -> int:
        """Copies of the weights."""
        return self._blueprint.num_shards

    @property
    def rows_per_shard(self) -> int:
        """See `Blueprint`."""
        return self._blueprint.rows_per_shard

    def load(self, params: Params) -> None:
        """Replaces the weights; those in the form of `weights.sampling_weights` are used where they
        are. Raises ValueError if the tree is not that of the config.
        """
        blueprint = self._blueprint
        check_tree(blueprint.config, params)
        self._params = {}  # frees converted weights before others are made
        params = sampling_weights(blueprint.config, params, blueprint.mesh)
        self._params = packed_weights(blueprint.config, params) if blueprint.kernels else params

    def programs(self) -> list[Callable[[], object]]:
        """One call for every program that any sequence of calls can need, which compiles it."""
        turns = [
            functools.partial(self._compiled_turn, shape)
            for shape in turn_shapes(self._blueprint.sizes)
        ]
        rows = [
            functools.partial(self._compiled_of_rows, name)
            for name in row_programs(self._blueprint.sizes)
        ]
        return [*turns, *rows]

    def blank(self, num_rows: int, length: int, attended: int) -> np.ndarray:
        """See `Blueprint.blank`."""
        return self._blueprint.blank(num_rows, length, attended)

    def turn(self, packed: np.ndarray, length: int, attended: int) -> Pending:
        """Launches one dispatch (see `step.turn`) of a matrix that `blank` made for these sizes,
        which must not change any more.

        Returns: Packed samples (see `step.turn`), which may still be computed.
        """
        program = self._compiled_turn(TurnShape(len(packed), length, attended))
        samples, self._cache, self._left = program(self._params, self._cache, self._left, packed)
        return samples

    def copy_row(self, source: int, target: int) -> None:
        """Copies one row of the cache over another."""
        program = self._compiled_of_rows("copy")
        self._cache = program(self._cache, np.int32(source), np.int32(target))

    def take_row(self, row: int) -> KVCache:
        """A row of the cache, on the host."""
        return jax.tree.map(np.asarray, self._compiled_of_rows("take")(self._cache, np.int32(row)))

    def put_row(self, row: int, content: KVCache) -> None:
        """Writes what `take_row` took over a row of the cache."""
        self._cache = self._compiled_of_rows("put")(self._cache, np.int32(row), content)

    def _compiled_turn(self, shape: TurnShape) -> Compiled:
        if shape not in self._turns:
            self._turns[shape] = self._compiled(
                self._blueprint.turn(self._params, self._cache, shape)
            )
        return self._turns[shape]

    def _compiled_of_rows(self, name: RowProgram) -> Compiled:
        if name not in self._of_rows:
            blueprint = self._blueprint
            made = {"copy": blueprint.copy, "take": blueprint.take, "put": blueprint.put}[name]
            self._of_rows[name] = self._compiled(made(self._cache))
        return self._of_rows[name]

    def _compiled(self, program: Lowered) -> Compiled:
        self.compile_count += 1
        return program.compile()
