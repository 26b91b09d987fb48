"""The shape of one decoder, and its translation from and to a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_DTYPES = ("float32", "bfloat16")
_ARCHITECTURE = "Qwen2ForCausalLM"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Qwen2 family; widths in elements, positions in tokens."""

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = True
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
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: every kv head serves a whole group"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings rotate pairs")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(_DTYPES)}")

    @property
    def num_params(self) -> int:
        """Number of weights."""
        queries, keys = (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        attention = self.d_model * (2 * queries + 2 * keys) + (queries + 2 * keys if self.qkv_bias else 0)
        layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + self.d_model

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a Qwen2 `config.json`.

        Weights and activations are in the file's `dtype` (`torch_dtype` in older files) if that is float32 or bfloat16, else in float32.

        Raises:
          ValueError: another architecture, a feature this decoder lacks, or a missing key.
        """
        architectures = data.get("architectures") or [_ARCHITECTURE]
        if data.get("model_type") != "qwen2" or _ARCHITECTURE not in architectures:
            raise ValueError(
                f"config.json names model_type {data.get('model_type')!r} and architectures {architectures}: "
                f"only {_ARCHITECTURE} (model_type 'qwen2') is supported"
            )
        rope = {
            **(data.get("rope_scaling") or {}),
            **(data.get("rope_parameters") or {}),
        }
        unsupported = {
            "use_sliding_window": data.get("use_sliding_window", False) and data["use_sliding_window"],
            "rope_type": rope.get("rope_type", rope.get("type", "default")) not in ("default", None) and rope,
            "hidden_act": data.get("hidden_act", "silu") != "silu" and data["hidden_act"],
        }
        for name, value in unsupported.items():
            if value:
                raise ValueError(
                    f"config.json sets {name} to {value!r}, which this decoder does not implement: use a plain Qwen2 checkpoint"
                )
        required = (
            "vocab_size",
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
        )
        missing = [name for name in required if data.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}: take the file that the checkpoint was published with")
        dtype = data.get("dtype") or data.get("torch_dtype")
        dtype = dtype if dtype in _DTYPES else "float32"
        return cls(
            vocab_size=data["vocab_size"],
            num_layers=data["num_hidden_layers"],
            d_model=data["hidden_size"],
            d_ff=data["intermediate_size"],
            num_heads=data["num_attention_heads"],
            num_kv_heads=data.get("num_key_value_heads") or data["num_attention_heads"],
            head_dim=data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"],
            rope_theta=float(rope.get("rope_theta") or data.get("rope_theta") or 10_000.0),
            norm_eps=float(data.get("rms_norm_eps", 1e-6)),
            qkv_bias=True,
            tie_embeddings=bool(data.get("tie_word_embeddings", False)),
            max_positions=data.get("max_position_embeddings", 32_768),
            dtype=dtype,
            param_dtype=dtype,
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that Hugging Face transformers reads as the same model.

        Raises:
          ValueError: the model has no query, key and value biases; Qwen2 always has them.
        """
        if not self.qkv_bias:
            raise ValueError(
                "qkv_bias is False: the Qwen2 layout always has query, key and value biases; build the model with qkv_bias=True"
            )
        return {
            "architectures": [_ARCHITECTURE],
            "model_type": "qwen2",
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_ff,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_positions,
            "use_sliding_window": False,
            "dtype": self.param_dtype,
        }
