"""The decoder: RMSNorm, rotary grouped-query attention, gated feed-forward; pure functions over one
parameter tree.

Qwen2 (https://arxiv.org/abs/2407.10671), Qwen3 (2505.09388), Llama 3 (2407.21783) and Gemma 3 text
(2503.19786) are this one decoder with other `ModelConfig` fields; docs/models.md says which.
Attention logits, softmax, norms and vocabulary logits are float32 at least.

`params["layers"]` has one of two forms, and every function takes both:

- stacked: one dict of weights with a leading axis L. Weights that are trained, read and written
have this form.
- unstacked (`unstack_layers`): a tuple of one dict per layer. Weights that sample have this form:
  `extend` is unrolled, and out of a stack it would copy every layer into temporary memory (XLA on
  CPU: all weights once more, 45 ms a step instead of 23).

Matrices of the second may be packed for this CPU (`ictjax.models.cpu_kernels`), for `extend` alone.

`forward` is one `scan` over either: of a tuple it copies out one layer at a time, so frozen weights
serve sampling and training from one place and compile time does not grow with depth. Low-rank
additions (`ictjax.models.lora`) are stacked under `params["lora"]`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from ictjax.config import Remat
from ictjax.mesh import table_sharding
from ictjax.models import cpu_kernels
from ictjax.models.attention import (
    BLOCKS,
    EVERYTHING,
    MIXED,
    WHOLE,
    Attention,
    Seen,
    attend_in_parts,
    plain_rows,
)
from ictjax.models.cache import CachedLayer, KVCache, of_layers
from ictjax.models.config import ModelConfig
from ictjax.models.int8 import Scales, to_int8
from ictjax.models.paged_attention import PAGES, PagedAttention
from ictjax.models.precision import contract, project, wide
from ictjax.models.rotary import rotary, rotate

Params = dict[str, Any]

_INIT_STD = 0.02
# What is kept of every layer, beside its input, by the name that it has where it is computed.
_KEPT: Mapping[Remat, tuple[str, ...]] = {
    "full": (),
    "attention": (MIXED,),
    "projections": (MIXED, "projections"),
}
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
# The input and output axes of every projection of a layer.
PROJECTION_AXES = {
    "q": ("D", "NH"),
    "k": ("D", "KH"),
    "v": ("D", "KH"),
    "o": ("NH", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}
PROJECTED = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Projections of the same hidden states, which are packed together (`cpu_kernels`)."""


