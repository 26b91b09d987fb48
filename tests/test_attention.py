"""Attention in blocks against the reference, in float64: values, gradients, and what is skipped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench_products import products
from ictjax.models.attention import (
    EVERYTHING,
    WHOLE,
    Seen,
    attend,
    attend_in_parts,
    attend_rows,
    may_see,
    plain_rows,
    plan,
)
from ictjax.models.int8 import Scales, to_int8

BLOCK = 16
ROWS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def tree(prompt, replies, contexts=1, padding=0):
    """Rows of contexts with one prompt and several replies each."""
    positions, numbers, branches = [], [], []
    for context in range(contexts):
        for branch, size in enumerate((prompt, *replies)):
            first = 0 if branch == 0 else prompt
            positions += range(first, first + size)
            numbers += [context] * size
            branches += [branch] * size
    fields = (positions + [0] * padding, numbers + [-1] * padding, branches + [0] * padding)
    return Seen(*(jnp.tile(jnp.array(field, jnp.int32), (ROWS, 1)) for field in fields))


def ragged(length):
    """Plain rows, one shorter than the other, with padding on the left."""
    valid = jnp.arange(length)[None] >= jnp.array([[0], [7]])
    return plain_rows(valid, jnp.maximum(jnp.arange(length)[None] - jnp.array([[0], [7]]), 0))


LAYOUTS = {
    "one block": ragged(13),
    "whole blocks": ragged(48),
    "ends within a block": ragged(41),
    "a prompt and its replies": tree(20, (9, 0, 17, 3)),
    "several contexts and padding": tree(10, (5, 12), contexts=3, padding=21),
}


def arrays(length):
    rng = np.random.default_rng(0)
    shapes = [(ROWS, length, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def reference(q, k, v, seen, window):
    mask = may_see(seen, seen, window)
    return attend(q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, 0.3)


@pytest.mark.parametrize("window", [EVERYTHING, 11])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_give_the_reference_and_its_gradients(layout, window):
    seen = LAYOUTS[layout]
    q, k, v, weight = arrays(seen.positions_bt.shape[1])
    real = (seen.context_bt >= 0)[:, :, None, None]

    def loss(attention):
        # What padding yields must not matter, so neither may its gradient.
        def total(q, k, v):
            mixed = jnp.where(real, attention(q, k, v), 0.0)
            return (mixed * weight).sum(), mixed

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, expected), expected_grads = loss(lambda q, k, v: reference(q, k, v, seen, window))
    (_, found), grads = loss(lambda q, k, v: attend_rows(q, k, v, plan(seen, window, BLOCK), 0.3))
    chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-13)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-10, atol=1e-12)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_bfloat16_accumulates_in_float32():
    seen = LAYOUTS["whole blocks"]
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in arrays(48))
    found = attend_rows(q, k, v, plan(seen, EVERYTHING, BLOCK), 0.3)
    exact = reference(*(x.astype(jnp.float64) for x in (q, k, v)), seen, EVERYTHING)
    assert found.dtype == jnp.bfloat16
    real = np.asarray(seen.context_bt >= 0)
    np.testing.assert_allclose(
        np.asarray(found, np.float64)[real], np.asarray(exact)[real], rtol=2e-2, atol=1e-2
    )


def test_only_blocks_with_something_to_see_are_needed():
    needed = plan(tree(32, (16, 16, 16)), EVERYTHING, BLOCK).needed_xy
    np.testing.assert_array_equal(
        needed,
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 0, 1, 0],
            [1, 1, 0, 0, 1],
        ],
    )
    near = plan(ragged(64), 8, BLOCK).needed_xy
    np.testing.assert_array_equal(near, np.tri(4) - np.tri(4, k=-2))
    assert not plan(tree(16, (16,), padding=16), EVERYTHING, BLOCK).needed_xy[2].any()


@pytest.mark.usefixtures("optimised")
def test_nothing_of_the_size_of_all_pairs_is_built():
    length = 37 * BLOCK
    seen = plain_rows(jnp.ones((ROWS, length), bool))
    q, k, v, _ = arrays(length)

    def loss(q, k, v):
        return attend_rows(q, k, v, plan(seen, EVERYTHING, BLOCK), 0.3).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile()
    pairs = ROWS * HEADS * length * length * q.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < pairs / 4


def over_a_cache(batch, length, positions):
    """Queries, cached keys and values, and what each token sees: its row up to itself."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(batch, length, HEADS, WIDTH)))
    k, v = (jnp.asarray(rng.normal(size=(batch, KV_HEADS, positions, WIDTH))) for _ in range(2))
    ends = rng.integers(0, positions - length, (batch, 1, 1)) + np.arange(length)[None, :, None]
    return q, k, v, jnp.arange(positions)[None, None] <= ends


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 5, 10, 25, 60, 70])  # of a part, at most
@pytest.mark.parametrize("batch", [6, 7])
def test_parts_give_the_whole(batch, tokens, kind):
    length, positions = 10, 24
    q, k, v, mask = over_a_cache(batch, length, positions)
    scales = None
    if kind == "int8":
        (k, k_scale), (v, v_scale) = to_int8(k, (3,)), to_int8(v, (3,))
        scales = Scales(k_scale, v_scale)
    given = q, k.swapaxes(2, 3), v, mask, 0.3, scales
    part_bytes = tokens * HEADS * positions * q.dtype.itemsize
    np.testing.assert_allclose(attend_in_parts(*given, part_bytes), attend(*given), rtol=1e-12)


@pytest.mark.parametrize("tokens", [1, 5, 25])
def test_parts_multiply_what_the_whole_does(tokens):
    q, k, v, mask = over_a_cache(6, 10, 24)
    given = q, k.swapaxes(2, 3), v, mask

    def multiplied(part_bytes):
        program = jax.make_jaxpr(lambda *given: attend_in_parts(*given, 0.3, None, part_bytes))
        return sum(products(program(*given).jaxpr))

    part_bytes = tokens * HEADS * 24 * q.dtype.itemsize
    assert multiplied(part_bytes) == multiplied(WHOLE) == 2 * 2 * q.size * 24


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(("batch", "length"), [(16, 32), (1, 512)])
def test_only_the_logits_of_a_part_exist_at_a_time(batch, length):
    positions = 640
    q, k, v, mask = over_a_cache(batch, length, positions)
    logits = q.size // WIDTH * positions * q.dtype.itemsize

    def held(part_bytes):
        program = jax.jit(lambda *given: attend_in_parts(*given, 0.3, None, part_bytes))
        compiled = program.lower(q, k.swapaxes(2, 3), v, mask).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(WHOLE) > logits > 2 * held(logits // 16)  # it copies keys and values too
