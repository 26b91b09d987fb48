"""Levels of our own in the manner of MiniHack's skill tasks: a room of 5x5 with one thing that must
be put to use. Importing this registers them.
"""

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

import gymnasium

from envs.minihack.families import GYM_IDS, OWN_LEVELS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from minihack import LevelGenerator, MiniHackSkill, RewardManager


def _eaten(rewards: RewardManager, thing: str) -> None:
    """What the game says of any food; the event of the stock tasks knows apples and pears alone."""
    rewards.add_message_event(
        [
            f"This {thing} is delicious",
            f"This {thing} tastes ",
            " is bland",
            "Blecch!  Rotten food!",
            "last bite of your meal",
            "Core dumped.",
            "You finish eating",
        ]
    )


def _wielded(rewards: RewardManager, thing: str) -> None:
    rewards.add_wield_event(thing)


# Of a verb: NetHack's symbol for the class of its things, and what adds the event that wins.
_USES: Mapping[str, tuple[str, Callable[[RewardManager, str], None]]] = MappingProxyType(
    {"eat": ("%", _eaten), "wield": (")", _wielded)}
)


class OneThing(MiniHackSkill):
    """A room with one thing, which wins when it is put to its use."""

    def __init__(self, *args: object, verb: str, thing: str, **kwargs: object) -> None:
        symbol, watch = _USES[verb]
        room = LevelGenerator(w=5, h=5, lit=True)
        room.add_object(thing, symbol)
        rewards = RewardManager()
        watch(rewards, thing)
        super().__init__(*args, des_file=room.get_des(), reward_manager=rewards, **kwargs)


for _verb, _things in OWN_LEVELS.items():
    for _thing in _things:
        gymnasium.register(
            id=GYM_IDS[f"{_verb}_{_thing}"],
            entry_point=f"{__name__}:OneThing",
            kwargs={"verb": _verb, "thing": _thing},
        )
