"""What the player can see, as plain data: the map in words, what lies underfoot, the pack. Read
from NLE's arrays after every action.
"""

import dataclasses
import functools
import re

import numpy as np
from nle import nethack

Position = tuple[int, int]  # x (column, grows east), y (row, grows south)

DIRECTIONS: dict[str, Position] = {
    "north": (0, -1),
    "south": (0, 1),
    "east": (1, 0),
    "west": (-1, 0),
    "northeast": (1, -1),
    "northwest": (-1, -1),
    "southeast": (1, 1),
    "southwest": (-1, 1),
}

# Every glyph of terrain by its index in NetHack's defsym table (src/drawing.c, version 3.6).
_TERRAIN = {
    0: ("blank", ""),
    **dict.fromkeys(range(1, 12), ("wall", "wall")),
    12: ("doorway", "doorway"),
    13: ("open", "open door"),
    14: ("open", "open door"),
    15: ("closed", "closed door"),
    16: ("closed", "closed door"),
    17: ("wall", "bars"),
    18: ("wall", "tree"),
    19: ("floor", ""),
    20: ("floor", ""),
    21: ("floor", ""),
    22: ("floor", ""),
    23: ("feature", "upstairs"),
    24: ("feature", "stairs"),
    25: ("feature", "upladder"),
    26: ("feature", "ladder"),
    27: ("feature", "altar"),
    28: ("feature", "grave"),
    29: ("feature", "throne"),
    30: ("feature", "sink"),
    31: ("feature", "fountain"),
    32: ("liquid", "water"),
    33: ("floor", "ice"),
    34: ("liquid", "lava"),
    35: ("floor", "bridge"),
    36: ("floor", "bridge"),
    37: ("wall", "drawbridge"),
    38: ("wall", "drawbridge"),
    39: ("floor", "air"),
    40: ("floor", "cloud"),
    41: ("liquid", "water"),
}
_CLASS_NOUNS = {
    nethack.WAND_CLASS: "wand",
    nethack.RING_CLASS: "ring",
    nethack.AMULET_CLASS: "amulet",
    nethack.SCROLL_CLASS: "scroll",
    nethack.POTION_CLASS: "potion",
    nethack.SPBOOK_CLASS: "book",
    nethack.COIN_CLASS: "gold",
}
# Worn in pairs: the plural is the name.
_PAIRS = ("boots", "shoes", "gloves", "gauntlets", "lenses", "glasses")
_LAST_REMARK = re.compile(r" \((?:[^()]|\([^()]*\))*\)$")
_ARTICLE = re.compile(r"^(?:an?|the|some|\d+) ")
_STATES = re.compile(
    r"(?<!\S)(?:blessed|uncursed|cursed|empty|holy|unholy|rusty|burnt|corroded|rotted|fireproof|rustproof|greased"
    r"|partly eaten|pair of|set of|[+-]\d+) "
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """Something on the map: `noun` is one canonical word or two ("wand", "closed door"), `name` is
    what the game calls it.
    """

    noun: str
    name: str
    # object | monster | feature | trap | doorway | open | closed | liquid | boulder | wall
    kind: str
    position: Position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One line of the pack. `gained` is false for what the hero started with."""

    letter: str
    noun: str
    name: str
    text: str  # the game's own line, "a +1 club (weapon in hand)"
    gained: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """The visible state after a reset or an action. `cells` holds every cell that is not blank, the
    hero's own included.
    """

    position: Position
    cells: dict[Position, Thing]
    here: tuple[Thing, ...]
    items: tuple[Item, ...]
    messages: tuple[str, ...]
    hp: int
    max_hp: int
    turn: int
    floating: bool
    blind: bool
    rows: tuple[str, ...]  # the map as characters, 21 rows of 79
    notes: tuple[str, ...] = ()

    def cell(self, position: Position) -> Thing | None:
        """What is known at a position; None where nothing was ever seen."""
        return self.cells.get(position)


@functools.cache
def _object_class(glyph: int) -> int:
    return ord(nethack.objclass(nethack.glyph_to_obj(glyph)).oc_class)


@functools.lru_cache(maxsize=4096)
def plain_name(text: str) -> str:
    """ "2 blessed +1 daggers (in hand)" -> "daggers": without article, number, state and
    remarks.
    """
    text = text.strip()
    while (shorter := _LAST_REMARK.sub("", text)) != text:
        text = shorter
    text = _ARTICLE.sub("", text)
    while (shorter := _STATES.sub("", text)) != text:
        text = shorter
    return text


def object_noun(name: str, oclass: int) -> str:
    """One canonical word for an object, the same whatever its random appearance."""
    if oclass in _CLASS_NOUNS:
        return _CLASS_NOUNS[oclass]
    head = re.split(r" (?:of|named|called|labeled|containing) ", name.lower())[0]
    word = head.split()[-1] if head.split() else "thing"
    if word.endswith("s") and not word.endswith("ss") and word not in _PAIRS:
        word = word[:-1]
    return word


_NAMED_CLASSES = tuple(
    (re.compile(rf"\b{word}s?\b"), noun)
    for word, noun in (
        ("wand", "wand"),
        ("ring", "ring"),
        ("amulet", "amulet"),
        ("scroll", "scroll"),
        ("potion", "potion"),
        ("spellbook", "book"),
    )
)


def noun_of_name(name: str) -> str:
    """The canonical word for an object known by its printed name alone."""
    for pattern, noun in _NAMED_CLASSES:
        if pattern.search(name):
            return noun
    return object_noun(name, -1)


def _decode(array: np.ndarray) -> str:
    return bytes(array).split(b"\0", 1)[0].decode("latin-1")


@functools.lru_cache(maxsize=65536)
def thing_at(glyph: int, description: str, position: Position) -> Thing | None:
    """Names one cell of the map. None where the screen is blank."""
    name = plain_name(description)
    if nethack.glyph_is_cmap(glyph):
        index = nethack.glyph_to_cmap(glyph)
        if index in _TERRAIN:
            kind, noun = _TERRAIN[index]
            if kind == "blank":
                return None
            if kind == "doorway" and "broken" in name:
                noun = "broken door"
            return Thing(noun=noun or "floor", name=name, kind=kind, position=position)
        if nethack.glyph_is_trap(glyph):
            return Thing(noun="trap", name=name, kind="trap", position=position)
        # the flash of a zap or an explosion
        return Thing(noun="floor", name=name, kind="floor", position=position)
    if nethack.glyph_is_statue(glyph):
        return Thing(noun="statue", name=name, kind="boulder", position=position)
    if nethack.glyph_is_body(glyph):
        return Thing(noun="corpse", name=name, kind="object", position=position)
    if nethack.glyph_is_object(glyph):
        oclass = _object_class(glyph)
        if name == "boulder":
            return Thing(noun="boulder", name=name, kind="boulder", position=position)
        return Thing(noun=object_noun(name, oclass), name=name, kind="object", position=position)
    noun = name.lower().split()[-1] if name else "monster"
    return Thing(noun=noun, name=name or "unseen monster", kind="monster", position=position)


def read_items(observation: dict[str, np.ndarray], start: dict[str, int]) -> tuple[Item, ...]:
    """The pack, in the game's order. `start` maps the letters of the starting kit to their
    glyphs.
    """
    items = []
    for letter, text, oclass, glyph in zip(
        observation["inv_letters"],
        observation["inv_strs"],
        observation["inv_oclasses"],
        observation["inv_glyphs"],
        strict=True,
    ):
        if not letter:
            break
        line = _decode(text)
        name = plain_name(line)
        items.append(
            Item(
                letter=chr(letter),
                noun=object_noun(name, int(oclass)),
                name=name,
                text=line,
                gained=start.get(chr(letter)) != int(glyph),
            )
        )
    return tuple(items)


def read_cells(observation: dict[str, np.ndarray]) -> dict[Position, Thing]:
    """Every cell that shows something, by position, the hero's own left out."""
    glyphs, descriptions = observation["glyphs"], observation["screen_descriptions"]
    hero = (int(observation["blstats"][0]), int(observation["blstats"][1]))
    ys, xs = np.nonzero(glyphs != nethack.GLYPH_CMAP_OFF)
    texts = descriptions[ys, xs].view(f"S{descriptions.shape[-1]}")[:, 0].tolist()
    cells = {}
    for position, glyph, text in zip(
        zip(xs.tolist(), ys.tolist(), strict=True), glyphs[ys, xs].tolist(), texts, strict=True
    ):
        if position != hero:
            thing = thing_at(glyph, text.decode("latin-1"), position)
            if thing is not None:
                cells[position] = thing
    return cells


_HERE_FEATURE = re.compile(r"There is (?:an? |the )?(.+?) here\.")
_HERE_OBJECT = re.compile(r"You (?:see|feel) here (.+?)\.(?= |$)")
_FEATURES = (
    ("staircase down", "stairs", "feature"),
    ("staircase up", "upstairs", "feature"),
    ("ladder down", "ladder", "feature"),
    ("ladder up", "upladder", "feature"),
    ("altar", "altar", "feature"),
    ("sink", "sink", "feature"),
    ("fountain", "fountain", "feature"),
    ("grave", "grave", "feature"),
    ("throne", "throne", "feature"),
    ("broken door", "broken door", "doorway"),
    ("open door", "open door", "open"),
    ("doorway", "doorway", "doorway"),
    ("lava", "lava", "liquid"),
    ("water", "water", "liquid"),
    ("ice", "ice", "floor"),
)


def read_here(lines: list[str], position: Position) -> tuple[Thing, ...]:
    """What the answers to the game's look command (`:`) name: features first, then objects."""
    things = []
    text = "  ".join(line for line in lines if not line.startswith("Things that"))
    for name in _HERE_FEATURE.findall(text):
        if name.startswith(("several", "many")):
            continue
        for part, noun, kind in _FEATURES:
            if part in name:
                things.append(Thing(noun=noun, name=plain_name(name), kind=kind, position=position))
                break
        else:
            things.append(Thing(noun="trap", name=plain_name(name), kind="trap", position=position))
    objects = _HERE_OBJECT.findall(text)
    for i, line in enumerate(lines):
        if line.startswith("Things that"):
            objects += lines[i + 1 :]
            break
    things += [
        Thing(
            noun=noun_of_name(plain_name(o)), name=plain_name(o), kind="object", position=position
        )
        for o in objects
    ]
    return tuple(things)
