"""The Qwen2 decoder: RMSNorm, rotary grouped-query attention with biases, SwiGLU; pure functions over one parameter tree.

Architecture: https://arxiv.org/abs/2407.10671. The weights of all layers are stacked along a leading axis L. `forward` scans over that
axis (training: one compiled layer, optional rematerialisation); `extend` unrolls it (sampling: each layer updates its own cache array in
place). Both are views of the same tree, so nothing is stored twice. Attention logits, softmax, norms and vocabulary logits are float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ictjax.models.cache import KVCache
from ictjax.models.config import ModelConfig

Params = dict[str, Any]

_MASKED = -1e30  # finite: a row with nothing to attend to yields a mean, never NaN
_INIT_STD = 0.02
# The input and output axes of every projection of a layer.
_PROJECTIONS = {
    "q": ("D", "NH"),
    "k": ("D", "KH"),
    "v": ("D", "KH"),
    "o": ("NH", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}


class Layers(nnx.Module):
    """The weights of all decoder layers, stacked."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        layers, d, f = config.num_layers, config.d_model, config.d_ff
        n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
        normal = functools.partial(_normal, rngs, config.param_dtype)
        ones = functools.partial(jnp.ones, dtype=config.param_dtype)
        zeros = functools.partial(jnp.zeros, dtype=config.param_dtype)
        residual_std = _INIT_STD / (2 * layers) ** 0.5  # GPT-2: the residual stream keeps its variance with depth
        self.attn_norm = nnx.Param(ones((layers, d)))
        self.q = nnx.Param(normal((layers, d, n, h)))
        self.k = nnx.Param(normal((layers, d, k, h)))
        self.v = nnx.Param(normal((layers, d, k, h)))
        if config.qkv_bias:
            self.q_bias = nnx.Param(zeros((layers, n, h)))
            self.k_bias = nnx.Param(zeros((layers, k, h)))
            self.v_bias = nnx.Param(zeros((layers, k, h)))
        self.o = nnx.Param(normal((layers, n, h, d), std=residual_std))
        self.mlp_norm = nnx.Param(ones((layers, d)))
        self.gate = nnx.Param(normal((layers, d, f)))
        self.up = nnx.Param(normal((layers, d, f)))
        self.down = nnx.Param(normal((layers, f, d), std=residual_std))


class Transformer(nnx.Module):
    """The decoder as a Flax module; `nnx.split` of it gives the tree that the functions below take (see `params_of`)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Param(_normal(rngs, config.param_dtype, (config.vocab_size, config.d_model)))
        self.layers = Layers(config, rngs)
        self.norm = nnx.Param(jnp.ones((config.d_model,), config.param_dtype))
        if not config.tie_embeddings:
            self.head = nnx.Param(_normal(rngs, config.param_dtype, (config.d_model, config.vocab_size)))

    def __call__(self, tokens_bt: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of a batch without padding."""
        params = params_of(self)
        return unembed(self.config, params, forward(self.config, params, tokens_bt))


def params_of(module: Transformer) -> Params:
    """The module's weights as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random weights: normal with standard deviation 0.02 (residual outputs scaled down by depth), norms one, biases zero."""
    return params_of(Transformer(config, rngs=nnx.Rngs(key)))


