"""Group-relative policy optimisation as named, composable pure functions.

Sources, named in the docstrings by these words:

- GRPO: DeepSeekMath, https://arxiv.org/abs/2402.03300, equations 3 and 4.
- Dr. GRPO: Understanding R1-Zero-Like Training, https://arxiv.org/abs/2503.20783, section 3.
- DAPO: https://arxiv.org/abs/2503.14476, sections 3.1 (clip-higher), 3.3 (token-level loss) and
  3.4 (overlong reward shaping).
- GSPO: Group Sequence Policy Optimization, https://arxiv.org/abs/2507.18071, sections 4.1 and 4.3.
- RLOO: Back to Basics, https://arxiv.org/abs/2402.14740.
- TIS: F. Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025,
  https://fengyao.notion.site/off-policy-rl (truncated importance sampling).
- MIS: J. Liu et al., When Speed Kills Stability: Demystifying RL Collapse from the
  Training-Inference Mismatch, 2025 (masked importance sampling, of sequences); of tokens: IcePop,
  Ling Team, Every Step Evolves, 2025.
- k1, k3: J. Schulman, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html.

Shapes beside the package key: R response positions of a row. `mask_br` is true at sampled tokens,
`weight_b` is 0 for rows that only pad the batch. Every reduction is a sum with coefficients fixed
over the whole batch (`token_mean`, `sequence_mean`, `constant`), so the sum of the losses of any
split of the rows is the loss of the batch. Values at masked positions never matter, not even when
they are NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ictjax.config import GRPOConfig

# Advantages.


class Advantages(NamedTuple):
    """Group-relative advantages; everything else about a group that the loss and the metrics
    need.
    """

    advantage_qg: Float[Array, "Q G"]  # exactly 0 for invalid members and in dead groups
    weight_qg: Float[Array, "Q G"]  # 1 for members the loss counts, 0 for the others
    dead_q: Bool[Array, "Q"]  # the valid members (none, one or more) all have the same reward


def advantages(
    config: GRPOConfig,
    reward_qg: Float[Array | np.ndarray, "Q G"],
    valid_qg: Bool[Array | np.ndarray, "Q G"],
) -> Advantages:
    """Composes the configured advantage with the treatment of dead groups.

    Args:
      config: reads `group_size`, `advantage`, `std_eps` and `dead_groups`.
      reward_qg: rewards; those of invalid members are never read.
      valid_qg: false for members that take no part (an environment fault, say).

    Raises:
      ValueError: for groups of another size than the configuration names.
    """
    if (
        reward_qg.ndim != 2
        or reward_qg.shape[1] != config.group_size
        or valid_qg.shape != reward_qg.shape
    ):
        raise ValueError(
            "Rewards and their validity must both have shape [contexts,"
            f" group_size={config.group_size}], got {reward_qg.shape} and {valid_qg.shape}."
        )
    reward_qg, valid_qg = jnp.asarray(reward_qg, jnp.float32), jnp.asarray(valid_qg)
    if config.advantage == "mean":
        advantage_qg = mean_advantages(reward_qg, valid_qg)
    elif config.advantage == "mean_std":
        advantage_qg = mean_std_advantages(reward_qg, valid_qg, eps=config.std_eps)
    else:
        advantage_qg = leave_one_out_advantages(reward_qg, valid_qg)
    dead_q = dead_groups(reward_qg, valid_qg)
    counted_qg = valid_qg & ~dead_q[:, None] if config.dead_groups == "drop" else valid_qg
    return Advantages(
        advantage_qg=advantage_qg, weight_qg=counted_qg.astype(jnp.float32), dead_q=dead_q
    )


def mean_advantages(
    reward_qg: Float[Array, "Q G"], valid_qg: Bool[Array, "Q G"]
) -> Float[Array, "Q G"]:
    """A_i = r_i - mean(r), over the valid members of a group (Dr. GRPO: no division by the standard
    deviation).

    Exactly 0 for invalid members and in dead groups, where float rounding of the mean would leave
    some 1e-8.
    """
    live_qg = valid_qg & ~dead_groups(reward_qg, valid_qg)[:, None]
    reward_qg = jnp.where(valid_qg, reward_qg, 0.0).astype(jnp.float32)
    mean_q = reward_qg.sum(axis=1) / jnp.maximum(valid_qg.sum(axis=1), 1)
    return jnp.where(live_qg, reward_qg - mean_q[:, None], 0.0)


def mean_std_advantages(
    reward_qg: Float[Array, "Q G"], valid_qg: Bool[Array, "Q G"], *, eps: float
) -> Float[Array, "Q G"]:
    """A_i = (r_i - mean(r)) / (std(r) + eps), over the valid members of a group (GRPO, section
    4.1.2).

    The paper does not say which standard deviation; this is the population's (divided by the number
    of members, not by one less), so the mean square of a group's advantages is 1. Libraries that
    divide by one less have advantages smaller by sqrt(7/8) at group size 8.
    """
    centred_qg = mean_advantages(reward_qg, valid_qg)
    variance_q = jnp.square(centred_qg).sum(axis=1) / jnp.maximum(valid_qg.sum(axis=1), 1)
    # 1 in dead groups: their numerators are 0
    std_q = jnp.sqrt(jnp.where(variance_q > 0, variance_q, 1.0))
    return centred_qg / (std_q[:, None] + eps)


def leave_one_out_advantages(
    reward_qg: Float[Array, "Q G"], valid_qg: Bool[Array, "Q G"]
) -> Float[Array, "Q G"]:
    """A_i = r_i - mean of r_j over the other valid members of the group (RLOO): the advantage
    to the mean of all n, times n / (n - 1).
    """
    members_q = valid_qg.sum(axis=1)
    factor_q = members_q / jnp.maximum(members_q - 1, 1)
    return mean_advantages(reward_qg, valid_qg) * factor_q[:, None]


def overlong_penalties(
    length_qg: np.ndarray, *, max_length: int, penalty: float, buffer: float
) -> np.ndarray:
    """What rewards lose for length: nothing up to (1 - buffer) max_length tokens, from there in
    proportion, `penalty` at max_length (DAPO, equation 13, with L_max = max_length, L_cache =
    buffer * L_max and penalty 1).
    """
    beyond_qg = length_qg - (1 - buffer) * max_length
    return penalty * np.clip(beyond_qg / (buffer * max_length), 0, 1)


def dead_groups(reward_qg: Float[Array, "Q G"], valid_qg: Bool[Array, "Q G"]) -> Bool[Array, "Q"]:
    """True for groups that carry no signal: all valid rewards are equal, or there are fewer than
    two.
    """
    highest_q = jnp.where(valid_qg, reward_qg, -jnp.inf).max(axis=1)
    lowest_q = jnp.where(valid_qg, reward_qg, jnp.inf).min(axis=1)
    return highest_q <= lowest_q


# Normalisation: coefficients c with loss = sum over b, r of c_br * loss_br.


def token_coefficients(
    config: GRPOConfig, mask_br: Bool[Array, "B R"], weight_b: Float[Array, "B"]
) -> Float[Array, "B R"]:
    """The configured coefficients, of the WHOLE batch: compute them before splitting it into
    microbatches.
    """
    if config.loss_normalisation == "token_mean":
        return token_mean(mask_br, weight_b)
    if config.loss_normalisation == "sequence_mean":
        return sequence_mean(mask_br, weight_b)
    return constant(mask_br, weight_b, length=config.constant_length)


def token_mean(mask_br: Bool[Array, "B R"], weight_b: Float[Array, "B"]) -> Float[Array, "B R"]:
    """Every token counts the same: c = w_b m_br / sum(w m) (DAPO, equation 8). All 0 for an empty
    mask.
    """
    weight_br = jnp.where(mask_br, weight_b[:, None], 0.0)
    return weight_br / _nonzero(weight_br.sum())


def sequence_mean(mask_br: Bool[Array, "B R"], weight_b: Float[Array, "B"]) -> Float[Array, "B R"]:
    """Every sequence counts the same: c = (w_b / sum(w)) m_br / |o_b| (GRPO, equation 3). Rows
    without a token count as no sequence.
    """
    length_b = mask_br.sum(axis=1)
    weight_b = jnp.where(length_b > 0, weight_b, 0.0)
    per_token_b = weight_b / jnp.maximum(length_b, 1) / _nonzero(weight_b.sum())
    return jnp.where(mask_br, per_token_b[:, None], 0.0)


def constant(
    mask_br: Bool[Array, "B R"], weight_b: Float[Array, "B"], *, length: int
) -> Float[Array, "B R"]:
    """Every token counts the same in every batch: c = (w_b / sum(w)) m_br / length (Dr. GRPO). Rows
    without a token are no sequence.
    """
    weight_b = jnp.where(mask_br.any(axis=1), weight_b, 0.0)
    per_token_b = weight_b / length / _nonzero(weight_b.sum())
    return jnp.where(mask_br, per_token_b[:, None], 0.0)


def _nonzero(total: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(total > 0, total, 1.0)


# Importance ratios.


def ratio_none(logp_br: Float[Array, "B R"], mask_br: Bool[Array, "B R"]) -> Float[Array, "B R"]:
    """1 everywhere, with the gradient of log p: the surrogate becomes REINFORCE's, uncorrected for
    old weights.
    """
    logp_br = jnp.where(mask_br, logp_br, 0.0)
    return jnp.exp(logp_br - jax.lax.stop_gradient(logp_br))


def ratio_token(
    logp_br: Float[Array, "B R"], old_logp_br: Float[Array, "B R"], mask_br: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """p(o_t) / p_old(o_t) of each token (GRPO, equation 3). 1 at masked positions."""
    # The mask goes in before the exponential: a masked overflow would still turn the gradient into
    # NaN.
    return jnp.exp(jnp.where(mask_br, logp_br - old_logp_br, 0.0))


def ratio_sequence(
    logp_br: Float[Array, "B R"], old_logp_br: Float[Array, "B R"], mask_br: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """The sequence's geometric mean ratio at each of its tokens (GSPO-token, equations 7 and 13).

    The value is s = exp(mean over t of log p(o_t) / p_old(o_t)); the gradient at token t is s times
    that of log p(o_t). For an advantage that is the same at all tokens this is GSPO itself, under
    each of the three normalisations. Clip it with far smaller bounds (GSPO: 3e-4 and 4e-4).
    """
    logp_br = jnp.where(mask_br, logp_br, 0.0)
    length_b = jnp.maximum(mask_br.sum(axis=1), 1)
    log_ratio_b = jnp.where(mask_br, logp_br - old_logp_br, 0.0).sum(axis=1) / length_b
    frozen_br = jax.lax.stop_gradient(log_ratio_b[:, None] - logp_br)
    return jnp.where(mask_br, jnp.exp(jnp.where(mask_br, frozen_br + logp_br, 0.0)), 1.0)


# The correction of what sampler and learner compute differently.


class Correction(NamedTuple):
    """Weights of the policy's loss without gradient, and which of them a bound has changed."""

    weight_br: Float[Array, "B R"]  # 1 where masked
    changed_br: Bool[Array, "B R"]


