"""The key/value cache: an explicit pytree of preallocated rows.

A row holds the positions of one conversation (a slot), or those of one page, of which
conversations hold as many as they need (`paged_attention`). Everything here serves both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ictjax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys (already rotated) and values of every layer; which positions are filled is known to the
    owner, not stored.

    One array per layer, so that an unrolled decode step updates each in place. Keys keep their
    positions last: both products of attention then read memory in order (a third of the time of [B,
    S, K, H] for one decode step on two CPU cores).
    """

    k: tuple[Float[Array, "B K H S"], ...]
    v: tuple[Float[Array, "B K S H"], ...]


def make_cache(
    config: ModelConfig, num_rows: int, num_positions: int, *, copies: int = 1
) -> KVCache:
    """An empty cache of `num_rows` rows of `num_positions` tokens, in the model's activation dtype.

    With `copies` above 1 every kv head is held that many times in a row: more devices than kv heads
    can then split the heads, each with only what its own query heads read. K is then num_kv_heads x
    copies.
    """
    heads, width, layers = config.num_kv_heads * copies, config.head_dim, range(config.num_layers)
    return KVCache(
        k=tuple(jnp.zeros((num_rows, heads, width, num_positions), config.dtype) for _ in layers),
        v=tuple(jnp.zeros((num_rows, heads, num_positions, width), config.dtype) for _ in layers),
    )


def take_rows(cache: KVCache, rows_b: Int[Array, " B"] | None, num_positions: int) -> KVCache:
    """The first `num_positions` positions (static) of some rows, or of all rows in order; indices
    outside the cache read any row.
    """
    k = (k[..., :num_positions] for k in cache.k)
    v = (v[:, :, :num_positions] for v in cache.v)
    if rows_b is not None:
        k = (array.at[rows_b].get(mode="clip") for array in k)
        v = (array.at[rows_b].get(mode="clip") for array in v)
    return KVCache(k=tuple(k), v=tuple(v))


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
    return KVCache(
        k=tuple(
            whole.at[rows_b[:, None], :, :, written_bt].set(
                new.at[batch_b1, :, :, positions_bt].get(mode="clip"), mode="drop"
            )
            for whole, new in zip(cache.k, part.k, strict=True)
        ),
        v=tuple(
            whole.at[rows_b[:, None], :, written_bt].set(
                new.at[batch_b1, :, positions_bt].get(mode="clip"), mode="drop"
            )
            for whole, new in zip(cache.v, part.v, strict=True)
        ),
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
