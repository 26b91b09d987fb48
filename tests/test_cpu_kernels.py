"""Products with packed weights and attention on CPUs against the plain ones of JAX; how they are
compiled, and what happens where they cannot be.
"""

import dataclasses
import functools
import gc
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ictjax.config import SamplerConfig
from ictjax.models import attention, cpu_kernels, transformer
from ictjax.models.cache import CachedLayer
from ictjax.models.config import ModelConfig
from ictjax.models.rotary import rotate
from ictjax.sampler import Request, Sampler, sampling_weights
from ictjax.sampler.weights import packed_weights

MODEL = ModelConfig(
    vocab_size=101,
    num_layers=2,
    d_model=40,
    d_ff=56,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=64,
    tie_embeddings=True,
)
SIZES = SamplerConfig(
    num_slots=3,
    max_len=40,
    extend_buckets=(8,),
    row_buckets=(3,),
    decode_steps=3,
    max_top_k=8,
    attended_buckets=(24,),
)


def weights(config):
    made = transformer.init_params(config, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * (12 if leaf.ndim > 1 else 1), made)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    cpu_kernels.load()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """The folder of a machine on which nothing was compiled before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "_loaded", functools.cache(cpu_kernels._loaded.__wrapped__))
    return tmp_path / "ictjax"


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def multiplied(x, weight, axes, *, transposed=False):
    packed = cpu_kernels.pack([weight], axes, transposed=transposed)
    (found,) = jax.jit(lambda x, packed: packed.multiply(x, axes))(x, packed)
    return np.asarray(found)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 31, 64, 65, 131])
@pytest.mark.parametrize(("depth", "wide"), [(16, 48), (33, 49), (1, 1), (128, 200)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_jax(rows, depth, wide, dtype):
    x, weight = noise(0, 1, rows, depth), jnp.asarray(noise(1, depth, wide), dtype)
    rounded = np.asarray(jnp.asarray(x, dtype), np.float64)
    expected = rounded @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(multiplied(x, weight, 1), expected, rtol=1e-5, atol=1e-5)
    table = jnp.asarray(np.asarray(weight, np.float32).T, dtype)
    found = multiplied(x, table, 1, transposed=True)
    np.testing.assert_array_equal(found, multiplied(x, weight, 1))


def test_products_take_and_give_several_axes():
    x, weight = noise(0, 2, 3, 4, 8), jnp.asarray(noise(1, 4, 8, 5, 6))
    found = multiplied(x, weight, 2)
    np.testing.assert_allclose(found, np.einsum("btnh,nhkd->btkd", x, weight), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_side_by_side_give_what_each_gives(dtype):
    x = noise(0, 1, 11, 33)
    weights = [
        jnp.asarray(noise(1 + i, 33, *axes), dtype)
        for i, axes in enumerate([(5, 3), (2, 7), (61,)])
    ]
    packed = cpu_kernels.pack(weights, 1)
    found = jax.jit(lambda x, packed: packed.multiply(x))(x, packed)
    for part, weight in zip(found, weights, strict=True):
        np.testing.assert_array_equal(part, multiplied(x, weight, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_rows_give_no_rows(dtype):
    weight = jnp.asarray(noise(1, 8, 5), dtype)
    assert multiplied(np.zeros((1, 0, 8), np.float32), weight, 1).shape == (1, 0, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_same_whatever_is_beside_it(dtype):
    x, weight = noise(0, 1, 150, 96), jnp.asarray(noise(1, 96, 1000), dtype)
    whole = multiplied(x, weight, 1)
    for first, last in [(0, 1), (3, 5), (149, 150), (20, 90)]:
        np.testing.assert_array_equal(multiplied(x[:, first:last], weight, 1), whole[:, first:last])


def test_programs_that_run_at_the_same_time_wait_for_nobody():
    """More of them than the pool has threads, each of which wants these."""
    packed = cpu_kernels.pack([jnp.asarray(noise(0, 512, 3000))], 1)
    multiply = jax.jit(lambda x, packed: packed.multiply(x)[0])
    inputs = [noise(1 + rows, 1, rows, 512) for rows in (1, 5, 17, 64, 200)]
    expected = [np.asarray(multiply(x, packed)) for x in inputs]

    def same(turn: int) -> bool:
        return np.array_equal(multiply(inputs[turn % 5], packed), expected[turn % 5])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(200)))


def test_rounding_to_bfloat16_is_that_of_jax():
    """Halves to even, beyond the largest to infinity, and NaN stays NaN."""
    of_bits = np.arange(0, 2**32, 65_521, dtype=np.uint32).view(np.float32)
    x = of_bits[: len(of_bits) // 16 * 16].reshape(1, -1, 16)
    identity = jnp.eye(16, dtype=jnp.bfloat16)
    finite = np.abs(x) < 1e30  # an infinity times the zeros of the identity is NaN in every column
    usual = np.where(finite & (np.abs(x) > 1e-30), x, 1.0)
    found = multiplied(usual, identity, 1)
    np.testing.assert_array_equal(found, np.asarray(jnp.asarray(usual, jnp.bfloat16), np.float32))
    for wrong in (np.nan, np.inf, -np.inf, 3.4e38):
        spoilt = multiplied(np.full((1, 1, 16), wrong, np.float32), identity, 1)
        assert np.isnan(spoilt).all()


CASES = [
    # rows, tokens, heads, kv heads, width, positions, window
    (5, 1, 4, 2, 32, 80, None),
    (1, 1, 9, 3, 64, 640, None),
    (2, 3, 7, 1, 16, 33, None),
    (3, 8, 6, 6, 48, 77, 20),
    (4, 2, 8, 8, 112, 19, 1),
    (2, 1, 2, 1, 32, 5, None),
    (2, 1, 5, 1, 32, 1, 3),
    (3, 32, 4, 2, 32, 80, None),
    (2, 35, 9, 3, 64, 101, None),
    (2, 17, 7, 1, 16, 33, 5),
    (1, 9, 5, 5, 112, 19, 1),
    (2, 64, 3, 3, 32, 64, 40),
]


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_jax(case):
    rows, tokens, heads, kv_heads, width, held, window = case
    rng = np.random.default_rng(0)
    q = 3 * noise(0, rows, tokens, heads, width)
    k, v = noise(1, rows, kv_heads, width, held), noise(2, rows, kv_heads, held, width)
    new_k, new_v = noise(3, rows, tokens, kv_heads, width), noise(4, rows, tokens, kv_heads, width)
    starts = rng.integers(0, held - tokens + 1, (rows, 1))
    starts[0] = held - tokens
    positions = (starts + np.arange(tokens)).astype(np.int32)
    written = positions.copy()
    written[-1, tokens // 2 + 1 :] = held  # padding
    # nothing of a position that no token sees is used, whatever is there
    real = written < held
    later = np.arange(held) > np.where(real, positions, -1).max(1, keepdims=True)
    before = np.arange(held) < positions[:, :1] - ((window or held) - 1)
    nobody = (later | before)[:, None]
    k, v = np.where(nobody[:, :, None], np.nan, k), np.where(nobody[..., None], np.nan, v)

    angles = noise(5, rows, tokens, 1, width // 2)
    cos_sin = np.cos(angles), np.sin(angles)

    def few(q, new_k, new_v, cos_sin, k, v, positions, written):
        held = CachedLayer(k, v)
        return cpu_kernels.attend(q, new_k, new_v, cos_sin, held, positions, written, window=window)

    found, layer = jax.jit(few)(q, new_k, new_v, cos_sin, k, v, positions, written)
    alone = [array[-1:] for array in (q, new_k, new_v, *cos_sin, k, v, positions, written)]
    alone[3:5] = [tuple(alone[3:5])]
    np.testing.assert_array_equal(jax.jit(few)(*alone)[0], found[-1:])
    q, new_k = (np.asarray(rotate(array, cos_sin)) for array in (q, new_k))
    expected_k, expected_v = k.copy(), v.copy()
    for row, token in np.argwhere(real):
        expected_k[row, :, :, written[row, token]] = new_k[row, token]
        expected_v[row, :, written[row, token]] = new_v[row, token]
    np.testing.assert_allclose(layer.k, expected_k, atol=1e-6)
    np.testing.assert_array_equal(layer.v, expected_v)
    distance = positions[..., None] - np.arange(held)
    seen = (distance >= 0) & (distance < (window or held))
    filled = [np.nan_to_num(array, nan=0.0) for array in (expected_k, expected_v)]
    expected = attention.attend(q, *filled, jnp.asarray(seen))
    expected = np.where(real[..., None, None], expected, 0.0)
    np.testing.assert_allclose(found, expected, atol=5e-6)  # logits up to 100


def test_windows_that_share_no_position_look_at_their_own_alone():
    """Of 9 tokens, which share passes over the keys; what one holds is NaN."""
    q, new_k, new_v = noise(0, 1, 9, 1, 32), noise(1, 1, 9, 1, 32), np.ones((1, 9, 1, 32), "f")
    new_v[0, 2] = np.nan
    unturned = (np.ones((1, 9, 1, 16), np.float32), np.zeros((1, 9, 1, 16), np.float32))
    layer = CachedLayer(jnp.zeros((1, 1, 32, 20)), jnp.zeros((1, 1, 20, 32)))
    at = np.arange(9, dtype=np.int32)[None]
    found, _ = jax.jit(functools.partial(cpu_kernels.attend, window=1))(
        q, new_k, new_v, unturned, layer, at, at
    )
    np.testing.assert_array_equal(found, new_v)


@pytest.mark.parametrize(("heads", "width"), [(2, 64), (6, 32)])
def test_each_of_a_few_tokens_is_the_same_as_alone(heads, width):
    """What guesses are checked against: the bits of a step of one token."""
    tokens, held = 8, 61
    q = 3 * noise(0, 1, tokens, heads, width)
    new_k, new_v = noise(1, 1, tokens, 2, width), noise(2, 1, tokens, 2, width)
    layer = CachedLayer(noise(3, 1, 2, width, held), noise(4, 1, 2, held, width))
    angles = noise(5, 1, tokens, 1, width // 2)
    cos_sin = np.cos(angles), np.sin(angles)
    at = np.arange(40, 40 + tokens, dtype=np.int32)[None]
    step = jax.jit(cpu_kernels.attend)
    together, _ = step(q, new_k, new_v, cos_sin, layer, at, at)
    for t in range(tokens):
        inputs = (q, new_k, new_v, *cos_sin, at)
        q_1, k_1, v_1, cos, sin, at_1 = (array[:, t : t + 1] for array in inputs)
        alone, layer = step(q_1, k_1, v_1, (cos, sin), layer, at_1, at_1)
        np.testing.assert_array_equal(alone[:, 0], together[:, t])


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_large_pages_keep_what_they_hold(system, monkeypatch):
    monkeypatch.setattr(cpu_kernels.sys, "platform", system)
    arrays = [jnp.arange(size, dtype=jnp.int32) for size in (5, 2**18, 3 * 2**20 + 7)]
    cpu_kernels.use_large_pages(arrays)
    for array in arrays:
        np.testing.assert_array_equal(array, np.arange(array.size))


def test_the_cache_is_updated_where_it_is():
    """Without a second one: of a cache that is donated, nothing is copied."""
    k, v = jnp.zeros((4, 2, 16, 1000)), jnp.zeros((4, 2, 1000, 16))
    new, q = noise(0, 4, 1, 2, 16), noise(1, 4, 1, 2, 16)
    at = np.full((4, 1), 3, np.int32)

    def step(k, v):
        unturned = (np.ones((4, 1, 1, 8), np.float32), np.zeros((4, 1, 1, 8), np.float32))
        return cpu_kernels.attend(q, new, new, unturned, CachedLayer(k, v), at, at)[1]

    program = jax.jit(step, donate_argnums=(0, 1)).lower(k, v).compile()
    assert program.memory_analysis().temp_size_in_bytes < k.nbytes / 10


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0, 1e4])
def test_attention_of_large_and_small_logits(size):
    q, k, v = size * noise(0, 1, 1, 2, 32), noise(1, 1, 2, 32, 40), noise(2, 1, 2, 40, 32)
    at = np.array([[39]], np.int32)
    new_k, new_v = k[:, None, :, :, 39], v[:, None, :, 39]
    expected = attention.attend(q, k, v, jnp.ones((1, 1, 40), bool), 0.7)
    unturned = (np.ones((1, 1, 1, 16), np.float32), np.zeros((1, 1, 1, 16), np.float32))
    found, _ = jax.jit(
        lambda *x: cpu_kernels.attend(*x[:3], unturned, CachedLayer(*x[3:5]), at, at, scale=0.7)
    )(q, new_k, new_v, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, size))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("wide", [1, 5, 16, 4097])
def test_what_is_sampled_from_is_that_of_jax(wide):
    logits = 5 * noise(0, 12, wide)
    logits[1] = logits[1].round()  # equals: the first of them
    logits[2] = 7.0
    logits[3], logits[4, wide // 2 :], logits[5, 0] = -np.inf, -np.inf, 300.0
    ids, normaliser = jax.jit(cpu_kernels.summarise)(logits)
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    np.testing.assert_allclose(normaliser, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6, atol=1e-6)
    logits[6, wide // 2] = np.inf
    assert np.isposinf(jax.jit(cpu_kernels.summarise)(logits)[1][6])
    logits[:, wide // 2] = np.nan
    ids, normaliser = jax.jit(cpu_kernels.summarise)(logits)
    assert np.isnan(normaliser).all() and (ids >= 0).all() and (ids < wide).all()


def said(params, config=MODEL, **changes):
    """Tokens and log-probabilities of a few replies, greedy and drawn."""
    sizes = dataclasses.replace(SIZES, **changes)
    with Sampler(config, params, sizes, pad_id=0) as sampler:
        conversations = [sampler.open([5 + row, 9, 11 + row] * (5 - row)) for row in range(3)]
        for row, conversation in enumerate(conversations):
            asked = Request(
                max_new_tokens=9,
                temperature=float(row == 2),
                top_k=0,
                top_p=1.0,
                stop_ids=(),
                key=np.array([row, 7], np.uint32),
            )
            sampler.generate(conversation, asked)
        replies = {reply.conversation: reply for reply in sampler.run()}
    ordered = [replies[conversation] for conversation in conversations]
    return [r.ids for r in ordered], np.array([r.logprobs for r in ordered])


@pytest.mark.parametrize(
    ("products", "changes"),
    [
        ("", {}),
        ("", {"extend_buckets": (24,)}),
        ("bfloat16", {"guessed_tokens": 3}),
        ("", {"page_size": 16}),
    ],
)
def test_a_sampler_says_the_same_with_and_without(products, changes):
    config = dataclasses.replace(MODEL, products=products)
    params = weights(config)
    with cpu_kernels.switched_off():
        plain_ids, plain_logprobs = said(params, config, **changes)
    ids, logprobs = said(params, config, **changes)
    assert ids == plain_ids
    np.testing.assert_allclose(logprobs, plain_logprobs, atol=1e-4)


def test_samplers_of_the_same_weights_share_what_is_packed():
    base = sampling_weights(MODEL, weights(MODEL))
    first, second = packed_weights(MODEL, base), packed_weights(MODEL, dict(base))
    assert first["layers"][0]["q+k+v"] is second["layers"][0]["q+k+v"]
    assert first["unembed"] is second["unembed"]
    other = sampling_weights(MODEL, weights(MODEL))
    assert packed_weights(MODEL, other)["unembed"] is not first["unembed"]


def test_what_is_packed_otherwise_is_packed_again():
    square, x = jnp.asarray(noise(0, 8, 8)), noise(1, 1, 3, 8)
    for transposed, weight in ((False, square), (True, square.T)):
        found = multiplied(x, square, 1, transposed=transposed)
        np.testing.assert_allclose(found, x @ weight, atol=1e-5)


def test_what_is_packed_is_gone_with_the_samplers():
    base = sampling_weights(MODEL, weights(MODEL))
    gc.collect()
    before = len(jax.live_arrays())
    packed = packed_weights(MODEL, base)
    assert len(jax.live_arrays()) > before
    del packed
    gc.collect()
    assert len(jax.live_arrays()) == before
    number = len(cpu_kernels._MADE)
    del base
    gc.collect()
    assert len(cpu_kernels._MADE) < number


def test_it_is_compiled_once_for_a_machine(fresh):
    library = cpu_kernels._compiled()
    made = library.stat().st_mtime_ns
    assert cpu_kernels._compiled() == library
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [made]


@pytest.mark.parametrize(
    ("compiler", "complaint"),
    [
        (
            "no-such-compiler -O2",
            "there is no C++ compiler no-such-compiler (c++, or what CXX names)",
        ),
        ("c++ 'unclosed", "cpu_kernels.cc cannot be compiled: No closing quotation"),
        ("false", "false cannot compile cpu_kernels.cc: it said nothing"),
        ("c++ -Dictjax_multiply=other", "undefined symbol: ictjax_multiply"),
    ],
)
def test_without_a_compiler_a_sampler_leaves_it_to_xla(fresh, monkeypatch, compiler, complaint):
    monkeypatch.setenv("CXX", compiler)
    assert cpu_kernels.why_not(MODEL).endswith(complaint)
    ids, _ = said(weights(MODEL))
    assert all(len(reply) == 9 for reply in ids)


def test_a_damaged_library_is_named(fresh):
    cpu_kernels._compiled().write_bytes(b"damaged")
    assert "cpu_kernels.cc cannot be loaded" in cpu_kernels.why_not(MODEL)


def test_it_says_why_it_is_not_used(monkeypatch):
    large = dataclasses.replace(MODEL, vocab_size=2**20, d_model=2**10)
    assert cpu_kernels.why_not(large).startswith("a second copy of the weights would take 4")
    half = dataclasses.replace(MODEL, dtype="bfloat16")
    assert cpu_kernels.why_not(half) == "the model computes bfloat16"
    assert "int8" in cpu_kernels.why_not(dataclasses.replace(MODEL, weights="int8"))
    assert cpu_kernels.why_not(MODEL, 2) == "its mesh has several devices"
    with cpu_kernels.switched_off():
        assert cpu_kernels.why_not(MODEL) == "ICTJAX_CPU_KERNELS is off"
    assert cpu_kernels.why_not(MODEL) == ""


_OTHER = """
import sys
import pytest
from ictjax.models import cpu_kernels
cpu_kernels._FLAGS = tuple(flag.replace("native", sys.argv[1]) for flag in cpu_kernels._FLAGS)
sys.exit(pytest.main([sys.argv[2], "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header",
                      "-W", "ignore::pytest.PytestAssertRewriteWarning",
                      "-k", "axes or beside or attention"]))
"""


@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64"])
def test_it_computes_the_same_for_other_processors(machine, tmp_path, monkeypatch):
    """With the instructions that older ones have."""
    if not cpu_kernels.load().columns >= 48:
        pytest.skip("this processor is itself one of them")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-c", _OTHER, machine, str(pathlib.Path(__file__))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
