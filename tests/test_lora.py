"""Adapters: what they add, what they leave alone, and that one base serves every role."""

import contextlib
import dataclasses
import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ictjax import keys
from ictjax.batch import pack
from ictjax.config import (
    PAPER,
    BatchConfig,
    LearnerConfig,
    LoraConfig,
    OptimizerConfig,
    SamplerConfig,
)
from ictjax.learner import init_state, make_optimizer, make_update, transformer_functions
from ictjax.models import cpu_kernels, lora, transformer
from ictjax.models.config import ModelConfig
from ictjax.sampler import Request, Sampler, sampling_weights
from ictjax.sampler.weights import packed_weights

MODEL = ModelConfig(
    vocab_size=23,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
)
LORA = LoraConfig(rank=3, alpha=6.0)
SIZES = SamplerConfig(
    num_slots=2,
    max_len=32,
    extend_buckets=(8,),
    row_buckets=(2,),
    decode_steps=4,
    max_top_k=1,
    attended_buckets=(32,),
)


@pytest.fixture(scope="module")
def base():
    return sampling_weights(
        MODEL,
        jax.tree.map(
            lambda leaf: leaf * (8 if leaf.ndim > 2 else 1),
            transformer.init_params(MODEL, jax.random.key(0)),
        ),
    )


@pytest.fixture(scope="module")
def adapter():
    fresh = lora.init_adapter(MODEL, LORA, jax.random.key(1))
    return {
        name: (
            leaf
            + (
                0.3 * jax.random.normal(jax.random.key(len(name)), leaf.shape)
                if name.endswith("_b")
                else 0
            )
        )
        for name, leaf in fresh.items()
    }


@pytest.fixture(scope="module")
def logits():
    tokens = jax.random.randint(jax.random.key(2), (2, 7), 0, MODEL.vocab_size)
    return jax.jit(
        lambda params: transformer.unembed(
            MODEL, params, transformer.forward(MODEL, params, tokens)
        )
    )


def test_a_new_adapter_changes_nothing_and_a_trained_one_equals_the_merged_weights(
    base, adapter, logits
):
    plain = logits(base)
    chex.assert_trees_all_equal(
        logits(lora.with_adapter(LORA, base, lora.init_adapter(MODEL, LORA, jax.random.key(1)))),
        plain,
    )
    adapted = logits(lora.with_adapter(LORA, base, adapter))
    assert float(jnp.abs(adapted - plain).max()) > 0.1
    merged = lora.merge(LORA, base, adapter)
    chex.assert_trees_all_close(logits(merged), adapted, atol=2e-5)
    assert (
        merged["embed"] is base["embed"]
        and merged["layers"][0]["attn_norm"] is base["layers"][0]["attn_norm"]
    )
    stacked = {
        name: jnp.stack([weights[name] for weights in base["layers"]]) for name in base["layers"][0]
    }
    again = lora.merge(LORA, {**base, "layers": stacked}, adapter)
    chex.assert_trees_all_close(transformer.unstack_layers(MODEL, again), merged, atol=1e-6)


def test_one_projection_by_hand(base):
    """The definition, for o: y = x W + (alpha / rank) (x A) B."""
    only_o = LoraConfig(rank=1, alpha=2.0, targets=("o",))
    factors = {
        "o_lora_a": jnp.zeros((2, 4, 4, 1)).at[1, 2, 3, 0].set(5.0),
        "o_lora_b": jnp.zeros((2, 1, 16)).at[1, 0, 7].set(3.0),
    }
    merged = lora.merge(only_o, base, factors)
    expected = np.asarray(base["layers"][1]["o"]).copy()
    expected[2, 3, 7] += 2.0 / 1 * 5.0 * 3.0
    np.testing.assert_allclose(merged["layers"][1]["o"], expected, rtol=1e-6)
    chex.assert_trees_all_equal(merged["layers"][0], base["layers"][0])


def test_a_new_adapter_changes_nothing(base):
    new = lora.init_adapter(MODEL, LORA, jax.random.key(1))
    assert {
        name: leaf.shape for name, leaf in new.items() if name.startswith(("q", "o", "down"))
    } == {
        "q_lora_a": (2, 16, 3),
        "q_lora_b": (2, 3, 4, 4),
        "o_lora_a": (2, 4, 4, 3),
        "o_lora_b": (2, 3, 16),
        "down_lora_a": (2, 24, 3),
        "down_lora_b": (2, 3, 16),
    }
    assert len(new) == 2 * len(LORA.targets)
    assert all(leaf.dtype == jnp.float32 for leaf in new.values())
    tokens = jnp.arange(7)[None]
    chex.assert_trees_all_close(
        transformer.forward(MODEL, lora.with_adapter(LORA, base, new), tokens),
        transformer.forward(MODEL, base, tokens),
        atol=1e-6,
    )


def batch():
    shapes = BatchConfig(num_rows=4, token_buckets=(12,), response_buckets=(4,))
    return pack(
        shapes,
        [[1, 2, 3]] * 4,
        [[4, 5], [6], [7, 8, 9], [10]],
        advantages=[1.0, -1.0, 0.5, -0.5],
        pad_id=0,
    )


