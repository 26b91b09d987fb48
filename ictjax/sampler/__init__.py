"""The slot sampler: conversations that keep their KV cache from turn to turn, sampled together in
jitted batches.
"""

from ictjax.sampler.blueprint import Blueprint, TurnShape, row_programs, turn_shapes
from ictjax.sampler.engine import Generation, Request, Sampler, SamplerStats, Tops
from ictjax.sampler.weights import sampling_shapes, sampling_weights, unstacked

__all__ = [
    "Blueprint",
    "Generation",
    "Request",
    "Sampler",
    "SamplerStats",
    "Tops",
    "TurnShape",
    "row_programs",
    "sampling_shapes",
    "sampling_weights",
    "turn_shapes",
    "unstacked",
]
