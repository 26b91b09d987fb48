"""The families of games: short name -> MiniHack task id, in groups; which suit which use; and which
ids are no family, with the reason.
"""

import importlib.metadata
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from envs.registry import nearest

# What is to be done with which things in `envs.minihack.levels`, a level each.
OWN_LEVELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "eat": ("banana", "carrot", "melon", "orange", "pear"),
        "wield": ("axe", "flail", "mace", "spear"),
    }
)

# Sizes: rooms and mazes without a number are 5x5 and 9x9. "mazewalk" shows its map, "mazewalk_dark"
# does not. "held": in the pack from the start.
GROUPS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "rooms": {
            "room": "MiniHack-Room-5x5-v0",
            "room_15": "MiniHack-Room-15x15-v0",
            "room_dark": "MiniHack-Room-Dark-5x5-v0",
            "room_dark_15": "MiniHack-Room-Dark-15x15-v0",
            "room_monster": "MiniHack-Room-Monster-5x5-v0",
            "room_monster_15": "MiniHack-Room-Monster-15x15-v0",
            "room_random": "MiniHack-Room-Random-5x5-v0",
            "room_random_15": "MiniHack-Room-Random-15x15-v0",
            "room_trap": "MiniHack-Room-Trap-5x5-v0",
            "room_trap_15": "MiniHack-Room-Trap-15x15-v0",
            "room_ultimate": "MiniHack-Room-Ultimate-5x5-v0",
            "room_ultimate_15": "MiniHack-Room-Ultimate-15x15-v0",
        },
        "one thing to use": {
            "eat": "MiniHack-Eat-v0",
            "eat_distr": "MiniHack-Eat-Distr-v0",
            "eat_fixed": "MiniHack-Eat-Fixed-v0",
            "pray": "MiniHack-Pray-v0",
            "pray_distr": "MiniHack-Pray-Distr-v0",
            "pray_fixed": "MiniHack-Pray-Fixed-v0",
            "puton": "MiniHack-PutOn-v0",
            "puton_distr": "MiniHack-PutOn-Distr-v0",
            "puton_fixed": "MiniHack-PutOn-Fixed-v0",
            "read": "MiniHack-Read-v0",
            "read_distr": "MiniHack-Read-Distr-v0",
            "read_fixed": "MiniHack-Read-Fixed-v0",
            "sink": "MiniHack-Sink-v0",
            "sink_distr": "MiniHack-Sink-Distr-v0",
            "sink_fixed": "MiniHack-Sink-Fixed-v0",
            "wear": "MiniHack-Wear-v0",
            "wear_distr": "MiniHack-Wear-Distr-v0",
            "wear_fixed": "MiniHack-Wear-Fixed-v0",
            "wield": "MiniHack-Wield-v0",
            "wield_distr": "MiniHack-Wield-Distr-v0",
            "wield_fixed": "MiniHack-Wield-Fixed-v0",
            "zap": "MiniHack-Zap-v0",
            "zap_distr": "MiniHack-Zap-Distr-v0",
            "zap_fixed": "MiniHack-Zap-Fixed-v0",
        },
        "one thing to use, levels of our own": {
            f"{verb}_{thing}": f"ictjax-{verb.title()}-{thing.title()}-v0"
            for verb, things in OWN_LEVELS.items()
            for thing in things
        },
        "levitation and cold": {
            "freeze_horn": "MiniHack-Freeze-Horn-Full-v0",
            "freeze_random": "MiniHack-Freeze-Random-Full-v0",
            "freeze_wand": "MiniHack-Freeze-Wand-Full-v0",
            "levitate": "MiniHack-Levitate-Random-Full-v0",
            "levitate_boots": "MiniHack-Levitate-Boots-Full-v0",
            "levitate_boots_fixed": "MiniHack-Levitate-Boots-Fixed-v0",
            "levitate_potion": "MiniHack-Levitate-Potion-Full-v0",
            "levitate_potion_fixed": "MiniHack-Levitate-Potion-Fixed-v0",
            "levitate_ring": "MiniHack-Levitate-Ring-Full-v0",
            "levitate_ring_fixed": "MiniHack-Levitate-Ring-Fixed-v0",
        },
        "lava and water": {
            "freeze_lava": "MiniHack-Freeze-Lava-Full-v0",
            "lava_cross": "MiniHack-LavaCross-Full-v0",
            "lava_levitate": "MiniHack-LavaCross-Levitate-Full-v0",
            "lava_potion": "MiniHack-LavaCross-Levitate-Potion-Pickup-Full-v0",
            "lava_potion_held": "MiniHack-LavaCross-Levitate-Potion-Inv-Full-v0",
            "lava_ring": "MiniHack-LavaCross-Levitate-Ring-Pickup-Full-v0",
            "lava_ring_held": "MiniHack-LavaCross-Levitate-Ring-Inv-Full-v0",
            "river": "MiniHack-River-v0",
            "river_lava": "MiniHack-River-Lava-v0",
            "river_monster": "MiniHack-River-Monster-v0",
            "river_monster_lava": "MiniHack-River-MonsterLava-v0",
            "river_narrow": "MiniHack-River-Narrow-v0",
        },
        "doors and keys": {
            "closed_door": "MiniHack-ClosedDoor-v0",
            "keyroom": "MiniHack-KeyRoom-S5-v0",
            "keyroom_15": "MiniHack-KeyRoom-S15-v0",
            "keyroom_dark": "MiniHack-KeyRoom-Dark-S5-v0",
            "keyroom_dark_15": "MiniHack-KeyRoom-Dark-S15-v0",
            "keyroom_fixed": "MiniHack-KeyRoom-Fixed-S5-v0",
            "locked_door": "MiniHack-LockedDoor-v0",
            "locked_door_fixed": "MiniHack-LockedDoor-Fixed-v0",
        },
        "mazes and corridors": {
            "corridor_2": "MiniHack-Corridor-R2-v0",
            "corridor_3": "MiniHack-Corridor-R3-v0",
            "corridor_5": "MiniHack-Corridor-R5-v0",
            "labyrinth": "MiniHack-Labyrinth-Small-v0",
            "labyrinth_big": "MiniHack-Labyrinth-Big-v0",
            "mazewalk": "MiniHack-MazeWalk-Mapped-9x9-v0",
            "mazewalk_15": "MiniHack-MazeWalk-Mapped-15x15-v0",
            "mazewalk_45": "MiniHack-MazeWalk-Mapped-45x19-v0",
            "mazewalk_dark": "MiniHack-MazeWalk-9x9-v0",
            "mazewalk_dark_15": "MiniHack-MazeWalk-15x15-v0",
            "mazewalk_dark_45": "MiniHack-MazeWalk-45x19-v0",
        },
        "foes": {
            "corridor_battle": "MiniHack-CorridorBattle-v0",
            "corridor_battle_dark": "MiniHack-CorridorBattle-Dark-v0",
            "hidenseek": "MiniHack-HideNSeek-v0",
            "hidenseek_big": "MiniHack-HideNSeek-Big-v0",
            "hidenseek_lava": "MiniHack-HideNSeek-Lava-v0",
            "hidenseek_mapped": "MiniHack-HideNSeek-Mapped-v0",
            "wod_easy": "MiniHack-WoD-Easy-Full-v0",
            "wod_hard": "MiniHack-WoD-Hard-Full-v0",
            "wod_medium": "MiniHack-WoD-Medium-Full-v0",
            "wod_pro": "MiniHack-WoD-Pro-Full-v0",
        },
        "long quests": {
            "quest_easy": "MiniHack-Quest-Easy-v0",
            "quest_hard": "MiniHack-Quest-Hard-v0",
            "quest_medium": "MiniHack-Quest-Medium-v0",
            "sokoban_1a": "MiniHack-Sokoban1a-v1",
            "sokoban_1b": "MiniHack-Sokoban1b-v1",
            "sokoban_2a": "MiniHack-Sokoban2a-v1",
            "sokoban_2b": "MiniHack-Sokoban2b-v1",
            "sokoban_3a": "MiniHack-Sokoban3a-v1",
            "sokoban_3b": "MiniHack-Sokoban3b-v1",
            "sokoban_4a": "MiniHack-Sokoban4a-v1",
            "sokoban_4b": "MiniHack-Sokoban4b-v1",
        },
    }
)

