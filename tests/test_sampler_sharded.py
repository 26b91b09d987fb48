"""The sampler on a mesh of eight virtual devices: the same tokens, nothing gathered, no more
programs than without.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ictjax import keys
from ictjax import mesh as meshes
from ictjax.config import SamplerConfig
from ictjax.models import transformer
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig
from ictjax.sampler import Request, Sampler
from ictjax.sampler.state import blank_rows, nothing_left
from ictjax.sampler.step import turn
from ictjax.sampler.weights import sampling_weights

pytestmark = pytest.mark.usefixtures("optimised")

MODEL = ModelConfig(
    vocab_size=32,
    num_layers=1,
    d_model=16,
    d_ff=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    max_positions=64,
    tie_embeddings=True,
)
SIZES = SamplerConfig(
    num_slots=4,
    max_len=40,
    extend_buckets=(24,),
    row_buckets=(4,),
    decode_steps=4,
    max_top_k=8,
    attended_buckets=(40,),
    max_stop_ids=1,
)


def weights(model):
    # Larger than initial weights: replies then depend on the whole context, and are not uniform.
    return jax.tree.map(
        lambda leaf: leaf * (12 if leaf.ndim > 1 else 1),
        transformer.init_params(model, jax.random.key(0)),
    )


def replies(sampler):
    """Two turns of six conversations, more than there are slots, and a fork of every reply; by
    conversation and turn.
    """
    rng = np.random.default_rng(0)
    texts = [
        rng.integers(0, MODEL.vocab_size, int(rng.integers(16, 22))).tolist() for _ in range(6)
    ]
    found, turns = {}, {}
    for index, text in enumerate(texts):
        conversation = sampler.open(text)
        sampler.generate(conversation, request(index))
        turns[conversation] = (index,)
    sources = []
    for _ in range(200):
        for generation in sampler.step():
            turn_of = turns.pop(generation.conversation)
            found[turn_of] = generation
            if len(turn_of) == 1:
                fork = sampler.fork(generation.conversation)
                sampler.generate(fork, request(100 + turn_of[0]))
                turns[fork] = (*turn_of, "fork")
                # stays open for a while: a row cannot be copied out of a slot that was reused
                sources.append(generation.conversation)
            else:
                sampler.close(generation.conversation)
        if sampler.idle and sources:
            sampler.close(sources.pop(0))
        if not turns:
            break
    for source in sources:
        sampler.close(source)
    return found


def request(seed):
    return Request(
        max_new_tokens=5,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stop_ids=(3,),
        key=keys.as_array(keys.fold(keys.root_key(0), "turn", seed)),
    )


@functools.cache
def alone(model):
    with Sampler(model, weights(model), SIZES, 0) as sampler:
        return replies(sampler), sampler.stats


@pytest.mark.parametrize(
    ("kv_heads", "sizes", "cached"),
    [
        (4, {"data": 2, "tensor": 4}, (4, PartitionSpec("data", "tensor"))),
        (4, {"tensor": 8}, (8, PartitionSpec("data", "tensor"))),  # every kv head twice
        (2, {"tensor": 8}, (8, PartitionSpec("data", "tensor"))),  # every kv head four times
    ],
    ids=["data2_tensor4", "tensor8_kv4", "tensor8_kv2"],
)
def test_tokens_equal_those_of_one_device(kv_heads, sizes, cached):
    model = dataclasses.replace(MODEL, num_kv_heads=kv_heads)
    expected, stats = alone(model)
    mesh = meshes.open_mesh(meshes.MeshConfig(**sizes))
    with Sampler(model, weights(model), SIZES, 0, mesh=mesh) as sampler:
        found = replies(sampler)
        heads, spec = cached
        for array in (*sampler._programs._cache.k, *sampler._programs._cache.v):
            assert array.shape[1] == heads and array.sharding.is_equivalent_to(
                jax.NamedSharding(mesh, spec), 4
            )
        used = sampler._programs._params["layers"][0]
        for name in ("q", "o", "gate", "up", "down"):
            assert (
                used[name].addressable_shards[0].data.size * mesh.shape["tensor"] == used[name].size
            ), name
        assert sampler.stats.compile_count == stats.compile_count
        assert sampler.stats.row_copies > 0
        for program in sampler._programs._turns.values():
            assert largest_collective(program.as_text()) <= biggest_message(model)
    assert found.keys() == expected.keys()
    for turn_of, generation in found.items():
        assert generation.ids == expected[turn_of].ids
        np.testing.assert_allclose(generation.logprobs, expected[turn_of].logprobs, atol=1e-5)


def test_pages_of_every_copy_hold_the_same_tokens():
    """In one page more than a conversation of full length takes on every copy of the weights; every
    kv head is there twice.
    """
    model = dataclasses.replace(MODEL, num_kv_heads=2)
    expected, _ = alone(model)
    mesh = meshes.open_mesh(meshes.MeshConfig(data=2, tensor=4))
    paged = dataclasses.replace(SIZES, page_size=8, num_pages=12)
    with Sampler(model, weights(model), paged, 0, mesh=mesh) as sampler:
        found = replies(sampler)
        for program in sampler._programs._turns.values():
            assert largest_collective(program.as_text()) <= biggest_message(model)
        stats = sampler.stats
        assert stats.suspensions > 0 and stats.held_bytes == stats.held_tokens == 0
        assert stats.compile_count <= 5
        assert stats.row_copies > 0  # a prefix that only the other copy held
        for array in sampler._programs._cache.v:
            assert array.shape == (12, 2 * 2, 8, 4)
            assert array.addressable_shards[0].data.shape == (6, 1, 8, 4)
    assert found.keys() == expected.keys()
    for turn_of, generation in found.items():
        assert generation.ids == expected[turn_of].ids
        np.testing.assert_allclose(generation.logprobs, expected[turn_of].logprobs, atol=1e-5)


def largest_collective(program: str) -> int:
    """Elements of the largest array that a program exchanges between devices."""
    shapes = re.findall(
        r"= \(?\w+\[([\d,]*)\][^=]*?"
        r" (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(",
        program,
    )
    return max(
        (int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes),
        default=0,
    )


def biggest_message(model) -> int:
    """Activations of one dispatch: nothing of the size of a weight matrix of all layers, nor of the
    cache, may travel.
    """
    return (
        SIZES.num_slots
        * SIZES.extend_buckets[-1]
        * max(model.d_model, model.num_heads * model.head_dim)
    )


def test_a_dispatch_takes_rows_of_every_copy_of_the_weights():
    """Two conversations on two copies fill one dispatch of two rows, one each; two on the same copy
    would need four rows.
    """
    mesh = meshes.make_mesh(2, 1, 4)
    with Sampler(
        MODEL, weights(MODEL), dataclasses.replace(SIZES, row_buckets=(2, 4)), 0, mesh=mesh
    ) as sampler:
        opened = [sampler.open([1, 2, 3]), sampler.open([4, 5, 6])]
        for conversation in opened:
            sampler.generate(
                conversation, dataclasses.replace(request(conversation), max_new_tokens=1)
            )
        sampler.run()
        assert [sampler._slots[c] // 2 for c in opened] == [0, 1]
        assert {rows for rows, _, _ in sampler._programs._turns} == {2}
    with pytest.raises(
        ValueError, match=r"row_buckets \(1, 4\) are not multiples of the mesh's data axis 2"
    ):
        Sampler(MODEL, weights(MODEL), dataclasses.replace(SIZES, row_buckets=(1, 4)), 0, mesh=mesh)


def test_decoding_holds_no_second_copy_of_the_weights():
    """Stacked weights would be copied layer by layer before the first step, and weights of another
    dtype converted.
    """
    wide = dataclasses.replace(MODEL, num_layers=4, d_model=256, d_ff=1024, head_dim=32)
    params = jax.eval_shape(
        lambda: transformer.unstack_layers(wide, transformer.init_params(wide, jax.random.key(0)))
    )
    cache = jax.eval_shape(lambda: make_cache(wide, 2, 16))
    left = jax.eval_shape(lambda: nothing_left(2))
    packed = blank_rows(2, 1, num_stop_ids=1, num_bias=0, num_slots=2, pad_id=0)
    step = functools.partial(
        turn, wide, attended=16, max_steps=4, num_stop_ids=1, num_bias=0, max_top_k=4, pad_id=0
    )
    memory = (
        jax.jit(step, donate_argnums=1)
        .lower(params, cache, left, packed)
        .compile()
        .memory_analysis()
    )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert memory.temp_size_in_bytes < 0.1 * size


def test_sampling_weights_are_made_once_and_shared():
    model = dataclasses.replace(MODEL, dtype="bfloat16", num_layers=3)
    stacked = weights(model)
    made = sampling_weights(model, stacked)
    assert len(made["layers"]) == 3 and made["layers"][1]["gate"].dtype == jnp.bfloat16
    assert made["layers"][0]["attn_norm"].dtype == jnp.float32  # norms compute in float32
    np.testing.assert_array_equal(
        made["layers"][2]["gate"], stacked["layers"]["gate"][2].astype(jnp.bfloat16)
    )
    again = sampling_weights(model, made)
    assert all(a is b for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True))
    hidden = [transformer.forward(model, tree, jnp.arange(8)[None]) for tree in (stacked, made)]
    np.testing.assert_array_equal(*hidden)
    sampling_weights(model, stacked, consume=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(stacked["layers"]))
