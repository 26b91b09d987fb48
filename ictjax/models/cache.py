"""The key/value cache: an explicit pytree of preallocated rows."""

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


def copy_row(cache: KVCache, source: Int[Array, ""], target: Int[Array, ""]) -> KVCache:
    """Copies row `source` over row `target`."""
    return KVCache(
        k=tuple(k.at[target].set(k[source]) for k in cache.k),
        v=tuple(v.at[target].set(v[source]) for v in cache.v),
    )


def copy_row_across(
    cache: KVCache, source: Int[Array, ""], target: Int[Array, ""], axis: str
) -> KVCache:
    """`copy_row` inside `jax.shard_map`, for rows split over the mesh axis `axis`: only the one row
    travels between devices.
    """
    num_rows = cache.v[0].shape[0]
    first = jax.lax.axis_index(axis) * num_rows
    here = (source >= first) & (source < first + num_rows)
    # beyond the end: dropped
    own_target = jnp.where(
        (target >= first) & (target < first + num_rows), target - first, num_rows
    )

    def copied(array: Array) -> Array:
        row = jnp.where(
            here, array[jnp.clip(source - first, 0, num_rows - 1)], jnp.zeros((), array.dtype)
        )
        return array.at[own_target].set(jax.lax.psum(row, axis), mode="drop")

    return jax.tree.map(copied, cache)
