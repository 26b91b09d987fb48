"""Loss and gradient of our algorithms beside TRL's, in float64, on the same logits and advantages.

Where TRL is not installed the tests are skipped. `python -m tests.test_trl` prints the differences.
"""

import collections
import dataclasses
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ictjax import grpo
from ictjax.algorithms import ALGORITHMS
from ictjax.config import GRPOConfig

LENGTHS, VOCABULARY, LIMIT = (5, 1, 4, 3), 7, 6


class Case(NamedTuple):
    """Settings of ours, and the same in TRL's words."""

    ours: GRPOConfig
    theirs: dict


def _ours(name, **changes):
    return dataclasses.replace(ALGORITHMS[name], **changes)


CASES = {
    "GRPO": Case(_ours("grpo"), {"loss_type": "grpo", "beta": 0.04}),
    "Dr. GRPO": Case(_ours("dr-grpo", constant_length=LIMIT), {"loss_type": "dr_grpo"}),
    "DAPO": Case(_ours("dapo"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "BNPO": Case(_ours("paper"), {"loss_type": "bnpo", "beta": 0.001}),
    "GSPO": Case(
        _ours("gspo"),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    # wide enough that some ratios lie inside
    "GSPO, clip 0.2": Case(
        _ours("gspo", clip_low=0.2, clip_high=0.2),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "GRPO, truncated tokens": Case(
        _ours("grpo", correction="truncated"),
        {"loss_type": "grpo", "beta": 0.04, "vllm_importance_sampling_correction": True},
    ),
    "DAPO, masked sequences": Case(
        _ours("dapo", correction="masked", correction_level="sequence"),
        {
            "loss_type": "dapo",
            "epsilon_high": 0.28,
            "vllm_importance_sampling_correction": True,
        },
    ),
}


def _batch():
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = np.arange(shape[1]) < np.array(LENGTHS)[:, None]
    logits = rng.normal(size=(*shape, VOCABULARY))
    target = rng.integers(VOCABULARY, size=shape)
    own = np.take_along_axis(
        logits - np.log(np.exp(logits).sum(-1, keepdims=True)), target[:, :, None], -1
    )[:, :, 0]
    # the scale makes ratios on both sides of every clip and cap
    old, reference, sampler = (own + scale * rng.normal(size=shape) for scale in (0.3, 0.5, 0.6))
    return mask, logits, target, old, reference, sampler, np.array([1.5, -0.5, 0.25, -2.0])


def _by_us(config):
    mask, logits, target, old, reference, sampler, advantage = map(jnp.asarray, _batch())

    def loss(logits):
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, :, None], -1)[:, :, 0]
        weight = grpo.correction(config, old, sampler, mask).weight_br
        terms = grpo.token_loss(config, logp, old, reference, advantage, mask, weight)
        ones = jnp.ones(len(LENGTHS), jnp.float64)
        return (grpo.token_coefficients(config, mask, ones) * terms.loss_br).sum()

    return jax.value_and_grad(loss)(logits)


def _correction(config, old, sampler, mask):
    """The weights in NumPy, as TRL makes them before its loss is called."""
    log = (old - sampler) * mask
    if config.correction_level == "sequence":
        log = log.sum(axis=1, keepdims=True)
    ratio, cap = np.exp(log), config.correction_cap
    if config.correction == "truncated":
        return np.minimum(ratio, cap)
    return np.where((ratio >= 1 / cap) & (ratio <= cap), ratio, 0.0)


def _replies(mask, target, advantage):
    """The batch as TRL's losses take it."""
    return {
        "prompt_ids": target[:, :1],
        "prompt_mask": mask[:, :1].long(),
        "completion_ids": target,
        "completion_mask": mask.long(),
        "advantages": advantage,
    }


def _by_trl(case):
    import torch
    from trl import GRPOTrainer

    settings = {
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "vllm_importance_sampling_correction": False,
        **case.theirs,
    }
    mask, logits, target, old, reference, sampler, advantage = map(torch.tensor, _batch())
    logits.requires_grad_()

    def logps(*args, **kwargs):
        chosen = logits.log_softmax(-1).gather(-1, target[:, :, None])[:, :, 0]
        return chosen, torch.zeros_like(chosen), None

    same = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    trainer = types.SimpleNamespace(
        **settings,
        use_vllm=True,
        args=types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1
        ),
        accelerator=same,
        model=types.SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=logps,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LIMIT,
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
    )
    inputs = {
        **_replies(mask, target, advantage),
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    if settings["vllm_importance_sampling_correction"]:
        weights = _correction(case.ours, *(x.numpy() for x in (old, sampler, mask)))
        inputs["importance_sampling_ratio"] = torch.tensor(weights)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach().numpy(), logits.grad.numpy()


def _rloo_by_trl():
    """The gradient of TRL's trainer on replies that were just drawn, without KL: what they are
    beyond that differs (docs/algorithms.md).
    """
    import torch
    from trl import RLOOTrainer

    mask, logits, target, *_, advantage = map(torch.tensor, _batch())
    logits.requires_grad_()
    chosen = logits.log_softmax(-1).gather(-1, target[:, :, None])[:, :, 0]
    same = types.SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = types.SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.2,
        accelerator=same,
        model=types.SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            chosen,
            torch.zeros_like(chosen),
            None,
        ),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        aux_loss_enabled=False,
    )
    inputs = {
        **_replies(mask, target, advantage),
        "old_logps": (chosen * mask).sum(1).detach(),
    }
    RLOOTrainer._compute_loss(trainer, None, inputs).backward()
    return logits.grad.numpy()


def rloo_difference():
    """The largest absolute difference of the gradients of RLOO on fresh replies, without KL."""
    with jax.enable_x64(True):
        _, ours = jax.device_get(_by_us(_ours("rloo", kl="none", kl_coefficient=0.0)))
    theirs = _rloo_by_trl()
    assert np.abs(theirs).max() > 1e-3
    return float(np.abs(ours - theirs).max())


def differences(case):
    """The largest absolute differences of loss and gradient."""
    with jax.enable_x64(True):
        ours = jax.device_get(_by_us(case.ours))
        theirs = _by_trl(case)
    assert np.abs(theirs[1]).max() > 1e-3
    return [float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(name):
    pytest.importorskip("trl", reason="TRL is compared in an environment of its own")
    assert max(differences(CASES[name])) < 1e-12


def test_gradients_of_rloo_are_those_of_trl_where_both_do_the_same():
    pytest.importorskip("trl", reason="TRL is compared in an environment of its own")
    assert rloo_difference() < 1e-12


if __name__ == "__main__":
    for name, case in CASES.items():
        loss, gradient = differences(case)
        print(f"{name:24} loss {loss:.1e}  gradient {gradient:.1e}")
    print(f"{'RLOO, fresh, without KL':24} gradient {rloo_difference():.1e}")
