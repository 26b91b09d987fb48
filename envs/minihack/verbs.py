"""Words to intentions: what an agent may type, and how it is read. Nothing is ever guessed; what
cannot be read becomes a note.
"""

import dataclasses
import re

from envs.minihack.view import DIRECTIONS, Item

_SHORT_DIRECTIONS = {
    "n": "north",
    "s": "south",
    "e": "east",
    "w": "west",
    "ne": "northeast",
    "nw": "northwest",
    "se": "southeast",
    "sw": "southwest",
}
_OTHER_TARGETS = ("self", "down", "up")  # answers to "In what direction?" that are no move

# verb -> (takes an item, takes a direction)
_SHAPES: dict[str, tuple[bool, bool]] = {
    "go": (False, True),
    "far": (False, True),
    "fight": (False, True),
    "kick": (False, True),
    "open": (False, True),
    "close": (False, True),
    "untrap": (False, True),
    "pickup": (True, False),
    "drop": (True, False),
    "eat": (True, False),
    "quaff": (True, False),
    "read": (True, False),
    "wield": (True, False),
    "wear": (True, False),
    "takeoff": (True, False),
    "puton": (True, False),
    "remove": (True, False),
    "apply": (True, True),
    "zap": (True, True),
    "throw": (True, True),
    "pray": (False, False),
    "search": (False, False),
    "wait": (False, False),
    "up": (False, False),
    "down": (False, False),
    "look": (False, False),
    "inventory": (False, False),
}
# Other spellings with exactly one meaning.
_ALIASES = {
    ("pick", "up"): "pickup",
    ("take", "off"): "takeoff",
    ("put", "on"): "puton",
    ("move",): "go",
    ("walk",): "go",
    ("attack",): "fight",
    ("drink",): "quaff",
    ("use",): "apply",
}
# What the game asks: "What do you want to use or apply? [ef or ?*]", and what may follow it.
_QUESTION = re.compile(
    r"\s*What do you want to (?:use or )?(.+?)\?\s*(?:\[[^\]]*\])?", re.IGNORECASE
)
_OFFERED = re.compile(r"\[[^\[\]]*\?\*\]|--More--", re.IGNORECASE)
# Answers to questions that the game no longer asks.
_ANSWERS = ("yes", "no", "esc", "escape", "space", "enter", "return", "more", "--more--")
_NO_QUESTION = " The game waits for no answer: say the whole action, for example: wear f."
_REMARK = re.compile(r"\(([^()]*)\)")  # of a line of the pack: "(being worn)"
_LINE = re.compile(r"([A-Za-z$]) - (.+)")  # of the pack: "f - a robe"
_FILLERS = ("the", "a", "an", "my", "at", "to", "towards", "with")

