"""Levels of our own in the manner of MiniHack's skill tasks: a room of 5x5 with one thing that must
be put to use. Importing this registers them.
"""

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import gymnasium

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from minihack import LevelGenerator, MiniHackSkill, RewardManager


class _Level(NamedTuple):
    thing: str
    symbol: str  # NetHack's, of its class
    watch: Callable[[RewardManager, str], None]  # adds the event that wins


# What the game says of any food; the event of the stock tasks knows apples and pears alone.
_EATEN = (
    " is delicious",
    " tastes ",
    " is bland",
    "Blecch!  Rotten food!",
    "last bite of your meal",
    "Core dumped.",
    "You finish eating",
)


def _eaten(rewards: RewardManager, thing: str) -> None:
    rewards.add_message_event([f"This {thing}{_EATEN[0]}", f"This {thing}{_EATEN[1]}", *_EATEN[2:]])


def _wielded(rewards: RewardManager, thing: str) -> None:
    rewards.add_wield_event(thing)


_LEVELS: Mapping[str, _Level] = MappingProxyType(
    {
        **{
            f"ictjax-Eat-{thing.title()}-v0": _Level(thing, "%", _eaten)
            for thing in ("orange", "pear", "melon", "banana", "carrot")
        },
        **{
            f"ictjax-Wield-{thing.title()}-v0": _Level(thing, ")", _wielded)
            for thing in ("axe", "flail", "mace", "spear")
        },
    }
)


class OneThing(MiniHackSkill):
    """A room with one thing, which wins when it is put to its use."""

    def __init__(self, *args: object, level: str, **kwargs: object) -> None:
        thing, symbol, watch = _LEVELS[level]
        room = LevelGenerator(w=5, h=5, lit=True)
        room.add_object(thing, symbol)
        rewards = RewardManager()
        watch(rewards, thing)
        super().__init__(*args, des_file=room.get_des(), reward_manager=rewards, **kwargs)


for _id in _LEVELS:
    gymnasium.register(id=_id, entry_point=f"{__name__}:OneThing", kwargs={"level": _id})