GYM_IDS: Mapping[str, str] = MappingProxyType(
    {family: task for group in GROUPS.values() for family, task in group.items()}
)
FAMILIES: tuple[str, ...] = tuple(sorted(GYM_IDS))

# Actions within which a family is meant to be solved, where the usual 25 are too few. The scripted
# experts are measured with these.
_USUAL_STEPS = 25
STEPS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "closed_door",
                "mazewalk_15",
                "mazewalk_dark",
                "room_ultimate",
                "wod_hard",
                "wod_medium",
            ),
            50,
        ),
        **dict.fromkeys(("hidenseek", "hidenseek_big", "hidenseek_lava", "hidenseek_mapped"), 50),
        **dict.fromkeys(
            ("corridor_battle", "corridor_battle_dark", "labyrinth", "quest_easy", "quest_medium"),
            100,
        ),
        **dict.fromkeys(
            ("keyroom_15", "mazewalk_dark_15", "room_dark_15", "room_ultimate_15"), 150
        ),
        **dict.fromkeys(
            (
                "keyroom_dark_15",
                "mazewalk_45",
                "river",
                "river_lava",
                "river_monster",
                "river_monster_lava",
                "river_narrow",
            ),
            200,
        ),
        **dict.fromkeys(
            (
                "corridor_2",
                "corridor_3",
                "corridor_5",
                "labyrinth_big",
                "mazewalk_dark_45",
                "quest_hard",
                "wod_pro",
            ),
            400,
        ),
        **{family: 1000 for family in GROUPS["long quests"] if family.startswith("sokoban")},
    }
)