class Layers(nnx.Module):
    """The weights of all decoder layers, stacked."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        # GPT-2: the residual stream keeps its variance with depth
        residual_std = _INIT_STD / (2 * config.num_layers) ** 0.5
        for name, axes in config.weight_axes[1].items():
            shape = tuple(config.axis_sizes[axis] for axis in axes)
            if name in PROJECTION_AXES:
                weight = _normal(
                    rngs,
                    config.param_dtype,
                    shape,
                    residual_std if name in ("o", "down") else _INIT_STD,
                )
            else:
                # the other norms start at 1 + 0, and biases at 0
                ones = name.endswith("norm") and not config.norm_offset
                weight = jnp.full(shape, float(ones), config.param_dtype)
            setattr(self, name, nnx.Param(weight))


class Transformer(nnx.Module):
    """The decoder as a Flax module; `nnx.split` of it gives the tree that the functions below take
    (see `params_of`).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Param(
            _normal(rngs, config.param_dtype, (config.vocab_size, config.d_model))
        )
        self.layers = Layers(config, rngs)
        self.norm = nnx.Param(
            jnp.full((config.d_model,), float(not config.norm_offset), config.param_dtype)
        )
        if not config.tie_embeddings:
            self.head = nnx.Param(
                _normal(rngs, config.param_dtype, (config.d_model, config.vocab_size))
            )

    def __call__(self, tokens_bt: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of a batch without padding."""
        params = params_of(self)
        return unembed(self.config, params, forward(self.config, params, tokens_bt))


def params_of(module: Transformer) -> Params:
    """The module's weights as a plain nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random weights: normal with standard deviation 0.02 (residual outputs scaled down by depth),
    norms one, biases zero.
    """
    return params_of(Transformer(config, rngs=nnx.Rngs(key)))


def abstract_params(config: ModelConfig) -> Params:
    """The shapes and dtypes of `init_params`, or of `int8.int8_weights`; allocates nothing."""
    sizes = config.axis_sizes

    def weight(name: str, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes), config.dtype_of(name))

    top, layers = config.weight_axes
    return {name: weight(name, axes) for name, axes in top.items()} | {
        "layers": {name: weight(name, axes) for name, axes in layers.items()}
    }


def unstack_layers(config: ModelConfig, params: Params) -> Params:
    """The same weights with one dict per layer (of slices: NumPy arrays stay views), as they
    sample.
    """
    layers = params["layers"]
    unstacked = tuple(
        {name: leaf[index] for name, leaf in layers.items()} for index in range(config.num_layers)
    )
    return params | {"layers": unstacked}


def layer_weights(params: Params, index: int) -> Params:
    """The weights of one layer in either form, with its low-rank additions."""
    layers = params["layers"]
    weights = (
        {name: leaf[index] for name, leaf in layers.items()}
        if isinstance(layers, dict)
        else layers[index]
    )
    return weights | {name: leaf[index] for name, leaf in params.get("lora", {}).items()}


def param_axes(config: ModelConfig) -> Params:
    """The logical axis of every dimension of every weight, as tuples in the shape of the parameter
    tree (see ictjax.mesh).
    """
    top, layers = config.weight_axes
    return {**top, "layers": layers}


def forward(
    config: ModelConfig,
    params: Params,
    tokens_bt: Int[Array, "B T"],
    *,
    seen: Seen | None = None,
    remat: Remat = "none",
    activations: NamedSharding | None = None,
    attention: Attention = BLOCKS,
) -> Float[Array, "B T D"]:
    """Hidden states after the last norm, of whole sequences (the training view).

    Args:
      seen: what each token may attend to, and its rotary position; unless given, rows are sequences
        without padding. Hidden states at padding are finite and meaningless.
      remat: what the backward pass computes again instead of keeping it, see
        `ictjax.config.Remat`.
      activations: of hidden states between layers on a mesh, [B, T, D]; without it the partitioner
        may split them like the weights.
      attention: how it is computed.
    """
    if seen is None:
        seen = plain_rows(jnp.ones(tokens_bt.shape, bool))
    windows = [EVERYTHING]
    if config.sliding_window is not None:
        windows.append(config.sliding_window)
    views = [
        (
            rotary(config, seen.positions_bt, sliding=window != EVERYTHING),
            attention.plan(seen, window),
        )
        for window in windows
    ]
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale

    def place(x_btd: Array) -> Array:
        return (
            x_btd if activations is None else jax.lax.with_sharding_constraint(x_btd, activations)
        )

    stacked, unstacked = (
        (params["layers"], ()) if isinstance(params["layers"], dict) else ({}, params["layers"])
    )

    def layer(x_btd: Array, scanned: tuple[Params, Array, Array | None]) -> tuple[Array, None]:
        weights, index, sliding = scanned
        if unstacked:
            weights = weights | jax.lax.switch(
                index, [lambda held=held: held for held in unstacked]
            )
        cos_sin, plan = (
            views[0]
            if sliding is None
            else jax.tree.map(lambda full, near: jnp.where(sliding, near, full), *views)
        )
        q_btnh, k_btkh, v_btkh = checkpoint_name(
            _qkv(config, weights, x_btd, cos_sin), "projections"
        )
        mixed_btnh = attention.rows(q_btnh, k_btkh, v_btkh, plan, scale)
        return place(_residual(config, weights, x_btd, mixed_btnh)), None

    if remat != "none":
        layer = jax.checkpoint(
            layer, policy=jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
        )
    elif unstacked:  # keep what the layers compute, but not the weights they copied out
        layer = jax.checkpoint(layer, policy=lambda primitive, *_, **__: primitive.name != "cond")
    if activations is None:
        x_btd = _embed(config, params, tokens_bt)
    else:
        table = jax.lax.with_sharding_constraint(
            params["embed"].astype(config.dtype),
            table_sharding(config.vocab_size, activations.mesh),
        )
        x_btd = place(_embed(config, params | {"embed": table}, tokens_bt))
    index_l = jnp.arange(config.num_layers, dtype=jnp.int32)
    sliding_l = None if config.sliding_window is None else jnp.array(config.sliding_layers)
    x_btd, _ = jax.lax.scan(layer, x_btd, (stacked | params.get("lora", {}), index_l, sliding_l))
    return _rms_norm(config, params["norm"], x_btd)


def extend(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    tokens_bt: Int[Array, "B T"],
    starts_b: Int[Array, " B"],
    lengths_b: Int[Array, " B"],
    part_bytes: int = WHOLE,
    kernels: cpu_kernels.Kernels | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Appends tokens to every row of a cache; returns their hidden states after the last norm and
    the new cache (the sampling view).

    To work on some rows, or on a prefix of the positions, take them out of the cache first
    (`cache.take_rows`).

    Args:
      cache: consumed if the caller donates it. It may hold every kv head several times in a row, as
        `make_cache` says.
      starts_b: number of tokens already in each row.
      lengths_b: number of real tokens of each row in this call; the others are padding: not
        written, their hidden states meaningless.
      part_bytes: see `attention.attend_in_parts`.
      kernels: of this CPU, that tokens attend with.
    """
    num_positions = cache.v[0].shape[2]
    batch, length = tokens_bt.shape
    steps_t = jnp.arange(length, dtype=jnp.int32)
    positions_bt = starts_b[:, None] + steps_t[None, :]
    # beyond the end: dropped
    written_bt = jnp.where(steps_t[None, :] < lengths_b[:, None], positions_bt, num_positions)
    cached_1s = jnp.arange(num_positions, dtype=jnp.int32)[None]
    masks_bts = [cached_1s[:, None, :] <= positions_bt[:, :, None]]
    if config.sliding_window is not None:
        near_bts = positions_bt[:, :, None] - cached_1s[:, None, :] < config.sliding_window
        masks_bts.append(masks_bts[0] & near_bts)
    rows_b1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
    rotations = _rotations(config, positions_bt)
    rotates = (  # the kernel does
        kernels is not None and not cache.k_scale and cpu_kernels.attends(kernels, config.head_dim)
    )

    def mix(
        sliding: bool, held: CachedLayer, q_btnh: Array, new: CachedLayer
    ) -> tuple[Array, CachedLayer]:
        scales = None
        if rotates:
            window = config.sliding_window if sliding else None
            return cpu_kernels.attend(
                q_btnh,
                new.k,
                new.v,
                rotations[sliding],
                held,
                positions_bt,
                written_bt,
                window=window,
                scale=config.attention_scale,
            )
        if held.scales is not None and new.scales is not None:
            scales = Scales(
                *(
                    scale_bks.at[rows_b1, :, written_bt].set(new_btk, mode="drop")
                    for scale_bks, new_btk in zip(held.scales, new.scales, strict=True)
                )
            )
        held = CachedLayer(
            k=held.k.at[rows_b1, :, :, written_bt].set(new.k, mode="drop"),
            v=held.v.at[rows_b1, :, written_bt].set(new.v, mode="drop"),
            scales=scales,
        )
        mixed_btnh = attend_in_parts(
            q_btnh,
            held.k,
            held.v,
            masks_bts[sliding],
            config.attention_scale,
            scales,
            part_bytes,
        )
        return mixed_btnh, held

    rotated = [None, None] if rotates else rotations
    return _extended(config, params, cache, tokens_bt, rotated, mix)


def extend_pages(
    config: ModelConfig,
    params: Params,
    pool: KVCache,
    table_bp: Int[Array, "B P"],
    tokens_bt: Int[Array, "B T"],
    starts_b: Int[Array, " B"],
    lengths_b: Int[Array, " B"],
    attention: PagedAttention = PAGES,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """`extend` of rows that hold pages of a pool: nothing is copied out, and work follows the
    longest row of this call.

    Args:
      pool: its rows are pages; consumed if the caller donates it.
      table_bp: the pages of each row in the order of its positions, enough for starts_b +
        lengths_b; entries behind them are any page.
      attention: how the rows write to their pages, and attend over them.
    """
    steps_t = jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)
    rows = table_bp, starts_b, lengths_b

    def mix(
        sliding: bool, held: CachedLayer, q_btnh: Array, new: CachedLayer
    ) -> tuple[Array, CachedLayer]:
        k_pages, v_pages = attention.write(held.k, held.v, new.k, new.v, *rows)
        scales = None
        if held.scales is not None and new.scales is not None:
            scales = attention.write_scales(held.scales, new.scales, *rows)
        mixed_btnh = attention.attend(
            q_btnh,
            k_pages,
            v_pages,
            *rows,
            window=config.sliding_window if sliding else None,
            scale=config.attention_scale,
            scales=scales,
        )
        return mixed_btnh, CachedLayer(k_pages, v_pages, scales)

    rotations = _rotations(config, starts_b[:, None] + steps_t[None, :])
    return _extended(config, params, pool, tokens_bt, rotations, mix)


def _rotations(config: ModelConfig, positions_bt: Array) -> list[tuple[Array, ...]]:
    """Of layers that see all, and of those that slide where some do."""
    kinds = [False] if config.sliding_window is None else [False, True]
    return [rotary(config, positions_bt, sliding=sliding) for sliding in kinds]


def _extended(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    tokens_bt: Array,
    rotations: Sequence[tuple[Array, ...] | None],
    mix: Callable[[bool, CachedLayer, Array, CachedLayer], tuple[Array, CachedLayer]],
) -> tuple[Array, KVCache]:
    """All layers over new tokens.

    Args:
      rotations: of layers that see all and of those that slide; None: left to `mix`.
      mix: (whether the layer slides, its cached keys and values, new queries, new keys and values
        as [B, T, K, H]) -> mixed values, and the cached keys and values with the new ones.
    """
    x_btd = _embed(config, params, tokens_bt)
    layers = []
    for index in range(config.num_layers):
        weights = layer_weights(params, index)
        sliding = config.sliding_window is not None and config.sliding_layers[index]
        q_btnh, k_btkh, v_btkh = _qkv(config, weights, x_btd, rotations[sliding])
        k_btkh, v_btkh = (
            jnp.repeat(x, cache.v[index].shape[1] // config.num_kv_heads, axis=2)
            for x in (k_btkh, v_btkh)
        )
        held, new = cache.layer(index), CachedLayer(k_btkh, v_btkh)
        if held.scales is not None:
            (k, k_scale), (v, v_scale) = (to_int8(x, (3,)) for x in (k_btkh, v_btkh))
            new = CachedLayer(k, v, Scales(k_scale, v_scale))
        mixed_btnh, held = mix(sliding, held, q_btnh, new)
        x_btd = _residual(config, weights, x_btd, mixed_btnh)
        layers.append(held)
    return _rms_norm(config, params["norm"], x_btd), of_layers(layers)


def unembed(
    config: ModelConfig, params: Params, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """Vocabulary logits in float32 of hidden states after the last norm; leading axes are free."""
    name, letters = ("embed", "VD") if config.tie_embeddings else ("head", "DV")
    if "unembed" in params:  # packed
        rows_1bd = hidden.reshape(1, -1, hidden.shape[-1])
        (logits,) = params["unembed"].multiply(rows_1bd)
        return logits.reshape(*hidden.shape[:-1], -1)
    if config.products:
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        logits = project(rows, params[name], ("D", "V"), config.products, letters)
        logits = logits.reshape(*hidden.shape[:-1], logits.shape[-1])
    else:
        logits = jnp.einsum(
            f"...D,{letters}->...V",
            hidden,
            params[name].astype(hidden.dtype),
            preferred_element_type=wide(hidden.dtype),
        )
    return _scaled(logits, params.get(f"{name}_scale"))


def _normal(rngs: nnx.Rngs, dtype: str, shape: tuple[int, ...], std: float = _INIT_STD) -> Array:
    return std * jax.random.normal(rngs.params(), shape, dtype)


def _embed(config: ModelConfig, params: Params, tokens_bt: Array) -> Array:
    x_btd = jnp.take(params["embed"], tokens_bt, axis=0, mode="clip")
    # as samplers hold the table, trained ones are rounded too
    x_btd = x_btd.astype(config.products or config.dtype).astype(config.dtype)
    if "embed_scale" in params:
        scale_bt = jnp.take(params["embed_scale"], tokens_bt, axis=0, mode="clip")
        x_btd = (x_btd * scale_bt[..., None]).astype(config.dtype)
    return (
        x_btd * jnp.asarray(config.d_model**0.5, config.dtype) if config.scale_embeddings else x_btd
    )


def _rms_norm(config: ModelConfig, weight: Array, x: Array) -> Array:
    dtype = wide(x.dtype)
    x_wide, weight = x.astype(dtype), weight.astype(dtype)
    scale = 1 + weight if config.norm_offset else weight
    normed = x_wide * jax.lax.rsqrt(
        jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + config.norm_eps
    )
    return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def _project(config: ModelConfig, weights: Params, names: tuple[str, ...], x: Array) -> list[Array]:
    """Linear maps of the same hidden states by weights of one layer, with their biases and low-rank
    additions where they have them: the one place where a projection's weights are used.

    Args:
      names: one of `PROJECTED`.
      x: [B, T, ...] with the axes that they are summed over.

    Returns:
      [B, T, ...] for each name, with the axes that it gives.
    """
    key = "+".join(names)
    if isinstance(weights.get(key), cpu_kernels.Packed):
        axes = len(PROJECTION_AXES[names[0]][0])
        products = weights[key].multiply(x, axes)
    else:
        products = [_product(config, name, weights[name], x) for name in names]
    return [
        _completed(weights, name, x, product) for name, product in zip(names, products, strict=True)
    ]


def _product(config: ModelConfig, name: str, weight: Array, x: Array) -> Array:
    inputs, outputs = PROJECTION_AXES[name]
    if config.products:
        return project(x, weight, (inputs, outputs), config.products)
    if outputs == "F":
        return _widened(x, weight.astype(x.dtype))
    letters = f"BT{inputs},{inputs}{outputs}->BT{outputs}"
    return contract(letters, x, weight.astype(x.dtype))


def _completed(weights: Params, name: str, x: Array, y: Array) -> Array:
    """What a projection adds to the product of x with its matrix."""
    inputs, outputs = PROJECTION_AXES[name]
    y = _scaled(y, weights.get(f"{name}_scale"))
    # R: rank; never merged here, so that the weights can be shared with models without the addition
    if f"{name}_lora_a" in weights:
        x_btr = contract(f"BT{inputs},{inputs}R->BTR", x, weights[f"{name}_lora_a"].astype(x.dtype))
        y = y + contract(
            f"BTR,R{outputs}->BT{outputs}", x_btr, weights[f"{name}_lora_b"].astype(x.dtype)
        )
    bias = weights.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(x.dtype)[None, None]


def _scaled(y: Array, scale: Array | None) -> Array:
    """What a matrix in 8 bits gave, by its scales along the last axes."""
    if scale is None:
        return y
    return (y * jnp.expand_dims(scale, range(y.ndim - scale.ndim))).astype(y.dtype)


@jax.custom_vjp
def _widened(x_btd: Array, weight_df: Array) -> Array:
    return contract("BTD,DF->BTF", x_btd, weight_df)


def _widened_forward(x_btd: Array, weight_df: Array) -> tuple[Array, tuple[Array, Array]]:
    return _widened(x_btd, weight_df), (x_btd, weight_df)


def _widened_backward(kept: tuple[Array, Array], grad_btf: Array) -> tuple[Array, Array]:
    """What automatic differentiation gives, but with the narrow factor of the weights' gradient
    first. XLA on CPU transposes the first one, and computes the activation's gradient again for
    every element of a wide one: together a fifth of an update.
    """
    x_btd, weight_df = kept
    return (
        contract("BTF,DF->BTD", grad_btf, weight_df),
        contract("BTD,BTF->DF", x_btd, grad_btf),
    )


_widened.defvjp(_widened_forward, _widened_backward)


def _qkv(
    config: ModelConfig, weights: Params, x_btd: Array, cos_sin: tuple[Array, ...] | None
) -> tuple[Array, Array, Array]:
    """Queries and keys, rotated unless left to others, and values, of one layer."""
    x_btd = _rms_norm(config, weights["attn_norm"], x_btd)
    q_btnh, k_btkh, v_btkh = _project(config, weights, ("q", "k", "v"), x_btd)
    if config.qk_norm:
        q_btnh, k_btkh = (
            _rms_norm(config, weights["q_norm"], q_btnh),
            _rms_norm(config, weights["k_norm"], k_btkh),
        )
    if cos_sin is None:
        return q_btnh, k_btkh, v_btkh
    return rotate(q_btnh, cos_sin), rotate(k_btkh, cos_sin), v_btkh


def _residual(config: ModelConfig, weights: Params, x_btd: Array, mixed_btnh: Array) -> Array:
    """The residual stream after one layer's attention output and feed-forward network."""
    (added_btd,) = _project(config, weights, ("o",), mixed_btnh)
    if config.sandwich_norms:
        added_btd = _rms_norm(config, weights["post_attn_norm"], added_btd)
    x_btd = x_btd + added_btd
    y_btd = _rms_norm(config, weights["mlp_norm"], x_btd)
    gate_btf, up_btf = _project(config, weights, ("gate", "up"), y_btd)
    gate_btf = _ACTIVATIONS[config.activation](gate_btf)
    (added_btd,) = _project(config, weights, ("down",), gate_btf * up_btf)
    if config.sandwich_norms:
        added_btd = _rms_norm(config, weights["post_mlp_norm"], added_btd)
    return x_btd + added_btd
