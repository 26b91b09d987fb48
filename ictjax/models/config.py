"""The shape of one decoder."""

import dataclasses
import math
from typing import Literal

from ictjax.config import Dtype

DTYPES = ("float32", "bfloat16", "float16")  # of weights
_ACTIVATION_DTYPES = ("float32", "bfloat16", "float64")  # the last for proofs, with JAX's x64 mode
WEIGHTS = ("float", "int8")
ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours -> Hugging Face's name
MAX_LAYERS = 1024  # the deepest published models have a few hundred
_MAX_SIZE = 2**24  # of anything else: the largest published vocabularies have 2**18
SCALINGS = ("linear", "llama3", "yarn")
# Hugging Face model types; hf/translate.py says what each of them fixes.
FAMILIES = ("qwen2", "qwen3", "llama", "gemma3_text")


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
        if self.kind not in SCALINGS:
            raise ValueError(
                f"rope scaling is {self.kind!r}: implemented are {', '.join(SCALINGS)}"
            )
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope scaling has factor {self.factor}: give at least 1")
        for name in (
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"rope scaling has {name} {getattr(self, name)}: give a positive number"
                )
        if self.kind != "linear" and self.original_max_positions < 1:
            raise ValueError(
                f"rope scaling {self.kind} has original_max_positions"
                f" {self.original_max_positions}: give at least 1"
            )


def frozen_dtype(dtype: Dtype) -> Literal["bfloat16", "float32"]:
    """Of the weights of a model that is not trained, in memory."""
    return "bfloat16" if dtype == "mixed" else dtype


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
    # what operands of products with matrices are rounded to, their sums being float32; empty: dtype
    products: str = ""
    # "int8": matrices are held in 8 bits, with scales (`int8`); "float": as param_dtype says
    weights: str = "float"

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
            value = getattr(self, name)
            most = MAX_LAYERS if name == "num_layers" else _MAX_SIZE
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} is {value}: give a whole number from 1 to {most}")
        for name in ("rope_theta", "norm_eps", "local_rope_theta", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: give a positive number")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}:"
                " every kv head serves a whole group"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings rotate pairs")
        for name, choices in (
            ("family", FAMILIES),
            ("activation", ACTIVATIONS),
            ("dtype", _ACTIVATION_DTYPES),
            ("param_dtype", DTYPES),
            ("weights", WEIGHTS),
            ("products", ("", "bfloat16")),
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
        if any(self.sliding_layers) != (self.sliding_window is not None) or (
            self.sliding_window is not None and not 1 <= self.sliding_window <= _MAX_SIZE
        ):
            raise ValueError(
                f"sliding_window is {self.sliding_window} for sliding_layers {self.sliding_layers}:"
                " give both or neither"
            )

    def with_param_dtype(self, dtype: str) -> "ModelConfig":
        """The same model with its weights stored in another type."""
        return dataclasses.replace(self, param_dtype=dtype)

    def with_dtype(self, dtype: Dtype) -> "ModelConfig":
        """The same model computed in another way, its weights stored as frozen ones are then."""
        mixed = dtype == "mixed"
        return dataclasses.replace(
            self,
            dtype="float32" if mixed else dtype,
            products="bfloat16" if mixed else "",
            param_dtype=frozen_dtype(dtype),
        )

    @property
    def num_params(self) -> int:
        """Number of weights, scales of matrices in 8 bits not counted."""
        sizes = self.axis_sizes
        top, layers = self.weight_axes
        return sum(
            math.prod(sizes[axis] for axis in axes)
            for name, axes in (*top.items(), *layers.items())
            if not name.endswith("_scale")
        )

    @property
    def matrices(self) -> dict[str, tuple[str, ...]]:
        """The logical axes that every matrix is summed over where it is multiplied with; of the
        embedding, those of one id.
        """
        return {
            **dict.fromkeys(("q", "k", "v", "gate", "up", "embed", "head"), ("embed",)),
            "o": ("heads", "head_dim"),
            "down": ("ff",),
        }

    def dtype_of(self, name: str) -> str:
        """The type that a weight is stored in."""
        if self.weights == "float":
            return self.param_dtype
        if name in self.matrices:
            return "int8"
        return "float32" if name.endswith("_scale") else self.param_dtype

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
        if self.weights == "int8":
            for weights in (top, layer):
                weights |= {
                    f"{name}_scale": tuple(a for a in weights[name] if a not in summed)
                    for name, summed in self.matrices.items()
                    if name in weights
                }
        return top, {name: ("layers", *axes) for name, axes in layer.items()}
