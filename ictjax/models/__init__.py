"""Decoder-only Flax transformers: config, weights, KV cache, and the Hugging Face checkpoint
layout.
"""
