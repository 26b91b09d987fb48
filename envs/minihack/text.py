"""Views to text, in three styles: "full" for language models, "short" for small ones (a few English
sentences, 20-60 tokens a turn), "compact" for tiny word-level models (20-35 words a turn, all lower
case).
"""

import random
import re

from envs.api import Outcome
from envs.minihack.view import DIRECTIONS, Position, Thing, View

STYLES = ("full", "short", "compact")
_MESSAGE_WORDS = 12
_SHORT_WORDS = 24
_NEAREST = 4
# What `here :` says already, and the phase of the moon.
_SAID_ELSEWHERE = re.compile(
    r"^There is .* here\.?$|^Be careful!|^New moon tonight|^You are lucky!|^Full moon"
    r" tonight|^Watch out!|^Friday the 13th"
)
_NOTABLE = (
    "object",
    "monster",
    "feature",
    "trap",
    "boulder",
    "open",
    "closed",
    "doorway",
    "liquid",
)
_MARK = re.compile("[^ ]")
_TERRAIN_WORDS = ("liquid", "open", "closed", "doorway", "boulder")


def render(view: View, previous: View | None, style: str) -> str:
    """The observation after a reset (`previous` is None) or an action."""
    if style == "compact":
        return _compact(view)
    return _short(view, previous) if style == "short" else _full(view, previous)


def render_end(messages: tuple[str, ...], outcome: Outcome, view: View, style: str) -> str:
    """The last observation: what happened, and how it ended."""
    end = {
        Outcome.SUCCESS: "You succeeded.",
        Outcome.DEATH: "You died.",
        Outcome.FAILED: "The game broke down.",
    }[outcome]
    kept = [
        m
        for m in messages
        if not m.startswith(("Do you want your possessions", "Goodbye", "You die..."))
    ]
    if style == "compact":
        message = _message_words(tuple(kept), view)
        return " ".join([*message, *(["."] if message else []), *_words(end), "."])
    if style == "short":
        return " ".join([*_short_messages(tuple(kept), view), end])
    return " ".join([_sentences(tuple(kept)), end]).strip()


def offset_words(origin: Position, position: Position) -> str:
    """ "2 north 1 east": how far a position lies from another, vertical first; "here" for the
    same.
    """
    dx, dy = position[0] - origin[0], position[1] - origin[1]
    parts = []
    if dy:
        parts.append(f"{abs(dy)} {'south' if dy > 0 else 'north'}")
    if dx:
        parts.append(f"{abs(dx)} {'east' if dx > 0 else 'west'}")
    return " ".join(parts) or "here"


def distance(a: Position, b: Position) -> tuple[int, int]:
    """Steps of a king, then of a rook: the order of "nearest"."""
    dx, dy = abs(a[0] - b[0]), abs(a[1] - b[1])
    return max(dx, dy), dx + dy


def notable(view: View) -> list[Thing]:
    """Everything worth naming, nearest first; of each liquid only its nearest cell."""
    things = sorted(
        (t for t in view.cells.values() if t.kind in _NOTABLE),
        key=lambda t: (*distance(view.position, t.position), t.position),
    )
    seen: set[str] = set()
    kept = []
    for thing in things:
        if thing.kind == "liquid":
            if thing.noun in seen:
                continue
            seen.add(thing.noun)
        kept.append(thing)
    return kept


# --- compact ---


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def _plain_messages(messages: tuple[str, ...], view: View) -> list[str]:
    """The messages that nothing else says, names of things replaced by their canonical nouns."""
    names = sorted(
        {(t.name, t.noun) for t in (*view.here, *view.items) if t.name != t.noun and t.name},
        key=lambda pair: -len(pair[0]),
    )
    plain = []
    for message in messages:
        if _SAID_ELSEWHERE.search(message):
            continue
        message = re.sub(r"^[A-Za-z] - ", "", message)
        for name, noun in names:
            message = re.sub(rf"\ban {re.escape(name)}\b", f"a {noun}", message)
            message = re.sub(rf"\b{re.escape(name)}\b", noun, message)
        plain.append(message)
    return plain


def _message_words(messages: tuple[str, ...], view: View) -> list[str]:
    """At most 12 words of the messages."""
    out: list[str] = []
    for message in _plain_messages(messages, view):
        words = _words(message)
        if out and words:
            out.append(".")
        out += words
    count = 0
    for index, word in enumerate(out):
        count += word != "."
        if count > _MESSAGE_WORDS:
            out = out[:index]
            break
    return out[:-1] if out and out[-1] == "." else out


def _compact(view: View) -> str:
    parts = []
    message = _message_words(view.notes or view.messages, view)
    if message:
        parts.append(" ".join(message))
    if view.floating:
        parts.append("floating")
    if view.here:
        parts.append("here : " + " , ".join(thing.noun for thing in view.here[:3]))
    x, y = view.position
    for word, (dx, dy) in DIRECTIONS.items():
        thing = view.cell((x + dx, y + dy))
        noun = "wall" if thing is None else thing.noun
        straight = not (dx and dy)
        if ((thing is None or thing.kind == "wall") and straight) or (
            thing is not None and thing.kind in _TERRAIN_WORDS
        ):
            parts.append(f"{word} : {noun}")
    adjacent_terrain = {
        t.noun
        for t in view.cells.values()
        if t.kind in _TERRAIN_WORDS and distance(view.position, t.position)[0] == 1
    }
    seen = [
        t
        for t in notable(view)
        if not (
            t.kind in _TERRAIN_WORDS
            and (
                distance(view.position, t.position)[0] == 1
                or (t.kind == "liquid" and t.noun in adjacent_terrain)
            )
        )
    ]
    if seen:
        parts.append(
            "see : "
            + " , ".join(
                f"{t.noun} {offset_words(view.position, t.position)}" for t in seen[:_NEAREST]
            )
        )
    gained = [item.noun for item in view.items if item.gained]
    if gained:
        parts.append("items : " + " ".join(gained))
    if view.hp * 3 < view.max_hp:
        parts.append("hp low")
    return " . ".join(parts) + " ."


