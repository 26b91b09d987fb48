"""How SmolLM2 plays and reflects: limits that its adapters are made for."""

from envs import prompts
from envs.renamings import MARK
from experiments.smollm.lessons import (
    HELDOUT_LESSONS,
    HOUSE_HELDOUT_LESSONS,
    HOUSE_TRAIN_LESSONS,
    TRAIN_LESSONS,
)
from ictjax.config import ReflectorConfig, RolloutConfig
from ictjax.run_config import EnvironmentConfig, TaskConfig

# In training no verb has the name that it has in English: what a thing is good for can only be seen
# in the episodes, as nothing is known of the held-out families. Two families are of no use so: a
# door takes more kicks than an episode has steps, and a horn has to be aimed, which its verb by
# another name does not say.
RENAMINGS = 4
RENAMED = tuple(
    f"{family}{MARK}{number}"
    for number in range(RENAMINGS)
    for family in TRAIN_LESSONS
    if family not in ("locked_door", "freeze_horn")
)
MINIHACK = TaskConfig(
    initial_prompt=prompts.MINIHACK["short"],
    environment=EnvironmentConfig(
        name="minihack",
        options={"text": "short", "renamings": str(RENAMINGS)},
        train_families=RENAMED,
        heldout_families=tuple(HELDOUT_LESSONS),
        num_workers=1,
    ),
    # a dispatch takes seconds on two cores: worth waiting for all games to answer
    rollout=RolloutConfig(max_steps=10, max_turn_tokens=40, gather_s=0.2),
)
# Games are short: with the right verb most take four turns, and a novice wins two of three.
ALFWORLD = TaskConfig(
    initial_prompt=prompts.ALFWORLD["short"],
    environment=EnvironmentConfig(
        name="alfworld",
        options={
            "data": "generated",
            "rooms": "small",
            "text": "short",
            "renamings": str(RENAMINGS),
        },
        train_families=tuple(
            f"{family}{MARK}{number}"
            for number in range(RENAMINGS)
            for family in HOUSE_TRAIN_LESSONS
        ),
        # A task's own name tells its verb, and two things are put as one is: by other names neither
        # is known. The words are those of all renamings, but the verb that wins one of these wins
        # no training family.
        heldout_families=(
            *HOUSE_HELDOUT_LESSONS,
            *(f"{family}{MARK}{number}" for number in range(2) for family in HOUSE_HELDOUT_LESSONS),
        ),
        num_workers=1,
    ),
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
