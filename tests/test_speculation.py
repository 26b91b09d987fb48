"""Guessed tokens: what is proposed, how much of it is taken, and that replies are those of greedy
sampling token by token.

A wide step adds up its sums in another order than a narrow one, so that two ids whose logits are
equal but for the last bits may change places. The weights below are far from such ties (`margin`
holds them to it), and equal tokens are then equal mathematics.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ictjax.config import SamplerConfig
from ictjax.mesh import make_mesh
from ictjax.models import transformer
from ictjax.sampler import Sampler, turn_shapes
from ictjax.sampler.speculation import propose, verify
from tests.test_paged_sampler import MODEL, ROWS, SCARCE, before_five, play, request, same, weights

MIXED = (0.0, 0.0, 1.0)


def guessing(sizes: SamplerConfig, number: int = 3) -> SamplerConfig:
    return dataclasses.replace(sizes, guessed_tokens=number)


@pytest.fixture(scope="module")
def chaotic():
    return weights(MODEL)


@pytest.fixture(scope="module")
def samplers(chaotic):
    """By name; tests close what they open."""
    with (
        Sampler(MODEL, chaotic, ROWS, 0) as plain,
        # two copies of the weights, whose dispatches have fewer rows than slots: these are copied
        # out of the cache
        Sampler(
            MODEL,
            chaotic,
            guessing(
                dataclasses.replace(ROWS, row_buckets=(2,), decode_steps=2, extend_steps=3), 5
            ),
            0,
            mesh=make_mesh(2, 1, 1, devices=jax.devices()[:2]),
        ) as copied,
        Sampler(MODEL, chaotic, guessing(SCARCE), 0) as pages,
    ):
        yield {"plain": plain, "copied": copied, "pages": pages}


def test_the_longest_stretch_is_found_and_then_the_last_one():
    history = jnp.array(
        [
            [1, 2, 3, 9, 5, 2, 3, 7, 2, 3, 0, 0],  # 2 3: where it stood last
            [4, 2, 3, 8, 1, 2, 3, 7, 4, 2, 3, 0],  # 4 2 3: further back, but longer
            [5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0, 0],  # 9 stood nowhere; what is behind is no token
            [1, 2, 1, 2, 1, 0, 0, 0, 0, 0, 0, 0],  # runs into its own end, and goes on from there
            [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3],
            [8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],  # a single token
        ],
        jnp.int32,
    )
    known = jnp.array([10, 11, 5, 5, 12, 1], jnp.int32)
    proposed, found = propose(history, known, 3)
    assert found.tolist() == [True, True, False, True, True, False]
    assert proposed[jnp.array([0, 1, 3, 4])].tolist() == [
        [7, 2, 3],
        [8, 1, 2],
        [2, 1, 2],
        [3, 3, 3],
    ]


def test_right_proposals_are_taken_up_to_a_stop():
    sampled = jnp.array([[5, 6, 7, 8]] * 6, jnp.int32)
    proposed = jnp.array(
        [[5, 6, 7], [5, 6, 9], [4, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7]], jnp.int32
    )
    counts = jnp.array([3, 3, 3, 1, 3, 3], jnp.int32)
    active = jnp.array([True] * 5 + [False])
    stops = jnp.array([[-1], [-1], [-1], [-1], [6], [-1]], jnp.int32)
    verdict = verify(sampled, proposed, counts, active, stops)
    assert verdict.count_b.tolist() == [4, 3, 1, 2, 2, 0]
    assert verdict.stopped_b.tolist()[:5] == [False, False, False, False, True]


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences_equal_those_without_guesses(samplers, seed):
    """Forks, cancelled replies, ends in text, budgets of one token and sampled conversations
    included: and what follows a reply in which guesses were rejected.
    """
    expected = play(samplers["plain"], seed, temperatures=MIXED)
    for name in ("copied", "pages"):
        before = samplers[name].stats
        same(play(samplers[name], seed, temperatures=MIXED), expected)
        after = samplers[name].stats
        proposed = after.proposed_tokens - before.proposed_tokens
        assert 0 <= after.accepted_tokens - before.accepted_tokens < proposed
    assert samplers["plain"].stats.proposed_tokens == 0


@pytest.fixture(scope="module")
def repetitive():
    """Without guesses and with them, of weights whose replies soon repeat themselves."""
    params = transformer.init_params(MODEL, jax.random.key(1))
    params = jax.tree.map(lambda leaf: leaf * (4 if leaf.ndim > 1 else 1), params)
    sizes = dataclasses.replace(ROWS, max_bias_ids=2, max_top_logprobs=2)
    with (
        Sampler(MODEL, params, sizes, 0) as plain,
        Sampler(MODEL, params, guessing(sizes), 0) as guesser,
    ):
        yield plain, guesser


def replies(sampler, **options):
    rng = np.random.default_rng(0)
    numbers, found = [], {}
    for _ in range(6):
        text = np.tile(rng.integers(0, MODEL.vocab_size, 4), 3).tolist()
        numbers.append(sampler.open(text))
        sampler.generate(numbers[-1], request(temperature=0.0, max_new_tokens=24, **options))
    while len(found) < len(numbers):
        for generation in sampler.step():
            found[numbers.index(generation.conversation)] = [generation]
            sampler.close(generation.conversation)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"stop_ids": ()},
        {"stop_ids": (2,), "min_p": 0.1, "top_k": 1},
        {"stop_ids": (), "bias": {6: 2.0, 7: -math.inf}, "top_logprobs": 2},
        {"stop_ids": (), "ends": before_five},
    ],
)
def test_what_repeats_itself_takes_fewer_dispatches(repetitive, options):
    plain, guesser = repetitive
    before = plain.stats, guesser.stats
    found, expected = replies(guesser, **options), replies(plain, **options)
    same(found, expected)
    for number, (reply,) in expected.items():
        reported = [
            np.array(one.top_logprobs).reshape(-1, 2, 2) for one in (found[number][0], reply)
        ]
        assert len(reported[1]) == (len(reply.ids) if "top_logprobs" in options else 0)
        np.testing.assert_array_equal(*(one[..., 0] for one in reported))
        np.testing.assert_allclose(*(one[..., 1] for one in reported), atol=1e-4)
    dispatches, fewer = (
        sampler.stats.dispatches - earlier.dispatches
        for sampler, earlier in zip(repetitive, before, strict=True)
    )
    accepted = guesser.stats.accepted_tokens - before[1].accepted_tokens
    decoded = guesser.stats.decoded_tokens - before[1].decoded_tokens
    assert accepted > 0.3 * decoded and fewer < 0.8 * dispatches


def test_a_reply_of_sampled_tokens_proposes_nothing(samplers):
    sampler = samplers["copied"]
    before = sampler.stats
    number = sampler.open([1, 2, 1, 2, 1])
    sampler.generate(number, request(4, max_new_tokens=6))
    (generation,) = sampler.run()
    sampler.close(number)
    assert sampler.stats.proposed_tokens == before.proposed_tokens and generation.ids


def test_guesses_add_no_programs(samplers):
    assert list(turn_shapes(guessing(ROWS))) == list(turn_shapes(ROWS))
    assert len(samplers["copied"].programs()) == len(samplers["plain"].programs())
