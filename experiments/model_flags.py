"""Flags of commands that answer with one model: how it is held, and how its tokens are found."""

import dataclasses
from typing import Annotated, Literal

import tyro

from experiments.command import Flags
from ictjax.config import CacheKind, Dtype
from ictjax.ranges import Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags(Flags):
    """How the model is held and sampled."""

    dtype: Annotated[
        Dtype | None,
        tyro.conf.arg(help_behavior_hint="(default: as config.json says)"),
    ] = None
    """Of weights and activations; mixed: bfloat16 and float32, for CPUs that multiply bfloat16."""
    weights: Literal["float", "int8"] = "float"
    """int8: matrices in 8 bits, a scale for every output; replies may differ."""
    cache: CacheKind = "float"
    """int8: keys and values in 8 bits, a scale for every position and head; replies may differ."""
    guessed_tokens: Annotated[int, Range(0, 64)] = 0
    """Of a greedy reply in one step, by what followed the same tokens before; the same replies."""
