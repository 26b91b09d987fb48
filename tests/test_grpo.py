import dataclasses

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ictjax import grpo
from ictjax.config import PAPER, GRPOConfig

CONFIG = dataclasses.replace(PAPER, group_size=4, std_eps=0.0)


def _rewards(*rows):
    return jnp.asarray(rows, jnp.float32)


def test_mean_advantages_by_hand():
    reward_qg = _rewards([1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    result = grpo.mean_advantages(reward_qg, jnp.ones((2, 4), bool))
    chex.assert_trees_all_close(
        result, _rewards([0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75])
    )


def test_mean_std_advantages_by_hand():
    reward_qg = _rewards([1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    result = grpo.mean_std_advantages(reward_qg, jnp.ones((2, 4), bool), eps=0.0)
    root = 3**0.5
    chex.assert_trees_all_close(
        result, _rewards([1, -1, -1, 1], [-1 / root, -1 / root, -1 / root, root]), rtol=1e-6
    )


def test_invalid_members_are_left_out_of_the_statistics_even_when_nan():
    reward_qg = _rewards([1.0, 0.0, jnp.nan, 99.0])
    valid_qg = jnp.asarray([[True, True, False, False]])
    result = grpo.advantages(CONFIG, reward_qg, valid_qg)
    np.testing.assert_array_equal(result.advantage_qg, [[1.0, -1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(result.weight_qg, [[1.0, 1.0, 0.0, 0.0]])
    assert not result.dead_q[0]


@pytest.mark.parametrize("advantage", ["mean", "mean_std"])
def test_dead_groups_have_exactly_zero_advantage_and_are_counted(advantage):
    # The float32 mean of four 0.1 is not 0.1: the difference, scaled by a tiny deviation, would be
    # a full-sized advantage.
    reward_qg = _rewards(
        [0.1] * 4, [0.1, 0.7, 0.1, 0.1], [0.3, 5.0, 5.0, 5.0], [1.0, 2.0, 3.0, 4.0]
    )
    valid_qg = jnp.asarray([[True] * 4, [True] * 4, [True, False, False, False], [False] * 4])
    result = grpo.advantages(dataclasses.replace(CONFIG, advantage=advantage), reward_qg, valid_qg)
    np.testing.assert_array_equal(result.dead_q, [True, False, True, True])
    np.testing.assert_array_equal(result.advantage_qg[jnp.array([0, 2, 3])], np.zeros((3, 4)))
    assert (result.advantage_qg[1] != 0).all()


def test_dropped_dead_groups_have_no_weight():
    reward_qg = _rewards([1.0] * 4, [1.0, 0.0, 0.0, 0.0])
    result = grpo.advantages(
        dataclasses.replace(CONFIG, dead_groups="drop"), reward_qg, jnp.ones((2, 4), bool)
    )
    np.testing.assert_array_equal(result.weight_qg, [[0.0] * 4, [1.0] * 4])


def test_advantages_refuse_another_group_size():
    with pytest.raises(ValueError, match=r"group_size=4.*\(2, 3\)"):
        grpo.advantages(CONFIG, jnp.zeros((2, 3)), jnp.ones((2, 3), bool))


# Multiples of 1/8 so that shifts and sums are exact in float32 and no group is "almost" dead.
_groups = st.lists(
    st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=4, max_size=4),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("advantage", ["mean", "mean_std"])
@hypothesis.settings(deadline=None, max_examples=25, derandomize=True)
@hypothesis.given(groups=_groups, shift=st.integers(-8, 8), order=st.permutations(range(4)))
def test_advantages_ignore_shifts_follow_permutations_and_sum_to_zero(
    advantage, groups, shift, order
):
    config = dataclasses.replace(CONFIG, advantage=advantage)
    reward_qg = jnp.asarray(groups, jnp.float32)
    valid_qg = jnp.ones(reward_qg.shape, bool)
    result = grpo.advantages(config, reward_qg, valid_qg).advantage_qg
    np.testing.assert_allclose(
        grpo.advantages(config, reward_qg + shift, valid_qg).advantage_qg, result, atol=1e-5
    )
    order = jnp.asarray(order)
    np.testing.assert_allclose(
        grpo.advantages(config, reward_qg[:, order], valid_qg).advantage_qg,
        result[:, order],
        atol=1e-5,
    )
    np.testing.assert_allclose(result.sum(axis=1), 0.0, atol=1e-4)
    if advantage == "mean_std":
        scaled = grpo.advantages(config, 2.0 * reward_qg, valid_qg).advantage_qg
        np.testing.assert_allclose(scaled, result, atol=1e-5)


MASK = jnp.asarray([[True, True, True], [True, False, False], [True, True, False]])
WEIGHT = jnp.asarray([1.0, 1.0, 0.0])  # the last row is padding


def test_coefficients_by_hand():
    np.testing.assert_allclose(grpo.token_mean(MASK, WEIGHT), [[0.25] * 3, [0.25, 0, 0], [0] * 3])
    np.testing.assert_allclose(
        grpo.sequence_mean(MASK, WEIGHT), [[1 / 6] * 3, [0.5, 0, 0], [0] * 3], rtol=1e-6
    )
    np.testing.assert_allclose(
        grpo.constant(MASK, WEIGHT, length=10), [[0.05] * 3, [0.05, 0, 0], [0] * 3], rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "constant"])
def test_coefficients_of_an_empty_batch_are_zero(kind):
    config = dataclasses.replace(CONFIG, loss_normalisation=kind)
    np.testing.assert_array_equal(
        grpo.token_coefficients(config, jnp.zeros((2, 3), bool), jnp.ones(2)), np.zeros((2, 3))
    )
    np.testing.assert_array_equal(
        grpo.token_coefficients(config, jnp.ones((2, 3), bool), jnp.zeros(2)), np.zeros((2, 3))
    )


def test_a_row_without_tokens_is_no_sequence():
    mask_br = jnp.asarray([[True, True], [False, False]])
    np.testing.assert_allclose(grpo.sequence_mean(mask_br, jnp.ones(2)), [[0.5, 0.5], [0.0, 0.0]])
    np.testing.assert_allclose(
        grpo.constant(mask_br, jnp.ones(2), length=4), [[0.25, 0.25], [0.0, 0.0]]
    )


def test_clip_symmetric_and_higher():
    ratio_br = jnp.asarray([[0.5, 1.0, 1.25, 1.5]])
    for advantage, high, losses, clipped in (
        (1.0, 0.2, [-0.5, -1.0, -1.2, -1.2], [False, False, True, True]),
        (1.0, 0.28, [-0.5, -1.0, -1.25, -1.28], [False, False, False, True]),
        (-1.0, 0.2, [0.8, 1.0, 1.25, 1.5], [True, False, False, False]),
        (0.0, 0.2, [0.0, 0.0, 0.0, 0.0], [False] * 4),
    ):
        loss_br, clipped_br = grpo.clipped_surrogate(
            ratio_br, jnp.full((1, 4), advantage), clip_low=0.2, clip_high=high
        )
        np.testing.assert_allclose(loss_br[0], losses, rtol=1e-6)
        np.testing.assert_array_equal(clipped_br[0], clipped)


def test_clip_stops_the_gradient_only_where_it_binds():
    def loss(ratio_br, advantage):
        return grpo.clipped_surrogate(
            ratio_br, jnp.full(ratio_br.shape, advantage), clip_low=0.0, clip_high=0.0
        )[0].sum()

    ratio_br = jnp.asarray([[0.9, 1.0, 1.1]])
    np.testing.assert_allclose(jax.grad(loss)(ratio_br, 2.0), [[-2.0, -2.0, 0.0]])
    np.testing.assert_allclose(jax.grad(loss)(ratio_br, -2.0), [[0.0, 2.0, 2.0]])


def test_ratios_by_hand():
    logp_br = jnp.log(jnp.asarray([[0.2, 0.4, 0.5], [0.1, 0.9, 0.9]]))
    old_br = jnp.log(jnp.asarray([[0.1, 0.1, 0.9], [0.2, 0.1, 0.1]]))
    mask_br = jnp.asarray([[True, True, False], [True, False, False]])
    np.testing.assert_allclose(
        grpo.ratio_token(logp_br, old_br, mask_br), [[2, 4, 1], [0.5, 1, 1]], rtol=1e-5
    )
    np.testing.assert_allclose(
        grpo.ratio_sequence(logp_br, old_br, mask_br), [[8**0.5, 8**0.5, 1], [0.5, 1, 1]], rtol=1e-5
    )
    np.testing.assert_allclose(grpo.ratio_none(logp_br, mask_br), np.ones((2, 3)))


def test_sequence_ratio_has_the_gradient_of_gspo():
    key = jax.random.key(0)
    logp_br, old_br = jax.random.normal(key, (2, 2, 3))
    mask_br = jnp.asarray([[True, True, True], [True, True, False]])
    advantage_b = jnp.asarray([1.5, -0.5])

    def gspo(logp_br):  # equation 5, unclipped, written as in the paper
        ratio_b = jnp.exp(
            (jnp.where(mask_br, logp_br - old_br, 0.0)).sum(axis=1) / mask_br.sum(axis=1)
        )
        return (ratio_b * advantage_b).mean()

    def ours(logp_br):
        ratio_br = grpo.ratio_sequence(logp_br, old_br, mask_br)
        return (grpo.sequence_mean(mask_br, jnp.ones(2)) * ratio_br * advantage_b[:, None]).sum()

    chex.assert_trees_all_close(ours(logp_br), gspo(logp_br), rtol=1e-6)
    chex.assert_trees_all_close(jax.grad(ours)(logp_br), jax.grad(gspo)(logp_br), rtol=1e-5)


def test_kl_estimators_by_hand_and_in_expectation():
    p, q = jnp.asarray([0.5, 0.3, 0.2]), jnp.asarray([0.2, 0.2, 0.6])
    mask_br = jnp.ones((1, 3), bool)
    k1_br = grpo.kl_k1(jnp.log(p)[None], jnp.log(q)[None], mask_br)
    k3_br = grpo.kl_k3(jnp.log(p)[None], jnp.log(q)[None], mask_br)
    np.testing.assert_allclose(k3_br[0, 0], 0.4 - np.log(0.4) - 1, rtol=1e-5)
    exact = (p * jnp.log(p / q)).sum()
    np.testing.assert_allclose((p * k1_br[0]).sum(), exact, rtol=1e-5)
    np.testing.assert_allclose((p * k3_br[0]).sum(), exact, rtol=1e-5)
    assert (k3_br >= 0).all() and (k1_br < 0).any()


def test_kl_reward_to_go_by_hand():
    k1_br = jnp.asarray([[1.0, 2.0, 4.0], [3.0, jnp.nan, jnp.nan]])
    mask_br = jnp.asarray([[True, True, True], [True, False, False]])
    np.testing.assert_array_equal(
        grpo.kl_reward_to_go(k1_br, mask_br), [[7.0, 6.0, 4.0], [3.0, 0.0, 0.0]]
    )


def test_k1_in_reward_has_the_expected_gradient_of_the_sequence_kl():
    """All 9 sequences of two tokens over three words, weighted by their probability: the
    estimator's expectation, exactly.
    """
    config = dataclasses.replace(CONFIG, kl="k1_in_reward", kl_coefficient=1.0, importance="none")
    key = jax.random.key(1)
    # logits; the second given the first word
    first, second = jax.random.normal(key, (3,)), jax.random.normal(key, (3, 3))
    ref = (jnp.asarray([0.5, 0.0, -1.0]), jnp.zeros((3, 3)))
    words = jnp.asarray([[a, b] for a in range(3) for b in range(3)])

    def logp_br(params):
        first, second = jax.nn.log_softmax(params[0]), jax.nn.log_softmax(params[1], axis=-1)
        return jnp.stack([first[words[:, 0]], second[words[:, 0], words[:, 1]]], axis=1)

    def estimate(params):
        probability_b = jnp.exp(jax.lax.stop_gradient(logp_br(params)).sum(axis=1))
        terms = grpo.token_loss(
            config,
            logp_br(params),
            logp_br(params),
            logp_br(ref),
            jnp.zeros(9),
            jnp.ones((9, 2), bool),
        )
        return (probability_b[:, None] * terms.loss_br).sum()

    def exact(params):
        log_b, ref_b = logp_br(params).sum(axis=1), logp_br(ref).sum(axis=1)
        return (jnp.exp(log_b) * (log_b - ref_b)).sum()

    chex.assert_trees_all_close(
        jax.grad(estimate)((first, second)), jax.grad(exact)((first, second)), atol=1e-6
    )


@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
def test_on_policy_gradient_is_reinforce(importance):
    config = dataclasses.replace(
        CONFIG, importance=importance, kl="none", clip_low=0.0, clip_high=0.0
    )
    logp_br = jax.random.normal(jax.random.key(2), (3, 3))
    advantage_b = jnp.asarray([1.0, -2.0, 5.0])
    coefficient_br = grpo.token_coefficients(config, MASK, WEIGHT)

    def loss(logp_br):
        return (
            coefficient_br
            * grpo.token_loss(config, logp_br, logp_br, None, advantage_b, MASK).loss_br
        ).sum()

    np.testing.assert_allclose(
        jax.grad(loss)(logp_br), -coefficient_br * advantage_b[:, None] * MASK, rtol=1e-6
    )


def test_k3_is_added_to_the_loss_with_its_coefficient_and_k1_is_not():
    logp_br, ref_br = jax.random.normal(jax.random.key(3), (2, 3, 3))
    for kl, factor in (("k3_in_loss", 0.5), ("k1_in_reward", 0.0)):
        config = dataclasses.replace(CONFIG, kl=kl, kl_coefficient=0.5)
        terms = grpo.token_loss(config, logp_br, logp_br, ref_br, jnp.ones(3), MASK)
        np.testing.assert_allclose(terms.loss_br, terms.policy_br + factor * terms.kl_br, rtol=1e-6)
        np.testing.assert_allclose(terms.kl_br, grpo.kl_k3(logp_br, ref_br, MASK))


@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
@pytest.mark.parametrize("kl", ["none", "k1_in_reward", "k3_in_loss"])
@pytest.mark.parametrize("loss_normalisation", ["token_mean", "sequence_mean", "constant"])
def test_masked_positions_never_matter(importance, kl, loss_normalisation):
    config = dataclasses.replace(
        CONFIG, importance=importance, kl=kl, loss_normalisation=loss_normalisation
    )
    logp_br, old_br, ref_br = jax.random.normal(jax.random.key(4), (3, 3, 3))
    mask_br = MASK.at[2].set(False)  # a row without any token

    @jax.value_and_grad
    def loss(logp_br, old_br, ref_br):
        terms = grpo.token_loss(
            config, logp_br, old_br, ref_br, jnp.asarray([1.0, -1.0, 2.0]), mask_br
        )
        return (grpo.token_coefficients(config, mask_br, jnp.ones(3)) * terms.loss_br).sum()

    expected = loss(logp_br, old_br, ref_br)
    for junk in (1e30, -1e30, jnp.nan):
        value, grad_br = loss(*(jnp.where(mask_br, x, junk) for x in (logp_br, old_br, ref_br)))
        np.testing.assert_array_equal(value, expected[0])
        np.testing.assert_array_equal(grad_br, jnp.where(mask_br, expected[1], 0.0))


def test_reference_is_required_by_the_kl():
    with pytest.raises(ValueError, match="k3_in_loss.*reference"):
        grpo.token_loss(
            CONFIG, jnp.zeros((1, 1)), jnp.zeros((1, 1)), None, jnp.zeros(1), jnp.ones((1, 1), bool)
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_size", 1),
        ("advantage", "median"),
        ("std_eps", -1.0),
        ("dead_groups", "revive"),
        ("loss_normalisation", "sum"),
        ("constant_length", 0),
        ("importance", "word"),
        ("clip_low", 1.5),
        ("clip_high", float("nan")),
        ("kl", "k2"),
        ("kl_coefficient", -0.1),
        ("temperature", 0.0),
    ],
)
def test_config_names_the_wrong_value(field, value):
    with pytest.raises(ValueError, match=f"grpo.{field} .*{value}"):
        dataclasses.replace(PAPER, **{field: value})


def test_config_has_no_defaults():
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(GRPOConfig))
    assert (PAPER.group_size, PAPER.kl_coefficient, PAPER.kl) == (
        8,
        0.001,
        "k3_in_loss",
    )