def abstract_params(config: ModelConfig) -> Params:
    """The shapes and dtypes of `init_params`; allocates nothing."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def param_axes(config: ModelConfig) -> Params:
    """The logical axis of every dimension of every weight, as tuples in the shape of the parameter tree (see ictjax.mesh)."""
    layers = {
        "attn_norm": ("layers", "embed"),
        "q": ("layers", "embed", "heads", "head_dim"),
        "k": ("layers", "embed", "kv_heads", "head_dim"),
        "v": ("layers", "embed", "kv_heads", "head_dim"),
        "o": ("layers", "heads", "head_dim", "embed"),
        "mlp_norm": ("layers", "embed"),
        "gate": ("layers", "embed", "ff"),
        "up": ("layers", "embed", "ff"),
        "down": ("layers", "ff", "embed"),
    }
    if config.qkv_bias:
        layers |= {
            "q_bias": ("layers", "heads", "head_dim"),
            "k_bias": ("layers", "kv_heads", "head_dim"),
            "v_bias": ("layers", "kv_heads", "head_dim"),
        }
    axes = {"embed": ("vocab", "embed"), "layers": layers, "norm": ("embed",)}
    return axes if config.tie_embeddings else axes | {"head": ("embed", "vocab")}


def forward(
    config: ModelConfig,
    params: Params,
    tokens_bt: Int[Array, "B T"],
    *,
    positions_bt: Int[Array, "B T"] | None = None,
    valid_bt: Bool[Array, "B T"] | None = None,
    mask_bts: Bool[Array, "B T T"] | None = None,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """Hidden states after the last norm, of whole sequences (the training view).

    Args:
      positions_bt: rotary positions; 0..T-1 unless given.
      valid_bt: False at padding, which nobody attends to; all True unless given. Hidden states at padding are finite and meaningless.
      mask_bts: True where token t may attend to token s; causal over valid tokens unless given, and then `valid_bt` is not consulted.
      remat: recompute each layer in the backward pass, so that only one hidden state per layer is kept.
    """
    batch, length = tokens_bt.shape
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    if mask_bts is None:
        mask_bts = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool))[None], (batch, length, length))
        if valid_bt is not None:
            mask_bts = mask_bts & valid_bt[:, None, :]
    rotary = _rotary(config, positions_bt)

    def layer(x_btd: Array, weights: Params) -> tuple[Array, None]:
        q_btnh, k_btkh, v_btkh = _qkv(config, weights, x_btd, rotary)
        mixed_btnh = attend(q_btnh, k_btkh.transpose(0, 2, 3, 1), v_btkh.swapaxes(1, 2), mask_bts)
        return _residual(config, weights, x_btd, mixed_btnh), None

    x_btd = _embed(config, params, tokens_bt)
    x_btd, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x_btd, params["layers"])
    return _rms_norm(x_btd, params["norm"], config.norm_eps)


def extend(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    tokens_bt: Int[Array, "B T"],
    starts_b: Int[Array, " B"],
    lengths_b: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Appends tokens to every row of a cache; returns their hidden states after the last norm and the new cache (the sampling view).

    To work on some rows, or on a prefix of the positions, take them out of the cache first (`cache.take_rows`).

    Args:
      cache: consumed if the caller donates it.
      starts_b: number of tokens already in each row.
      lengths_b: number of real tokens of each row in this call; the others are padding: not written, their hidden states meaningless.
    """
    num_positions = cache.v[0].shape[2]
    batch, length = tokens_bt.shape
    steps_t = jnp.arange(length, dtype=jnp.int32)
    positions_bt = starts_b[:, None] + steps_t[None, :]
    written_bt = jnp.where(steps_t[None, :] < lengths_b[:, None], positions_bt, num_positions)  # beyond the end: dropped
    mask_bts = jnp.arange(num_positions, dtype=jnp.int32)[None, None, :] <= positions_bt[:, :, None]
    rows_b1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
    rotary = _rotary(config, positions_bt)
    x_btd = _embed(config, params, tokens_bt)
    keys, values = [], []
    for index in range(config.num_layers):
        weights = {name: stacked[index] for name, stacked in params["layers"].items()}
        q_btnh, k_btkh, v_btkh = _qkv(config, weights, x_btd, rotary)
        k_bkhs = cache.k[index].at[rows_b1, :, :, written_bt].set(k_btkh, mode="drop")
        v_bksh = cache.v[index].at[rows_b1, :, written_bt].set(v_btkh, mode="drop")
        x_btd = _residual(config, weights, x_btd, attend(q_btnh, k_bkhs, v_bksh, mask_bts))
        keys.append(k_bkhs)
        values.append(v_bksh)
    return _rms_norm(x_btd, params["norm"], config.norm_eps), KVCache(k=tuple(keys), v=tuple(values))


