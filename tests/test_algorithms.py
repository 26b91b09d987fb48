"""Every algorithm on one tiny batch, against its formula written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.presets import PRESETS, by_algorithm
from ictjax import grpo
from ictjax.algorithms import ALGORITHMS, with_algorithm
from ictjax.batch import shaped
from tests.test_refill import candidate

# One group of four replies of 3, 1, 2 and 2 tokens. By hand: the mean of the rewards is 0.5, their
# deviations from it are 0.5, -0.5, 0.25 and -0.25, and the mean of the squares of these 0.15625.
REWARD = np.array([1.0, 0.0, 0.75, 0.25])
CENTRED = np.array([0.5, -0.5, 0.25, -0.25])
NORMAL = CENTRED / 0.15625**0.5  # 1.26491, -1.26491, 0.63246, -0.63246
LENGTH = np.array([3, 1, 2, 2])
MASK = np.arange(3) < LENGTH[:, None]
# tokens that became likelier and rarer, within and beyond every clip
RATIO = np.array([[1.1, 1.25, 1.5], [0.7, 1, 1], [0.9, 1.1, 1], [1.4, 0.75, 1]])
LOGP = np.log(np.array([[0.5, 0.3, 0.2], [0.4, 1, 1], [0.6, 0.1, 1], [0.3, 0.2, 1]]))
OLD = LOGP - np.log(RATIO)
REFERENCE = LOGP + np.array([[0.1, -0.2, 0.3], [-0.4, 0, 0], [0.2, 0.1, 0], [-0.3, 0.5, 0]])
K3 = np.exp(REFERENCE - LOGP) - (REFERENCE - LOGP) - 1
K3_SLOPE = 1 - np.exp(REFERENCE - LOGP)  # by log p


def _clipped(ratio, advantage, low, high):
    """Objective and its slope by log p of one ratio: min(r A, clip(r) A)."""
    clipped = np.clip(ratio, 1 - low, 1 + high)
    bound = clipped * advantage < ratio * advantage
    return np.where(bound, clipped, ratio) * advantage, np.where(bound, 0, ratio * advantage)


def _by_tokens(advantage, low, high, coefficient, beta=0.0):
    objective, slope = _clipped(RATIO, advantage[:, None], low, high)
    loss = (coefficient * MASK * (beta * K3 - objective)).sum()
    return loss, coefficient * MASK * (beta * K3_SLOPE - slope)


def _gspo():
    # equation 5: the geometric mean of a reply's ratios, the mean over replies
    ratio = np.exp((np.log(RATIO) * MASK).sum(axis=1) / LENGTH)
    objective, slope = _clipped(ratio, NORMAL, 3e-4, 4e-4)
    return -objective.mean(), -(slope / LENGTH / 4)[:, None] * MASK


def _rloo():
    # the reward less the mean of the other three: 1 - 1/3, 0 - 2/3, 3/4 - 5/12, 1/4 - 7/12
    advantage = np.array([2 / 3, -2 / 3, 1 / 3, -1 / 3])
    # ... less 0.05 times what the KL still costs from each token on, under the policy that sampled
    k1 = (OLD - REFERENCE) * MASK
    to_go = np.array([[k1[b, t:].sum() for t in range(3)] for b in range(4)])
    per_token = (advantage[:, None] - 0.05 * to_go) * MASK
    # REINFORCE: the value of the surrogate is that of the advantages, the slope is theirs too
    return -per_token.sum() / 4, -per_token / 4


EXPECTED = {
    # 8 tokens that count the same
    "paper": (NORMAL, _by_tokens(NORMAL, 0.2, 0.2, 1 / 8, beta=0.001)),
    # 4 replies that count the same, and within each its tokens
    "grpo": (NORMAL, _by_tokens(NORMAL, 0.2, 0.2, 1 / 4 / LENGTH[:, None], beta=0.04)),
    # 4 replies over the limit of a reply, 2048 tokens
    "dr-grpo": (CENTRED, _by_tokens(CENTRED, 0.2, 0.2, 1 / 4 / 2048)),
    "dapo": (NORMAL, _by_tokens(NORMAL, 0.2, 0.28, 1 / 8)),
    "gspo": (NORMAL, _gspo()),
    "rloo": (np.array([2 / 3, -2 / 3, 1 / 3, -1 / 3]), _rloo()),
}


def test_every_algorithm_is_tried():
    assert EXPECTED.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_loss_and_gradient_are_those_of_the_formula(name):
    expected, (value, gradient) = EXPECTED[name]
    config = dataclasses.replace(ALGORITHMS[name], group_size=4)
    found = grpo.advantages(config, REWARD[None], np.ones((1, 4), bool))
    np.testing.assert_allclose(found.advantage_qg[0], expected, rtol=1e-5)
    mask = jnp.asarray(MASK)
    coefficient = grpo.token_coefficients(config, mask, jnp.ones(4))

    def loss(logp):
        terms = grpo.token_loss(
            config, logp, jnp.asarray(OLD), jnp.asarray(REFERENCE), found.advantage_qg[0], mask
        )
        return (coefficient * terms.loss_br).sum()

    ours, slope = jax.value_and_grad(loss)(jnp.asarray(LOGP))
    np.testing.assert_allclose(ours, value, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(slope, gradient, rtol=1e-4, atol=1e-8)


def test_leave_one_out_knows_who_is_left_out_and_dead_groups():
    config = dataclasses.replace(ALGORITHMS["rloo"], group_size=3)
    valid = np.array([[True, True, False], [True] * 3, [True, False, False]])
    reward = np.array([[1.0, 0.0, 9.0], [0.1, 0.1, 0.1], [1.0, 5.0, 5.0]])
    found = grpo.advantages(config, reward, valid).advantage_qg
    np.testing.assert_array_equal(found, [[1, -1, 0], [0, 0, 0], [0, 0, 0]])


def test_the_run_keeps_group_size_temperature_and_the_limit_of_a_reply():
    base = PRESETS["fake-tiny"]
    run = dataclasses.replace(base, grpo=dataclasses.replace(base.grpo, temperature=0.7))
    for name in ALGORITHMS:
        chosen = with_algorithm(run, name)
        assert (chosen.grpo.group_size, chosen.grpo.temperature) == (4, 0.7)
        assert dataclasses.replace(chosen, grpo=run.grpo) == run
    assert with_algorithm(run, "dr-grpo").grpo.constant_length == 8
    assert with_algorithm(run, "rloo").grpo.constant_length == 1
    with pytest.raises(
        ValueError, match=r"Unknown algorithm 'drgrpo' \(did you mean 'dr-grpo'\?\)"
    ):
        by_algorithm(run, "drgrpo")


def test_overlong_replies_lose_by_the_formula():
    # DAPO's own numbers: 16,384 tokens expected, 4,096 more to be punished in, 20,480 at most
    lengths = np.array([[1, 16_384, 18_432, 20_480]])
    found = grpo.overlong_penalties(lengths, max_length=20_480, penalty=1.0, buffer=0.2)
    np.testing.assert_allclose(found, [[0, 0, 0.5, 1]])


def test_shaping_leaves_candidates_without_a_reward_alone():
    estimator = dataclasses.replace(ALGORITHMS["dapo"], group_size=3)
    group = [candidate(1.0, length=8), candidate(1.0, length=10), candidate(None, length=10)]
    (found,) = shaped([group], estimator, max_reply_tokens=10)
    assert [c.reward for c in found] == [1.0, 0.5, None]


def test_correction_by_hand():
    # sampler's probabilities are 1/4, 3 times and 1.5 times the learner's; one is masked
    old = jnp.log(jnp.asarray([[0.4, 0.1, 0.2], [0.2, 0.9, 0.9]]))
    sampler = jnp.log(jnp.asarray([[0.1, 0.3, 0.3], [0.2, 0.1, 0.9]]))
    mask = jnp.asarray([[True, True, True], [True, False, False]])
    base = dataclasses.replace(ALGORITHMS["grpo"], correction_cap=2.0)
    product = 4 / 3 * 2 / 3
    for kind, level, weights, changed in (
        ("none", "token", [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]),
        ("truncated", "token", [[2, 1 / 3, 2 / 3], [1, 1, 1]], [[1, 0, 0], [0, 0, 0]]),
        ("masked", "token", [[0, 0, 2 / 3], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]),
        ("truncated", "sequence", [[product] * 3, [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]),
    ):
        config = dataclasses.replace(base, correction=kind, correction_level=level)
        found = grpo.correction(config, old, sampler, mask)
        np.testing.assert_allclose(found.weight_br, weights, rtol=1e-5)
        np.testing.assert_array_equal(found.changed_br, changed)
    # at a cap of 1.1 the whole reply, whose weight is 0.89, is dropped: 1 / 1.1 is 0.91
    config = dataclasses.replace(
        base, correction="masked", correction_level="sequence", correction_cap=1.1
    )
    found = grpo.correction(config, old, sampler, mask)
    np.testing.assert_array_equal(found.weight_br, [[0, 0, 0], [1, 1, 1]])


def test_a_correction_weighs_the_policy_and_not_the_kl():
    config = dataclasses.replace(ALGORITHMS["grpo"], group_size=4)
    weight = jnp.asarray([[0.5, 0.0, 2.0]] * 4)
    arrays = [jnp.asarray(x) for x in (LOGP, OLD, REFERENCE)]
    advantage, mask = jnp.asarray(NORMAL), jnp.asarray(MASK)
    plain = grpo.token_loss(config, *arrays, advantage, mask)
    weighed = grpo.token_loss(config, *arrays, advantage, mask, weight)
    np.testing.assert_allclose(weighed.policy_br, weight * plain.policy_br)
    np.testing.assert_allclose(
        weighed.loss_br, weight * plain.policy_br + 0.04 * plain.kl_br, rtol=1e-6
    )
