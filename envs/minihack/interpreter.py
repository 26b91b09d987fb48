"""Commands to keys: plays what an agent means on the console, and answers what the game asks.

Nothing is ever guessed: what cannot be resolved presses no key, or is undone, and leaves a note.
"""

import dataclasses
import re

from envs.minihack.console import ENTER, ESC, Console, nethack
from envs.minihack.verbs import Command, find_item, listing, matches
from envs.minihack.view import DIRECTIONS, Item, View, plain_name

_KEYS = nethack.Command
_STEP_KEYS = dict(zip(DIRECTIONS, (ord(c) for c in "kjlhuynb"), strict=True))
_TARGET_KEYS = {**_STEP_KEYS, "self": ord("."), "down": ord(">"), "up": ord("<")}
_VERB_KEYS = {
    "fight": int(_KEYS.FIGHT),
    "kick": int(_KEYS.KICK),
    "open": int(_KEYS.OPEN),
    "close": int(_KEYS.CLOSE),
    "untrap": int(_KEYS.UNTRAP),
    "pickup": int(_KEYS.PICKUP),
    "drop": int(_KEYS.DROP),
    "eat": int(_KEYS.EAT),
    "quaff": int(_KEYS.QUAFF),
    "read": int(_KEYS.READ),
    "wield": int(_KEYS.WIELD),
    "wear": int(_KEYS.WEAR),
    "takeoff": int(_KEYS.TAKEOFF),
    "puton": int(_KEYS.PUTON),
    "remove": int(_KEYS.REMOVE),
    "apply": int(_KEYS.APPLY),
    "zap": int(_KEYS.ZAP),
    "throw": int(_KEYS.THROW),
    "pray": int(_KEYS.PRAY),
    "search": int(_KEYS.SEARCH),
    "wait": ord("."),
    "up": ord("<"),
    "down": ord(">"),
}
_NEXT_PAGE = ord(">")
_MAX_MENU_PAGES = 20
_YES, _NO = (ord("y"),), (ord("n"),)
_SUGGESTED = re.compile(r"\[(.*?) or \?\*\]|\[(.*?)\]")
_FLOOR_FOOD = re.compile(r"There (?:is|are) (.+?) here; eat (?:it|one)\?")
_DRINK_FROM = re.compile(r"Drink from the (\w+)\?")
_MENU_LINE = re.compile(r"^([A-Za-z$]) - (.+)$")  # $: gold
_CONFIRMED = ("sure you want to pray?", "nlock it?", "Improvise?", "Continue?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Played:
    """What came of an action beside what the console says: `notes` on what could not be done, and
    the direction it went in or was aimed at, if any.
    """

    notes: tuple[str, ...]
    direction: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Meant:
    """A command whose words are resolved: a real direction, and an item of the pack where one was
    needed before the first key.
    """

    command: Command
    direction: str | None
    item: Item | None


def play_command(command: Command, view: View, console: Console) -> Played:
    """Plays one command on a console that shows `view` and waits for a command."""
    interpreter = _Interpreter(view, console)
    direction = interpreter.play(command)
    return Played(notes=tuple(interpreter.notes), direction=direction)


class _Interpreter:
    """Plays one command."""

    def __init__(self, view: View, console: Console):
        self.notes: list[str] = []
        self._view = view
        self._console = console

    def play(self, command: Command) -> str | None:
        """Returns the direction that the command was understood to have."""
        verb = command.verb
        if verb in ("look", "inventory"):
            if verb == "look":
                self.notes.append("You look around.")
            return None
        direction = command.direction
        if direction is not None and direction not in _TARGET_KEYS:
            direction = self._neighbour(direction)
            if direction is None:
                return None
        if verb in ("go", "far") and direction not in DIRECTIONS:
            self.notes.append(
                f"{verb} needs one of the eight directions, got {direction!r}; stairs are taken"
                " with up and down."
            )
            return None
        if verb in ("open", "close", "kick", "fight", "untrap") and direction in (
            "self",
            "up",
            "down",
        ):
            self.notes.append(f"{verb} needs one of the eight directions, got {direction!r}.")
            return None
        item = None
        if verb in ("apply", "zap", "throw", "drop") or (
            command.item is not None and verb not in ("pickup", "eat", "quaff")
        ):
            item = self._resolve_item(verb, command.item)
            if item is None:
                return direction
            if verb == "throw" and direction is None:
                self.notes.append(f"throw needs a direction, for example: throw {item.noun} east.")
                return None
        meant = _Meant(command=command, direction=direction, item=item)
        if verb == "pickup":
            self._pick_up(meant)
        else:
            self._start(verb, direction)
            self._answer_all(meant)
        return direction

    def _start(self, verb: str, direction: str | None) -> None:
        """Presses the keys that come before any question."""
        press = self._console.press
        if verb == "go" and direction is not None:
            press(_STEP_KEYS[direction])
        elif verb == "far" and direction is not None:
            press(ord(chr(_STEP_KEYS[direction]).upper()))
        else:
            press(_VERB_KEYS[verb])
            # a prefix key, which waits for a move without asking
            if verb == "fight" and direction is not None:
                press(_STEP_KEYS[direction])

    # --- words ---

    def _neighbour(self, noun: str) -> str | None:
        """The direction of the one neighbour cell that shows `noun` ("door", "goblin"); leaves a
        note otherwise.
        """
        x, y = self._view.position
        found = []
        for word, (dx, dy) in DIRECTIONS.items():
            thing = self._view.cell((x + dx, y + dy))
            if (
                thing is not None
                and thing.kind not in ("floor", "wall")
                and matches(noun, noun=thing.noun, name=thing.name)
            ):
                found.append(word)
        if len(found) == 1:
            return found[0]
        if found:
            self.notes.append(
                f"Which {noun}? There is one {', one '.join(found)}: name a direction."
            )
        else:
            self.notes.append(f"{noun!r} is no direction and no such thing is next to you.")
        return None

    def _resolve_item(self, verb: str, wanted: str | None) -> Item | None:
        """The item meant, before any key is sent; leaves a note and returns None when that is
        unclear.
        """
        items = self._view.items
        if wanted is None:
            wands = [item for item in items if verb == "zap" and item.noun == "wand"]
            if len(wands) == 1:
                return wands[0]
            self.notes.append(
                f"{verb} needs an item: {listing(wands or list(items))}."
                if items
                else f"You have nothing to {verb}."
            )
            return None
        found = find_item(wanted, items, "")
        if isinstance(found, str):
            self.notes.append(found)
            return None
        return found

    def _only_door(self) -> str | None:
        x, y = self._view.position
        doors = []
        for word, (dx, dy) in DIRECTIONS.items():
            thing = self._view.cell((x + dx, y + dy))
            if thing is not None and thing.kind == "closed":
                doors.append(word)
        return doors[0] if len(doors) == 1 else None

    # --- questions ---

    def _answer_all(self, meant: _Meant) -> None:
        """Answers questions while they have one meaning and leaves the others with the safe answer
        and a note.
        """
        console = self._console
        console.settle()
        while console.asks() and not console.over and not console.stuck:
            keys = self._answer(meant, console.message())
            if not keys:  # the command was undone
                return
            for key in keys:
                console.press(key)
            console.settle()

    def _answer(self, meant: _Meant, question: str) -> tuple[int, ...]:
        verb, wanted = meant.command.verb, meant.command.item
        if "What do you want to" in question:
            return self._answer_item(meant, question)
        if "direction?" in question:
            direction = meant.direction
            if direction is None and verb == "apply":
                direction = self._only_door()
            if direction is None:
                # No answer would waste the charge of a wand or horn, so the whole command is
                # undone.
                self._console.rewind()
                words = f"{verb} {meant.item.noun}" if meant.item else verb
                self.notes.append(f"{words} needs a direction here, for example: {words} east.")
                return ()
            return (_TARGET_KEYS[direction],)
        if found := _FLOOR_FOOD.search(question):
            name = re.sub(r"^(?:an?|the|\d+) ", "", found.group(1))
            eaten = verb == "eat" and (
                wanted is None
                or wanted in ("here", "it")
                or matches(wanted, noun=name.split()[-1], name=name)
            )
            return _YES if eaten else _NO
        if found := _DRINK_FROM.search(question):
            drunk = verb == "quaff" and (wanted is None or wanted in ("here", "it", found.group(1)))
            return _YES if drunk else _NO
        if "Right or Left?" in question:
            return (ord("r"),)
        if any(part in question for part in _CONFIRMED):
            return _YES
        if "eally attack" in question:
            if verb == "fight":
                return _YES
            self.notes.append("It is peaceful, so you do not attack it; fight DIRECTION would.")
            return (ESC,)
        self.notes.append(f"The game asked {question!r}; the answer was no.")
        return _NO if "[yn" in question else (ESC,)

    def _answer_item(self, meant: _Meant, question: str) -> tuple[int, ...]:
        """Answers "What do you want to wield? [- abf or ?*]": the named item, or the only one
        offered.
        """
        verb, wanted = meant.command.verb, meant.command.item
        if meant.item is not None:
            return (ord(meant.item.letter),)
        suggested = _expand(question)
        if wanted is not None and wanted not in ("here", "it"):
            found = find_item(wanted, self._view.items, suggested)
            if isinstance(found, str):
                self.notes.append(found)
                return (ESC,)
            return (ord(found.letter),)
        offered = [item for item in self._view.items if item.letter in suggested]
        if len(offered) == 1 and wanted is None:
            return (ord(offered[0].letter),)
        if offered:
            self.notes.append(f"{verb} what? You could name one of: {listing(offered)}.")
        else:
            self.notes.append(f"You have nothing to {verb}.")
        return (ESC,)

    # --- picking up ---

    def _pick_up(self, meant: _Meant) -> None:
        """Picks up what lies here, out of a menu when there are several objects. Without a name:
        everything.
        """
        wanted = meant.command.item
        here = [thing for thing in self._view.here if thing.kind == "object"]
        if wanted is not None and (line := _MENU_LINE.match(wanted)):
            wanted = line[2]  # of the game's own menu
        if wanted in ("here", "it", "all", "everything"):
            wanted = None
        if not here and wanted is not None and not self._view.blind:
            self.notes.append(f"There is no {wanted} here.")
            return
        names = {thing.name for thing in here}
        if here and wanted is not None:
            found = [thing for thing in here if matches(wanted, noun=thing.noun, name=thing.name)]
            found = [thing for thing in found if thing.name.lower() == wanted.lower()] or found
            if not found:
                self.notes.append(
                    f"There is no {wanted} here. Here is:"
                    f" {', '.join(thing.name for thing in here)}."
                )
                return
            names = {thing.name for thing in found}
            if len(names) > 1:
                self.notes.append(
                    f"Which {wanted}? Here is: {', '.join(thing.name for thing in found)}."
                )
                return
        self._start("pickup", None)
        if here:
            self._settle_menu(names)
        self._answer_all(meant)

    def _settle_menu(self, names: set[str]) -> None:
        """Marks the lines of a pick-up menu that bear one of the names, on every page, and
        confirms.
        """
        console = self._console
        for _ in range(_MAX_MENU_PAGES):
            window = console.window() if console.waits() and not console.message() else []
            if not any(_MENU_LINE.match(line) for line in window):
                return
            more = console.more_pages()
            for line in window:
                found = _MENU_LINE.match(line)
                if found and plain_name(found.group(2)) in names:
                    console.press(ord(found.group(1)))
            console.press(_NEXT_PAGE if more else ENTER)
            if not more:
                return


def _expand(question: str) -> str:
    """The letters a question offers: "[- a-ce or ?*]" -> "abce"."""
    found = _SUGGESTED.search(question)
    letters = (found.group(1) or found.group(2) or "") if found else ""
    return re.sub(
        r"([A-Za-z])-([A-Za-z])",
        lambda m: "".join(chr(c) for c in range(ord(m.group(1)), ord(m.group(2)) + 1)),
        letters,
    )
