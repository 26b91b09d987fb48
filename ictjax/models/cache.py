"""The key/value cache: an explicit pytree of preallocated rows."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ictjax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys (already rotated) and values of every layer; which positions are filled is known to the owner, not stored.

    One array per layer, so that an unrolled decode step updates each in place; kv heads before positions, so that attention
    reads each head's positions contiguously.
    """

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]


def make_cache(config: ModelConfig, num_rows: int, num_positions: int) -> KVCache:
    """An empty cache of `num_rows` rows of `num_positions` tokens, in the model's activation dtype."""
    shape = (num_rows, config.num_kv_heads, num_positions, config.head_dim)
    layers = range(config.num_layers)
    return KVCache(
        k=tuple(jnp.zeros(shape, config.dtype) for _ in layers),
        v=tuple(jnp.zeros(shape, config.dtype) for _ in layers),
    )


def copy_row(cache: KVCache, source: Array, target: Array) -> KVCache:
    """Copies row `source` over row `target` (int32 scalars); a target equal to the number of rows changes nothing."""
    return KVCache(
        k=tuple(k.at[target].set(k[source], mode="drop") for k in cache.k),
        v=tuple(v.at[target].set(v[source], mode="drop") for v in cache.v),
    )
