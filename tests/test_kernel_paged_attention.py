"""Writing to pages and attending over them by the kernels for TPU and for GPU, interpreted on CPU,
against the plain way.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from experiments.gpu_targets import compiler_is_here
from experiments.machines import machine
from experiments.places import place_of
from ictjax.config import SamplerConfig
from ictjax.mesh import make_mesh
from ictjax.models.attention_choice import resolve_paged
from ictjax.models.config import ModelConfig
from ictjax.models.gpu_paged_attention import gpu_paged_attention
from ictjax.models.int8 import Scales, to_int8
from ictjax.models.paged_attention import PAGES
from ictjax.models.tpu_paged_attention import tpu_paged_attention

QUICKLY = {"xla_backend_optimization_level": 0}  # compiling is what takes the time
SIZE = 16
PLATFORMS = ("tpu", "gpu")
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


def interpreted(platform, mesh=None, *, programs=64):
    """The kernels in blocks so small that there are several of everything."""
    if platform == "tpu":
        return tpu_paged_attention(mesh, at_once=2 * SIZE, queries=64, interpret=True)
    return gpu_paged_attention(
        mesh, tile=SIZE, queries=32, programs=programs, share=1, interpret=True
    )


def inputs(length, heads, kv_heads, width, dtype=np.float32, size=SIZE):
    """Queries, keys and values of new positions, and the pool; rows in pages without order, some of
    them longer than others, one that ends with its page, and one that takes no part.
    """
    rng = np.random.default_rng(0)
    starts = np.array([0, 3 * size + 2, 5, 3 * size - 1], np.int32)
    lengths = np.array([min(length, size), length, 0, 1], np.int32)
    table = rng.permutation(48).reshape(4, 12).astype(np.int32)
    table[:, 8:] = 2**20  # behind the last position: none of the pool
    shapes = [
        (4, length, heads, width),
        *[(4, length, kv_heads, width)] * 2,
        (48, kv_heads, width, size),
        (48, kv_heads, size, width),
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is attended to, and how far the mixed values may be from the plain ones."""

    length: int
    heads: tuple[int, int, int] = (4, 2, 16)  # of queries, of keys, and how wide
    window: int | None = SIZE + 3
    size: int = SIZE
    exact: bool = True
    kept_in_8_bits: bool = False

    @property
    def inputs(self):
        return inputs(
            self.length, *self.heads, jnp.float32 if self.exact else jnp.bfloat16, self.size
        )

    def by(self, attention):
        run = extended_in_8_bits if self.kept_in_8_bits else extended
        return jax.jit(run(attention, self.window), compiler_options=QUICKLY)(*self.inputs)


@functools.cache
def plainly(case):
    return case.by(PAGES)


DECODE = Case(length=1, heads=(14, 2, 16), exact=False)
PREFILL = Case(length=2 * SIZE + 9)
CASES = {
    "decode": DECODE,
    "blocks of a prefill": PREFILL,
    "decode in 8 bits": dataclasses.replace(DECODE, kept_in_8_bits=True),
    "blocks of a prefill in 8 bits": dataclasses.replace(PREFILL, kept_in_8_bits=True),
}
CASES_OF_GPU = {
    "several tokens, heads 24 wide": Case(length=5, heads=(14, 2, 24), window=None),
    "no groups, 64 wide, tiles of a page": Case(
        length=2, heads=(2, 2, 64), window=SIZE + 3, size=2 * SIZE
    ),
    "128 wide": Case(length=1, heads=(7, 1, 128), exact=False),
}


@pytest.mark.parametrize(
    ("platform", "case"),
    [
        *(
            pytest.param(name, case, id=f"{name}: {words}")
            for words, case in CASES.items()
            for name in PLATFORMS
        ),
        *(pytest.param("gpu", case, id=f"gpu: {words}") for words, case in CASES_OF_GPU.items()),
    ],
)
def test_kernels_give_the_plain_values_and_leave_the_plain_pool(platform, case):
    found = case.by(interpreted(platform))
    assert_equal(found, plainly(case), case.inputs[-1], 1e-6 if case.exact else 1e-2)


