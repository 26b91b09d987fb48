"""ALFWorld in short English sentences and with actions of a higher level, for small language
models.

A turn takes 10 to 60 tokens: `Task clean: a cloth for the toilet. Places: countertop, drawer, ...
Verbs: use, open, clean, ...`, then `At the countertop you see a cloth and a soapbar.` Nothing in it
goes beyond what the official text has shown. An action is `go PLACE`, `pickup THING` or `VERB
THING`, and stands for the official commands that it takes: to go somewhere opens what is closed
there; to clean, heat or cool a thing walks to where that is done, does it, and brings the thing to
the place that the task names; to put it brings it there; to use it carries it to the lamp and turns
that on. Other verbs are tried where the agent stands. So what decides a game is the verb.

In a renamed family (`envs.renamings`) the verbs and the word for the task have other names.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from envs.alfworld.compact import Notes, kind_of
from envs.alfworld.engine import Answer
from envs.renamings import LABELS, draw_names

TASKS: Sequence[str] = ("put", "look", "clean", "heat", "cool", "two")
VERBS: Sequence[str] = ("put", "clean", "heat", "cool", "use", "examine", "open", "slice")
"""Listed in the first turn, in an order of each game's own: who tries them in turn tries others in
every game. The last three lead nowhere."""
_TOOLS: Mapping[str, str] = MappingProxyType(
    {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
)
_OPENINGS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(TASKS, "{thing} for the {place}")
    | {"look": "{thing} by the {place}", "two": "two {kind}s for the {place}"}
)
_MOST_SEEN = 6
_ACTION = re.compile(r"([a-z]+) (?:to |the )*([a-z]+)(?: \d+)? ?[.]?")  # of single spaces

Run = Callable[[str], Answer]


def renaming(family: str) -> Mapping[str, str]:
    """What verbs, and the words for tasks ("task clean"), are called in a renamed family: the same
    for each of its games.
    """
    words = (*VERBS, *map(task_word, TASKS))
    labels = [label for label in LABELS if label not in VERBS]
    return draw_names(words, labels, random.Random(f"alfworld {family}"))


def task_word(kind: str) -> str:
    """The key of a kind of task in a renaming, which names verbs as well."""
    return f"task {kind}"


class ShortText:
    """One episode in the short style, over the official environment: `start` is its first answer,
    and `run` plays an official command. `names` is what verbs and tasks are called instead
    (`renaming`).

    Raises ValueError for a text that states no known task.
    """

    def __init__(self, start: Answer, run: Run, names: Mapping[str, str] = MappingProxyType({})):
        self.notes = Notes(start.text, start.commands)
        self._run, self._last, self._names = run, start, names
        self._verbs = {names.get(verb, verb): verb for verb in VERBS}
        verbs = random.Random(start.text).sample(VERBS, len(VERBS))
        task = self.notes.task
        about = _OPENINGS[task.kind].format(
            thing=_with_article(task.thing), kind=task.thing, place=task.place
        )
        places = dict.fromkeys(map(kind_of, self.notes.places))
        self._text = (
            f"Task {self.task_name}: {about}. Places: {', '.join(places)}."
            f" Verbs: {', '.join(names.get(verb, verb) for verb in verbs)}."
        )

    @property
    def task_name(self) -> str:
        """What the kind of task is called here."""
        kind = self.notes.task.kind
        return self._names.get(task_word(kind), kind)

    @property
    def text(self) -> str:
        """Of the present turn."""
        return self._text

    def play(self, action: str) -> Answer:
        """Plays one action and returns the last official answer."""
        if not self._last.won:
            said = self._play(action)
            self._text = f"{said} You succeeded." if self._last.won else said
        return self._last

    def _play(self, action: str) -> str:
        action = " ".join(action.split())
        found = _ACTION.fullmatch(action.lower())
        verb, kind = found.groups() if found else ("", "")
        if verb == "go":
            return self._go_to_kind(kind)
        if verb in ("pickup", "take"):
            return self._pick_up(kind)
        if verb not in self._verbs:
            self._do("look")
            return f"Unknown action: {action[:40]!r}. {self._seen()}"
        return self._try(self._verbs[verb], verb, kind)

    def _do(self, command: str) -> bool:
        """Plays an official command, and says whether it had an effect."""
        self._last = self._run(command)
        self.notes.update(command, self._last.text, self._last.commands)
        return not self.notes.idle

    def _go(self, place: str) -> None:
        """Goes to a place and opens it. What shares the agent's spot is looked at."""
        if self.notes.here != place:
            options = (f"go to {place}", f"examine {place}")
            self._do(next((c for c in options if c in self.notes.actions), options[0]))
        if place in self.notes.closed:
            self._do(f"open {place}")

    def _go_to_kind(self, kind: str) -> str:
        notes = self.notes
        places = sorted(place for place in notes.places if kind_of(place) == kind)
        if not places:
            self._do("look")
            return f"There is no {kind} here. {self._seen()}"
        unseen = [place for place in notes.unseen() if place in places]
        holding = [place for _, place in notes.find(notes.task.thing) if place in places]
        self._go((holding or unseen or places)[0])
        return self._seen()

    def _pick_up(self, kind: str) -> str:
        here = [name for name in self._lying_here() if kind_of(name) == kind]
        if not here:
            self._do("look")
            return f"There is no {kind} to pick up. {self._seen()}"
        if self.notes.held:
            self._do("look")
            return f"Your hands are full. {self._seen()}"
        self._do(f"take {here[0]} from {self.notes.here}")
        return self._seen()

    def _try(self, verb: str, shown: str, kind: str) -> str:
        """What comes of a verb. What the agent put down before is taken again, the last first."""
        notes = self.notes
        if verb == "use" and kind == notes.lamp:
            kind = notes.task.thing
        if not notes.held:
            known = [name for name in reversed(notes.placed) if kind_of(name) == kind]
            if known:
                place = notes.placed[known[0]]
                self._go(place)
                self._do(f"take {known[0]} from {place}")
        if not notes.held or kind_of(notes.held) != kind:
            self._do("look")
            return f"You carry no {kind}. {self._seen()}"
        held, target = notes.held, notes.task.place
        if verb in _TOOLS:
            tool = next((p for p in notes.places if kind_of(p) == _TOOLS[verb]), None)
            if tool:
                self._go(tool)
            if not self._do(f"{verb} {held} with {tool}"):
                return f"Nothing happens. {self._seen()}"
            brought = f" and bring it to the {target}" if self._bring(held) else ""
            return f"You {shown} the {kind}{brought}."
        if verb == "put":
            if not self._bring(held):
                return f"Nothing happens. {self._seen()}"
            return f"You {shown} the {kind}: it is at the {target}."
        if verb == "use":
            lamp = self._find_lamp()
            if not (lamp and self._do(f"use {lamp}")):
                return f"Nothing happens. {self._seen()}"
            return f"You {shown} the {kind} by the {kind_of(lamp)}."
        self._do(f"{verb} {held}")
        return f"Nothing happens. {self._seen()}"

    def _bring(self, held: str) -> bool:
        """Puts what is held into the place that the task names."""
        notes = self.notes
        places = [place for place in notes.places if kind_of(place) == notes.task.place]
        # two things go to one place
        places.sort(key=lambda place: place not in notes.placed.values())
        if not places:
            return False
        self._go(places[0])
        return self._do(f"move {held} to {places[0]}")

    def _find_lamp(self) -> str:
        """Goes to where a lamp stands, looking for one where none was seen; the lamp, or empty."""
        notes = self.notes
        for _ in range(len(notes.places) + 1):
            if known := notes.find(notes.lamp or "desklamp"):
                lamp, place = known[0]
                self._go(place)
                return lamp
            if not (left := notes.unseen()):
                break
            self._go(left[0])
        return ""

    def _lying_here(self) -> list[str]:
        return [] if self.notes.here in self.notes.closed else self.notes.visible()

    def _seen(self) -> str:
        """Where the agent is, what lies there, what it carries; and, while it has nothing in hand,
        which places it has not looked into.
        """
        notes = self.notes
        parts = []
        if notes.here:
            kinds = list(dict.fromkeys(map(kind_of, self._lying_here())))
            wanted = (notes.task.thing, notes.lamp)
            kinds.sort(key=lambda kind: kind not in wanted)
            seen = _listed([_with_article(kind) for kind in kinds[:_MOST_SEEN]]) or "nothing"
            parts.append(f"At the {kind_of(notes.here)} you see {seen}.")
        if notes.held:
            parts.append(f"You carry {_with_article(kind_of(notes.held))}.")
        elif left := dict.fromkeys(map(kind_of, notes.unseen())):
            parts.append(f"Not seen yet: {', '.join(left)}.")
        return " ".join(parts)


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _listed(names: Sequence[str]) -> str:
    """ "a mug, a pen and a cd"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