def test_gradients_are_those_of_the_adapter_in_the_merged_weights(base, adapter):
    """dL/dA and dL/dB of the update equal those through `merge`; the reference is the base with its
    adapter off.
    """
    config = dataclasses.replace(PAPER, kl_coefficient=0.1)
    functions = transformer_functions(MODEL, remat="none", lora=LORA)
    optimizer = optax.sgd(1.0)
    update = make_update(functions, config, optimizer, LearnerConfig(positions_per_chunk=4))
    state, metrics = update(init_state(adapter, optimizer), base, batch())
    assert float(metrics["kl"]) > 1e-3

    full = transformer_functions(MODEL, remat="none")._replace(
        combine=lambda factors, base: lora.merge(LORA, base, factors)
    )
    merged_update = make_update(full, config, optimizer, LearnerConfig(positions_per_chunk=4))
    merged_state, merged_metrics = merged_update(init_state(adapter, optimizer), base, batch())
    chex.assert_trees_all_close(state.params, merged_state.params, atol=1e-5)
    chex.assert_trees_all_close(metrics, merged_metrics, atol=1e-4)
    with pytest.raises(ValueError, match="pass the frozen weights"):
        make_update(functions, dataclasses.replace(config, kl="none"), optimizer, LearnerConfig())(
            init_state(adapter, optimizer), None, batch()
        )


@pytest.mark.parametrize("packs", [False, True])
def test_one_base_in_memory_for_actor_reference_and_reflector(adapter, packs):
    """Counts the device buffers while both samplers and the learner's state are there, before and
    after an update. What is packed of the base is there once, too.
    """
    gc.collect()
    before = buffers()
    chosen = contextlib.nullcontext() if packs else cpu_kernels.switched_off()
    base = sampling_weights(MODEL, transformer.init_params(MODEL, jax.random.key(3)), consume=True)
    assert buffers() - before == buffers(jax.tree.leaves(base))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2))
    update = make_update(
        transformer_functions(MODEL, remat="none", lora=LORA), PAPER, optimizer, LearnerConfig()
    )
    state = init_state(adapter, optimizer)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with (
        chosen,
        Sampler(MODEL, base, SIZES, 0) as actor,
        Sampler(MODEL, lora.with_adapter(LORA, base, state.params), SIZES, 0) as reflector,
    ):
        cache = 2 * sum(
            array.nbytes for array in (*actor._programs._cache.k, *actor._programs._cache.v)
        )
        # the factors as the reflector samples with them
        most = sum(leaf.nbytes for leaf in adapter.values())
        for _ in range(2):
            one, other = actor._programs._params, reflector._programs._params
            packed = packed_weights(MODEL, base) if packs else base
            assert all(
                leaf is held
                for leaf, held in zip(jax.tree.leaves(packed), jax.tree.leaves(one), strict=True)
            )
            assert one["layers"][1]["o"] is other["layers"][1]["o"]
            least = buffers(jax.tree.leaves((base, packed))) + trained + cache
            assert least <= buffers() - before <= least + most + 4096
            # donates the factors that the reflector sampled with, never the base
            state, _ = update(state, base, batch())
            reflector.set_params(lora.with_adapter(LORA, base, state.params))
            last = ask(reflector)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))
        assert ask(actor) != last


def buffers(arrays=None) -> int:
    """Bytes of the device buffers of these arrays, or of all there are, each counted once however
    many refer to it.
    """
    found = {}
    for array in jax.live_arrays() if arrays is None else arrays:
        if not array.is_deleted():
            for shard in array.addressable_shards:
                found[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(found.values())


def ask(sampler):
    conversation = sampler.open([1, 2, 3])
    sampler.generate(
        conversation,
        Request(
            max_new_tokens=6,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            stop_ids=(),
            key=keys.as_array(keys.root_key(0)),
        ),
    )
    (generation,) = sampler.run()
    sampler.close(conversation)
    return generation.ids, np.round(generation.logprobs, 4).tolist()


def test_the_sampler_decodes_with_the_adapter(base, adapter):
    with Sampler(MODEL, lora.with_adapter(LORA, base, adapter), SIZES, 0) as adapted:
        ids, logprobs = ask(adapted)
        compiled = adapted.stats.compile_count
        adapted.set_params(lora.with_adapter(LORA, base, jax.tree.map(jnp.zeros_like, adapter)))
        off = ask(adapted)
        assert adapted.stats.reused_tokens == 0  # new weights forget the cache
        assert adapted.stats.compile_count == compiled
    with Sampler(MODEL, lora.merge(LORA, base, adapter), SIZES, 0) as merged:
        expected_ids, expected_logprobs = ask(merged)
        merged.set_params(base)
        assert ask(merged) == off
    assert ids == expected_ids
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-4)
    assert logprobs != off[1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LoraConfig(rank=-1), "lora.rank must be a whole number from 0 to 16,384, got -1"),
        (
            lambda: LoraConfig(rank=2, alpha=0.0),
            "lora.alpha must be from 1e-06 to 1,000,000, got 0.0",
        ),
        (lambda: LoraConfig(rank=2, targets=("q", "wq")), "lora.targets are q, wq"),
        (lambda: LoraConfig(rank=2, targets=("q", "q")), "each once"),
        (
            lambda: lora.init_adapter(MODEL, LoraConfig(), jax.random.key(0)),
            "there is no adapter",
        ),
    ],
)
def test_bad_values_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
