"""The types that numbers are computed in."""

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """What sums of this type are accumulated in: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)
