"""A model's shape to and from a Hugging Face `config.json`, family by family."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ictjax.models.config import (
    ACTIVATIONS,
    DTYPES,
    MAX_LAYERS,
    SCALINGS,
    ModelConfig,
    RopeScaling,
)
from ictjax.ranges import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What the code of one Hugging Face model type fixes, and its `config.json` therefore does not
    say.
    """

    architecture: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of ModelConfig
    activation_key: str = "hidden_act"


FAMILIES: Mapping[str, _Family] = {
    "qwen2": _Family(architecture="Qwen2ForCausalLM", fixed={"qkv_bias": True}),
    "qwen3": _Family(architecture="Qwen3ForCausalLM", fixed={"qk_norm": True}),
    "llama": _Family(architecture="LlamaForCausalLM"),
    "gemma3_text": _Family(
        architecture="Gemma3ForCausalLM",
        fixed={
            "qk_norm": True,
            "sandwich_norms": True,
            "norm_offset": True,
            "scale_embeddings": True,
        },
        activation_key="hidden_activation",
    ),
}

_POSITIVE = ("rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar")
# keys with more of them
_ROPE = ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention")
# what transformers writes before the reason
_CLASS_NAMES = re.compile(r"(?:Class validation|Validation) error for .*?: (?:\w+: )?")
# Keys of a config.json that change what a model computes, and that this decoder does not implement.
_REFUSED = (
    "quantization_config",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
)


def model_from_hf(data: Mapping[str, Any]) -> ModelConfig:
    """Reads the contents of a `config.json`; what it leaves out has the default of its family
    in Hugging Face transformers.

    Weights are in the file's `dtype` (`torch_dtype` in older files), float32 if it says
    nothing. Activations are too, or in float32 where weights are float16.

    Raises:
      ValueError: another architecture, or an option that this decoder does not implement.
    """
    family, architectures = data.get("model_type"), data.get("architectures") or []
    known = FAMILIES.get(family) if isinstance(family, str) else None
    if (
        not isinstance(family, str)
        or known is None
        or not isinstance(architectures, list)
        or (architectures and known.architecture not in architectures)
    ):
        supported = ", ".join(f"{entry.architecture} ({name})" for name, entry in FAMILIES.items())
        raise ValueError(
            f"it names model_type {shown(family)} and architectures {shown(architectures)}:"
            f" supported are {supported}"
        )
    try:
        _check_numbers(data)
        return _translated(family, AutoConfig.for_model(**data), data)
    except _Unsupported:
        raise
    except Exception as error:
        # transformers checks types and values, and raises whatever its checks raise
        detail = _CLASS_NAMES.sub("", " ".join(str(error).split()))[:300]
        raise ValueError(
            f"it cannot be read as {family} ({detail}): take the file that the checkpoint came with"
        ) from error


class _Unsupported(ValueError):
    """A setting that is not implemented, or can be that of no model."""


def _check_numbers(data: Mapping[str, Any]) -> None:
    """Before transformers computes with them, or makes lists of that many layers."""
    layers = data.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise _Unsupported(
            f"it sets num_hidden_layers to {shown(layers)}: models of up to {MAX_LAYERS} layers are"
            " read"
        )
    for name, value in data.items():
        if name in _POSITIVE and not (
            isinstance(value, int | float) and value is not True and 0 < value < math.inf
        ):
            raise _Unsupported(
                f"it sets {name} to {shown(value)}, which is no positive number: take the file that"
                " the checkpoint came with"
            )
        if isinstance(value, dict) and name in _ROPE:
            _check_numbers(value)


