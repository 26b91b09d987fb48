"""The form in which weights sample: one dict per layer, in the dtype that they compute in, in their
places on the mesh.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered
from jaxtyping import Array

from ictjax import mesh as meshes
from ictjax.config import LoraConfig
from ictjax.models.config import ModelConfig
from ictjax.models.cpu_kernels import pack
from ictjax.models.lora import adapter_axes, init_adapter
from ictjax.models.transformer import (
    PROJECTED,
    PROJECTION_AXES,
    Params,
    abstract_params,
    unstack_layers,
)


def sampling_weights(
    config: ModelConfig, params: Params, mesh: Mesh | None = None, *, consume: bool = False
) -> Params:
    """Brings weights of either form into the one that samples; what has it already is returned
    itself, not copied.

    So the result of one call can be given to any number of samplers and, frozen, to the learner:
      all of them use the same arrays.
    Matrices and biases are converted to `config.dtype` (matrices to `config.products` where that is
    set), which every use of them does anyway: a decode loop would hold the converted weights as a
    second copy. Norms keep their dtype (they are used in float32). The adapter of
    `lora.with_adapter` stays stacked: it is small.

    Args:
      params: stacked or unstacked, NumPy or JAX arrays.
      mesh: where to; None for the default device, or wherever JAX arrays are.
      consume: delete stacked JAX arrays once their layers are there (until then memory holds both).

    Raises:
      ValueError: the tree is not that of the config.
    """
    check_tree(config, params)
    top, stacked = config.weight_axes
    layer_axes = {name: axes[1:] for name, axes in stacked.items()}
    place = functools.partial(_place, config, mesh)
    result: Params = {name: place(name, axes, params[name]) for name, axes in top.items()}
    layers = params["layers"]
    if isinstance(layers, Mapping):
        stacked_layers = {name: layers[name] for name in sorted(layer_axes)}
        if all(isinstance(leaf, jax.Array) for leaf in stacked_layers.values()):
            layers = _slices(stacked_layers, *_placing(config, stacked_layers, mesh))
            if consume:
                jax.block_until_ready(layers)
                for leaf in stacked_layers.values():
                    leaf.delete()
        else:
            layers = unstack_layers(config, params)["layers"]
    result["layers"] = tuple(
        {name: place(name, axes, weights[name]) for name, axes in layer_axes.items()}
        for weights in layers
    )
    if "lora" in params:
        axes = adapter_axes(LoraConfig(rank=1))
        result["lora"] = {
            name: place(name, axes[name], leaf) for name, leaf in params["lora"].items()
        }
    return result


def packed_weights(config: ModelConfig, params: Params) -> Params:
    """Weights in the form that samples, with their matrices packed for this CPU. All who are given
    the same arrays share what is packed of them.
    """

    def layer(weights: Params) -> Params:
        others = {name: leaf for name, leaf in weights.items() if name not in PROJECTION_AXES}
        return others | {
            "+".join(names): pack(
                [weights[name] for name in names], len(PROJECTION_AXES[names[0]][0])
            )
            for names in PROJECTED
        }

    table = "embed" if config.tie_embeddings else "head"
    unembed = pack([params[table]], 1, transposed=config.tie_embeddings)
    return params | {"layers": tuple(map(layer, params["layers"])), "unembed": unembed}


def sampling_shapes(config: ModelConfig, mesh: Mesh, lora: LoraConfig | None = None) -> Params:
    """What `sampling_weights` makes of weights of `config.param_dtype`, on shapes alone.

    Args:
      lora: with an adapter of this rank above 0 on them.
    """
    shapes = jax.eval_shape(functools.partial(unstack_layers, config), abstract_params(config))
    top, stacked = config.weight_axes
    layer_axes = {name: axes[1:] for name, axes in stacked.items()}

    def placed(name: str, axes: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, _dtype(config, name, leaf), sharding=_sharding(axes, leaf, mesh)
        )

    result: Params = {name: placed(name, axes, shapes[name]) for name, axes in top.items()}
    result["layers"] = tuple(
        {name: placed(name, axes, weights[name]) for name, axes in layer_axes.items()}
        for weights in shapes["layers"]
    )
    if lora is not None and lora.rank:
        adapter = jax.eval_shape(lambda: init_adapter(config, lora, jax.random.key(0)))
        axes = adapter_axes(lora)
        result["lora"] = {name: placed(name, axes[name], leaf) for name, leaf in adapter.items()}
    return result


def unstacked(config: ModelConfig, layers: Params, mesh: Mesh) -> Lowered:
    """The program that brings stacked layers into the form that samples, lowered from shapes."""
    return _slices.lower(layers, *_placing(config, layers, mesh))


def check_tree(config: ModelConfig, params: Params) -> None:
    """Raises ValueError unless the tree is that of the config, in one of its two forms; an adapter
    is not looked at.
    """
    expected = abstract_params(config)
    if not isinstance(params["layers"], Mapping):
        expected = jax.eval_shape(functools.partial(unstack_layers, config), expected)
    expected_shapes = jax.tree.map(lambda leaf: leaf.shape, expected)
    shapes = jax.tree.map(
        lambda leaf: tuple(leaf.shape),
        {name: node for name, node in params.items() if name != "lora"},
    )
    if shapes != expected_shapes:
        raise ValueError(f"the weights have shapes {shapes}, the config asks for {expected_shapes}")


def _place(
    config: ModelConfig, mesh: Mesh | None, name: str, axes: tuple[str, ...], leaf: Any
) -> Array:
    sharding = _sharding(axes, leaf, mesh)
    dtype = _dtype(config, name, leaf)
    if (
        isinstance(leaf, jax.Array)
        and leaf.dtype == dtype
        and (sharding is None or leaf.sharding.is_equivalent_to(sharding, leaf.ndim))
    ):
        return leaf
    return (
        jax.device_put(leaf.astype(dtype), sharding)
        if sharding is None
        else meshes.place(leaf.astype(dtype), sharding)
    )


def _dtype(config: ModelConfig, name: str, leaf: Any) -> jnp.dtype:
    """Norms, and matrices in 8 bits with their scales, are used as they are stored."""
    if name.endswith(("norm", "_scale")) or leaf.dtype == jnp.int8:
        return jnp.dtype(leaf.dtype)
    is_matrix = not name.endswith(("_bias", "_lora_a", "_lora_b"))
    return jnp.dtype(config.products or config.dtype if is_matrix else config.dtype)


def _sharding(axes: tuple[str, ...], leaf: Any, mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else meshes.param_shardings(axes, leaf, mesh)


def _placing(
    config: ModelConfig, layers: Params, mesh: Mesh | None
) -> tuple[tuple[jnp.dtype, ...], tuple[NamedSharding | None, ...]]:
    """The dtype and the place of every kind of weight of one layer, in the order of their names."""
    axes = config.weight_axes[1]
    kinds = {
        name: jax.ShapeDtypeStruct(layers[name].shape[1:], layers[name].dtype)
        for name in sorted(layers)
    }
    return (
        tuple(_dtype(config, name, kind) for name, kind in kinds.items()),
        tuple(_sharding(axes[name][1:], kind, mesh) for name, kind in kinds.items()),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _slices(
    stacked: dict[str, Array],
    dtypes: tuple[jnp.dtype, ...],
    shardings: tuple[NamedSharding | None, ...],
) -> tuple[dict[str, Array], ...]:
    def part(leaf: Array, index: int, dtype: jnp.dtype, sharding: NamedSharding | None) -> Array:
        value = leaf[index].astype(dtype)
        return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)

    kinds = dict(zip(sorted(stacked), zip(dtypes, shardings, strict=True), strict=True))
    num_layers = next(iter(stacked.values())).shape[0]
    return tuple(
        {name: part(leaf, index, *kinds[name]) for name, leaf in stacked.items()}
        for index in range(num_layers)
    )