def unembed(config: ModelConfig, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Vocabulary logits in float32 of hidden states after the last norm; leading axes are free."""
    if config.tie_embeddings:
        return jnp.einsum(
            "...D,VD->...V",
            hidden,
            params["embed"].astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
    return jnp.einsum(
        "...D,DV->...V",
        hidden,
        params["head"].astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def attend(
    q_btnh: Float[Array, "B T N H"],
    k_bkhs: Float[Array, "B K H S"],
    v_bksh: Float[Array, "B K S H"],
    mask_bts: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; query head n reads kv head n // (N / K), without repeating keys or values."""
    batch, length, num_heads, head_dim = q_btnh.shape
    num_kv_heads = k_bkhs.shape[1]
    # Rows of each kv head's matrix product: (group, token). In this order both products are plain batched matrix products; XLA transposes
    # the large operand of the direct five-letter einsum, which doubles the time of a decode step on CPU.
    groups = num_heads // num_kv_heads
    q_bkmh = (
        q_btnh.reshape(batch, length, num_kv_heads, groups, head_dim).transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)
    )
    logits_bkms = jnp.einsum("BKMH,BKHS->BKMS", q_bkmh, k_bkhs, preferred_element_type=jnp.float32) * head_dim**-0.5
    logits_bkgts = logits_bkms.reshape(batch, num_kv_heads, groups, length, -1)
    weights_bkgts = jax.nn.softmax(jnp.where(mask_bts[:, None, None], logits_bkgts, _MASKED), axis=-1)
    mixed_bkmh = jnp.einsum("BKMS,BKSH->BKMH", weights_bkgts.reshape(logits_bkms.shape).astype(v_bksh.dtype), v_bksh)
    return mixed_bkmh.reshape(batch, num_kv_heads, groups, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(q_btnh.shape)


def _normal(rngs: nnx.Rngs, dtype: str, shape: tuple[int, ...], std: float = _INIT_STD) -> Array:
    return std * jax.random.normal(rngs.params(), shape, dtype)


def _embed(config: ModelConfig, params: Params, tokens_bt: Array) -> Array:
    return jnp.take(params["embed"], tokens_bt, axis=0, mode="clip").astype(config.dtype)


def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)[None, None]).astype(x.dtype)


def _rotary(config: ModelConfig, positions_bt: Array) -> tuple[Array, Array]:
    """Cosines and sines, [B, T, 1, H/2], float32."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions_bt.astype(jnp.float32)[:, :, None, None] / (config.rope_theta**exponents)[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x_btnh: Array, rotary: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H/2), the convention of the Hugging Face weights."""
    cos, sin = rotary
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_btnh.dtype)


def _project(weights: Params, name: str, x: Array) -> Array:
    """One linear map of one layer, with its bias where the layer has one: the single place where a projection's weights are used."""
    inputs, outputs = _PROJECTIONS[name]
    y = jnp.einsum(f"BT{inputs},{inputs}{outputs}->BT{outputs}", x, weights[name].astype(x.dtype))
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(x.dtype)[None, None]


def _qkv(config: ModelConfig, weights: Params, x_btd: Array, rotary: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Rotated queries and keys, and values, of one layer."""
    x_btd = _rms_norm(x_btd, weights["attn_norm"], config.norm_eps)
    q_btnh, k_btkh, v_btkh = (_project(weights, name, x_btd) for name in ("q", "k", "v"))
    return _rotate(q_btnh, rotary), _rotate(k_btkh, rotary), v_btkh


def _residual(config: ModelConfig, weights: Params, x_btd: Array, mixed_btnh: Array) -> Array:
    """The residual stream after one layer's attention output and feed-forward network."""
    x_btd = x_btd + _project(weights, "o", mixed_btnh)
    y_btd = _rms_norm(x_btd, weights["mlp_norm"], config.norm_eps)
    gate_btf = jax.nn.silu(_project(weights, "gate", y_btd))
    return x_btd + _project(weights, "down", gate_btf * _project(weights, "up", y_btd))
