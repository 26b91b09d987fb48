"""ALFWorld in few words, for tiny word-level models: notes of what the official text has shown, one
line per turn, two-word actions.

A turn reads `task clean apple fridge . at countertop . found apple . see bread cup . left drawer
sinkbasin .`: the task, where the agent is (`at place fridge` where that is the kind of place that
the task names), whether the thing (or `lamp`) of the task is there, what else it sees there, what
it carries, where else the things of the task were seen, and which places it has not looked into
yet. Nothing in it goes beyond the official text of the episode so far and the admissible actions.
Numbers are left out; where a word could mean several things of a kind, a fixed rule decides
(`CompactText.command`).
"""

import dataclasses
import re

_MARKS = {"clean": "clean", "heat": "hot", "cool": "cold"}
_MOST_SEEN = 3  # kinds of other things listed per turn
_MOST_LEFT = 3
# kinds of places that take a second action to look into
_CLOSING = frozenset({"cabinet", "drawer", "fridge", "microwave", "safe"})

_TASKS = tuple(
    (kind, re.compile(rf"^{pattern}\.?$"))
    for kind, pattern in (
        (
            "look",
            r"(?:look at|examine) (?:an? |the |some )?(\w+) (?:under|with) (?:an? |the )?(\w+)",
        ),
        ("two", r"put two (\w+) (?:in|on) (?:an? |the )?(\w+)"),
        ("two", r"find two (\w+) and put them (?:in|on) (?:an? |the )?(\w+)"),
        ("clean", r"put (?:an? |some )?clean (\w+) (?:in|on) (?:an? |the )?(\w+)"),
        ("heat", r"put (?:an? |some )?hot (\w+) (?:in|on) (?:an? |the )?(\w+)"),
        ("cool", r"put (?:an? |some )?(?:cool|cold) (\w+) (?:in|on) (?:an? |the )?(\w+)"),
        ("clean", r"clean (?:an? |some )?(\w+) and put it (?:in|on) (?:an? |the )?(\w+)"),
        ("heat", r"heat (?:an? |some )?(\w+) and put it (?:in|on) (?:an? |the )?(\w+)"),
        ("cool", r"cool (?:an? |some )?(\w+) and put it (?:in|on) (?:an? |the )?(\w+)"),
        ("put", r"put (?:an? |some )?(\w+) (?:in|on) (?:an? |the )?(\w+)"),
    )
)
_NAME = re.compile(r"[a-z]+ \d+")
_CONTENTS = re.compile(r"(?:On the (\w+ \d+)|The (\w+ \d+) is open\. In it), you see (.*)\.")
_CLOSED = re.compile(r"(?:The (\w+ \d+) is closed|You close the (\w+ \d+))\.")
_TAKEN = re.compile(r"You pick up the (\w+ \d+) from the (\w+ \d+)\.")
_MOVED = re.compile(r"You move the (\w+ \d+) to the (\w+ \d+)\.")
_MARKED = re.compile(r"You (clean|heat|cool) the (\w+ \d+) using the")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """The task of a game: its kind (put, look, clean, heat, cool or two), the kind of thing, and
    the kind of place to bring it to (for `look`: the lamp).
    """

    kind: str
    thing: str
    place: str


def read_task(text: str) -> Task:
    """The task in an observation that states it. Raises ValueError where it is missing or of no
    known form.
    """
    sentence = text.partition("Your task is to: ")[2].partition("\n")[0].strip()
    for kind, pattern in _TASKS:
        if found := pattern.match(sentence):
            return Task(kind=kind, thing=found[1], place=found[2])
    raise ValueError(
        f"No known ALFWorld task in {(sentence or text)[:200]!r}: start from the text that a reset"
        " gives."
    )


def kind_of(name: str) -> str:
    """`drawer 2` -> `drawer`."""
    return name.partition(" ")[0]


def _number(name: str) -> tuple[str, int]:
    kind, _, number = name.partition(" ")
    return kind, int(number)


