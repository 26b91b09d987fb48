"""What a sampler keeps on its devices: the weights, the KV cache, and the programs that work on
them, compiled ahead.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from ictjax.config import SamplerConfig
from ictjax.mesh import cache_sharding, kv_copies
from ictjax.models.cache import KVCache, copy_row, copy_row_across, make_cache
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params
from ictjax.sampler.state import blank_rows
from ictjax.sampler.step import turn
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
        self.num_shards = 1 if mesh is None else mesh.shape["data"]  # copies of the weights
        for name, counts in (("num_slots", (sizes.num_slots,)), ("row_buckets", sizes.row_buckets)):
            if any(count % self.num_shards for count in counts):
                raise ValueError(
                    f"{name} {counts} are not multiples of the mesh's data axis {self.num_shards}:"
                    " every copy gets the same share"
                )
        self._config, self._sizes, self._pad_id, self._mesh = config, sizes, pad_id, mesh
        self._unused = unused
        copies = kv_copies(config.num_heads, config.num_kv_heads, mesh)
        self._cache_sharding = (
            None if mesh is None else cache_sharding(config.num_kv_heads * copies, mesh)
        )
        self._cache: KVCache = jax.jit(
            lambda: make_cache(config, sizes.num_slots, sizes.max_len, copies=copies),
            out_shardings=self._cache_sharding,
        )()
        self._params: Params = {}
        self._turns: dict[tuple[int, int, int], Compiled] = {}
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
        """Cache rows that one copy of the weights works on: the first ones are the first copy's."""
        return self._sizes.num_slots // self.num_shards

    def load(self, params: Params) -> None:
        """Replaces the weights; those in the form of `weights.sampling_weights` are used where they
        are. Raises ValueError if the tree is not that of the config.
        """
        check_tree(self._config, params)
        self._params = {}  # frees converted weights before others are made
        self._params = sampling_weights(self._config, params, self._mesh)

    def warmup(self) -> None:
        """Compiles every program that any sequence of calls can need."""
        for num_rows in self._sizes.row_buckets:
            for length in (1, *self._sizes.extend_buckets):
                for attended in self._sizes.attended:
                    if length <= attended:
                        self._compiled_turn(num_rows, length, attended)
        self._compiled_copy()

    def blank(self, num_rows: int, length: int) -> np.ndarray:
        """The packed matrix of a dispatch, all padding, to be filled by `state.pack_row`."""
        return blank_rows(
            num_rows,
            length,
            num_stop_ids=self._sizes.max_stop_ids,
            num_slots=self.slots_per_shard,
            pad_id=self._pad_id,
        )

    def turn(self, packed: np.ndarray, length: int, attended: int) -> np.ndarray:
        """Does one dispatch (see `step.turn`) of a matrix that `blank` made for this length, and
        waits for it.

        Returns: Packed samples (state.unpack_samples), on the host.
        """
        program = self._compiled_turn(len(packed), length, attended)
        samples, self._cache = program(self._params, self._cache, packed)
        return np.asarray(samples)

    def copy_row(self, source: int, target: int) -> None:
        """Copies one row of the cache over another."""
        self._cache = self._compiled_copy()(self._cache, np.int32(source), np.int32(target))

    def _compiled_turn(self, num_rows: int, length: int, attended: int) -> Compiled:
        shape = (num_rows, length, attended)
        if shape not in self._turns:
            sizes = self._sizes
            static = functools.partial(
                turn,
                self._config,
                attended=attended,
                max_steps=sizes.decode_steps if length == 1 else sizes.extend_steps,
                num_stop_ids=sizes.max_stop_ids,
                max_top_k=sizes.max_top_k,
                pad_id=self._pad_id,
                unused=self._unused,
            )
            arguments = (self._params, self._cache, self.blank(num_rows, length))
            self._turns[shape] = self._compile(
                static, arguments, cache=1, split=(False, True, True), split_result=(True, True)
            )
        return self._turns[shape]

    def _compiled_copy(self) -> Compiled:
        if self._row_copy is None:
            copy = (
                copy_row
                if self.num_shards == 1
                else functools.partial(copy_row_across, axis="data")
            )
            arguments = (self._cache, np.int32(0), np.int32(0))
            self._row_copy = self._compile(
                copy, arguments, cache=0, split=(True, False, False), split_result=True
            )
        return self._row_copy

    def _compile(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        cache: int,
        split: tuple[bool, ...],
        split_result: bool | tuple[bool, ...],
    ) -> Compiled:
        """Compiles a function of these arguments, one of them the donated cache. On a mesh it runs
        once per copy of the weights, each time on its share of what `split` names, by rows; inside
        a copy the compiler splits the work as the weights and the cache are split."""
        self.compile_count += 1
        if self._mesh is None:
            return jax.jit(function, donate_argnums=cache).lower(*arguments).compile()
        rows, whole = PartitionSpec("data"), PartitionSpec()
        inputs, outputs = jax.tree.map(
            lambda by_rows: rows if by_rows else whole, (split, split_result)
        )
        if self.num_shards > 1:
            function = jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=inputs,
                out_specs=outputs,
                axis_names={"data"},
                check_vma=False,
            )
        places = tuple(
            (
                jax.tree.map(lambda leaf: leaf.sharding, argument)
                if isinstance(jax.tree.leaves(argument)[0], jax.Array)
                else NamedSharding(self._mesh, spec)
            )
            for argument, spec in zip(arguments, inputs, strict=True)
        )
        results = (
            (NamedSharding(self._mesh, rows), self._cache_sharding)
            if isinstance(split_result, tuple)
            else self._cache_sharding
        )
        return (
            jax.jit(function, donate_argnums=cache, in_shardings=places, out_shardings=results)
            .lower(*arguments)
            .compile()
        )
