"""The tensors of a Hugging Face checkpoint: their names and shapes, and which part of our parameter
tree each one is.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ictjax.models.config import ModelConfig

# Written by some exporters beside the weights; derived from the config, so never read.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
HEAD = "lm_head.weight"
# safetensors' names of the types that are read and written
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm.weight",
    **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkvo"},
    **{f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"},
    "mlp_norm": "post_attention_layernorm.weight",
    **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"{name}_bias": f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")},
}
# With sandwich norms "post_attention" is what it says.
_SANDWICH = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
# The axes of our projections that are inputs; torch keeps [outputs, inputs], each flattened.
_NUM_INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1}


class Tensor(NamedTuple):
    """One tensor of the file."""

    path: tuple[str, ...]  # of our weight
    layer: int | None  # of our weight's leading axis
    shape: tuple[int, ...]  # of (the layer of) our weight
    # for every dimension in the file, the axes of our weight that are flattened in it
    dims: tuple[tuple[int, ...], ...]

    @property
    def file_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[axis] for axis in axes) for axes in self.dims)

    def file_view(self, weight: np.ndarray) -> np.ndarray:
        """(A part of the layer of) our weight, contiguous, as a view in the shape and order of the
        file.
        """
        merged = sorted(self.dims)
        flat = weight.reshape([math.prod(weight.shape[axis] for axis in axes) for axes in merged])
        return flat.transpose([merged.index(axes) for axes in self.dims])

    def window(self, index: Sequence[slice]) -> tuple[slice, ...]:
        """Where the part of our weight at `index` (a slice with bounds for every axis) lies in the
        file.
        """
        for axes in self.dims:
            assert all(index[axis] == slice(0, self.shape[axis]) for axis in axes[1:]), (
                "only the first of flattened axes can be split"
            )
        rests = [math.prod(self.shape[axis] for axis in axes[1:]) for axes in self.dims]
        return tuple(
            slice(index[axes[0]].start * rest, index[axes[0]].stop * rest)
            for axes, rest in zip(self.dims, rests, strict=True)
        )


def layout(config: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name."""
    sizes = config.axis_sizes
    top, layers = config.weight_axes
    names = _LAYER | (_SANDWICH if config.sandwich_norms else {})
    tensors = {
        _TOP[name]: Tensor((name,), None, tuple(sizes[a] for a in axes), _dims(name, len(axes)))
        for name, axes in top.items()
    }
    for layer in range(config.num_layers):
        for name, (_, *axes) in layers.items():
            shape = tuple(sizes[axis] for axis in axes)
            tensors[f"model.layers.{layer}.{names[name]}"] = Tensor(
                ("layers", name), layer, shape, _dims(name, len(shape))
            )
    return tensors


def projection_names() -> dict[str, str]:
    """The modules of a layer that are projections, by our names."""
    return {name: _LAYER[name].removesuffix(".weight") for name in _NUM_INPUTS if name in _LAYER}


def _dims(name: str, rank: int) -> tuple[tuple[int, ...], ...]:
    if name == "embed":
        return ((0,), (1,))
    if name not in _NUM_INPUTS:
        return (tuple(range(rank)),)
    inputs = _NUM_INPUTS[name]
    return tuple(range(inputs, rank)), tuple(range(inputs))
