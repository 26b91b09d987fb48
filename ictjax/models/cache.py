"""The key/value cache: an explicit pytree of preallocated rows.

A row holds the positions of one conversation (a slot), or those of one page, of which
conversations hold as many as they need (`paged_attention`). Everything here serves both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from ictjax.config import CacheKind
from ictjax.models.config import ModelConfig
from ictjax.models.int8 import Scales


class CachedLayer(NamedTuple):
    """Keys and values of one layer; with their scales where they are held in 8 bits."""

    k: Float[Array, "B K H S"] | Int8[Array, "B K H S"]
    v: Float[Array, "B K S H"] | Int8[Array, "B K S H"]
    scales: Scales | None = None


class KVCache(NamedTuple):
    """Keys (already rotated) and values of every layer; which positions are filled is known to the
    owner, not stored.

    One array per layer, so that an unrolled decode step updates each in place. Keys keep their
    positions last: both products of attention then read memory in order (a third of the time of [B,
    S, K, H] for one decode step on two CPU cores).
    """

    k: tuple[Float[Array, "B K H S"] | Int8[Array, "B K H S"], ...]
    v: tuple[Float[Array, "B K S H"] | Int8[Array, "B K S H"], ...]
    # of each position and head, where keys and values are held in 8 bits; else there are none
    k_scale: tuple[Float[Array, "B K S"], ...] = ()
    v_scale: tuple[Float[Array, "B K S"], ...] = ()

    def layer(self, index: int) -> CachedLayer:
        """That of one layer."""
        if not self.k_scale:
            return CachedLayer(self.k[index], self.v[index])
        scales = Scales(self.k_scale[index], self.v_scale[index])
        return CachedLayer(self.k[index], self.v[index], scales)


def of_layers(layers: Sequence[CachedLayer]) -> KVCache:
    """The cache of these layers."""
    scales = [layer.scales for layer in layers if layer.scales is not None]
    return KVCache(
        k=tuple(layer.k for layer in layers),
        v=tuple(layer.v for layer in layers),
        k_scale=tuple(one.k for one in scales),
        v_scale=tuple(one.v for one in scales),
    )


def make_cache(
    config: ModelConfig,
    num_rows: int,
    num_positions: int,
    *,
    copies: int = 1,
    kind: CacheKind = "float",
) -> KVCache:
    """An empty cache of `num_rows` rows of `num_positions` tokens, in the model's activation dtype
    or in 8 bits.

    With `copies` above 1 every kv head is held that many times in a row: more devices than kv heads
    can then split the heads, each with only what its own query heads read. K is then num_kv_heads x
    copies.
    """
    heads, width, layers = config.num_kv_heads * copies, config.head_dim, range(config.num_layers)
    dtype = config.dtype if kind == "float" else jnp.int8
    scaled = layers if kind == "int8" else ()
    k_scale, v_scale = (
        tuple(jnp.zeros((num_rows, heads, num_positions), jnp.float32) for _ in scaled)
        for _ in range(2)
    )
    return KVCache(
        k=tuple(jnp.zeros((num_rows, heads, width, num_positions), dtype) for _ in layers),
        v=tuple(jnp.zeros((num_rows, heads, num_positions, width), dtype) for _ in layers),
        k_scale=k_scale,
        v_scale=v_scale,
    )


def take_rows(cache: KVCache, rows_b: Int[Array, " B"] | None, num_positions: int) -> KVCache:
    """The first `num_positions` positions (static) of some rows, or of all rows in order; indices
    outside the cache read any row.
    """
    part = KVCache(
        k=tuple(k[..., :num_positions] for k in cache.k),
        v=tuple(v[:, :, :num_positions] for v in cache.v),
        k_scale=tuple(scale[..., :num_positions] for scale in cache.k_scale),
        v_scale=tuple(scale[..., :num_positions] for scale in cache.v_scale),
    )
    if rows_b is None:
        return part
    return jax.tree.map(lambda array: array.at[rows_b].get(mode="clip"), part)


def put_positions(
    cache: KVCache,
    part: KVCache,
    rows_b: Int[Array, " B"],
    starts_b: Int[Array, " B"],
    ends_b: Int[Array, " B"],
    max_new: int,
) -> KVCache:
    """Writes positions starts_b..ends_b-1 (at most `max_new` per row, static) of `part`, which
    `take_rows` took, back into its rows.
    """
    positions_bt = starts_b[:, None] + jnp.arange(max_new, dtype=jnp.int32)[None]
    num_positions = cache.v[0].shape[2]
    # beyond the end: dropped
    written_bt = jnp.where(positions_bt < ends_b[:, None], positions_bt, num_positions)
    batch_b1 = jnp.arange(rows_b.shape[0], dtype=jnp.int32)[:, None]

    def put_last(whole: Array, new: Array) -> Array:
        return whole.at[rows_b[:, None], :, :, written_bt].set(
            new.at[batch_b1, :, :, positions_bt].get(mode="clip"), mode="drop"
        )

    def put_third(whole: Array, new: Array) -> Array:
        return whole.at[rows_b[:, None], :, written_bt].set(
            new.at[batch_b1, :, positions_bt].get(mode="clip"), mode="drop"
        )

    return KVCache(
        k=tuple(map(put_last, cache.k, part.k)),
        v=tuple(map(put_third, cache.v, part.v)),
        k_scale=tuple(map(put_third, cache.k_scale, part.k_scale)),
        v_scale=tuple(map(put_third, cache.v_scale, part.v_scale)),
    )


def take_row(cache: KVCache, row: Int[Array, ""], axis: str | None = None) -> KVCache:
    """One row, without its first axis.

    Args:
      cache: all rows; inside `jax.shard_map` those of one device.
      row: counted over all devices.
      axis: of the mesh, over which the rows are split: only the one row travels between devices.
    """
    if axis is None:
        return jax.tree.map(lambda array: array[row], cache)
    num_rows = cache.v[0].shape[0]
    local = row - jax.lax.axis_index(axis) * num_rows
    here = (local >= 0) & (local < num_rows)

    def taken(array: Array) -> Array:
        own = array[jnp.clip(local, 0, num_rows - 1)]
        return jax.lax.psum(jnp.where(here, own, jnp.zeros((), array.dtype)), axis)

    return jax.tree.map(taken, cache)


def put_row(
    cache: KVCache, row: Int[Array, ""], content: KVCache, axis: str | None = None
) -> KVCache:
    """Writes what `take_row` took over a row; the arguments are those of `take_row`."""
    if axis is not None:
        num_rows = cache.v[0].shape[0]
        local = row - jax.lax.axis_index(axis) * num_rows
        # beyond the end: dropped
        row = jnp.where((local >= 0) & (local < num_rows), local, num_rows)
    return jax.tree.map(lambda array, new: array.at[row].set(new, mode="drop"), cache, content)


def copy_row(
    cache: KVCache, source: Int[Array, ""], target: Int[Array, ""], axis: str | None = None
) -> KVCache:
    """Copies row `source` over row `target`; see `take_row`."""
    return put_row(cache, target, take_row(cache, source, axis), axis)
