"""How SmolLM2 plays and reflects: limits that its adapters are made for."""

from envs import prompts
from experiments.smollm.lessons import HELDOUT_LESSONS, TRAIN_LESSONS
from ictjax.config import ReflectorConfig, RolloutConfig
from ictjax.run_config import EnvironmentConfig, TaskConfig

MINIHACK = TaskConfig(
    initial_prompt=prompts.MINIHACK["short"],
    environment=EnvironmentConfig(
        name="minihack",
        options={"text": "short"},
        train_families=tuple(TRAIN_LESSONS),
        heldout_families=tuple(HELDOUT_LESSONS),
        num_workers=1,
    ),
    # a dispatch takes seconds on two cores: worth waiting for all games to answer
    rollout=RolloutConfig(max_steps=8, max_turn_tokens=40, gather_s=0.2),
)
REFLECTION = ReflectorConfig(
    style="short",
    max_context_tokens=560,
    max_reply_tokens=72,
    max_prompt_tokens=48,
    head_turns=1,
    tail_turns=1,
)