def correction(
    config: GRPOConfig,
    old_logp_br: Float[Array, "B R"],
    sampler_logp_br: Float[Array, "B R"],
    mask_br: Bool[Array, "B R"],
) -> Correction:
    """Weights w = p_old / p_sampler: both of the same parameters and tokens, as the learner
    computes and the sampler reported them, so that without rounding all are 1.

    "truncated" is min(w, C) (TIS), "masked" is w within [1 / C, C] and 0 outside (MIS; its authors
    bound w from above only). Of "sequence" w is the product over the tokens of a reply. Tokens of
    weight 0 stay in the normalisers of the loss.
    """
    log_br = jnp.where(mask_br, old_logp_br - sampler_logp_br, 0.0)
    if config.correction_level == "sequence":
        log_br = jnp.where(mask_br, log_br.sum(axis=1, keepdims=True), 0.0)
    log_cap = jnp.log(config.correction_cap)
    weight_br = jnp.exp(jnp.minimum(log_br, log_cap))
    if config.correction == "none":
        weight_br, changed_br = jnp.ones_like(log_br), jnp.zeros_like(mask_br)
    elif config.correction == "truncated":
        changed_br = log_br > log_cap
    else:
        changed_br = jnp.abs(log_br) > log_cap
        weight_br = jnp.where(changed_br, 0.0, weight_br)
    return Correction(jax.lax.stop_gradient(weight_br), changed_br)


