"""The families of games: short name -> MiniHack task id, and which of them suit which use.

Left out on purpose: ExploreMaze and Memento (success is not reward > 0.5), tasks that need `minigrid`, HideNSeek (unsolvable in 25 steps).
"""

import importlib.metadata

TASKS: dict[str, str] = {
    "closed_door": "MiniHack-ClosedDoor-v0",
    "eat": "MiniHack-Eat-v0",
    "eat_distr": "MiniHack-Eat-Distr-v0",
    "eat_fixed": "MiniHack-Eat-Fixed-v0",
    "freeze_lava": "MiniHack-Freeze-Lava-Full-v0",
    "keyroom": "MiniHack-KeyRoom-S5-v0",
    "keyroom_fixed": "MiniHack-KeyRoom-Fixed-S5-v0",
    "lava_cross": "MiniHack-LavaCross-Full-v0",
    "lava_levitate": "MiniHack-LavaCross-Levitate-Full-v0",
    "levitate": "MiniHack-Levitate-Random-Full-v0",
    "levitate_boots": "MiniHack-Levitate-Boots-Full-v0",
    "levitate_potion": "MiniHack-Levitate-Potion-Full-v0",
    "levitate_ring": "MiniHack-Levitate-Ring-Full-v0",
    "locked_door": "MiniHack-LockedDoor-v0",
    "mazewalk": "MiniHack-MazeWalk-Mapped-9x9-v0",
    "mazewalk_dark": "MiniHack-MazeWalk-9x9-v0",
    "pray": "MiniHack-Pray-v0",
    "puton": "MiniHack-PutOn-v0",
    "puton_distr": "MiniHack-PutOn-Distr-v0",
    "puton_fixed": "MiniHack-PutOn-Fixed-v0",
    "read": "MiniHack-Read-v0",
    "read_distr": "MiniHack-Read-Distr-v0",
    "read_fixed": "MiniHack-Read-Fixed-v0",
    "room": "MiniHack-Room-5x5-v0",
    "room_dark": "MiniHack-Room-Dark-5x5-v0",
    "room_monster": "MiniHack-Room-Monster-5x5-v0",
    "room_random": "MiniHack-Room-Random-5x5-v0",
    "room_trap": "MiniHack-Room-Trap-5x5-v0",
    "room_ultimate": "MiniHack-Room-Ultimate-5x5-v0",
    "sink": "MiniHack-Sink-v0",
    "wear": "MiniHack-Wear-v0",
    "wear_distr": "MiniHack-Wear-Distr-v0",
    "wear_fixed": "MiniHack-Wear-Fixed-v0",
    "wield": "MiniHack-Wield-v0",
    "wield_distr": "MiniHack-Wield-Distr-v0",
    "wield_fixed": "MiniHack-Wield-Fixed-v0",
    "wod_easy": "MiniHack-WoD-Easy-Full-v0",
    "zap": "MiniHack-Zap-v0",
    "zap_distr": "MiniHack-Zap-Distr-v0",
    "zap_fixed": "MiniHack-Zap-Fixed-v0",
}

FAMILIES: tuple[str, ...] = tuple(sorted(TASKS))

# What the experts solve and random play does not (facts measured by `python -m envs.experts`).
SOUND_TRAIN = ("eat", "wield", "zap", "room_monster", "locked_door", "keyroom", "mazewalk", "lava_levitate")
SOUND_HELDOUT = ("wear", "puton", "levitate", "lava_cross")
SOUND_RESERVE = ("read", "pray", "closed_door")

# The split of "Training Language Agents to Learn from Experience" (arXiv 2605.20477).
PAPER_TRAIN = ("room", "room_random", "room_monster", "room_trap", "eat", "wield", "wear")
PAPER_HELDOUT = ("room_dark", "read", "puton", "zap")


def check_family(family: str) -> str:
    """Returns `family`; raises ValueError naming the known ones for any other."""
    if family not in TASKS:
        raise ValueError(f"Unknown MiniHack family {family!r}; the families are: {', '.join(FAMILIES)}.")
    return family


def versions() -> str:
    """The versions that decide what a seed means, for cache keys and manifests."""
    return "-".join(f"{name}{importlib.metadata.version(name)}" for name in ("minihack", "nle"))
