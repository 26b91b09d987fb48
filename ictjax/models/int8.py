"""Numbers in 8 bits with a scale for each group of them: frozen weights and cached keys and values
that take half the memory of bfloat16, and half the time to be read from it.

Symmetric: a value is its int8, -127 to 127, times its scale, the group's largest magnitude over
127. So a value is off by at most half its scale. Products are of the activations' dtype, or of
`ModelConfig.products`: both hold every int8 exactly (bfloat16 does up to 256); they are scaled
afterwards.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from ictjax.models.config import ModelConfig

_MOST = 127


class Scales(NamedTuple):
    """Of keys and values in 8 bits, one for every position and head."""

    k: Float[Array, "B K S"]
    v: Float[Array, "B K S"]


def to_int8(
    x: Float[Array, "..."], axes: Sequence[int]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Values in 8 bits, and the float32 scale of each group, with which they are multiplied.

    Args:
      x: any shape.
      axes: along which values share a scale; the scales have the others.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / _MOST
    # of a group of zeros, all of which stay zero
    divided = wide / jnp.where(scale > 0, scale, 1.0)
    return jnp.round(divided).astype(jnp.int8), jnp.squeeze(scale, axes)


def int8_weights(config: ModelConfig, params: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The model with its matrices in 8 bits, a scale for every output of a projection and for every
    id of the vocabulary; norms and biases stay.

    One weight after the other is converted, and JAX arrays are deleted, so that there are never two
    copies of more than one.

    Args:
      config: of the model.
      params: stacked, without an adapter; consumed.
    """
    quantised = dataclasses.replace(config, weights="int8")
    top, layers = config.weight_axes
    inputs = quantised.matrices

    def converted(axes_of: dict[str, tuple[str, ...]], weights: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in axes_of:
            weight = weights[name]
            if name not in inputs:
                found[name] = weight
                continue
            along = tuple(axes_of[name].index(axis) for axis in inputs[name])
            found[name], found[f"{name}_scale"] = jax.block_until_ready(
                jax.jit(to_int8, static_argnums=1)(weight, along)
            )
            if isinstance(weight, jax.Array):
                weight.delete()
        return found

    return quantised, {**converted(top, params), "layers": converted(layers, params["layers"])}
