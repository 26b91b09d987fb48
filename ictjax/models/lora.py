"""Low-rank adapters (https://arxiv.org/abs/2106.09685): what is trained while the weights of a base
model stay as they are.

A projection y = x W becomes y = x W + (alpha / rank) (x A) B. The base is never written to and
never copied: actor, reference policy and reflector are the same arrays, the reference is the base
without its adapter, and `with_adapter` is the reflector's view of both.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ictjax.config import LoraConfig
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import PROJECTION_AXES, Params

_AXES = {"D": ("embed",), "F": ("ff",), "NH": ("heads", "head_dim"), "KH": ("kv_heads", "head_dim")}


class Adapter(nnx.Module):
    """The factors of all layers, stacked and float32: `<name>_lora_a` [L, in..., R] and
    `<name>_lora_b` [L, R, out...].

    A is normal with variance 1 / in and B is zero, so a new adapter changes nothing.
    """

    def __init__(self, config: ModelConfig, lora: LoraConfig, *, rngs: nnx.Rngs) -> None:
        for name, axes in adapter_axes(lora).items():
            shape = tuple(lora.rank if axis == "rank" else config.axis_sizes[axis] for axis in axes)
            if name.endswith("_a"):
                value = (
                    jax.random.normal(rngs.params(), shape, jnp.float32)
                    / math.prod(shape[1:-1]) ** 0.5
                )
            else:
                value = jnp.zeros(shape, jnp.float32)
            setattr(self, name, nnx.LoRAParam(value))


def init_adapter(config: ModelConfig, lora: LoraConfig, key: Array) -> Params:
    """A new adapter: {"q_lora_a": [L, D, R], "q_lora_b": [L, R, N, H], ...}. Raises ValueError for
    rank 0.
    """
    if not lora.rank:
        raise ValueError(
            "lora.rank is 0, which means to train all weights: there is no adapter to make"
        )
    return nnx.to_pure_dict(nnx.state(Adapter(config, lora, rngs=nnx.Rngs(key)), nnx.LoRAParam))


def adapter_axes(lora: LoraConfig) -> dict[str, tuple[str, ...]]:
    """The logical axes of every factor (see ictjax.mesh)."""
    axes: dict[str, tuple[str, ...]] = {}
    for name in lora.targets:
        inputs, outputs = (_AXES[letters] for letters in PROJECTION_AXES[name])
        axes[f"{name}_lora_a"] = ("layers", *inputs, "rank")
        axes[f"{name}_lora_b"] = ("layers", "rank", *outputs)
    return axes


def with_adapter(lora: LoraConfig, base: Params, adapter: Params) -> Params:
    """The tree that computes with the adapter on: the arrays of the base themselves, and beside
    them the factors, scaled.
    """
    scaled = {
        name: leaf * lora.scale if name.endswith("_b") else leaf for name, leaf in adapter.items()
    }
    return {**base, "lora": scaled}


def merge(lora: LoraConfig, base: Params, adapter: Params) -> Params:
    """A tree of the base's form and dtypes with W + (alpha / rank) A B in place of W: new arrays
    for the targets, the base's for the rest.
    """
    stacked = isinstance(base["layers"], dict)

    def merged(weights: Params, lead: str, factors: Params) -> Params:
        changed = {}
        for name in lora.targets:
            inputs, outputs = PROJECTION_AXES[name]
            letters = f"{lead}{inputs}R,{lead}R{outputs}->{lead}{inputs}{outputs}"
            added = lora.scale * jnp.einsum(
                letters, factors[f"{name}_lora_a"], factors[f"{name}_lora_b"]
            )
            changed[name] = (weights[name].astype(jnp.float32) + added).astype(weights[name].dtype)
        return weights | changed

    def layer(index: int) -> Params:
        return {name: leaf[index] for name, leaf in adapter.items()}

    layers: Any = base["layers"]
    if stacked:
        return {**base, "layers": merged(layers, "L", adapter)}
    return {
        **base,
        "layers": tuple(merged(weights, "", layer(index)) for index, weights in enumerate(layers)),
    }
