"""The programs of a sampler, lowered from shapes: nothing is allocated, and the devices may be
those of a description, not of this machine.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from ictjax.config import SamplerConfig
from ictjax.mesh import cache_sharding, kv_copies
from ictjax.models import cpu_kernels
from ictjax.models.attention_choice import (
    paged_attention_of,
    part_bytes_of,
    platform_of,
    resolve_paged,
)
from ictjax.models.cache import KVCache, copy_row, make_cache, put_row, take_row
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params
from ictjax.sampler.state import Left, blank_rows, nothing_left
from ictjax.sampler.step import turn

_INDEX = jax.ShapeDtypeStruct((), jnp.int32)


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


RowProgram = Literal["copy", "take", "put"]


def row_programs(sizes: SamplerConfig) -> tuple[RowProgram, ...]:
    """The programs that move single rows of the cache: slots are only copied, pages also leave it
    for a while.
    """
    return ("copy", "take", "put") if sizes.page_size else ("copy",)


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
        sizes.cache_rows(self.num_shards)
        resolve_paged(sizes, self.config, platform_of(self.mesh))

    @functools.cached_property
    def kernels(self) -> cpu_kernels.Kernels | None:
        """Of the CPU that it samples on, where it is one and they suit the model. Weights are then
        to be packed (`weights.packed_weights`).
        """
        if platform_of(self.mesh) != "cpu":
            return None
        num_devices = 1 if self.mesh is None else self.mesh.size
        return None if cpu_kernels.why_not(self.config, num_devices) else cpu_kernels.load()

    @property
    def num_shards(self) -> int:
        """Copies of the weights."""
        return 1 if self.mesh is None else self.mesh.shape["data"]

    @property
    def slots_per_shard(self) -> int:
        """Cache rows that one copy of the weights works on: the first ones are the first copy's."""
        return self.sizes.num_slots // self.num_shards

    @property
    def rows_per_shard(self) -> int:
        """Rows of the cache on one copy of the weights: its slots, or its pages."""
        return self.sizes.cache_rows(self.num_shards)[0] // self.num_shards

    @property
    def cache_sharding(self) -> NamedSharding | None:
        """Where the cache lies; None without a mesh."""
        if self.mesh is None:
            return None
        return cache_sharding(self.config.num_kv_heads * self._kv_copies, self.mesh)

    def make_cache(self) -> KVCache:
        """An empty cache, to be jitted with its sharding."""
        rows, positions = self.sizes.cache_rows(self.num_shards)
        return make_cache(
            self.config, rows, positions, copies=self._kv_copies, kind=self.sizes.cache
        )

    def cache_shapes(self) -> KVCache:
        """The cache on shapes alone."""
        place = self.cache_sharding
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(self.make_cache),
        )

    def make_left(self) -> Left:
        """What is left before the first dispatch, to be jitted with `left_sharding`."""
        return nothing_left(self.sizes.num_slots)

    @property
    def left_sharding(self) -> NamedSharding | None:
        """Where `make_left` lies; None without a mesh."""
        return self._sharding("data")

    def turn(self, params: Params, cache: KVCache, shape: TurnShape) -> Lowered:
        """The program of one dispatch of this shape (see `step.turn`).

        Args:
          params: weights in the form of `weights.sampling_weights`, packed or not, arrays or
            shapes.
          cache: arrays or shapes.
          shape: of the dispatch.
        """
        sizes = self.sizes
        platform = platform_of(self.mesh)
        attention = resolve_paged(sizes, self.config, platform)
        static = functools.partial(
            turn,
            self.config,
            attended=shape.attended,
            max_steps=sizes.decode_steps if shape.length == 1 else sizes.extend_steps,
            num_stop_ids=sizes.max_stop_ids,
            num_bias=sizes.max_bias_ids,
            max_top_k=sizes.max_top_k,
            pad_id=self.pad_id,
            num_pages=self.table_length,
            attention=paged_attention_of(attention, self.mesh),
            part_bytes=part_bytes_of(platform),
            kernels=self.kernels if "unembed" in params else None,
            unused=self.unused,
            guessed=sizes.guessed_tokens if sizes.guesses(shape.length) else 0,
            num_likeliest=sizes.max_top_logprobs,
        )
        packed = self.blank(*shape)
        return self._lower(
            static,
            (
                params,
                cache,
                jax.eval_shape(self.make_left),
                jax.ShapeDtypeStruct(packed.shape, packed.dtype),
            ),
            split=(False, True, True, True),
            split_result=(True, True, True),
            results=(self._sharding("data"), self.cache_sharding, self.left_sharding),
            donated=(1, 2),
        )

    def copy(self, cache: KVCache) -> Lowered:
        """The copy of one row of the cache over another."""
        return self._lower(
            functools.partial(copy_row, axis=self._split_axis),
            (cache, _INDEX, _INDEX),
            split=(True, False, False),
            split_result=True,
            results=self.cache_sharding,
            donated=(0,),
        )

    def take(self, cache: KVCache) -> Lowered:
        """One row out of the cache, which stays."""
        return self._lower(
            functools.partial(take_row, axis=self._split_axis),
            (cache, _INDEX),
            split=(True, False),
            split_result=False,
            results=self._row_sharding,
            donated=(),
        )

    def put(self, cache: KVCache) -> Lowered:
        """What `take` took, over a row of the cache."""
        place = self._row_sharding
        content = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(take_row, cache, _INDEX),
        )
        return self._lower(
            functools.partial(put_row, axis=self._split_axis),
            (cache, _INDEX, content),
            split=(True, False, False),
            split_result=True,
            results=self.cache_sharding,
            donated=(0,),
        )

    def blank(self, num_rows: int, length: int, attended: int) -> np.ndarray:
        """The packed matrix of a dispatch, all padding, to be filled by `state.pack_row`."""
        return blank_rows(
            num_rows,
            length,
            num_stop_ids=self.sizes.max_stop_ids,
            num_bias=self.sizes.max_bias_ids,
            num_slots=self.slots_per_shard,
            pad_id=self.pad_id,
            num_pages=self.table_length,
            num_history=attended if self.sizes.guesses(length) else 0,
        )

    @property
    def table_length(self) -> int:
        """Pages of a row's table; 0 for a cache of slots."""
        return self.sizes.pages_per_row if self.sizes.page_size else 0

    @property
    def _row_sharding(self) -> NamedSharding | None:
        """Of one row outside the cache: its heads stay where they are."""
        place = self.cache_sharding
        return None if place is None else self._sharding(*place.spec[1:])

    def _sharding(self, *axes: str | None) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def _split_axis(self) -> str | None:
        return None if self.num_shards == 1 else "data"

    @property
    def _kv_copies(self) -> int:
        return kv_copies(self.config.num_heads, self.config.num_kv_heads, self.mesh)

    def _lower(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        *,
        split: tuple[bool, ...],
        split_result: bool | tuple[bool, ...],
        results: Any,
        donated: tuple[int, ...],
    ) -> Lowered:
        """Lowers a function of these arguments; `donated` are the indices of what is
        replaced. On a mesh it runs once per copy of the weights, each time on its share of what
        `split` names, by rows; inside a copy the compiler splits the work as the weights and the
        cache are split."""
        if self.mesh is None:
            return jax.jit(function, donate_argnums=donated).lower(*arguments)
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
        return jax.jit(
            function, donate_argnums=donated, in_shardings=places, out_shardings=results
        ).lower(*arguments)
