"""Products of operands in bfloat16 with sums in float32 (dtype "mixed")."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ictjax.config import LoraConfig
from ictjax.models import transformer
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig
from ictjax.models.lora import init_adapter, with_adapter
from ictjax.models.precision import contract, project
from ictjax.sampler.weights import sampling_weights

_CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=2,
    d_model=32,
    d_ff=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
_MIXED = _CONFIG.with_param_dtype("bfloat16").with_dtype("mixed")


def _rounded(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64)


def _drawn(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("rows", [(1, 1), (3, 2), (2, 40)])
@pytest.mark.parametrize("axes", [("D", "F"), ("D", "NH"), ("NH", "D")])
def test_a_projection_rounds_its_operands_and_nothing_else(rows, axes) -> None:
    sizes = {"D": 24, "F": 40, "N": 3, "H": 8}
    inputs, outputs = ([sizes[letter] for letter in letters] for letters in axes)
    x, grad = _drawn(0, *rows, *inputs), _drawn(2, *rows, *outputs)
    weight = _drawn(1, *inputs, *outputs)
    y, pull = jax.vjp(lambda x, w: project(x, w, axes, jnp.bfloat16), x, weight)
    by_x, by_weight = pull(grad)
    letters = f"BT{axes[0]},{axes[0]}{axes[1]}->BT{axes[1]}"
    exact = np.einsum(letters, _rounded(x), _rounded(weight))
    assert y.dtype == by_x.dtype == by_weight.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    back = f"BT{axes[1]},{axes[0]}{axes[1]}->BT{axes[0]}"
    np.testing.assert_allclose(
        by_x, np.einsum(back, _rounded(grad), _rounded(weight)), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        by_weight,
        np.einsum(f"BT{axes[0]},BT{axes[1]}->{axes[0]}{axes[1]}", _rounded(x), _rounded(grad)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("letters", "x", "y"),
    [
        ("BTNH,NHD->BTD", (2, 5, 3, 8), (3, 8, 24)),
        ("BTNH,DNH->BTD", (2, 5, 3, 8), (24, 3, 8)),
        ("BTD,BTNH->DNH", (2, 5, 24), (2, 5, 3, 8)),
        ("BTD,BTV->VD", (2, 5, 24), (2, 5, 40)),
    ],
)
def test_contractions_are_those_of_einsum(letters, x, y) -> None:
    x, y = _drawn(0, *x), _drawn(1, *y)
    expected = np.einsum(letters, np.asarray(x, np.float64), np.asarray(y, np.float64))
    np.testing.assert_allclose(contract(letters, x, y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("optimised")
def test_no_step_copies_weights_that_take_heads_together() -> None:
    x, weight = _drawn(0, 4, 1, 3, 8), _drawn(1, 3, 8, 24)

    def copied(of) -> bool:
        program = jax.jit(lambda x, w: of("BTNH,NHD->BTD", x, w)).lower(x, weight).compile()
        return program.memory_analysis().temp_size_in_bytes >= weight.nbytes

    assert copied(jnp.einsum)
    assert not copied(contract)


@pytest.mark.parametrize("shape", [(32,), (3, 32), (40, 32), (2, 20, 32)])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_round_their_operands_too_and_nothing_else(shape, tied) -> None:
    config = dataclasses.replace(_MIXED, tie_embeddings=tied)
    hidden, grad = _drawn(0, *shape), _drawn(1, *shape[:-1], 96)
    name, weight = ("embed", _drawn(2, 96, 32)) if tied else ("head", _drawn(2, 32, 96))
    logits, pull = jax.vjp(lambda x: transformer.unembed(config, {name: weight}, x), hidden)
    weight_dv = _rounded(weight).T if tied else _rounded(weight)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, _rounded(hidden) @ weight_dv, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pull(grad)[0], _rounded(grad) @ weight_dv.T, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_learned_in_a_compiled_update(tied) -> None:
    """XLA on CPUs with products of bfloat16 refused to run that of a table that was transposed."""
    config = dataclasses.replace(_MIXED, tie_embeddings=tied)
    hidden, grad = _drawn(0, 2, 20, 32), _drawn(1, 2, 20, 96)
    name, weight = ("embed", _drawn(2, 96, 32)) if tied else ("head", _drawn(2, 32, 96))

    @jax.jit
    @jax.grad
    def by_weight(weight: jax.Array, hidden: jax.Array, grad: jax.Array) -> jax.Array:
        return (transformer.unembed(config, {name: weight}, hidden) * grad).sum()

    exact_dv = np.einsum("btd,btv->dv", _rounded(hidden), _rounded(grad))
    exact = exact_dv.T if tied else exact_dv
    np.testing.assert_allclose(by_weight(weight, hidden, grad), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_weights_compute_what_they_sample(tied) -> None:
    config = dataclasses.replace(_MIXED, tie_embeddings=tied)
    drawn = transformer.init_params(config.with_param_dtype("float32"), jax.random.key(0))
    params = jax.tree.map(lambda leaf: 8 * leaf, drawn)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 96)
    held = sampling_weights(config, params)
    assert held["embed"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        _logits(config, params, tokens), _logits(config, held, tokens), rtol=1e-5, atol=1e-5
    )


def _logits(config: ModelConfig, params: transformer.Params, tokens: jax.Array) -> jax.Array:
    return transformer.unembed(config, params, transformer.forward(config, params, tokens))


def _base() -> transformer.Params:
    """Weights that bfloat16 holds exactly, so that models differ by what they compute alone."""
    drawn = transformer.init_params(_CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: (8 * leaf).astype(jnp.bfloat16).astype(jnp.float32), drawn)


def test_mixed_is_nearer_to_float32_than_bfloat16_is() -> None:
    params = _base()
    tokens = jax.random.randint(jax.random.key(1), (4, 24), 0, 96)
    exact = _logits(_CONFIG, params, tokens)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def off(config: ModelConfig) -> float:
        return float(jnp.abs(_logits(config, narrow, tokens) - exact).mean())

    bfloat16 = off(dataclasses.replace(_CONFIG, dtype="bfloat16"))
    assert 0 < off(_MIXED) < bfloat16


def test_cache_and_whole_rows_agree_and_samplers_hold_matrices_in_bfloat16() -> None:
    lora = LoraConfig(rank=2, alpha=4.0)
    shapes = init_adapter(_CONFIG, lora, jax.random.key(0))
    adapter = {name: 0.1 * _drawn(len(name), *leaf.shape) for name, leaf in shapes.items()}
    params = sampling_weights(_MIXED, with_adapter(lora, _base(), adapter))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 96)
    whole = _logits(_MIXED, params, tokens)
    cache = make_cache(_MIXED, 2, 16)
    assert cache.k[0].dtype == jnp.float32
    parts = []
    for start, length in ((0, 9), (9, 1), (10, 2)):
        starts, lengths = jnp.full(2, start), jnp.full(2, length)
        hidden, cache = transformer.extend(
            _MIXED, params, cache, tokens[:, start : start + length], starts, lengths
        )
        parts.append(transformer.unembed(_MIXED, params, hidden))
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=0.02, atol=0.02)
    held = {name: leaf.dtype.name for name, leaf in params["layers"][0].items()}
    assert {held[name] for name in ("q", "o", "up", "down")} == {"bfloat16"}
    assert {held[name] for name in held if name.endswith(("norm", "bias"))} == {"float32"}
    assert {leaf.dtype.name for leaf in params["lora"].values()} == {"float32"}
    assert params["embed"].dtype == jnp.bfloat16