ACTIONS: tuple[str, ...] = (
    *DIRECTIONS,
    "far DIRECTION",
    "fight DIRECTION",
    "pickup [ITEM]",
    "drop ITEM",
    "eat [ITEM]",
    "quaff [ITEM]",
    "read [ITEM]",
    "wield [ITEM]",
    "wear [ITEM]",
    "takeoff [ITEM]",
    "puton [ITEM]",
    "remove [ITEM]",
    "apply ITEM [DIRECTION]",
    "zap ITEM [DIRECTION]",
    "throw ITEM DIRECTION",
    "kick DIRECTION",
    "open DIRECTION",
    "close DIRECTION",
    "untrap DIRECTION",
    "pray",
    "search",
    "wait",
    "up",
    "down",
    "look",
    "inventory",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """An action that was understood. `item` and `direction` are as typed or None; a direction may
    also be the noun of a neighbour cell.
    """

    verb: str
    item: str | None = None
    direction: str | None = None


def parse(text: str) -> Command | str:
    """Reads one action, or says in a sentence why it cannot be read.

    Grammar: VERB [ITEM] [DIRECTION], any case, articles ignored; a direction alone is a step. An
    item is a letter of the pack, a name, or a whole line of the pack; the verb may be given as the
    game's question for the item. For verbs that take both, the last word is the direction
    when it names one and another word stands before it.
    """
    asked = _QUESTION.match(text)
    plain = _OFFERED.sub(" ", f"{asked[1]} {text[asked.end() :]}" if asked else text)
    words = _words(plain) or _words(text)
    if not words:
        return "No action was given."
    verb = words[0].lower()
    if verb in DIRECTIONS:
        return (
            Command(verb="go", direction=verb)
            if len(words) == 1
            else f"{verb} takes nothing after it."
        )
    if verb not in _SHAPES:
        return (
            f"Unknown action: {_quote(text)}. Known verbs: {', '.join(DIRECTIONS)},"
            f" {', '.join(_SHAPES)}."
            + (_NO_QUESTION if len(words[0]) == 1 or verb in _ANSWERS else "")
        )
    takes_item, takes_direction = _SHAPES[verb]
    if takes_item:
        shorter = _words(_REMARK.sub(_remark, plain))
        words = shorter if len(shorter) > 1 else words
    letter, words = _letter(words, takes_direction) if takes_item else ("", words)
    rest = [
        word
        for word in words[1:]
        if word.lower() not in _FILLERS or (takes_item and not letter and len(words) == 2)
    ]
    if not takes_item and not takes_direction:
        if rest and [word.lower() for word in rest] != ["here"]:
            return f"{verb} takes nothing after it, got {_quote(' '.join(rest))}."
        return Command(verb=verb)
    if not takes_item:
        if not rest:
            return f"{verb} needs a direction, for example: {verb} north."
        return Command(verb=verb, direction=_direction(" ".join(rest)))
    direction = None
    if takes_direction and len(rest) > (0 if letter else 1):
        last = _direction(rest[-1])
        if last in DIRECTIONS or last in _OTHER_TARGETS:
            direction, rest = last, rest[:-1]
    elif takes_direction and len(rest) == 1 and rest[0].lower() in DIRECTIONS:
        direction, rest = rest[0].lower(), []
    item = " ".join(rest) or None
    if letter:
        item = f"{letter} - {item}" if item else letter
    return Command(verb=verb, item=item, direction=direction)


def _words(text: str) -> list[str]:
    """The words of an action, its verb as one of ours where it has another spelling."""
    words = re.findall(r"[A-Za-z0-9+'$-]+", text)[:12]
    lowered = tuple(word.lower() for word in words[:2])
    for spelling, verb in _ALIASES.items():
        if lowered[: len(spelling)] == spelling:
            return [verb, *words[len(spelling) :]]
    return words


def _remark(found: re.Match[str]) -> str:
    """Nothing, but for a direction or a letter that somebody has put into brackets."""
    words = re.findall("[A-Za-z]+", found[1])
    said = any(len(word) == 1 or _direction(word) in DIRECTIONS for word in words)
    return found[0] if said else " "


def _letter(words: list[str], takes_direction: bool) -> tuple[str, list[str]]:
    """The letter that a line of the pack begins with, or "a" where it is no article; and the words
    without it.
    """
    if len(words) > 2 and words[2] == "-" and _LINE.fullmatch(f"{words[1]} - x"):
        return words[1], [words[0], *words[3:]]
    after = [word for word in words[2:] if word.lower() not in _FILLERS]
    if len(words) > 2 and words[1] == "a" and takes_direction and len(after) == 1:
        said = _direction(after[0])
        if said in DIRECTIONS or said in _OTHER_TARGETS:
            return words[1], [words[0], *words[2:]]
    return "", words


def _direction(text: str) -> str:
    return _SHORT_DIRECTIONS.get(text.lower(), text.lower())


def _quote(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")


def matches(wanted: str, *, noun: str, name: str) -> bool:
    """Whether the words typed for an item name this one: its noun, or some of the words of its
    name, singular or plural.
    """
    wanted = wanted.lower()
    if wanted in (noun, name.lower()):
        return True
    have = {_singular(word) for word in re.findall(r"[a-z0-9+'-]+", f"{name.lower()} {noun}")}
    words = {_singular(word) for word in wanted.split()}
    return bool(words) and words <= have


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def find_item(wanted: str, items: tuple[Item, ...], suggested: str) -> Item | str:
    """The one item of the pack that the words mean, or a note. `suggested` holds the letters that
    the game offers (empty: no preference).
    """
    line = _LINE.fullmatch(wanted)
    letter = line[1] if line else wanted
    if len(letter) == 1 and (letter.isalpha() or letter == "$"):
        found = [item for item in items if item.letter == letter]
        if not found:
            return f"You have no item {letter!r}."
        if line and not _means(line[2], found[0]):
            return f"{letter} is no {line[2].lower()}: you have {listing(found)}."
        return found[0]
    found = [item for item in items if matches(wanted, noun=item.noun, name=item.name)]
    found = found or [item for item in items if _means(wanted, item)]
    if len(found) > 1:
        found = [item for item in found if item.letter in suggested] or found
    if len(found) > 1:
        found = [item for item in found if item.name.lower() == wanted.lower()] or found
    if not found:
        return f"You have no {wanted.lower()}."
    if len(found) > 1:
        return f"Which {wanted.lower()}? {listing(found)}."
    return found[0]


def _means(wanted: str, item: Item) -> bool:
    """Whether words that may be more than its name say this item: also of its state, or its letter
    beside its name.
    """
    line = f"{item.text} {item.noun}"
    words = {_singular(word) for word in wanted.lower().split() if word not in _FILLERS}
    have = {_singular(word) for word in re.findall(r"[a-z0-9+'-]+", line.lower())}
    named = {_singular(word) for word in f"{item.name} {item.noun}".lower().split()}
    if item.letter in wanted.split():
        words.discard(item.letter.lower())
    return bool(words & named) and words <= have


def listing(items: list[Item]) -> str:
    """ "a a +1 club, b a sling": letters and names of items, for a note."""
    return ", ".join(f"{item.letter} - {item.text}" for item in items)
