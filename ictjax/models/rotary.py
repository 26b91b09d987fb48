"""Rotary position embeddings: frequencies, plain or stretched for long contexts, and the
rotation.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ictjax.models.config import ModelConfig, RopeScaling
from ictjax.models.precision import wide


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of every rotated pair, float32 [H/2], rounded as the Hugging Face models
    round them.

    Sources: linear, https://arxiv.org/abs/2306.15595; yarn, https://arxiv.org/abs/2309.00071;
      llama3, the Llama 3.1 reference code.
    """
    periods = np.float32(theta) ** (
        np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    )
    plain = np.float32(1) / periods
    if scaling is None:
        return plain
    stretched = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "llama3":
        # Long waves are stretched, short ones stay, those between are blended by how many turns fit
        # into the original context.
        turns = np.float32(scaling.original_max_positions) * plain / np.float32(2 * math.pi)
        kept = np.clip(
            (turns - scaling.low_freq_factor)
            / (scaling.high_freq_factor - scaling.low_freq_factor),
            0,
            1,
        )
    else:
        # The same with a ramp over the index of the pair, between the pairs that make beta_fast and
        # beta_slow turns.
        low, high = (
            head_dim
            * math.log(scaling.original_max_positions / (turns * 2 * math.pi))
            / (2 * math.log(theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / (
            high - low if high != low else 0.001
        )
        kept = 1 - np.clip(ramp, 0, 1)
    return (stretched * (1 - kept) + plain * kept).astype(np.float32)


def rotary(
    config: ModelConfig, positions_bt: Int[Array, "B T"], *, sliding: bool
) -> tuple[Float[Array, "B T 1 H/2"], ...]:
    """Cosines and sines of full or of sliding layers, float32."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if sliding and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    angles = (
        positions_bt.astype(jnp.float32)[:, :, None, None]
        * frequencies(config.head_dim, theta, scaling)[None, None, None]
    )
    magnitude = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(
    x_btnh: Float[Array, "B T N H"], cos_sin: tuple[Float[Array, "B T 1 H/2"], ...]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), the convention of the Hugging Face weights."""
    cos, sin = cos_sin
    first, second = jnp.split(x_btnh.astype(wide(x_btnh.dtype)), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x_btnh.dtype)