# Task ids (whole, as patterns) that are no family, and why.
LEFT_OUT: Mapping[str, str] = MappingProxyType(
    {
        r".*-Restricted-v0": (
            "the same games as the id with Full: they differ in the keys offered, and we offer"
            " words"
        ),
        r"MiniHack-(MultiRoom|LavaCrossing|SimpleCrossing).*": (
            "draws its map with the package minigrid, from a generator of its own"
        ),
        r"MiniHack-Boxoban-.*": (
            "needs levels that are downloaded, and picks one by Python's global random numbers, not"
            " by the seed"
        ),
        r"MiniHack-ExploreMaze-.*": (
            "pays 0.5 for every apple and 1 on every step upon the stairs, and never ends: no"
            " reward means success"
        ),
        r"MiniHack-Memento-.*": (
            "pays -1 for the wrong choice and plays on: one game can end both ways"
        ),
        r"MiniHack-(Navigation|Skill)-Custom-v0": (
            "has no level of its own: it is the base that users write theirs on"
        ),
    }
)


class FamilySplit(NamedTuple):
    """Families to train on, and families held out."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


# What the experts solve and random play does not (facts measured by `python -m envs.experts`).
SOUND_TRAIN = (
    "eat",
    "wield",
    "zap",
    "room_monster",
    "locked_door",
    "keyroom",
    "mazewalk",
    "lava_levitate",
)
SOUND_HELDOUT = ("wear", "puton", "levitate", "lava_cross")
SOUND_RESERVE = ("read", "pray", "closed_door")

# The split of "Training Language Agents to Learn from Experience" (arXiv 2605.20477).
PAPER_TRAIN = ("room", "room_random", "room_monster", "room_trap", "eat", "wield", "wear")
PAPER_HELDOUT = ("room_dark", "read", "puton", "zap")

FAMILY_SPLITS: Mapping[str, FamilySplit] = MappingProxyType(
    {
        "sound": FamilySplit(SOUND_TRAIN, SOUND_HELDOUT),
        "paper": FamilySplit(PAPER_TRAIN, PAPER_HELDOUT),
    }
)


def check_family(family: str) -> str:
    """Returns `family`; raises ValueError naming the nearest ones for any other."""
    if family not in GYM_IDS:
        raise ValueError(
            f"Unknown MiniHack family {family!r}: use one of {nearest(family, FAMILIES)}; `ictjax"
            " games list --env minihack` lists all."
        )
    return family


def step_limit(family: str) -> int:
    """Actions within which a family is meant to be solved. Raises ValueError for an unknown
    family.
    """
    return STEPS.get(check_family(family), _USUAL_STEPS)


def why_left_out(task: str) -> str | None:
    """The reason why a registered task id is no family; None for one that is, or that this list
    does not know.
    """
    return next(
        (reason for pattern, reason in LEFT_OUT.items() if re.fullmatch(pattern, task)), None
    )


def package_versions() -> dict[str, str]:
    """The versions that decide what a seed means."""
    return {name: importlib.metadata.version(name) for name in ("minihack", "nle")}


def versions() -> str:
    """The same in one word, for cache keys."""
    return "-".join(f"{name}{version}" for name, version in package_versions().items())