# --- short ---

# Verbs whose use a player may not think of; moves go without saying.
OFFERED: tuple[str, ...] = (
    "pickup",
    "eat",
    "quaff",
    "read",
    "wield",
    "wear",
    "puton",
    "zap",
    "apply",
    "kick",
    "pray",
    "down",
)
_SHORT_NAMES = {"stairs": "staircase down", "upstairs": "staircase up"}
_VOWEL = re.compile(r"\b[aA](?= [aeiou])")
_PLURALS = ("boots", "shoes", "gloves", "gauntlets", "lenses", "glasses", "lava", "water")


def _short(view: View, previous: View | None) -> str:
    """The first observation also says which verbs there are, in an order of each initial state: who
    tries them in turn tries others in every game. The way back up is of no use in any game: it is
    left out where the hero does not stand on it.
    """
    parts = _short_messages(view.notes or view.messages, view)
    if view.floating:
        parts.append("You are floating.")
    if view.here:
        parts.append(f"You stand on {_listed([_with_article(t.noun) for t in view.here[:3]])}.")
    seen = [
        f"{_with_article(thing.noun)} {offset_words(view.position, thing.position)}"
        for thing in [t for t in notable(view) if t.noun != "upstairs"][:_NEAREST]
    ]
    if seen:
        parts.append(f"You see {_listed(seen)}.")
    x, y = view.position
    walls = [
        word
        for word, (dx, dy) in DIRECTIONS.items()
        if not (dx and dy) and ((t := view.cell((x + dx, y + dy))) is None or t.kind == "wall")
    ]
    if walls:
        parts.append(f"Walls: {', '.join(walls)}.")
    gained = [_with_article(item.noun) for item in view.items if item.gained]
    if gained:
        parts.append(f"You carry {_listed(gained)}.")
    if view.hp * 3 < view.max_hp:
        parts.append("You are badly hurt.")
    if previous is None:
        order = random.Random("\n".join(view.rows))
        parts.append(f"Verbs: {', '.join(order.sample(OFFERED, len(OFFERED)))}.")
    return " ".join(parts)


def _short_messages(messages: tuple[str, ...], view: View) -> list[str]:
    """The messages as sentences, of at most 24 words together."""
    said = [
        _VOWEL.sub(lambda found: f"{found[0]}n", message)
        for message in _plain_messages(messages, view)
        if message.strip() and not message.startswith("You see here")
    ]
    text = _sentences(tuple(said))
    words = text.split()
    if len(words) > _SHORT_WORDS:
        text = " ".join(words[:_SHORT_WORDS]).rstrip(".,:;") + " ..."
    return [text[0].upper() + text[1:]] if text else []


def _with_article(noun: str) -> str:
    name = _SHORT_NAMES.get(noun, noun)
    if noun in _PLURALS:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _listed(names: list[str]) -> str:
    """ "an apple, a sink and a wand"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# --- full ---


def _sentences(messages: tuple[str, ...]) -> str:
    return " ".join(m if m.endswith((".", "!", "?", '"')) else m + "." for m in messages)


def _full(view: View, previous: View | None) -> str:
    parts = []
    for note in view.notes:
        parts.append(f"({note})" if not note.startswith("(") else note)
    if view.messages:
        parts.append(_sentences(view.messages))
    parts += _map(view)
    things = [f"- {t.name} ({_where(view, t)})" for t in notable(view)]
    if things:
        parts.append("You see:\n" + "\n".join(things[:12]))
    if view.here:
        parts.append("Here: " + ", ".join(t.name for t in view.here) + ".")
    if previous is None or previous.items != view.items:
        parts.append(
            "You carry:\n" + "\n".join(f"{item.letter} - {item.text}" for item in view.items)
            if view.items
            else "You carry nothing."
        )
    if previous is None or (previous.hp, previous.max_hp) != (view.hp, view.max_hp):
        parts.append(f"Health: {view.hp} of {view.max_hp}.")
    if view.floating:
        parts.append("You are floating in the air.")
    if view.blind:
        parts.append("You are blind.")
    return "\n".join(parts)


def _where(view: View, thing: Thing) -> str:
    """Where a thing is, in words: "3 north, 1 east"."""
    words = offset_words(view.position, thing.position)
    return words.replace(" north ", " north, ").replace(" south ", " south, ")


def _map(view: View) -> list[str]:
    """The part of the map that is not blank, within 10 rows and 20 columns of the hero, and what
    its characters mean.
    """
    hx, hy = view.position
    top, bottom = max(hy - 10, 0), hy + 11
    left, right = max(hx - 20, 0), hx + 21
    rows = [row[left:right] for row in view.rows[top:bottom]]
    filled = [r for r, row in enumerate(rows) if row.strip(" ")]
    if not filled:
        return []
    start = min(len(rows[r]) - len(rows[r].lstrip(" ")) for r in filled)
    lines = [row[start:].rstrip() for row in rows[filled[0] : filled[-1] + 1]]
    legend: dict[str, list[str]] = {}
    for r in filled:
        for found in _MARK.finditer(rows[r]):
            position = (found.start() + left, r + top)
            thing = view.cell(position)
            name = "you" if position == view.position else thing.name if thing is not None else ""
            if name and name not in legend.setdefault(found.group(), []):
                legend[found.group()].append(name)
    return [
        "Map:\n" + "\n".join(lines),
        "Legend: "
        + ", ".join(f"{char} {' or '.join(names)}" for char, names in legend.items() if names),
    ]
