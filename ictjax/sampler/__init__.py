"""The slot sampler: conversations that keep their KV cache from turn to turn, sampled together in jitted batches."""

from ictjax.sampler.engine import Generation, Request, Sampler, SamplerConfig, SamplerStats, raw_key

__all__ = ["Generation", "Request", "Sampler", "SamplerConfig", "SamplerStats", "raw_key"]