class Notes:
    """What the official text has shown so far in one episode. Feed it every text once, in order.

    Attributes:
      task: of the game.
      places: every place of the room, in the order of the first text.
      contents: what lay in each place when last seen, for the places looked into.
      closed: places that were closed when last seen.
      here: the place that the agent last went to, empty at the start.
      held: the thing in hand, or empty.
      marks: things that were made `clean`, `hot` or `cold`.
      placed: things that the agent itself put somewhere, and where.
      actions: the admissible commands now.
      idle: whether the last command had no effect.
    """

    def __init__(self, text: str, actions: tuple[str, ...]):
        self.task = read_task(text)
        self.places = tuple(
            dict.fromkeys(_NAME.findall(text.partition("you see ")[2].partition("\n")[0]))
        )
        self.contents: dict[str, tuple[str, ...]] = {}
        self.closed: set[str] = set()
        self.here = ""
        self.held = ""
        self.marks: dict[str, str] = {}
        self.placed: dict[str, str] = {}
        self.actions = tuple(actions)
        self.idle = False

    def update(self, command: str, text: str, actions: tuple[str, ...]) -> None:
        """Takes in the answer to one command."""
        self.actions = tuple(actions)
        self.idle = text.startswith("Nothing happens")
        if self.idle:
            return
        verb, _, rest = command.partition(" ")
        target = rest.removeprefix("to ") if verb == "go" else rest
        if verb in ("go", "examine", "open") and target in self.places:
            self.here = target
        if found := _CONTENTS.search(text):
            place = found[1] or found[2]
            self.contents[place] = tuple(_NAME.findall(found[3]))
            self.closed.discard(place)
        elif found := _CLOSED.search(text):
            self.closed.add(found[1] or found[2])
        elif found := _TAKEN.search(text):
            thing, place = found[1], found[2]
            self.held = thing
            self.placed.pop(thing, None)
            self.contents[place] = tuple(
                name for name in self.contents.get(place, ()) if name != thing
            )
        elif found := _MOVED.search(text):
            thing, place = found[1], found[2]
            self.held = ""
            self.placed[thing] = place
            self.contents[place] = (*self.contents.get(place, ()), thing)
        elif found := _MARKED.search(text):
            self.marks[found[2]] = _MARKS[found[1]]

    def unseen(self) -> list[str]:
        """The places not looked into yet (never visited, or closed): those of kinds that close come
        last, else in the order of the first text.
        """
        left = [place for place in self.places if place not in self.contents]
        return sorted(left, key=lambda place: kind_of(place) in _CLOSING)

    def find(self, kind: str) -> list[tuple[str, str]]:
        """The things of a kind that the agent has seen and not itself put down, with their places;
        those here come first, then by number.
        """
        found = [
            (name, place)
            for place, names in self.contents.items()
            for name in names
            if kind_of(name) == kind and name not in self.placed
        ]
        return sorted(found, key=lambda item: (item[1] != self.here, _number(item[0])))

    def visible(self) -> list[str]:
        """The things to be seen in the place where the agent is, but for those it put there."""
        if self.here in self.closed:
            return []
        return [name for name in self.contents.get(self.here, ()) if name not in self.placed]

    @property
    def lamp(self) -> str:
        """The kind of lamp that the task asks for, or empty."""
        return self.task.place if self.task.kind == "look" else ""


def describe(notes: Notes) -> str:
    """One turn in few words."""
    task = notes.task
    parts = ["nothing happens"] if notes.idle else []
    parts.append(f"task {task.kind} {task.thing} {task.place}")
    if notes.here:
        kind = kind_of(notes.here)
        parts.append(
            " ".join(
                [
                    "at",
                    *["place"] * (kind == task.place),
                    kind,
                    *["closed"] * (notes.here in notes.closed),
                ]
            )
        )
    wanted = {task.thing: "found", notes.lamp: "lamp"}
    seen = list(dict.fromkeys(map(kind_of, notes.visible())))
    parts += [f"{word} {kind}" for kind, word in wanted.items() if kind in seen]
    others = [kind for kind in seen if kind not in wanted]
    if others:
        parts.append(" ".join(["see", *others[:_MOST_SEEN]]))
    if notes.held:
        parts.append(
            " ".join(
                word
                for word in ("carry", notes.marks.get(notes.held, ""), kind_of(notes.held))
                if word
            )
        )
    if notes.placed:
        parts.append(" ".join(["done", *dict.fromkeys(map(kind_of, notes.placed))]))
    for kind in filter(None, wanted):
        elsewhere = [place for _, place in notes.find(kind) if place != notes.here]
        if elsewhere and kind not in seen:
            parts.append(f"know {kind} {kind_of(elsewhere[0])}")
    left = dict.fromkeys(kind_of(place) for place in notes.unseen() if place != notes.here)
    if left:
        parts.append(" ".join(["left", *list(left)[:_MOST_LEFT]]))
    return " . ".join(parts) + " ."


class CompactText:
    """One episode in the compact style: official text in, compact text out, and compact actions in,
    official commands out.
    """

    def __init__(self, text: str, actions: tuple[str, ...]):
        self.notes = Notes(text, actions)

    @property
    def text(self) -> str:
        """The compact text of the present turn."""
        return describe(self.notes)

    def update(self, command: str, text: str, actions: tuple[str, ...]) -> str:
        """Takes in the official answer to an official command, and returns the compact text of the
        new turn.
        """
        self.notes.update(command, text, actions)
        return self.text

    def command(self, action: str) -> str:
        """The official command for a compact action such as `go fridge` or `take apple`; an action
        without a meaning here is returned as it is.

        `go KIND` goes to the place of that kind that matters: with a thing in hand, the one where
        the agent put a thing before or saw the lamp; else the one where it saw the task's thing;
        then the first not looked into; then the first other than where it is. A place that shares
        the agent's spot is looked at instead. Other verbs mean the first admissible command with
        that thing or place, the place where the agent is before others.
        """
        notes = self.notes
        verb, _, rest = action.strip().partition(" ")
        kind = rest.strip()
        if verb == "go":
            place = self._destination(kind)
            options = [f"go to {place}", f"examine {place}"]
            return next((option for option in options if option in notes.actions), action)
        official = "move" if verb == "put" else verb
        options = [
            option
            for option in notes.actions
            if option.startswith(f"{official} {kind} ") or option == f"{official} {kind}"
        ]
        options.sort(key=lambda option: not option.endswith(f" {notes.here}"))
        # what the agent itself put down stays there, unless nothing else can be meant
        if verb == "take":
            options.sort(
                key=lambda option: option.split(" from ")[0].removeprefix("take ") in notes.placed
            )
        return options[0] if kind and options else action

    def _destination(self, kind: str) -> str:
        notes = self.notes
        places = sorted((place for place in notes.places if kind_of(place) == kind), key=_number)
        if notes.held:
            marked = [*notes.placed.values(), *(place for _, place in notes.find(notes.lamp))]
        else:
            marked = [place for _, place in notes.find(notes.task.thing)]
        choices = [
            *(place for place in marked if place in places),
            *(place for place in places if place not in notes.contents),
            *places,
        ]
        return next((place for place in choices if place != notes.here), notes.here)