def test_a_gpu_that_is_full_does_not_share_rows():
    found = PREFILL.by(interpreted("gpu", programs=1))
    assert_equal(found, plainly(PREFILL), PREFILL.inputs[-1], 1e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kept_in_8_bits", [False, True], ids=["float", "8 bits"])
def test_rows_and_heads_are_split_over_a_mesh(platform, kept_in_8_bits):
    """Rows by the caller, as the sampler does, each part with a pool of its own."""
    mesh = make_mesh(2, 2, 2)
    case = Case(length=1, heads=(4, 2, 8), window=None, kept_in_8_bits=kept_in_8_bits)
    rows = PartitionSpec("data")
    run = extended_in_8_bits if kept_in_8_bits else extended
    split = jax.shard_map(
        run(interpreted(platform, mesh), None),
        mesh=mesh,
        in_specs=(rows,) * 8,
        out_specs=rows,
        axis_names={"data"},
        check_vma=False,
    )
    twice = [jnp.concatenate([x, x]) for x in case.inputs]
    found = jax.jit(split, compiler_options=QUICKLY)(*twice)
    for half in range(2):
        part = [x[half * len(x) // 2 :][: len(x) // 2] for x in found]
        assert_equal(part, plainly(case), case.inputs[-1], 1e-6)


def shapes(length, width, *, pages=64, dtype=jnp.bfloat16, size=128, sharding=None):
    rows = (4, length)
    return [
        jax.ShapeDtypeStruct(shape, of, sharding=sharding)
        for shape, of in (
            *(((*rows, n, width), dtype) for n in (14, 2, 2)),
            ((pages, 2, width, size), dtype),
            ((pages, 2, size, width), dtype),
            *((shape, jnp.int32) for shape in ((4, 16), (4,), (4,))),
        )
    ]


# a decode step, one with guessed tokens, and a prefill
@pytest.mark.parametrize(("length", "width"), [(1, 128), (5, 128), (256, 64)])
@pytest.mark.parametrize(("extended", "kernels"), [(extended, 2), (extended_in_8_bits, 3)])
def test_kernels_are_lowered_for_tpu(length, width, extended, kernels):
    traced = jax.jit(extended(tpu_paged_attention(), None)).trace(*shapes(length, width))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call(") == kernels


def lowered_by_triton(run, *arguments):
    """How many kernels of a program Triton is to compile."""
    device = jax.sharding.AbstractDevice("NVIDIA L4", None, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("__gpu$xla.gpu.triton")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(("length", "width"), [(1, 128), (5, 96), (256, 64)])
@pytest.mark.parametrize("extended", [extended, extended_in_8_bits])
def test_the_kernel_for_gpu_is_lowered_by_triton(length, width, extended):
    run = extended(gpu_paged_attention(), None)
    assert lowered_by_triton(run, *shapes(length, width)) == 1


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("pages", "dtype", "kernels"),
    [
        (2**16, jnp.int8, 1),
        (2**16 + 1, jnp.int8, 0),
        (2**17, jnp.int8, 0),
        (2**17 + 1, jnp.int8, 1),
        (2**16 + 1, jnp.bfloat16, 1),
    ],
)
def test_pools_whose_offsets_pallas_would_cut_off_are_attended_to_in_the_plain_way(
    pages, dtype, kernels
):
    """Those of more than 2^31 numbers and at most 2^32 bytes."""
    attention = gpu_paged_attention()

    def run(q, new_k, new_v, k, v, scales, table, starts, lengths):
        rows = table, starts, lengths
        return attention.attend(q, k, v, *rows, window=None, scale=None, scales=scales)

    q, *of_pool, table, starts, lengths = shapes(1, 128, pages=pages)
    k, v = (jax.ShapeDtypeStruct(x.shape, dtype) for x in of_pool[2:])
    scale = jax.ShapeDtypeStruct((pages, 2, 128), jnp.float32)
    scales = Scales(scale, scale) if dtype == jnp.int8 else None
    arguments = (q, *of_pool[:2], k, v, scales, table, starts, lengths)
    assert lowered_by_triton(run, *arguments) == kernels


@pytest.mark.skipif(
    not compiler_is_here(),
    reason="the compiler for GPUs is not installed (the extra `plan-gpu`)",
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize(
    ("length", "width", "dtype", "size", "extended"),
    [
        (1, 128, "bfloat16", 16, extended),
        (256, 256, "bfloat16", 128, extended),
        (256, 256, "float32", 64, extended),
        (5, 96, "bfloat16", 128, extended_in_8_bits),
    ],
)
def test_the_kernel_for_gpu_fits_the_smallest_of_them_and_copies_no_pool(
    length, width, dtype, size, extended
):
    """The pool is donated, as the sampler does, and much larger than all that a program holds; the
    one in 8 bits is made by the program, and lies there whole.
    """
    mesh = make_mesh(1, 1, 1, devices=place_of(machine("l4")).devices)
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = shapes(length, width, pages=2**14, dtype=dtype, size=size, sharding=everywhere)
    run = extended(gpu_paged_attention(mesh), None)
    compiled = jax.jit(run, donate_argnums=(3, 4)).lower(*arguments).compile()
    assert compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 1
    pool = 2**14 * 2 * size * width * jnp.dtype(dtype).itemsize
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert extended is extended_in_8_bits or temporaries < pool / 4


def test_the_platform_and_the_pages_decide_unless_told(monkeypatch):
    def chosen(platform, attention="auto", dtype="bfloat16", **sizes):
        sizes = dataclasses.replace(SIZES, attention=attention, **sizes)
        return resolve_paged(sizes, dataclasses.replace(MODEL, dtype=dtype), platform)

    assert [chosen(name) for name in ("cpu", "another gpu", "gpu", "tpu")] == [
        "pages",
        "pages",
        "pallas_gpu",
        "pallas_tpu",
    ]
    for platform, page_size in (("tpu", 64), ("gpu", 8), ("gpu", 48)):
        assert chosen(platform, page_size=page_size) == "pages"
        assert chosen(platform, page_size=0) == "slots"
        assert chosen(platform, dtype="float64") == "pages"
        assert chosen(platform, "pages") == "pages"
        assert chosen(platform, cache="int8") == f"pallas_{platform}"
        taken = "a multiple of 128" if platform == "tpu" else "a power of 2 of at least 16"
        with pytest.raises(
            ValueError, match=f"{taken} .* page_size {page_size}: take auto or pages"
        ):
            chosen(platform, f"pallas_{platform}", page_size=page_size)
    assert chosen("gpu", page_size=16) == chosen("gpu", "pallas_gpu", page_size=64) == "pallas_gpu"
    for name, platform in (("pallas_tpu", "cpu"), ("pallas_gpu", "another gpu")):
        with pytest.raises(
            ValueError, match=f"{name}', and it runs on {platform}: take auto or pages"
        ):
            chosen(platform, name)
    with pytest.raises(ValueError, match="attention must be auto without page_size, got 'pages'"):
        chosen("tpu", "pages", page_size=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # a JAX without Triton
    assert [chosen(name) for name in ("gpu", "tpu")] == ["pages", "pallas_tpu"]
