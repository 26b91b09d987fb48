"""Weights and caches in 8 bits: how far a number is rounded, how near the model stays, and what it
takes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.memory import uses
from experiments.presets import FAKE_TINY, in_folders
from ictjax.config import EndpointConfig
from ictjax.mesh import make_mesh
from ictjax.models import transformer
from ictjax.models.attention_choice import resolve_paged
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig
from ictjax.models.int8 import int8_weights, to_int8
from ictjax.players import initial_weights, open_players
from ictjax.run_config import ActorConfig
from ictjax.sampler import Sampler, sampling_shapes, sampling_weights
from tests.test_paged_sampler import MODEL, PAGES, ROWS, play, same, weights

# Everything that a weight can be: biases, norms of heads, a head of its own, sliding layers.
UNTIED = dataclasses.replace(
    MODEL,
    num_layers=2,
    tie_embeddings=False,
    qk_norm=True,
    o_bias=True,
    mlp_bias=True,
    sandwich_norms=True,
    sliding_window=6,
    sliding_layers=(True, False),
)


def test_a_number_is_off_by_half_a_scale_at_most():
    x = np.random.default_rng(0).normal(0, 3, (5, 4, 7)).astype(np.float32)
    x[2, :, 3] = 0.0
    x[1, 2, 1] = 1e6
    values, scale = to_int8(jnp.asarray(x), (1,))
    assert values.dtype == jnp.int8 and scale.shape == (5, 7)
    np.testing.assert_allclose(scale, np.abs(x).max(axis=1) / 127, rtol=1e-6)
    found = np.asarray(values, np.float32) * np.asarray(scale)[:, None]
    assert (np.abs(found - x) <= np.asarray(scale)[:, None] * (0.5 + 1e-5)).all()
    assert (np.abs(values).max(axis=1) == 127).sum() == 5 * 7 - 1  # all but the zeros
    assert not np.asarray(values)[2, :, 3].any()
    again, _ = to_int8(jnp.asarray(found), (1,))
    np.testing.assert_array_equal(again, values)


def in_int8(model: ModelConfig):
    return int8_weights(model, jax.tree.map(jnp.asarray, weights(model)))


@pytest.mark.parametrize("model", [MODEL, UNTIED], ids=["tied", "untied"])
def test_logits_stay_near_and_weights_are_as_the_shape_says(model):
    params = weights(model)
    quantised, held = in_int8(model)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), held) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), transformer.abstract_params(quantised)
    )
    assert quantised.num_params == model.num_params
    tokens = np.random.default_rng(1).integers(0, 23, (3, 16)).astype(np.int32)

    def logits(config, tree):
        return np.asarray(
            transformer.unembed(config, tree, transformer.forward(config, tree, tokens))
        )

    expected, found = logits(model, params), logits(quantised, held)
    error = np.abs(found - expected).mean() / expected.std()
    assert 1e-4 < error < 0.03
    # each weight is what its scale says: exactly the model of the rounded weights
    rounded = jax.tree.map(jnp.asarray, params)
    for tree, source in ((rounded, held), (rounded["layers"], held["layers"])):
        for name, summed in model.matrices.items():
            if f"{name}_scale" in source:
                axes_of = {**model.weight_axes[0], **model.weight_axes[1]}[name]
                along = [axes_of.index(axis) for axis in summed]
                scale = jnp.expand_dims(source[f"{name}_scale"], along)
                tree[name] = source[name] * scale
    np.testing.assert_allclose(found, logits(model, rounded), atol=2e-4)


def test_a_cache_in_8_bits_stays_near_in_rows_and_pages():
    model, params = UNTIED, weights(UNTIED)
    tokens = np.random.default_rng(2).integers(0, 23, (2, 15)).astype(np.int32)
    table = jnp.array([[3, 1, 5, 7], [2, 6, 0, 4]], jnp.int32)

    def logits(kind, paged):
        cache = make_cache(model, 8, 4, kind=kind) if paged else make_cache(model, 2, 16, kind=kind)
        found = []
        for start, end in ((0, 9), (9, 10), (10, 15)):
            given = tokens[:, start:end], jnp.full(2, start), jnp.full(2, end - start)
            hidden, cache = (
                transformer.extend_pages(model, params, cache, table, *given)
                if paged
                else transformer.extend(model, params, cache, *given)
            )
            found.append(transformer.unembed(model, params, hidden))
        return np.concatenate(found, axis=1), cache

    expected, plain = logits("float", paged=False)
    rows, cache = logits("int8", paged=False)
    pages, _ = logits("int8", paged=True)
    assert 1e-5 < np.abs(rows - expected).mean() / expected.std() < 0.03
    np.testing.assert_allclose(pages, rows, atol=2e-3)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(one)) for one in (plain, cache)]
    # of the 4 bytes of each number of a head's 4 one is left, and a scale is added
    assert sizes[1] == sizes[0] / 4 + sizes[0] / model.head_dim


def test_conversations_are_the_same_in_rows_and_pages_and_on_a_mesh():
    quantised, held = in_int8(MODEL)
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    placed = sampling_weights(quantised, held, mesh)
    shapes = sampling_shapes(quantised, mesh)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), placed) == (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes)
    )
    rows, pages = (dataclasses.replace(sizes, cache="int8") for sizes in (ROWS, PAGES))
    with (
        Sampler(quantised, held, rows, 0) as expected,
        Sampler(quantised, held, pages, 0) as paged,
        Sampler(quantised, placed, rows, 0, mesh=mesh) as split,
    ):
        found = play(expected, 1)
        same(play(paged, 1), found)
        same(play(split, 1), found)


def test_a_run_keeps_what_its_plan_says():
    config = in_folders(FAKE_TINY)
    config = dataclasses.replace(
        config,
        actor=dataclasses.replace(config.actor, weights="int8"),
        actor_sampler=dataclasses.replace(config.actor_sampler, cache="int8", guessed_tokens=2),
    )
    planned = {part: use.device_bytes for use in uses(config) for part in use.parts}
    with open_players(config, initial_weights(config)) as players:
        programs = players.actor._sampler._programs
        weights_bytes, cache_bytes = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            for tree in (programs._params, programs._cache)
        )
        assert programs._params["layers"][0]["q"].dtype == jnp.int8
        assert players.base is None or players.base["layers"][0]["q"].dtype == jnp.float32
    assert (planned["actor weights"], planned["actor cache"]) == (weights_bytes, cache_bytes)


def test_where_8_bits_cannot_be_is_said():
    with pytest.raises(ValueError, match=r"reflector_sampler\.cache is 'int8'.*actor_sampler"):
        dataclasses.replace(
            FAKE_TINY,
            reflector_sampler=dataclasses.replace(FAKE_TINY.reflector_sampler, cache="int8"),
        )
    with pytest.raises(ValueError, match=r"actor\.weights is 'int8'.*endpoint"):
        ActorConfig(model="m", weights="int8", endpoint=EndpointConfig(url="http://localhost:1/v1"))
    sizes = dataclasses.replace(
        ROWS, page_size=128, max_len=128, num_pages=4, cache="int8", attended_buckets=()
    )
    assert resolve_paged(sizes, MODEL, "tpu") == "pallas_tpu"
    assert resolve_paged(sizes, MODEL, "cpu") == "pages"
    kernels = dataclasses.replace(sizes, attention="pallas_tpu", page_size=64)
    with pytest.raises(ValueError, match="page_size 64: take auto"):
        resolve_paged(kernels, MODEL, "tpu")
