"""The shape of one decoder, and its translation from and to a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig

DTYPES = ("float32", "bfloat16", "float16")
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours -> Hugging Face's name
_SCALINGS = ("linear", "llama3", "yarn")


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

# Keys of a config.json that change what a model computes, and that this decoder does not implement.
_REFUSED = (
    "quantization_config",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "use_bidirectional_attention",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts (see `rotary.frequencies`)."""

    kind: str  # linear, llama3 or yarn
    factor: float
    original_max_positions: int = 0  # positions before stretching; linear does not use it
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cosines and sines

    def __post_init__(self) -> None:
        if self.kind not in _SCALINGS:
            raise ValueError(
                f"rope scaling is {self.kind!r}: implemented are {', '.join(_SCALINGS)}"
            )
        if self.factor < 1:
            raise ValueError(f"rope scaling has factor {self.factor}: give at least 1")
        if self.kind != "linear" and self.original_max_positions < 1:
            raise ValueError(
                f"rope scaling {self.kind} has original_max_positions"
                f" {self.original_max_positions}: give at least 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder with rotary grouped-query attention and a gated feed-forward network; widths in
    elements, positions in tokens.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    # Hugging Face model_type: how checkpoints are laid out; what is computed is said by the fields
    # below
    family: str = "qwen2"
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    # of sliding layers, never scaled; None: they rotate as the others do
    local_rope_theta: float | None = None
    sliding_window: int | None = None  # tokens that a sliding layer sees, the current one included
    sliding_layers: tuple[bool, ...] = ()  # one per layer; empty: none slides
    norm_eps: float = 1e-6
    norm_offset: bool = False  # norms multiply by 1 + weight
    qk_norm: bool = False  # RMSNorm of every query and key head
    # also normalise what attention and feed-forward add to the residual stream
    sandwich_norms: bool = False
    qkv_bias: bool = True
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    attention_scale: float | None = None  # of queries times keys; None: head_dim ** -0.5
    scale_embeddings: bool = False  # multiply embeddings by d_model ** 0.5
    tie_embeddings: bool = False
    max_positions: int = 32_768
    dtype: str = "float32"  # of activations and of the KV cache
    param_dtype: str = "float32"  # of the stored weights

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "d_model",
            "d_ff",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}:"
                " every kv head serves a whole group"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings rotate pairs")
        for name, choices in (
            ("family", FAMILIES),
            ("activation", _ACTIVATIONS),
            ("dtype", DTYPES[:2]),
            ("param_dtype", DTYPES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"sliding_layers has {len(self.sliding_layers)} entries for {self.num_layers}"
                " layers: give one each, or none"
            )
        if (
            any(self.sliding_layers) != (self.sliding_window is not None)
            or (self.sliding_window or 1) < 1
        ):
            raise ValueError(
                f"sliding_window is {self.sliding_window} for sliding_layers {self.sliding_layers}:"
                " give both or neither"
            )

    def with_param_dtype(self, dtype: str) -> "ModelConfig":
        """The same model with its weights stored in another type."""
        return dataclasses.replace(self, param_dtype=dtype)

    @property
    def num_params(self) -> int:
        """Number of weights."""
        sizes = self.axis_sizes
        top, layers = self.weight_axes
        return sum(
            math.prod(sizes[axis] for axis in axes) for axes in (*top.values(), *layers.values())
        )

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The size of every logical axis of the weights."""
        return {
            "layers": self.num_layers,
            "vocab": self.vocab_size,
            "embed": self.d_model,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "ff": self.d_ff,
        }

    @property
    def weight_axes(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        """The logical axes of every weight: those outside the layers, and those of all layers
        stacked along "layers".
        """
        layer: dict[str, tuple[str, ...]] = {
            "attn_norm": ("embed",),
            "q": ("embed", "heads", "head_dim"),
            "k": ("embed", "kv_heads", "head_dim"),
            "v": ("embed", "kv_heads", "head_dim"),
            "o": ("heads", "head_dim", "embed"),
            "mlp_norm": ("embed",),
            "gate": ("embed", "ff"),
            "up": ("embed", "ff"),
            "down": ("ff", "embed"),
        }
        if self.qkv_bias:
            layer |= {
                "q_bias": ("heads", "head_dim"),
                "k_bias": ("kv_heads", "head_dim"),
                "v_bias": ("kv_heads", "head_dim"),
            }
        if self.o_bias:
            layer |= {"o_bias": ("embed",)}
        if self.mlp_bias:
            layer |= {"gate_bias": ("ff",), "up_bias": ("ff",), "down_bias": ("embed",)}
        if self.qk_norm:
            layer |= {"q_norm": ("head_dim",), "k_norm": ("head_dim",)}
        if self.sandwich_norms:
            layer |= {"post_attn_norm": ("embed",), "post_mlp_norm": ("embed",)}
        top: dict[str, tuple[str, ...]] = {"embed": ("vocab", "embed"), "norm": ("embed",)}
        if not self.tie_embeddings:
            top |= {"head": ("embed", "vocab")}
        return top, {name: ("layers", *axes) for name, axes in layer.items()}

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a `config.json`; what it leaves out has the default of its family
        in Hugging Face transformers.

        Weights are in the file's `dtype` (`torch_dtype` in older files), float32 if it says
        nothing. Activations are too, or in float32 where weights are float16.

        Raises:
          ValueError: another architecture, or an option that this decoder does not implement.
        """
        family = data.get("model_type")
        architectures = data.get("architectures") or [
            FAMILIES[family].architecture if family in FAMILIES else None
        ]
        if family not in FAMILIES or FAMILIES[family].architecture not in architectures:
            known = ", ".join(f"{each.architecture} ({name})" for name, each in FAMILIES.items())
            raise ValueError(
                f"config.json names model_type {family!r} and architectures {architectures}:"
                f" supported are {known}"
            )
        try:
            hf = AutoConfig.for_model(**data)
        except (
            Exception
        ) as error:  # transformers checks types and values, and raises whatever its checks raise
            detail = " ".join(str(error).split())
            raise ValueError(
                f"config.json cannot be read as {family} ({detail}): take the file that the"
                " checkpoint came with"
            ) from error
        for name in _REFUSED:
            if getattr(hf, name, None):
                raise _not_implemented(name, getattr(hf, name))
        activation = getattr(hf, FAMILIES[family].activation_key)
        if activation not in _ACTIVATIONS.values():
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
        dtype = str(data.get("dtype") or data.get("torch_dtype") or "float32").removeprefix(
            "torch."
        )
        if dtype not in DTYPES:
            raise _not_implemented("dtype", dtype)
        attention_bias = bool(getattr(hf, "attention_bias", False))
        fields: dict[str, Any] = {
            "family": family,
            "vocab_size": hf.vocab_size,
            "num_layers": hf.num_hidden_layers,
            "d_model": hf.hidden_size,
            "d_ff": hf.intermediate_size,
            "num_heads": hf.num_attention_heads,
            "num_kv_heads": hf.num_key_value_heads,
            "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            "rope_theta": float(rope["rope_theta"]),
            "rope_scaling": scaling,
            "local_rope_theta": float(local["rope_theta"]) if local else None,
            "sliding_window": hf.sliding_window if any(sliding_layers) else None,
            "sliding_layers": sliding_layers,
            "norm_eps": float(hf.rms_norm_eps),
            "qkv_bias": attention_bias,
            "o_bias": attention_bias,
            "mlp_bias": bool(getattr(hf, "mlp_bias", False)),
            "activation": next(
                ours for ours, theirs in _ACTIVATIONS.items() if theirs == activation
            ),
            "attention_scale": (
                hf.query_pre_attn_scalar**-0.5 if hasattr(hf, "query_pre_attn_scalar") else None
            ),
            "tie_embeddings": bool(hf.tie_word_embeddings),
            "max_positions": positions,
            "dtype": "float32" if dtype == "float16" else dtype,
            "param_dtype": dtype,
        }
        return cls(**{**fields, **FAMILIES[family].fixed})

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that Hugging Face transformers reads as the same model.

        Raises:
          ValueError: the family cannot hold one of the fields (Qwen2 always has biases, for
            example).
        """
        family = FAMILIES[self.family]
        full: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            full |= _scaling_to_hf(self.rope_scaling)
        data: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            family.activation_key: _ACTIVATIONS[self.activation],
            "rope_theta": self.rope_theta,
            "rope_parameters": full,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "dtype": self.param_dtype,
        }
        if self.rope_scaling is not None:
            data["rope_scaling"] = full  # what readers before transformers 5 look at
        if self.family in ("qwen2", "qwen3"):
            data["use_sliding_window"] = any(self.sliding_layers)
        if self.family != "llama":
            kinds = self.sliding_layers or (False,) * self.num_layers
            data["layer_types"] = [
                "sliding_attention" if sliding else "full_attention" for sliding in kinds
            ]
            data["sliding_window"] = self.sliding_window
        if self.family != "qwen2":
            data["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            data["mlp_bias"] = self.mlp_bias
        if self.local_rope_theta is not None:
            data["rope_parameters"] = {
                "full_attention": full,
                "sliding_attention": {"rope_type": "default", "rope_theta": self.local_rope_theta},
            }
            data["rope_local_base_freq"] = self.local_rope_theta
        if self.attention_scale is not None:
            scalar = self.attention_scale**-2
            data["query_pre_attn_scalar"] = (
                round(scalar) if math.isclose(scalar, round(scalar)) else scalar
            )
        again = ModelConfig.from_hf(data)
        for field in dataclasses.fields(self):
            mine, read = getattr(self, field.name), getattr(again, field.name)
            # of activations: config.json names the dtype of the weights only
            if mine != read and field.name != "dtype":
                raise ValueError(
                    f"{field.name} is {mine!r}, which a {self.family} checkpoint cannot hold (it"
                    f" would be read as {read!r})"
                )
        return data


def _not_implemented(name: str, value: Any) -> ValueError:
    return ValueError(
        f"config.json sets {name} to {value!r}, which this decoder does not implement: use a"
        " checkpoint without it"
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
    if kind not in _SCALINGS:
        raise _not_implemented("rope_type", kind)
    original = rope.get("original_max_position_embeddings") or max_positions
    factor = float(rope.get("factor") or max_positions / original)
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
