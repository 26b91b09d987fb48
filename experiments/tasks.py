"""Named tasks: a benchmark as one pair of models plays it, for `--train-env` and `--eval-env`.

A preset names the set of its models, so the same name ("alfworld") means the same games in the
words and limits that suit them.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from envs import prompts
from envs.minihack.families import PAPER_HELDOUT, PAPER_TRAIN, SOUND_HELDOUT, SOUND_TRAIN
from experiments.smollm import task as smollm
from ictjax.config import RolloutConfig
from ictjax.manners import Manners
from ictjax.run_config import EnvironmentConfig, TaskConfig

# The paper's split: two kinds of household task are never trained on.
ALFWORLD_TRAIN = ("put", "look", "clean", "heat")
ALFWORLD_HELDOUT = ("cool", "pick_two")


def _split(base: TaskConfig, train: tuple[str, ...], heldout: tuple[str, ...]) -> TaskConfig:
    environment = dataclasses.replace(
        base.environment, train_families=train, heldout_families=heldout
    )
    return dataclasses.replace(base, environment=environment)


# Fake games, and generated ALFWorld games, in seconds.
FAKE = TaskConfig(
    initial_prompt="play",
    environment=EnvironmentConfig(
        name="fake",
        train_families=("door", "lamp"),
        heldout_families=("bell",),
        num_workers=1,
        max_live_games=8,
    ),
    rollout=RolloutConfig(max_steps=2, max_turn_tokens=4),
)
FAKE_ALFWORLD = dataclasses.replace(
    FAKE,
    environment=EnvironmentConfig(
        name="alfworld",
        options={"data": "generated", "rooms": "small", "text": "compact"},
        train_families=("put", "look"),
        heldout_families=("cool",),
        num_workers=1,
        max_live_games=8,
    ),
)

# The families of the demo, which the pocket actor can read about.
POCKET_MINIHACK = TaskConfig(
    initial_prompt=prompts.MINIHACK["compact"],
    environment=EnvironmentConfig(
        name="minihack",
        options={"text": "compact"},
        train_families=("eat", "wield", "zap", "pray", "sink", "levitate_boots", "levitate_potion"),
        heldout_families=("wear", "puton", "read", "levitate_ring"),
        num_workers=2,  # as fast as the actor of two cores
    ),
    rollout=RolloutConfig(max_steps=10, max_turn_tokens=16),
)
POCKET_ALFWORLD = TaskConfig(
    initial_prompt=prompts.ALFWORLD["compact"],
    environment=EnvironmentConfig(
        name="alfworld",
        options={"text": "compact", "rooms": "small"},
        train_families=ALFWORLD_TRAIN,
        heldout_families=ALFWORLD_HELDOUT,
        num_workers=1,
    ),
    rollout=RolloutConfig(max_steps=12, max_turn_tokens=16),
)

# The paper's limits: 25 steps, 500 tokens a turn, greedy, the admissible actions shown.
_PAPER_ROLLOUT = RolloutConfig(
    max_steps=25, max_turn_tokens=500, temperature=0.0, show_actions=True
)
QWEN_MINIHACK = TaskConfig(
    initial_prompt=prompts.MINIHACK["full"],
    environment=EnvironmentConfig(
        name="minihack",
        options={"text": "full"},
        train_families=PAPER_TRAIN,
        heldout_families=PAPER_HELDOUT,
        num_workers=8,
        max_live_games=256,
    ),
    rollout=_PAPER_ROLLOUT,
)
QWEN_ALFWORLD = TaskConfig(
    initial_prompt=prompts.ALFWORLD["full"],
    environment=EnvironmentConfig(
        name="alfworld",
        options={"text": "full"},
        train_families=ALFWORLD_TRAIN,
        heldout_families=ALFWORLD_HELDOUT,
        num_workers=8,
        max_live_games=256,
    ),
    rollout=_PAPER_ROLLOUT,
)


def _tasks(minihack: TaskConfig, alfworld: TaskConfig) -> Mapping[str, TaskConfig]:
    return MappingProxyType(
        {
            "minihack": minihack,
            "minihack-sound": _split(minihack, SOUND_TRAIN, SOUND_HELDOUT),
            "minihack-paper": _split(minihack, PAPER_TRAIN, PAPER_HELDOUT),
            "alfworld": alfworld,
        }
    )


def manners(*taught: TaskConfig) -> dict[str, Manners]:
    """How a model that was taught these tasks expects to be spoken to, for its `ictjax.json`."""
    return {
        task.environment.name: Manners(
            options=dict(task.environment.options),
            initial_prompt=task.initial_prompt,
            max_steps=task.rollout.max_steps,
            max_turn_tokens=task.rollout.max_turn_tokens,
            show_actions=task.rollout.show_actions,
        )
        for task in taught
    }


FAKE_TASKS: Mapping[str, TaskConfig] = MappingProxyType({"fake": FAKE, "alfworld": FAKE_ALFWORLD})
POCKET_TASKS = _tasks(POCKET_MINIHACK, POCKET_ALFWORLD)
QWEN_TASKS = _tasks(QWEN_MINIHACK, QWEN_ALFWORLD)
SMOLLM_TASKS: Mapping[str, TaskConfig] = MappingProxyType(
    {"minihack": smollm.MINIHACK, "alfworld": smollm.ALFWORLD}
)


def parse_options(text: str) -> dict[str, str]:
    """Reads options of an environment, "KEY=VALUE,KEY=VALUE". Raises ValueError for text that is
    not of this form.
    """
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not (key.isidentifier() and equals):
            raise ValueError(
                f"Environment options read KEY=VALUE,KEY=VALUE, got {part!r} in {text!r}."
            )
        options[key] = value
    return options


def with_options(task: TaskConfig, text: str) -> TaskConfig:
    """A task with some options of its environment set, from "KEY=VALUE,KEY=VALUE". Raises
    ValueError for text that is not of this form.
    """
    options = {**task.environment.options, **parse_options(text)}
    return dataclasses.replace(
        task, environment=dataclasses.replace(task.environment, options=options)
    )
