"""Attention by TPU kernels, interpreted on CPU, against the reference in float64: values and
gradients, also on a mesh and in every family's decoder.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ictjax.mesh import make_mesh
from ictjax.models import transformer
from ictjax.models.attention import EVERYTHING, PLAIN, Seen, attend, may_see, plain_rows
from ictjax.models.attention_choice import resolve
from ictjax.models.config import ModelConfig
from ictjax.models.tpu_attention import tpu_attention

BLOCK = 128
SCALE = 0.3
INTERPRETED = tpu_attention(block=BLOCK, interpret=True)


def tree(rows, prompt, replies, contexts=1, padding=0):
    """Rows of contexts with one prompt and several replies each."""
    parts = [
        (position, context, branch)
        for context in range(contexts)
        for branch, size in enumerate((prompt, *replies))
        for position in range(prompt * (branch > 0), prompt * (branch > 0) + size)
    ]
    fields = zip(*parts, *[(0, -1, 0)] * padding, strict=True)
    return Seen(*(jnp.tile(jnp.array(field, jnp.int32), (rows, 1)) for field in fields))


def ragged(length, shifts):
    """Plain rows with padding on the left."""
    place_bt = jnp.arange(length)[None] - jnp.array(shifts)[:, None]
    return plain_rows(place_bt >= 0, jnp.maximum(place_bt, 0))


CASES = {
    # layout, window, N, K, H
    "causal": (ragged(300, [0, 0]), EVERYTHING, 2, 2, 64),
    "padding on the left, more than a block": (ragged(300, [0, 150]), EVERYTHING, 2, 1, 64),
    "a prompt and its replies, heads of 128": (
        tree(1, 200, (90, 0, 170, 30)),
        EVERYTHING,
        4,
        2,
        128,
    ),
    "several contexts and padding": (tree(2, 70, (50, 20), 3, 140), EVERYTHING, 3, 1, 16),
    "all of it, within a window": (tree(2, 70, (50, 20), 3, 140), 60, 4, 2, 24),
}


def arrays(seen, heads, kv_heads, width):
    rng = np.random.default_rng(0)
    rows, length = seen.positions_bt.shape
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.normal(size=shape) for shape in shapes]


def values_and_gradients(attention, q, k, v, weight, real):
    """What padding yields must not matter, so neither may its gradient."""

    def total(q, k, v):
        mixed = jnp.where(real[:, :, None, None], attention(q, k, v), 0.0)
        return (mixed * weight.astype(mixed.dtype)).sum(), mixed

    (_, mixed), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return jax.device_get((mixed, *grads))


def exact(seen, window, q, k, v, weight):
    def reference(q, k, v):
        mask = may_see(seen, seen, window)
        return attend(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, SCALE)

    with jax.enable_x64(True):
        return values_and_gradients(reference, q, k, v, weight, seen.context_bt >= 0)


def found(attention, seen, window, q, k, v, weight, dtype=jnp.float32):
    def rows(q, k, v):
        return attention.rows(q, k, v, attention.plan(seen, window), SCALE)

    return values_and_gradients(
        rows, *(jnp.asarray(x, dtype) for x in (q, k, v)), weight, seen.context_bt >= 0
    )


def assert_close(mine, theirs, tolerance):
    """Relative to the largest value of each array."""
    for name, x, y in zip(("mixed", "dq", "dk", "dv"), mine, theirs, strict=True):
        assert np.isfinite(np.asarray(x, np.float64)).all(), name
        worst = np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()
        assert worst < tolerance, (name, worst)


@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_reference_and_its_gradients(case):
    seen, window, *sizes = CASES[case]
    inputs = arrays(seen, *sizes)
    assert_close(
        found(INTERPRETED, seen, window, *inputs), exact(seen, window, *inputs), tolerance=1e-5
    )


def test_bfloat16_accumulates_in_float32():
    seen = tree(1, 200, (90, 70))
    q, k, v, weight = (jnp.asarray(x, jnp.bfloat16) for x in arrays(seen, 4, 2, 64))
    mine = found(INTERPRETED, seen, EVERYTHING, q, k, v, weight, jnp.bfloat16)
    assert mine[0].dtype == jnp.bfloat16
    theirs = exact(
        seen,
        EVERYTHING,
        *(np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, weight)),
    )
    assert_close(mine, theirs, tolerance=2e-2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "sizes"),
    [(4, 2, (2, 2, 2)), (4, 2, (1, 2, 4)), (3, 1, (4, 1, 2))],
    ids=["kv heads split", "kv heads repeated", "kv heads whole"],
)
def test_rows_and_heads_are_split_over_a_mesh(heads, kv_heads, sizes):
    mesh = make_mesh(*sizes)
    seen, window = tree(4, 100, (40, 30), padding=10), 150
    inputs = arrays(seen, heads, kv_heads, 16)
    attention = tpu_attention(mesh, block=BLOCK, interpret=True)
    assert_close(
        found(attention, seen, window, *inputs), exact(seen, window, *inputs), tolerance=1e-5
    )


def test_padding_yields_zeros_and_pairs_with_nothing_to_see_are_not_visited():
    seen = tree(1, 128, (128, 128), padding=128)
    plan = INTERPRETED.plan(seen, EVERYTHING)
    for pairs_bp, expected in (
        (plan.by_query_bp, [(0, 0), (1, 0), (1, 1), (2, 0), (2, 2), (3, 3)]),
        (plan.by_key_bp, [(0, 0), (0, 1), (0, 2), (1, 1), (2, 2), (3, 3)]),
    ):
        pairs = np.asarray(pairs_bp)[0]
        assert [(pair >> 18, (pair >> 4) & 0x3FFF) for pair in pairs[:6]] == expected
        assert (pairs[:5] & 3 > 0).all()
        assert not (pairs[5:] & 3).any()  # of padding, and what is left of the grid
        assert len(set(pairs[6:] >> 4)) == 1  # of which nothing is fetched
    # What the prompt lets every reply see is seen whole.
    assert [int(pair) & 3 for pair in np.asarray(plan.by_query_bp)[0][:5]] == [1, 2, 1, 2, 1]
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays(seen, 2, 1, 16))
    assert not np.asarray(INTERPRETED.rows(q, k, v, plan, SCALE))[:, 384:].any()


FAMILY = ModelConfig(
    vocab_size=61,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=512,
)
FAMILIES = {
    "qwen2": dataclasses.replace(FAMILY, sliding_window=100, sliding_layers=(False, True)),
    "qwen3": dataclasses.replace(FAMILY, family="qwen3", qkv_bias=False, qk_norm=True),
    "llama": dataclasses.replace(FAMILY, family="llama", qkv_bias=False, num_kv_heads=4),
    "gemma3_text": dataclasses.replace(
        FAMILY,
        family="gemma3_text",
        qkv_bias=False,
        qk_norm=True,
        norm_offset=True,
        sandwich_norms=True,
        activation="gelu_tanh",
        scale_embeddings=True,
        tie_embeddings=True,
        attention_scale=24**-0.5,
        local_rope_theta=1e4,
        sliding_window=100,
        sliding_layers=(True, False),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_hidden_states_and_gradients_of_the_reference(family):
    config = FAMILIES[family]
    rng = np.random.default_rng(0)  # compiles nothing
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32),
        transformer.abstract_params(config),
    )
    seen = tree(1, 120, (50, 60), padding=10)
    tokens = rng.integers(0, config.vocab_size, seen.positions_bt.shape)
    weight = rng.normal(size=(*tokens.shape, config.d_model)).astype(np.float32)
    real = (seen.context_bt >= 0)[:, :, None]

    def total(params, attention):
        hidden = transformer.forward(config, params, tokens, seen=seen, attention=attention)
        return (jnp.where(real, hidden, 0.0) * weight).mean()

    value_and_grad = jax.jit(jax.value_and_grad(total), static_argnums=1)
    mine, theirs = (value_and_grad(params, attention) for attention in (INTERPRETED, PLAIN))
    chex.assert_trees_all_close(mine, theirs, rtol=1e-3, atol=2e-6)


def test_the_platform_decides_unless_told():
    assert [resolve("auto", FAMILY, platform) for platform in ("cpu", "gpu", "tpu")] == [
        "blocks",
        "blocks",
        "pallas_tpu",
    ]
    exact = dataclasses.replace(FAMILY, dtype="float64")
    assert resolve("auto", exact, "tpu") == "blocks"
    assert resolve("plain", FAMILY, "tpu") == "plain"
    with pytest.raises(ValueError, match="runs on cpu: take auto or blocks"):
        resolve("pallas_tpu", FAMILY, "cpu")
    with pytest.raises(ValueError, match="the model is float64: take auto or blocks"):
        resolve("pallas_tpu", exact, "tpu")
