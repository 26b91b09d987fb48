"""The shape of a model in a GGUF file, as the `config.json` of Hugging Face's model."""

import math
from typing import Any

import numpy as np

from ictjax.models.config import RopeScaling
from ictjax.models.gguf.file import GGUF, PLAIN
from ictjax.models.hf.translate import FAMILIES
from ictjax.models.rotary import frequencies
from ictjax.ranges import shown

# GGUF's architectures -> Hugging Face's model types
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
ROPE_FREQS = "rope_freqs.weight"
_HEAD = "output.weight"
# Llama 3.1 and 3.2, whose files keep only what comes out of it: rope_freqs.weight.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 8192}
# What llama.cpp knows of Gemma 3 and its files do not say.
_GEMMA_LOCAL_THETA = 10_000.0
_GEMMA_PERIOD = 6  # every sixth layer sees everything
_GEMMA_27B_LAYERS = 62  # its queries are scaled by d_model / heads instead of the head's size
_LARGE = 10**9  # weights, beyond which quantised ones are kept in 16 bits


def hf_config(file: GGUF) -> dict[str, Any]:
    """The contents of a `config.json`.

    Weights are in the type of the file's matrices; quantised ones become float32, in models of more
    than 1e9 weights bfloat16.

    Raises:
      ValueError: another architecture, or something that the file does not say.
    """
    architecture = file.need("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} holds a model of architecture {shown(architecture)}: read are"
            f" {', '.join(ARCHITECTURES)}"
        )
    family = ARCHITECTURES[architecture]

    def need(name: str) -> Any:
        return file.need(f"{architecture}.{name}")

    def get(name: str, default: Any = None) -> Any:
        return file.get(f"{architecture}.{name}", default)

    heads, width, layers = (
        need("attention.head_count"),
        need("embedding_length"),
        need("block_count"),
    )
    head_dim = get("attention.key_length", get("rope.dimension_count", width // heads))
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"{file.path} rotates {get('rope.dimension_count')} of {head_dim} numbers of a head,"
            " which this decoder does not implement: take another model"
        )
    theta = _written(get("rope.freq_base", 10_000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{file.path} stretches positions by {shown(scaling)}: implemented are linear and yarn"
        )
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": _written(need("rope.scaling.factor"))}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = need("rope.scaling.original_context_length")
    if ROPE_FREQS in file.tensors:
        rope |= _llama3(file, head_dim, theta)
    data: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": len(file.need_list("tokenizer.ggml.tokens")),
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        FAMILIES[family].activation_key: "gelu_pytorch_tanh" if family == "gemma3_text" else "silu",
        "rope_theta": theta,
        "rope_parameters": rope,
        "rms_norm_eps": _written(need("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": _HEAD not in file.tensors,
        "max_position_embeddings": need("context_length"),
        "dtype": _dtype(file),
    }
    if family == "gemma3_text":
        scalar = width // heads if layers == _GEMMA_27B_LAYERS else head_dim
        data |= {
            "query_pre_attn_scalar": scalar,
            "sliding_window": need("attention.sliding_window"),
            "layer_types": [
                "sliding_attention" if (layer + 1) % _GEMMA_PERIOD else "full_attention"
                for layer in range(layers)
            ],
            "rope_local_base_freq": _GEMMA_LOCAL_THETA,
            "rope_parameters": {
                "full_attention": rope,
                "sliding_attention": {"rope_type": "default", "rope_theta": _GEMMA_LOCAL_THETA},
            },
        }
    return data


def _written(value: float) -> float:
    """The number that was rounded to float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _dtype(file: GGUF) -> str:
    matrices = {stored.kind for stored in file.tensors.values() if len(stored.shape) > 1}
    if len(matrices) == 1 and (kind := matrices.pop()) in PLAIN:
        return PLAIN[kind]
    weights = sum(math.prod(stored.shape) for stored in file.tensors.values())
    return "bfloat16" if weights > _LARGE else "float32"


def _llama3(file: GGUF, head_dim: int, theta: float) -> dict[str, Any]:
    """The scaling whose factors the file lists, one for every frequency."""
    factors = np.asarray(file.read(ROPE_FREQS), np.float64).reshape(-1)
    scaling = RopeScaling(kind="llama3", factor=float(factors.max()), **_LLAMA3)
    expected = frequencies(head_dim, theta, None) / frequencies(head_dim, theta, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError(
            f"{file.path} stretches positions by other factors than Llama 3.1 and 3.2"
            f" ({ROPE_FREQS}): take the model's own checkpoint"
        )
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