def _translated(family: str, hf: PretrainedConfig, data: Mapping[str, Any]) -> ModelConfig:
    for name in _REFUSED:
        if getattr(hf, name, None):
            raise _not_implemented(name, getattr(hf, name))
    activation = getattr(hf, FAMILIES[family].activation_key)
    if activation not in ACTIVATIONS.values():
        raise _not_implemented(FAMILIES[family].activation_key, activation)
    sliding_layers = _sliding_layers(hf)
    rope = dict(hf.rope_parameters or {})
    local = dict(rope.get("sliding_attention") or {})
    if local and _scaling(local, hf.max_position_embeddings) is not None:
        raise _not_implemented("rope_parameters of sliding_attention", local)
    rope = dict(rope.get("full_attention") or rope)
    scaling = _scaling(rope, hf.max_position_embeddings)
    positions = hf.max_position_embeddings
    # published configs keep the unstretched length there
    if scaling is not None and scaling.kind == "yarn":
        positions = max(positions, int(scaling.factor * scaling.original_max_positions))
    named = (data.get("dtype"), data.get("torch_dtype"), "float32")
    dtype = str(next(name for name in named if name is not None)).removeprefix("torch.")
    if dtype not in DTYPES:
        raise _not_implemented("dtype", dtype)
    head_dim = getattr(hf, "head_dim", None)
    attention_bias = bool(getattr(hf, "attention_bias", False))
    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": hf.vocab_size,
        "num_layers": hf.num_hidden_layers,
        "d_model": hf.hidden_size,
        "d_ff": hf.intermediate_size,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": hf.hidden_size // hf.num_attention_heads if head_dim is None else head_dim,
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling,
        "local_rope_theta": float(local["rope_theta"]) if local else None,
        "sliding_window": hf.sliding_window if any(sliding_layers) else None,
        "sliding_layers": sliding_layers,
        "norm_eps": float(hf.rms_norm_eps),
        "qkv_bias": attention_bias,
        "o_bias": attention_bias,
        "mlp_bias": bool(getattr(hf, "mlp_bias", False)),
        "activation": next(ours for ours, theirs in ACTIVATIONS.items() if theirs == activation),
        "attention_scale": (
            hf.query_pre_attn_scalar**-0.5 if hasattr(hf, "query_pre_attn_scalar") else None
        ),
        "tie_embeddings": bool(hf.tie_word_embeddings),
        "max_positions": positions,
        "dtype": "float32" if dtype == "float16" else dtype,
        "param_dtype": dtype,
    }
    return ModelConfig(**{**fields, **FAMILIES[family].fixed})


def model_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` that Hugging Face transformers reads as the same model.

    Raises:
      ValueError: the family cannot hold one of the fields (Qwen2 always has biases, for
        example).
    """
    family = FAMILIES[model.family]
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        full |= _scaling_to_hf(model.rope_scaling)
    data: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        family.activation_key: ACTIVATIONS[model.activation],
        "rope_theta": model.rope_theta,
        "rope_parameters": full,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": model.max_positions,
        "dtype": model.param_dtype,
    }
    if model.rope_scaling is not None:
        data["rope_scaling"] = full  # what readers before transformers 5 look at
    if model.family in ("qwen2", "qwen3"):
        data["use_sliding_window"] = any(model.sliding_layers)
    if model.family != "llama":
        kinds = model.sliding_layers or (False,) * model.num_layers
        data["layer_types"] = [
            "sliding_attention" if sliding else "full_attention" for sliding in kinds
        ]
        data["sliding_window"] = model.sliding_window
    if model.family != "qwen2":
        data["attention_bias"] = model.qkv_bias
    if model.family == "llama":
        data["mlp_bias"] = model.mlp_bias
    if model.local_rope_theta is not None:
        data["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": model.local_rope_theta},
        }
        data["rope_local_base_freq"] = model.local_rope_theta
    if model.attention_scale is not None:
        scalar = model.attention_scale**-2
        data["query_pre_attn_scalar"] = (
            round(scalar) if math.isclose(scalar, round(scalar)) else scalar
        )
    again = model_from_hf(data)
    for field in dataclasses.fields(model):
        mine, read = getattr(model, field.name), getattr(again, field.name)
        # how it is computed: config.json names the dtype of the weights only
        if mine != read and field.name not in ("dtype", "products"):
            raise ValueError(
                f"{field.name} is {mine!r}, which a {model.family} checkpoint cannot hold (it"
                f" would be read as {read!r})"
            )
    return data


def _not_implemented(name: str, value: Any) -> _Unsupported:
    return _Unsupported(
        f"it sets {name} to {shown(value)}, which this decoder does not implement: use a checkpoint"
        " without it"
    )


def _sliding_layers(hf: PretrainedConfig) -> tuple[bool, ...]:
    kinds = getattr(hf, "layer_types", None) or ()
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise _not_implemented("layer_types", kind)
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return sliding if any(sliding) else ()


def _scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """Reads one set of `rope_parameters`."""
    kind = rope.get("rope_type", "default")
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise _not_implemented("partial_rotary_factor", rope["partial_rotary_factor"])
    if kind == "default":
        return None
    # "dynamic" rotates by the length of the longest row so far: cached keys would go stale
    if kind not in SCALINGS:
        raise _not_implemented("rope_type", kind)
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    original = max_positions if original is None else original
    factor = max_positions / original if factor is None else float(factor)
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor)
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=factor,
            original_max_positions=original,
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
        )
    attention = rope.get("attention_factor")
    if attention is None:
        over, under = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = (
            _yarn_magnitude(factor, over) / _yarn_magnitude(factor, under)
            if over and under
            else _yarn_magnitude(factor, 1.0)
        )
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_positions=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=float(attention),
    )


def _yarn_magnitude(factor: float, scale: float) -> float:
    """Section 3.4 of https://arxiv.org/abs/2309.00071."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    data: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        data["original_max_position_embeddings"] = scaling.original_max_positions
    names = {
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor"),
    }
    return data | {name: getattr(scaling, name) for name in names.get(scaling.kind, ())}
