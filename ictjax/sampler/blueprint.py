"""The programs of a sampler, lowered from shapes: nothing is allocated, and the devices may be
those of a description, not of this machine.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from ictjax.config import SamplerConfig
from ictjax.mesh import cache_sharding, kv_copies
from ictjax.models.cache import KVCache, copy_row, copy_row_across, make_cache
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params
from ictjax.sampler.state import blank_rows
from ictjax.sampler.step import turn


class TurnShape(NamedTuple):
    """What tells the programs of a sampler apart."""

    num_rows: int
    length: int  # tokens appended; 1: none, a generation goes on
    attended: int  # cache positions


def turn_shapes(sizes: SamplerConfig) -> Iterator[TurnShape]:
    """Every `turn` that any sequence of calls can need."""
    for num_rows in sizes.row_buckets:
        for length in (1, *sizes.extend_buckets):
            for attended in sizes.attended:
                if length <= attended:
                    yield TurnShape(num_rows, length, attended)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blueprint:
    """How the programs of a sampler are made.

    Raises:
      ValueError: sizes that do not fit the mesh.
    """

    config: ModelConfig
    sizes: SamplerConfig
    pad_id: int  # fills unused positions
    mesh: Mesh | None  # the devices to work on; None for the one that the weights are on
    unused: Sequence[range] = ()  # ids that are never sampled

    def __post_init__(self) -> None:
        sizes = self.sizes
        for name, counts in (("num_slots", (sizes.num_slots,)), ("row_buckets", sizes.row_buckets)):
            if any(count % self.num_shards for count in counts):
                raise ValueError(
                    f"{name} {counts} are not multiples of the mesh's data axis {self.num_shards}:"
                    " every copy gets the same share"
                )

    @property
    def num_shards(self) -> int:
        """Copies of the weights."""
        return 1 if self.mesh is None else self.mesh.shape["data"]

    @property
    def slots_per_shard(self) -> int:
        """Cache rows that one copy of the weights works on: the first ones are the first copy's."""
        return self.sizes.num_slots // self.num_shards

    @property
    def cache_sharding(self) -> NamedSharding | None:
        """Where the cache lies; None without a mesh."""
        if self.mesh is None:
            return None
        return cache_sharding(self.config.num_kv_heads * self._kv_copies, self.mesh)

    def make_cache(self) -> KVCache:
        """An empty cache, to be jitted with its sharding."""
        sizes = self.sizes
        return make_cache(self.config, sizes.num_slots, sizes.max_len, copies=self._kv_copies)

    def cache_shapes(self) -> KVCache:
        """The cache on shapes alone."""
        place = self.cache_sharding
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(self.make_cache),
        )

    def turn(self, params: Params, cache: KVCache, shape: TurnShape) -> Lowered:
        """The program of one dispatch of this shape (see `step.turn`).

        Args:
          params: weights in the form of `weights.sampling_weights`, arrays or shapes.
          cache: arrays or shapes.
          shape: of the dispatch.
        """
        sizes = self.sizes
        static = functools.partial(
            turn,
            self.config,
            attended=shape.attended,
            max_steps=sizes.decode_steps if shape.length == 1 else sizes.extend_steps,
            num_stop_ids=sizes.max_stop_ids,
            num_bias=sizes.max_bias_ids,
            max_top_k=sizes.max_top_k,
            pad_id=self.pad_id,
            unused=self.unused,
        )
        packed = blank_rows(
            shape.num_rows,
            shape.length,
            num_stop_ids=sizes.max_stop_ids,
            num_bias=sizes.max_bias_ids,
            num_slots=self.slots_per_shard,
            pad_id=self.pad_id,
        )
        return self._lower(
            static,
            (params, cache, jax.ShapeDtypeStruct(packed.shape, packed.dtype)),
            cache=1,
            split=(False, True, True),
            split_result=(True, True),
        )

    def copy(self, cache: KVCache) -> Lowered:
        """The copy of one row of the cache over another."""
        function = (
            copy_row if self.num_shards == 1 else functools.partial(copy_row_across, axis="data")
        )
        row = jax.ShapeDtypeStruct((), jnp.int32)
        return self._lower(
            function, (cache, row, row), cache=0, split=(True, False, False), split_result=True
        )

    @property
    def _kv_copies(self) -> int:
        return kv_copies(self.config.num_heads, self.config.num_kv_heads, self.mesh)

    def _lower(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        cache: int,
        split: tuple[bool, ...],
        split_result: bool | tuple[bool, ...],
    ) -> Lowered:
        """Lowers a function of these arguments, one of them the donated cache. On a mesh it runs
        once per copy of the weights, each time on its share of what `split` names, by rows; inside
        a copy the compiler splits the work as the weights and the cache are split."""
        if self.mesh is None:
            return jax.jit(function, donate_argnums=cache).lower(*arguments)
        rows, whole = PartitionSpec("data"), PartitionSpec()
        inputs, outputs = jax.tree.map(
            lambda by_rows: rows if by_rows else whole, (split, split_result)
        )
        if self.num_shards > 1:
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=inputs,
                out_specs=outputs,
                axis_names={"data"},
                check_vma=False,
            )
        places = tuple(
            jax.tree.map(
                lambda leaf, spec=spec: leaf.sharding or NamedSharding(self.mesh, spec), argument
            )
            for argument, spec in zip(arguments, inputs, strict=True)
        )
        results = (
            (NamedSharding(self.mesh, rows), self.cache_sharding)
            if isinstance(split_result, tuple)
            else self.cache_sharding
        )
        return jax.jit(
            function, donate_argnums=cache, in_shardings=places, out_shardings=results
        ).lower(*arguments)
