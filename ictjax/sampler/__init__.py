"""The slot sampler: conversations that keep their KV cache from turn to turn, sampled together in
jitted batches.
"""

from ictjax.sampler.engine import Generation, Request, Sampler, SamplerStats
from ictjax.sampler.weights import sampling_weights

__all__ = [
    "Generation",
    "Request",
    "Sampler",
    "SamplerStats",
    "sampling_weights",
]
