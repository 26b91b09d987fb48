"""The decoder: shapes, masks, and prefill plus decode against one full forward pass."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from ictjax import mesh
from ictjax.models import transformer
from ictjax.models.attention import Seen, plain_rows
from ictjax.models.cache import copy_row, make_cache, put_positions, take_rows
from ictjax.models.config import ModelConfig

TINY = ModelConfig(
    vocab_size=61,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
)
QWEN_7B = ModelConfig(
    vocab_size=152_064,
    num_layers=28,
    d_model=3584,
    d_ff=18_944,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    dtype="bfloat16",
    param_dtype="bfloat16",
)


@pytest.fixture(scope="module")
def params():
    # Weights of this size make attention depend visibly on every key; the initial ones are nearly
    # uniform.
    return jax.tree.map(
        lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf,
        transformer.init_params(TINY, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 9), 0, TINY.vocab_size)


@pytest.fixture(scope="module")
def forward():
    return jax.jit(transformer.forward, static_argnums=0, static_argnames="remat")


def test_forward_is_causal_and_ignores_padding(params, tokens, forward):
    whole = forward(TINY, params, tokens)
    changed = forward(TINY, params, tokens.at[:, 5].add(1) % TINY.vocab_size)
    chex.assert_trees_all_close(changed[:, :5], whole[:, :5], atol=1e-6)
    # every later token sees the change
    assert float(jnp.abs(changed[:, 5:] - whole[:, 5:]).max(axis=-1).min()) > 1e-3
    # The same tokens after three positions of padding on the left.
    padded = jnp.pad(tokens, ((0, 0), (3, 0)))
    valid = jnp.arange(12)[None] >= 3
    positions = jnp.maximum(jnp.arange(12)[None] - 3, 0)
    shifted = forward(
        TINY,
        params,
        padded,
        seen=plain_rows(jnp.tile(valid, (2, 1)), jnp.tile(positions, (2, 1))),
    )
    chex.assert_trees_all_close(shifted[:, 3:], whole, atol=1e-5)
    assert bool(jnp.isfinite(shifted).all())


def test_sequences_in_one_row_do_not_see_each_other(params, tokens, forward):
    row = jnp.concatenate([tokens[0], tokens[1]])[None]
    context = jnp.repeat(jnp.arange(2), 9)[None]
    positions = jnp.tile(jnp.arange(9), 2)[None]
    packed = forward(TINY, params, row, seen=Seen(positions, context, jnp.zeros_like(context)))
    chex.assert_trees_all_close(
        packed[0].reshape(2, 9, -1), forward(TINY, params, tokens), atol=1e-5
    )


def test_prefill_and_decode_equal_one_forward(params, tokens, forward):
    """In pieces of 4, 1 and 4 tokens, rows 3 and 1 of a cache, through a shorter copy of the rows
    for the second half.
    """
    extend = jax.jit(transformer.extend, static_argnums=0)
    rows = jnp.array([3, 1])
    cache = make_cache(TINY, 5, 16)
    part = take_rows(cache, rows, 12)
    first, part = extend(TINY, params, part, tokens[:, :4], jnp.array([0, 0]), jnp.array([4, 4]))
    second, part = extend(TINY, params, part, tokens[:, 4:5], jnp.array([4, 4]), jnp.array([1, 1]))
    cache = put_positions(cache, part, rows, jnp.array([0, 0]), jnp.array([5, 5]), 6)
    part = take_rows(cache, rows, 12)
    padded = jnp.pad(tokens[:, 5:], ((0, 0), (0, 3)))
    third, part = extend(TINY, params, part, padded, jnp.array([5, 5]), jnp.array([4, 4]))
    chex.assert_trees_all_close(
        jnp.concatenate([first, second, third[:, :4]], axis=1),
        forward(TINY, params, tokens),
        atol=1e-5,
    )
    assert not np.asarray(part.v[0])[:, :, 9:].any()  # padding writes nothing
    untouched = [0, 2, 4]
    assert not any(np.asarray(array)[untouched].any() for array in (*cache.k, *cache.v))
    copied = copy_row(cache, jnp.int32(3), jnp.int32(0))
    chex.assert_trees_all_equal(
        take_rows(copied, jnp.array([0]), 16), take_rows(cache, jnp.array([3]), 16)
    )


REMAT = ("none", "projections", "attention", "full")


def test_remat_changes_no_gradient(params, tokens, forward):
    def loss(params, remat):
        return transformer.unembed(TINY, params, forward(TINY, params, tokens, remat=remat)).var()

    grad = jax.grad(loss)
    for remat in REMAT[1:]:
        chex.assert_trees_all_close(grad(params, remat), grad(params, "none"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [64, 256])  # plain attention, and in blocks
def test_every_remat_keeps_less_and_computes_more_than_the_one_before(params, length):
    tokens = jnp.zeros((4, length), jnp.int32)

    def kept(remat):
        """What the backward pass is given, beside the weights."""
        backward = jax.eval_shape(
            lambda params: jax.vjp(
                lambda params: transformer.forward(TINY, params, tokens, remat=remat), params
            )[1],
            params,
        )
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward))

    def flops(remat):
        def loss(params):
            return transformer.forward(TINY, params, tokens, remat=remat).var()

        return jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"]

    sizes, costs = [kept(remat) for remat in REMAT], [flops(remat) for remat in REMAT]
    assert sizes == sorted(set(sizes), reverse=True), sizes
    assert costs == sorted(set(costs)), costs


def test_module_splits_into_the_same_tree(tokens):
    config = dataclasses.replace(TINY, tie_embeddings=True)
    module = transformer.Transformer(config, rngs=nnx.Rngs(jax.random.key(0)))
    params = transformer.init_params(config, jax.random.key(0))
    chex.assert_trees_all_equal(transformer.params_of(module), params)
    assert "head" not in params
    chex.assert_trees_all_equal_shapes_and_dtypes(params, transformer.abstract_params(config))
    expected = transformer.unembed(config, params, transformer.forward(config, params, tokens))
    chex.assert_trees_all_close(module(tokens), expected, atol=1e-6)
    assert module(tokens).shape == (2, 9, 61)


def test_bfloat16_model_has_float32_logits(tokens):
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    params = transformer.init_params(config, jax.random.key(0))
    hidden = transformer.forward(config, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert transformer.unembed(config, params, hidden).dtype == jnp.float32


@pytest.mark.parametrize(
    "config", [TINY, dataclasses.replace(TINY, qkv_bias=False, tie_embeddings=True), QWEN_7B]
)
def test_shapes_without_allocation(config):
    shapes = transformer.abstract_params(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == config.num_params
    axes = transformer.param_axes(config)
    one = mesh.make_mesh(jax.device_count(), 1, 1)
    specs = mesh.param_specs(axes, shapes, one)
    assert jax.tree.structure(
        specs, is_leaf=lambda node: isinstance(node, PartitionSpec)
    ) == jax.tree.structure(shapes)
    assert specs["layers"]["gate"] == PartitionSpec(None, "fsdp", "tensor")


def test_7b_traces_forward_and_backward_on_shapes_alone():
    assert QWEN_7B.num_params == 7_615_616_512

    def loss(params, tokens):
        hidden = transformer.forward(QWEN_7B, params, tokens, remat="full")
        return transformer.unembed(QWEN_7B, params, hidden[:, -1:]).sum()

    shapes = transformer.abstract_params(QWEN_7B)
    gradients = jax.eval_shape(jax.grad(loss), shapes, jax.ShapeDtypeStruct((4, 2048), jnp.int32))
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, shapes)


def test_mesh_rules():
    shapes = {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}
    abstract = jax.sharding.AbstractMesh((1, 2, 4), mesh.AXES)
    assert mesh.param_specs({"w": ("embed", "heads")}, shapes, abstract) == {
        "w": PartitionSpec("fsdp", "tensor")
    }
    # 4 does not divide 6
    assert mesh.param_specs({"w": ("heads", "embed")}, shapes, abstract) == {
        "w": PartitionSpec(None, "fsdp")
    }
    with pytest.raises(ValueError, match="'color' has no rule"):
        mesh.param_specs({"w": ("color", "embed")}, shapes, abstract)
    with pytest.raises(ValueError, match="one axis per dimension"):
        mesh.param_specs({"w": ("embed",)}, shapes, abstract)
    with pytest.raises(ValueError, match="does not use all"):
        mesh.make_mesh(jax.device_count(), 2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
