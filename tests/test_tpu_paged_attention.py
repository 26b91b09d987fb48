"""Writing to pages and attending over them by the kernels for TPU, interpreted on CPU, against the
plain way.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ictjax.config import SamplerConfig
from ictjax.mesh import make_mesh
from ictjax.models.attention_choice import resolve_paged
from ictjax.models.config import ModelConfig
from ictjax.models.int8 import Scales, to_int8
from ictjax.models.paged_attention import PAGES
from ictjax.models.tpu_paged_attention import tpu_paged_attention

QUICKLY = {"xla_backend_optimization_level": 0}  # compiling is what takes the time
SIZE = 16
MODEL = ModelConfig(
    vocab_size=7, num_layers=1, d_model=8, d_ff=8, num_heads=1, num_kv_heads=1, head_dim=8
)
SIZES = SamplerConfig(
    num_slots=1,
    max_len=256,
    extend_buckets=(2,),
    row_buckets=(1,),
    decode_steps=1,
    max_top_k=1,
    page_size=128,
)


def inputs(length, heads, kv_heads, width, dtype=np.float32):
    """Queries, keys and values of new positions, and the pool; rows in pages without order, some of
    them longer than others, one that ends with its page, and one that takes no part.
    """
    rng = np.random.default_rng(0)
    starts = np.array([0, 3 * SIZE + 2, 5, 3 * SIZE - 1], np.int32)
    lengths = np.array([min(length, SIZE), length, 0, 1], np.int32)
    table = rng.permutation(48).reshape(4, 12).astype(np.int32)
    table[:, 8:] = 2**20  # behind the last position: none of the pool
    shapes = [
        (4, length, heads, width),
        *[(4, length, kv_heads, width)] * 2,
        (48, kv_heads, width, SIZE),
        (48, kv_heads, SIZE, width),
    ]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(table), starts, lengths


def extended(attention, window):
    """Mixed values, and the pool."""

    def run(q, new_k, new_v, k, v, table, starts, lengths):
        rows = table, starts, lengths
        k, v = attention.write(k, v, new_k, new_v, *rows)
        return attention.attend(q, k, v, *rows, window=window, scale=0.3), k, v

    return run


def extended_in_8_bits(attention, window):
    """The same of keys and values that are held in 8 bits, with their scales."""

    def run(q, new_k, new_v, k, v, table, starts, lengths):
        rows = table, starts, lengths
        (new_k, new_k_scale), (new_v, new_v_scale) = (to_int8(x, (3,)) for x in (new_k, new_v))
        (k, k_scale), (v, v_scale) = to_int8(k, (2,)), to_int8(v, (3,))
        k, v = attention.write(k, v, new_k, new_v, *rows)
        held, new = Scales(k_scale, v_scale), Scales(new_k_scale, new_v_scale)
        scales = attention.write_scales(held, new, *rows)
        mixed = attention.attend(q, k, v, *rows, window=window, scale=0.3, scales=scales)
        return mixed, k, v, *scales

    return run


def assert_equal(found, expected, lengths, tolerance):
    mixed, *pool = found
    plain, *plain_pool = expected
    assert mixed.dtype == plain.dtype
    real = np.arange(mixed.shape[1])[None] < lengths[:, None]
    difference = np.asarray(mixed, np.float32) - np.asarray(plain, np.float32)
    assert np.abs(difference[real]).max() <= tolerance
    assert not np.asarray(mixed, np.float32)[lengths == 0].any()
    for mine, theirs in zip(pool, plain_pool, strict=True):
        np.testing.assert_array_equal(mine.astype(np.float32), theirs.astype(np.float32))


@pytest.mark.parametrize(
    ("length", "heads", "window", "dtype", "tolerance", "extended"),
    [
        (1, (14, 2, 16), SIZE + 3, jnp.bfloat16, 1e-2, extended),
        (2 * SIZE + 9, (4, 2, 16), SIZE + 3, jnp.float32, 1e-6, extended),
        (1, (14, 2, 16), SIZE + 3, jnp.bfloat16, 1e-2, extended_in_8_bits),
        (2 * SIZE + 9, (4, 2, 16), SIZE + 3, jnp.float32, 1e-6, extended_in_8_bits),
    ],
    ids=["decode", "blocks of a prefill", "decode in 8 bits", "blocks of a prefill in 8 bits"],
)
def test_kernels_give_the_plain_values_and_leave_the_plain_pool(
    length, heads, window, dtype, tolerance, extended
):
    arrays = inputs(length, *heads, dtype)
    kernels = tpu_paged_attention(at_once=2 * SIZE, queries=64, interpret=True)
    found, expected = (
        jax.jit(extended(way, window), compiler_options=QUICKLY)(*arrays)
        for way in (kernels, PAGES)
    )
    assert_equal(found, expected, arrays[-1], tolerance)


@pytest.mark.parametrize("extended", [extended, extended_in_8_bits])
def test_rows_and_heads_are_split_over_a_mesh(extended):
    """Rows by the caller, as the sampler does, each part with a pool of its own."""
    mesh = make_mesh(2, 2, 2)
    arrays = inputs(1, 4, 2, 8)
    rows = PartitionSpec("data")
    kernels = tpu_paged_attention(mesh, at_once=2 * SIZE, interpret=True)
    split = jax.shard_map(
        extended(kernels, None),
        mesh=mesh,
        in_specs=(rows,) * 8,
        out_specs=rows,
        axis_names={"data"},
        check_vma=False,
    )
    twice = [jnp.concatenate([x, x]) for x in arrays]
    found = jax.jit(split, compiler_options=QUICKLY)(*twice)
    expected = jax.jit(extended(PAGES, None), compiler_options=QUICKLY)(*arrays)
    for half in range(2):
        part = [x[half * len(x) // 2 :][: len(x) // 2] for x in found]
        assert_equal(part, expected, arrays[-1], 1e-6)


# a decode step, one with guessed tokens, and a prefill
@pytest.mark.parametrize(("length", "width"), [(1, 128), (5, 128), (256, 64)])
@pytest.mark.parametrize(("extended", "kernels"), [(extended, 2), (extended_in_8_bits, 3)])
def test_kernels_are_lowered_for_tpu(length, width, extended, kernels):
    rows, pages = (4, length), 64
    shapes = [
        *(jax.ShapeDtypeStruct((*rows, n, width), jnp.bfloat16) for n in (14, 2, 2)),
        jax.ShapeDtypeStruct((pages, 2, width, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((pages, 2, 128, width), jnp.bfloat16),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 16), (4,), (4,))),
    ]
    traced = jax.jit(extended(tpu_paged_attention(), None)).trace(*shapes)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call(") == kernels


def test_the_platform_and_the_pages_decide_unless_told():
    def chosen(platform, attention="auto", dtype="bfloat16", **sizes):
        sizes = dataclasses.replace(SIZES, attention=attention, **sizes)
        return resolve_paged(sizes, dataclasses.replace(MODEL, dtype=dtype), platform)

    assert [chosen(name) for name in ("cpu", "gpu", "tpu")] == ["pages", "pages", "pallas_tpu"]
    assert chosen("tpu", page_size=0) == "slots"
    assert chosen("tpu", page_size=64) == chosen("tpu", dtype="float64") == "pages"
    assert chosen("tpu", "pages") == "pages"
    assert chosen("tpu", cache="int8") == "pallas_tpu"
    with pytest.raises(ValueError, match="pallas_tpu', and it runs on cpu: take auto or pages"):
        chosen("cpu", "pallas_tpu")
    with pytest.raises(ValueError, match="multiple of 128 .* page_size 64: take auto or pages"):
        chosen("tpu", "pallas_tpu", page_size=64)
    with pytest.raises(ValueError, match="attention must be auto without page_size, got 'pages'"):
        chosen("tpu", "pages", page_size=0)
