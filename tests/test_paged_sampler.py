"""Conversations in pages against the same conversations in rows of their own: equal tokens whatever
is shared, evicted or suspended, and nothing left behind.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ictjax import keys
from ictjax import mesh as meshes
from ictjax.config import SamplerConfig
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.sampler import Request, Sampler

MODEL = ModelConfig(
    vocab_size=23,
    num_layers=2,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
    tie_embeddings=True,
)
ROWS = SamplerConfig(
    num_slots=4,
    max_len=40,
    extend_buckets=(8,),
    row_buckets=(4,),
    decode_steps=3,
    max_top_k=1,
    attended_buckets=(40,),
    max_stop_ids=1,
)
PAGES = dataclasses.replace(ROWS, page_size=4, num_pages=40)
SCARCE = dataclasses.replace(PAGES, num_pages=12)  # one conversation of 40 tokens, and two pages


def weights(model):
    # Larger than initial weights: replies then depend on the whole context, and are not uniform.
    return jax.tree.map(
        lambda leaf: leaf * (12 if leaf.ndim > 1 else 1),
        transformer.init_params(model, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def samplers():
    """By name; tests close what they open."""
    with (
        Sampler(MODEL, weights(MODEL), ROWS, 0) as rows,
        Sampler(MODEL, weights(MODEL), PAGES, 0) as pages,
        Sampler(MODEL, weights(MODEL), SCARCE, 0) as scarce,
    ):
        yield {"rows": rows, "pages": pages, "scarce": scarce}


def request(seed=0, **changes):
    defaults = {
        "max_new_tokens": 7,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "stop_ids": (3,),
        "key": keys.as_array(keys.root_key(seed)),
    }
    return Request(**defaults | changes)


def check_pools(sampler):
    """Every page is free, kept or used, and used as often as the tables say."""
    store = sampler._store
    users = [np.zeros(len(pool._users), int) for pool in store._pools]
    for seat in store._seats.values():
        for page in seat.pages:
            users[seat.shard][page] += 1
    for pool, expected in zip(store._pools, users, strict=True):
        np.testing.assert_array_equal(pool._users, expected)
        free, kept = set(pool._free), set(pool._kept)
        used = set(np.flatnonzero(expected).tolist())
        assert free | kept | used == set(range(len(expected)))
        assert len(pool._free) + len(kept) + len(used) == len(expected)
        assert all(pool._by_name[name] not in free for name in pool._by_name)
    if not store._seats:
        assert not store._host and not store._awaited


def play(sampler, seed, *, count=7):
    """A random sequence of everything that can be asked for; replies by conversation, in the order
    in which these were opened, up to the turn that was cancelled.
    """
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, 23, 17).tolist() for _ in range(2)]
    opened, found, plans = {}, {}, {}
    for number in range(count):
        text = [*prefixes[number % 2][: rng.integers(0, 18)], *rng.integers(0, 23, 3).tolist()]
        plans[number] = {
            "text": text,
            "parent": int(rng.integers(number)) if number and rng.random() < 0.3 else None,
            "turns": [rng.integers(0, 23, rng.integers(1, 6)).tolist() for _ in range(3)],
            "new": rng.integers(1, 8, 4).tolist(),
            "cancelled": bool(rng.random() < 0.15),
        }

    def start(number, conversation):
        opened[conversation] = number
        found[number] = []
        ask(number, conversation)

    def ask(number, conversation):
        turn, plan = len(found[number]), plans[number]
        sampler.generate(
            conversation, request(100 * number + turn, max_new_tokens=plan["new"][turn])
        )
        if plan["cancelled"] and turn == 1:
            sampler.close(conversation)
            del opened[conversation]

    for number, plan in plans.items():
        if plan["parent"] is None:
            start(number, sampler.open(plan["text"]))
    for _ in range(300):
        for generation in sampler.step():
            conversation = generation.conversation
            number = opened[conversation]
            found[number].append(generation)
            for child, plan in plans.items():
                if plan["parent"] == number and child not in found:
                    start(child, sampler.fork(conversation))
            if len(found[number]) == 4 or generation.finish == "context":
                sampler.close(conversation)
                del opened[conversation]
            else:
                sampler.extend(conversation, plans[number]["turns"][len(found[number]) - 1])
                ask(number, conversation)
        if not opened:
            break
    assert not opened and sampler.idle
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for number, generations in expected.items():
        for ours, theirs in zip(found[number], generations, strict=True):
            assert (ours.ids, ours.finish) == (theirs.ids, theirs.finish)
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)


@pytest.mark.parametrize("seed", range(6))
def test_random_sequences_equal_those_in_rows(samplers, seed):
    expected = play(samplers["rows"], seed)
    for name in ("pages", "scarce"):
        same(play(samplers[name], seed), expected)
        check_pools(samplers[name])
        assert samplers[name].stats.held_bytes == 0
    assert seed or samplers["scarce"].stats.suspensions > 0


def test_x(samplers):
    for name, s in samplers.items():
        print(name, s.stats)
