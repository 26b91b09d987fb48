"""Attention by kernels for TPU and for GPU, interpreted on CPU, against the reference in float64:
values and gradients, also on a mesh and in every family's decoder.

Programs are compiled without optimisation, and once for all that is seen: compiling them is what
takes the time.
"""

import dataclasses
import functools
import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from experiments.gpu_targets import compiler_is_here
from experiments.machines import machine
from experiments.places import place_of
from ictjax.mesh import make_mesh
from ictjax.models import transformer
from ictjax.models.attention import BLOCKS as BLOCKS_OF_ROWS
from ictjax.models.attention import EVERYTHING, PLAIN, Seen, attend, may_see, plain_rows, plan
from ictjax.models.attention_choice import resolve
from ictjax.models.config import ModelConfig
from ictjax.models.gpu_attention import gpu_attention
from ictjax.models.tpu_attention import tpu_attention

SCALE = 0.3
BLOCKS = {"tpu": 128, "gpu": 16}
QUICKLY = {"xla_backend_optimization_level": 0}


def interpreted(platform, mesh=None):
    if platform == "tpu":
        return tpu_attention(mesh, block=BLOCKS["tpu"], interpret=True)
    return gpu_attention(16, "float32", mesh, block=BLOCKS["gpu"], interpret=True)


def tree(rows, prompt, replies, contexts=1, length=0):
    """Rows of contexts with one prompt and several replies each, and padding behind them."""
    parts = [
        (position, context, branch)
        for context in range(contexts)
        for branch, size in enumerate((prompt, *replies))
        for position in range(prompt * (branch > 0), prompt * (branch > 0) + size)
    ]
    parts += [(0, -1, 0)] * (length - len(parts))
    return Seen(*(np.tile(np.int32(field), (rows, 1)) for field in zip(*parts, strict=True)))


def ragged(length, shifts):
    """Plain rows with padding on the left."""
    place_bt = np.arange(length)[None] - np.array(shifts)[:, None]
    seen = plain_rows(jnp.asarray(place_bt >= 0), jnp.maximum(place_bt, 0))
    return Seen(*(np.asarray(field, np.int32) for field in seen))