# The surrogate and the KL estimators.


def clipped_surrogate(
    ratio_br: Float[Array, "B R"],
    advantage_br: Float[Array, "B R"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "B R"], Bool[Array, "B R"]]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) (GRPO, equation 3; clip_high > clip_low is
    DAPO's clip-higher).

    Returns the loss of each token and whether the clip stopped its gradient.
    """
    clipped_ratio_br = jax.lax.stop_gradient(jnp.clip(ratio_br, 1.0 - clip_low, 1.0 + clip_high))
    clipped_br = clipped_ratio_br * advantage_br < ratio_br * advantage_br
    # `where` and not `minimum`: on the bound itself (always, on policy, when a clip is 0) the
    # gradient is the ratio's, not half of it.
    objective_br = jnp.where(clipped_br, clipped_ratio_br * advantage_br, ratio_br * advantage_br)
    return -objective_br, clipped_br


def kl_k1(
    logp_br: Float[Array, "B R"], ref_logp_br: Float[Array, "B R"], mask_br: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """log p - log p_ref: unbiased, of high variance, sometimes negative. Never a loss: its expected
    gradient is 0 (hence "in reward").
    """
    return jnp.where(mask_br, logp_br - ref_logp_br, 0.0)


def kl_k3(
    logp_br: Float[Array, "B R"], ref_logp_br: Float[Array, "B R"], mask_br: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """p_ref / p - log(p_ref / p) - 1: unbiased and never negative (GRPO, equation 4)."""
    delta_br = jnp.where(mask_br, ref_logp_br - logp_br, 0.0)
    return jnp.expm1(delta_br) - delta_br


def kl_reward_to_go(k1_br: Float[Array, "B R"], mask_br: Bool[Array, "B R"]) -> Float[Array, "B R"]:
    """Sum of k1 from each token to the end of its response: what "k1_in_reward" subtracts, times
    the coefficient, from the advantage.

    Deliberate deviation: added after the group's rewards were normalised. Before it, a dead group
    would be "normalised" by the noise of its KL terms alone, and no group would ever count as dead.
    The estimate of the gradient of the sequence's KL is unbiased.
    """
    k1_br = jnp.where(mask_br, k1_br, 0.0)
    return jnp.where(mask_br, jnp.cumsum(k1_br[:, ::-1], axis=1)[:, ::-1], 0.0)


class TokenLoss(NamedTuple):
    """The terms of the loss at each response position, before any reduction; 0 where masked (ratio:
    1).
    """

    loss_br: Float[Array, "B R"]  # policy_br, plus kl_coefficient * kl_br under "k3_in_loss"
    policy_br: Float[Array, "B R"]
    # k3 against the reference, whatever the configuration penalises; 0 without a reference
    kl_br: Float[Array, "B R"]
    ratio_br: Float[Array, "B R"]
    clipped_br: Bool[Array, "B R"]


def token_loss(
    config: GRPOConfig,
    logp_br: Float[Array, "B R"],
    old_logp_br: Float[Array, "B R"],
    ref_logp_br: Float[Array, "B R"] | None,
    advantage_b: Float[Array, "B"],
    mask_br: Bool[Array, "B R"],
    correction_br: Float[Array, "B R"] | None = None,
) -> TokenLoss:
    """Composes the configured ratio, clip, correction and KL term. Gradients flow through `logp_br`
    only.

    Args:
      config: what the estimator is.
      logp_br: log-probabilities under the weights being trained.
      old_logp_br: under the weights that sampled the batch.
      ref_logp_br: under the reference policy; None when `config.kl` is "none".
      advantage_b: one per sequence.
      mask_br: the sampled tokens.
      correction_br: weights of the policy's loss (`correction`), not of the KL term; 1 if None.

    Raises:
      ValueError: if the configured KL needs the reference and there is none.
    """
    if ref_logp_br is None and config.kl != "none":
        raise ValueError(
            f"kl={config.kl!r} needs the log-probabilities of the reference policy; pass them or"
            ' set kl="none".'
        )
    old_logp_br = jax.lax.stop_gradient(old_logp_br)
    advantage_br = jnp.where(mask_br, advantage_b[:, None], 0.0)
    kl_br = jnp.zeros_like(logp_br)
    if ref_logp_br is not None:
        ref_logp_br = jax.lax.stop_gradient(ref_logp_br)
        kl_br = kl_k3(logp_br, ref_logp_br, mask_br)
    if ref_logp_br is not None and config.kl == "k1_in_reward":
        # A reward is a property of the sample: the policy that drew it is the old one.
        advantage_br -= config.kl_coefficient * kl_reward_to_go(
            kl_k1(old_logp_br, ref_logp_br, mask_br), mask_br
        )
    if config.importance == "none":
        ratio_br = ratio_none(logp_br, mask_br)
    elif config.importance == "token":
        ratio_br = ratio_token(logp_br, old_logp_br, mask_br)
    else:
        ratio_br = ratio_sequence(logp_br, old_logp_br, mask_br)
    policy_br, clipped_br = clipped_surrogate(
        ratio_br, advantage_br, clip_low=config.clip_low, clip_high=config.clip_high
    )
    if correction_br is not None:
        policy_br *= correction_br
    loss_br = policy_br + config.kl_coefficient * kl_br if config.kl == "k3_in_loss" else policy_br
    return TokenLoss(
        loss_br=loss_br, policy_br=policy_br, kl_br=kl_br, ratio_br=ratio_br, clipped_br=clipped_br
    )
