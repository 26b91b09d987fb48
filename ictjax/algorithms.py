"""Published algorithms by name, each as the settings of one estimator (docs/algorithms.md)."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from ictjax.config import PAPER, GRPOConfig
from ictjax.run_config import TrainConfig

# DeepSeekMath, arXiv 2402.03300: sequences count the same, KL coefficient 0.04
_GRPO = dataclasses.replace(PAPER, loss_normalisation="sequence_mean", kl_coefficient=0.04)

ALGORITHMS: Mapping[str, GRPOConfig] = MappingProxyType(
    {
        "paper": PAPER,
        "grpo": _GRPO,
        # arXiv 2503.20783: neither the deviation nor the length of a reply divides
        "dr-grpo": dataclasses.replace(
            _GRPO, advantage="mean", loss_normalisation="constant", kl="none", kl_coefficient=0.0
        ),
        # arXiv 2503.14476; its rewards are -1 and 1, ours 0 and 1, and so is half its penalty
        "dapo": dataclasses.replace(
            PAPER,
            dead_groups="drop",
            refill_rounds=10,
            overlong_penalty=0.5,
            overlong_buffer=0.2,
            clip_high=0.28,
            kl="none",
            kl_coefficient=0.0,
        ),
        # arXiv 2507.18071
        "gspo": dataclasses.replace(
            _GRPO,
            importance="sequence",
            clip_low=3e-4,
            clip_high=4e-4,
            kl="none",
            kl_coefficient=0.0,
        ),
        # arXiv 2402.14740: REINFORCE on the sum of a reply's log-probabilities, KL in the reward
        "rloo": dataclasses.replace(
            PAPER,
            advantage="leave_one_out",
            loss_normalisation="constant",
            constant_length=1,
            importance="none",
            kl="k1_in_reward",
            kl_coefficient=0.05,
        ),
    }
)
"""By name. `group_size`, `temperature` and the constant of "dr-grpo" are the run's, see
`with_algorithm`.
"""


def with_algorithm(config: TrainConfig, name: str) -> TrainConfig:
    """The same run by another algorithm. Its group size and temperature stay; the constant that
    Dr. GRPO divides by becomes its limit of a reply. KeyError for a name that is none.
    """
    chosen, run = ALGORITHMS[name], config.grpo
    length = config.reflection.max_reply_tokens if name == "dr-grpo" else chosen.constant_length
    settings = dataclasses.replace(
        chosen,
        group_size=run.group_size,
        temperature=run.temperature,
        constant_length=length,
    )
    return dataclasses.replace(config, grpo=settings)