def layout(case, unit):
    """What is seen in two rows of 3.25 units, and how far back."""
    length = 13 * unit // 4
    return {
        "causal": (ragged(length, [0, 0]), EVERYTHING),
        "padding on the left, more than a block": (ragged(length, [0, 5 * unit // 4]), EVERYTHING),
        "a prompt and its replies": (
            tree(2, 2 * unit, (unit // 2, 0, unit // 2, unit // 4)),
            EVERYTHING,
        ),
        "several contexts and padding": (
            tree(2, unit // 2, (3 * unit // 8, unit // 8), 2, length),
            EVERYTHING,
        ),
        "all of it, within a window": (
            tree(2, unit, (unit // 2, unit // 4), 1, length),
            3 * unit // 8,
        ),
    }[case]


CASES = (
    "causal",
    "padding on the left, more than a block",
    "a prompt and its replies",
    "several contexts and padding",
    "all of it, within a window",
)


def arrays(seen, heads, kv_heads, width):
    rng = np.random.default_rng(0)
    rows, length = seen.positions_bt.shape
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.normal(size=shape) for shape in shapes]


@functools.cache
def values_and_gradients(attention):
    """Of any rows, compiled once for their shapes. What padding yields must not matter, so neither
    may its gradient.
    """

    def total(q, k, v, weight, seen, window):
        mixed = attention(q, k, v, seen, window)
        real = jnp.where((seen.context_bt >= 0)[:, :, None, None], mixed, 0.0)
        return (real * weight.astype(real.dtype)).sum(), (mixed, real)

    return jax.jit(
        jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICKLY
    )


def reference(q, k, v, seen, window):
    mask = may_see(seen, seen, window)
    return attend(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, SCALE)


@functools.cache
def by_kernels(platform, mesh=None):
    kernels = interpreted(platform, mesh)
    return lambda q, k, v, seen, window: kernels.rows(q, k, v, kernels.plan(seen, window), SCALE)


def assert_kernels_are_exact(attention, seen, window, inputs, dtype, tolerance):
    """Relative to the largest value of each array."""
    inputs = [np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for x in inputs]
    (_, (mixed, real)), grads = values_and_gradients(attention)(
        *(jnp.asarray(x, dtype) for x in inputs), seen, window
    )
    assert mixed.dtype == dtype
    assert not np.asarray(mixed)[seen.context_bt < 0].any()
    with jax.enable_x64(True):
        (_, (_, expected)), expected_grads = values_and_gradients(reference)(
            *(x.astype(np.float64) for x in inputs), seen, window
        )
    names = ("mixed", "dq", "dk", "dv")
    for name, x, y in zip(names, (real, *grads), (expected, *expected_grads), strict=True):
        assert np.isfinite(np.asarray(x, np.float64)).all(), name
        worst = np.abs(np.asarray(x, np.float64) - np.asarray(y)).max() / np.abs(y).max()
        assert worst < tolerance, (name, worst)


@pytest.mark.parametrize("platform", BLOCKS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_reference_and_its_gradients(case, platform):
    seen, window = layout(case, BLOCKS[platform])
    inputs = arrays(seen, 4, 2, 16)
    assert_kernels_are_exact(by_kernels(platform), seen, window, inputs, jnp.float32, 1e-5)


@pytest.mark.parametrize("platform", BLOCKS)
def test_bfloat16_accumulates_in_float32(platform):
    seen, window = layout("a prompt and its replies", BLOCKS[platform])
    inputs = arrays(seen, 4, 2, 64)
    assert_kernels_are_exact(by_kernels(platform), seen, window, inputs, jnp.bfloat16, 2e-2)


@pytest.mark.parametrize(
    ("platform", "heads", "sizes"),
    [
        ("tpu", (4, 2, 128), (2, 2, 2)),
        ("gpu", (4, 2, 16), (2, 2, 2)),
        ("gpu", (4, 2, 16), (1, 2, 4)),
        ("gpu", (3, 1, 24), (4, 1, 2)),
    ],
    ids=[
        "tpu: kv heads split, 128 wide",
        "kv heads split",
        "kv heads repeated",
        "kv heads whole, not a power of 2 wide",
    ],
)
def test_rows_and_heads_are_split_over_a_mesh(platform, heads, sizes):
    unit = BLOCKS[platform]
    seen, window = tree(4, unit, (unit // 4, unit // 4), length=2 * unit), unit
    inputs = arrays(seen, *heads)
    attention = by_kernels(platform, make_mesh(*sizes))
    assert_kernels_are_exact(attention, seen, window, inputs, jnp.float32, 1e-5)


def planned(platform, seen):
    plan = interpreted(platform).plan
    return jax.device_get(jax.jit(plan, compiler_options=QUICKLY)(seen, EVERYTHING))


def test_kernels_for_gpu_walk_over_what_is_seen_whole_and_then_over_the_rest():
    plan = planned("gpu", tree(1, 16, (16, 16), length=64))
    for visits, whole, visited in (
        # nothing sees padding, or another reply; the prompt is seen whole
        (plan.by_query, [0, 1, 1, 0], [[0], [0, 1], [0, 2], []]),
        (plan.by_key, [2, 0, 0, 0], [[1, 2, 0], [1], [2], []]),
    ):
        assert visits.whole_bx[0].tolist() == whole
        for inner, some, expected in zip(
            visits.inner_bxy[0], visits.some_bx[0], visited, strict=True
        ):
            assert inner[:some].tolist() == expected


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("head_dim", [96, 256])
def test_kernels_for_gpu_are_lowered_by_triton(head_dim):
    kernels = gpu_attention(head_dim, "bfloat16")
    seen = ragged(256, [0, 5])

    def total(q, k, v):
        return kernels.rows(q, k, v, kernels.plan(seen, EVERYTHING), SCALE).sum()

    q, k = (jax.ShapeDtypeStruct((2, 256, n, head_dim), jnp.bfloat16) for n in (4, 2))
    device = jax.sharding.AbstractDevice("NVIDIA L4", None, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, k)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.skipif(
    not compiler_is_here(),
    reason="the compiler for GPUs is not installed (the extra `plan-gpu`)",
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (256, "float32")],
)
def test_kernels_for_gpu_fit_the_smallest_of_them(head_dim, dtype):
    mesh = make_mesh(1, 1, 1, devices=place_of(machine("l4")).devices)
    kernels = gpu_attention(head_dim, dtype, mesh)
    seen = ragged(256, [0, 5])

    def total(q, k, v):
        return kernels.rows(q, k, v, kernels.plan(seen, EVERYTHING), SCALE).sum()

    everywhere = NamedSharding(mesh, PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((2, 256, n, head_dim), dtype, sharding=everywhere) for n in (4, 2))
    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, k).compile().as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3


def test_pairs_with_nothing_to_see_are_not_visited_on_tpu():
    plan = planned("tpu", tree(1, 128, (128, 128), length=512))
    for pairs_bp, expected in (
        (plan.by_query, [(0, 0), (1, 0), (1, 1), (2, 0), (2, 2), (3, 3)]),
        (plan.by_key, [(0, 0), (0, 1), (0, 2), (1, 1), (2, 2), (3, 3)]),
    ):
        pairs = pairs_bp[0]
        assert [(pair >> 18, (pair >> 4) & 0x3FFF) for pair in pairs[:6]] == expected
        assert (pairs[:5] & 3 > 0).all()
        assert not (pairs[5:] & 3).any()  # of padding, and what is left of the grid
        assert len(set(pairs[6:] >> 4)) == 1  # of which nothing is fetched
    # What the prompt lets every reply see is seen whole.
    assert [int(pair) & 3 for pair in plan.by_query[0][:5]] == [1, 2, 1, 2, 1]


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
    "qwen2": dataclasses.replace(FAMILY, sliding_window=11, sliding_layers=(False, True)),
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
        sliding_window=11,
        sliding_layers=(True, False),
    ),
}


def decoders_by(attention, family, transformed, dtype="float32"):
    """What a function of a decoder's loss yields with this attention, and with the reference."""
    config = dataclasses.replace(FAMILIES[family], dtype=dtype)
    rng = np.random.default_rng(0)  # compiles nothing
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(dtype),
        transformer.abstract_params(config),
    )
    seen = tree(1, 20, (9, 11), length=44)
    tokens = rng.integers(0, config.vocab_size, seen.positions_bt.shape)
    weight = rng.normal(size=(*tokens.shape, config.d_model)).astype(dtype)
    real = (seen.context_bt >= 0)[:, :, None]

    def loss(params, attention):
        hidden = transformer.forward(config, params, tokens, seen=seen, attention=attention)
        masked = jnp.where(real, hidden, 0.0)
        return (masked * weight).mean(), masked

    program = jax.jit(transformed(loss), static_argnums=1, compiler_options=QUICKLY)
    return (program(params, way) for way in (attention, PLAIN))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_hidden_states_of_the_reference(family):
    mine, theirs = decoders_by(interpreted("gpu"), family, lambda loss: loss)
    chex.assert_trees_all_close(mine, theirs, rtol=1e-3, atol=1e-5)


def gradients(loss):
    return jax.grad(loss, has_aux=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_gradients_of_the_reference_in_blocks(family):
    """In float64, of more than one block in a row."""
    blocks = BLOCKS_OF_ROWS._replace(plan=functools.partial(plan, block=16))
    with jax.enable_x64(True):
        (mine, hidden), (theirs, expected) = decoders_by(blocks, family, gradients, "float64")
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs)) > 1e-3
        chex.assert_trees_all_close(mine, theirs, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(hidden, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("platform", BLOCKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_gradients_of_the_reference_by_kernels(family, platform):
    (mine, hidden), (theirs, expected) = decoders_by(interpreted(platform), family, gradients)
    chex.assert_trees_all_close(mine, theirs, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(hidden, expected, rtol=1e-3, atol=1e-5)


def test_the_platform_decides_unless_told(monkeypatch):
    assert [resolve("auto", FAMILY, name) for name in ("cpu", "another gpu", "gpu", "tpu")] == [
        "blocks",
        "blocks",
        "pallas_gpu",
        "pallas_tpu",
    ]
    exact = dataclasses.replace(FAMILY, dtype="float64")
    assert [resolve("auto", exact, name) for name in ("gpu", "tpu")] == ["blocks", "blocks"]
    assert resolve("plain", FAMILY, "tpu") == "plain"
    for name, platform in (("pallas_tpu", "cpu"), ("pallas_gpu", "another gpu")):
        with pytest.raises(ValueError, match=f"{name}.* runs on {platform}: take auto or blocks"):
            resolve(name, FAMILY, platform)
    with pytest.raises(ValueError, match="the model is float64: take auto or blocks"):
        resolve("pallas_tpu", exact, "tpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # a JAX without Triton
    assert [resolve("auto", FAMILY, name) for name in ("gpu", "tpu")] == ["blocks", "pallas_tpu"]
