"""New ALFWorld games from the installed package's own rules, text grammar, floor plans and object
tables; no download.

A game is a function of (rooms, seed): the seed fixes the family and the split, everything else is
drawn from it. Rooms are the package's 120 floor plans with their real receptacles and standing
places; objects are laid out anew. Where the initial state of a draw does not hash into the split of
the seed, the next draw is taken: the splits are disjoint by initial state, and no index has to be
scanned. Every game comes with a walkthrough that wins it. Content and text have the form of the
official `game.tw-pddl` files.
"""

import bisect
import collections
import dataclasses
import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from envs.alfworld.tables import FAMILIES, Tables, load_tables, thor_type

Pose = tuple[int, int, int, int]  # steps of 0.25 m east and north, quarter turns, degrees of tilt

SPLITS = ("train", "select", "test")
WANTED: Mapping[str, int] = MappingProxyType({"train": 3000, "select": 200, "test": 200})
"""Generated games of a family in each split."""

_FORMAT = 2  # raise it when the same seed gives another game
_FAMILIES = tuple(FAMILIES)
_TOOLS = MappingProxyType({"clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge"})
_TOOL_NEEDS = MappingProxyType({"clean": "Cleanable", "heat": "Heatable", "cool": "Coolable"})
_LAMP = "DeskLamp"
_LAMP_PLACES = frozenset({"Desk", "Dresser", "SideTable", "Shelf", "CoffeeTable", "DiningTable"})
_NEVER_GOALS = frozenset(
    {
        "SinkBasin",
        "BathtubBasin",
        "TVStand",
        "TowelHolder",
        "HandTowelHolder",
        "Toaster",
        "LaundryHamper",
    }
)

# share of fixtures that are seen from a receptacle's place, as in the official games
_BESIDE = 0.15
# how PDDL spells THOR's ids
_WORDS = (("-", "_minus_"), ("|", "_bar_"), ("+", "_plus_"), (".", "_dot_"))

# Mean number of objects on or in one receptacle of each type over 500 official games: where a thing
# is likely to lie.
_CROWD: Mapping[str, float] = MappingProxyType(
    {
        "ArmChair": 0.8,
        "BathtubBasin": 1.4,
        "Bed": 4.0,
        "Cabinet": 0.5,
        "Cart": 2.5,
        "CoffeeMachine": 0.3,
        "CoffeeTable": 4.7,
        "CounterTop": 5.9,
        "Desk": 7.5,
        "DiningTable": 9.3,
        "Drawer": 0.5,
        "Dresser": 4.8,
        "Fridge": 4.0,
        "GarbageCan": 0.9,
        "HandTowelHolder": 0.8,
        "LaundryHamper": 0.1,
        "Microwave": 1.2,
        "Ottoman": 0.9,
        "PaintingHanger": 0.1,
        "Safe": 0.6,
        "Shelf": 1.0,
        "SideTable": 2.6,
        "SinkBasin": 1.6,
        "Sofa": 2.5,
        "StoveBurner": 0.5,
        "TVStand": 3.4,
        "Toaster": 0.1,
        "Toilet": 2.4,
        "ToiletPaperHanger": 0.3,
        "TowelHolder": 0.9,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rooms:
    """How large rooms are and how hard things are to find. Ranges are inclusive; None leaves what
    the floor plan has.
    """

    name: str
    # receptacles in a room, as far as the floor plan has them
    receptacles: tuple[int, int] | None = None
    # open receptacles on which objects may lie, the sought ones among them; None: anywhere
    surfaces: tuple[int, int] | None = None
    kinds: tuple[int, int] | None = None  # types of objects beside the sought one
    copies: tuple[int, int] = (1, 3)  # objects of each type
    # how many of the sought object there are, drawn uniformly
    sought: tuple[int, ...] = (1, 1, 1, 2, 2, 2, 3, 3, 4)
    fixtures: bool = True  # windows, chairs, ...: named by `look` beside some receptacles

    def __post_init__(self):
        for field in ("receptacles", "surfaces", "kinds", "copies"):
            value = getattr(self, field)
            if value is not None and not 0 <= value[0] <= value[1]:
                raise ValueError(
                    f"Rooms.{field} must be a range (low, high) with 0 <= low <= high, got"
                    f" {value!r}."
                )


FULL = Rooms(name="full")
"""Rooms as in the official games."""

SMALL = Rooms(
    name="small",
    receptacles=(5, 8),
    surfaces=(2, 3),
    kinds=(2, 4),
    copies=(1, 1),
    sought=(1,),
    fixtures=False,
)
"""Rooms for tiny models: what is sought lies on one of 2 or 3 open receptacles, so that a search of
all of them wins within 10 actions.
"""

ROOMS: Mapping[str, Rooms] = MappingProxyType({rooms.name: rooms for rooms in (FULL, SMALL)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A receptacle: THOR's id, its type, and the pose from which it is used."""

    thor: str
    type: str
    pose: Pose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """An object: its type, the index of the place it lies on (None for a fixture), the pose from
    which it is seen, and THOR's id.
    """

    type: str
    place: int | None
    pose: Pose
    thor: str = ""  # drawn last, for the draft that is kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A drawn game before it is written down."""

    family: str
    plan: int
    sought: str
    goal: str  # type of the receptacle to put it in, or of the lamp
    sentence: str
    places: tuple[Place, ...]
    things: tuple[Thing, ...]
    start: Pose


def rooms_named(name: str) -> Rooms:
    """The variant of that name. Raises ValueError when there is none."""
    if name not in ROOMS:
        raise ValueError(f"Unknown rooms {name!r}: use one of {', '.join(ROOMS)}.")
    return ROOMS[name]


def family_of(seed: int) -> str:
    """The family of a seed, by its remainder."""
    return _FAMILIES[seed % len(_FAMILIES)]


def split_of(seed: int) -> str:
    """The split of a seed, by its remainder."""
    return SPLITS[seed // len(_FAMILIES) % len(SPLITS)]


def seeds(family: str, split: str, count: int | None = None) -> range:
    """The seeds of a family's games in a split, in their order: `WANTED`, or so many."""
    first = SPLITS.index(split) * len(_FAMILIES) + _FAMILIES.index(family)
    stride = len(SPLITS) * len(_FAMILIES)
    return range(first, first + (WANTED[split] if count is None else count) * stride, stride)


def key_of(seed: int, rooms: Rooms) -> str:
    """The key of a generated game: "generated/ROOMS/SEED"."""
    return f"generated/{rooms.name}/{seed}"


def parse_key(key: str) -> tuple[Rooms, int]:
    """Reads what `key_of` wrote. Raises ValueError for anything else."""
    prefix, _, rest = key.partition("/")
    name, _, seed = rest.partition("/")
    if prefix != "generated" or not re.fullmatch(r"0|[1-9][0-9]{0,17}", seed):
        raise ValueError(
            f"A key of a generated ALFWorld game reads 'generated/ROOMS/SEED', got {key!r}."
        )
    return rooms_named(name), int(seed)


def generate(seed: int, rooms: Rooms = FULL) -> dict[str, Any]:
    """One game in the form of an official `game.tw-pddl`: pddl_domain, grammar, pddl_problem,
    walkthrough, solvable.

    The same arguments give the same game in every process. Raises ValueError for a negative seed.
    """
    return content(draw(seed, rooms), f"{rooms.name}_{seed}")


def content(draft: Draft, name: str) -> dict[str, Any]:
    """A draft as the content of a game file; `name` is that of the PDDL problem."""
    tables = load_tables()
    return {
        "pddl_domain": tables.domain,
        "grammar": tables.grammar.replace("UNKNOWN GOAL", draft.sentence),
        "pddl_problem": _problem(draft, f"generated_{name}", tables),
        "solvable": True,
        "walkthrough": walkthrough(draft),
    }


def draw(seed: int, rooms: Rooms = FULL) -> Draft:
    """The draft behind `generate`: the first draw of the seed whose initial state falls into the
    seed's split.
    """
    if seed < 0:
        raise ValueError(f"The seed of a generated game must not be negative, got {seed}.")
    rng = random.Random(f"ictjax alfworld {_FORMAT} {rooms} {seed}")
    while True:
        draft = _draw(rng, family_of(seed), rooms)
        if SPLITS[int(initial_hash(draft)[:12], 16) % len(SPLITS)] == split_of(seed):
            return _with_ids(rng, draft)


def initial_hash(draft: Draft) -> str:
    """A hex digest of the task, whatever its wording, the receptacles by name, and the types of
    what lies where.
    """
    named = _numbered(place.thor for place in draft.places)
    contents: list[list[str]] = [[] for _ in draft.places]
    for thing in draft.things:
        if thing.place is not None:
            contents[thing.place].append(thing.type)
    lines = sorted(
        f"{named[place.thor]}: {', '.join(sorted(within))}"
        for place, within in zip(draft.places, contents, strict=True)
    )
    return hashlib.sha256(
        "\n".join([draft.family, draft.sought, draft.goal, *lines]).encode()
    ).hexdigest()


def manifest(rooms: Rooms) -> str:
    """A hex digest of all that decides which games the seeds are: this module's format, the rooms,
    and the package's tables.
    """
    tables = load_tables()
    parts = [
        _FORMAT,
        rooms,
        tables.domain,
        tables.grammar,
        tables.object_types,
        tables.receptacle_types,
    ]
    parts += [
        sorted(
            (name, sorted(types))
            for name, types in (*tables.contains.items(), *tables.actions.items())
        )
    ]
    parts += [
        sorted(tables.goals.items()),
        sorted(tables.sentences.items()),
        list(tables.plans.values()),
        sorted(_CROWD.items()),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def trajectory(draft: Draft) -> dict[str, Any]:
    """The `traj_data.json` that the stock environment and its expert want beside a game."""
    lamp = draft.goal == _LAMP
    params = {
        "mrecep_target": "",
        "object_sliced": False,
        "object_target": draft.sought,
        "parent_target": "" if lamp else draft.goal,
        "toggle_target": draft.goal if lamp else "",
    }
    return {
        "task_type": FAMILIES[draft.family],
        "pddl_params": params,
        "scene": {"scene_num": draft.plan},
        "turk_annotations": {"anns": []},
    }


# --- drawing ---


def _draw(rng: random.Random, family: str, rooms: Rooms) -> Draft:
    tables, plans = load_tables(), _feasible(family, rooms)
    number = rng.choice(tuple(plans))
    sought, goals = rng.choice(plans[number])
    goal = rng.choice(goals)
    places, homes = _furniture(number), None
    if rooms.surfaces is not None:
        places, homes = _choose_places(rng, rooms, places, family, sought, goal)
    layout = _Layout(rng, places, homes)
    if family == "look":
        layout.add_lamp()
    copies = rng.choice(rooms.sought)
    for _ in range(max(copies, 2) if family == "pick_two" else copies):
        # Nothing may be won at the start, and small rooms keep a pair together.
        avoid = goal if family in ("put", "pick_two") else None
        home = layout.add(sought, avoid=avoid)
        if rooms.surfaces is not None and family == "pick_two":
            layout.holdable[sought] = [home]
    types = tables.plans[number].types
    others = [kind for kind in types if kind != sought and kind in layout.holdable]
    if rooms.kinds is not None:
        others = rng.sample(others, min(rng.randint(*rooms.kinds), len(others)))
    for kind in others:
        for _ in range(rng.randint(*rooms.copies)):
            layout.add(kind)
    if rooms.fixtures:
        if _LAMP in types and family != "look":
            layout.add_lamp()
        for kind in types:
            if kind in _fixtures():
                layout.add_fixture(kind)
    return Draft(
        family=family,
        plan=number,
        sought=sought,
        goal=goal,
        sentence=rng.choice(tables.sentences[family]).format(
            obj=sought.lower(), recep=goal.lower(), toggle=goal.lower()
        ),
        places=places,
        things=tuple(layout.things),
        start=layout.free_pose(),
    )


class _Layout:
    """Things being laid out in a room; `homes` are the places where they may lie (None: all)."""

    def __init__(self, rng: random.Random, places: tuple[Place, ...], homes: Sequence[int] | None):
        contains = load_tables().contains
        self.things: list[Thing] = []
        self.holdable: dict[str, list[int]] = {}  # type of object -> where it may lie
        within = range(len(places)) if homes is None else homes
        for index in within:
            for kind in contains[places[index].type]:
                self.holdable.setdefault(kind, []).append(index)
        self._lamp_places = [index for index in within if places[index].type in _LAMP_PLACES]
        self._rng, self._places = rng, places
        self._poses = {place.pose for place in places}

    def add(self, kind: str, avoid: str | None = None) -> int:
        """Lays down one more object of a type, not on a receptacle of type `avoid`; returns the
        place.
        """
        homes = self.holdable[kind]
        return self._lay(
            kind,
            (
                homes
                if avoid is None
                else [index for index in homes if self._places[index].type != avoid]
            ),
        )

    def add_lamp(self):
        """Puts a lamp where it can be used, if there is such a place."""
        if self._lamp_places:
            self._lay(_LAMP, self._lamp_places)

    def add_fixture(self, kind: str):
        """Stands something that is not for taking into the room, sometimes beside a receptacle."""
        pose = (
            self._rng.choice(self._places).pose
            if self._rng.random() < _BESIDE
            else self.free_pose()
        )
        self.things.append(Thing(type=kind, place=None, pose=pose))

    def free_pose(self) -> Pose:
        """A standing place of nothing else."""
        while True:
            pose = _pose(self._rng)
            if pose not in self._poses:
                self._poses.add(pose)
                return pose

    def _lay(self, kind: str, allowed: Sequence[int]) -> int:
        sums = list(itertools.accumulate(_CROWD[self._places[index].type] for index in allowed))
        index = allowed[min(bisect.bisect(sums, self._rng.random() * sums[-1]), len(allowed) - 1)]
        self.things.append(Thing(type=kind, place=index, pose=self._places[index].pose))
        return index


def _with_ids(rng: random.Random, draft: Draft) -> Draft:
    used = {place.thor.lower() for place in draft.places}
    things = []
    for thing in draft.things:
        name = ""
        while not name or name.lower() in used:
            name = _thor_id(rng, thing.type)
        used.add(name.lower())
        things.append(dataclasses.replace(thing, thor=name))
    return dataclasses.replace(draft, things=tuple(things))


def _choose_places(
    rng: random.Random, rooms: Rooms, room: tuple[Place, ...], family: str, sought: str, goal: str
) -> tuple[tuple[Place, ...], tuple[int, ...]]:
    """Some of a room's places, and which of them objects may lie on: a goal, a tool, a few surfaces
    to search, the rest closed or unfit.
    """
    assert rooms.surfaces is not None
    surfaces = _surfaces(room, family, sought, goal)
    number = min(rng.randint(*rooms.surfaces), len(surfaces))
    chosen = rng.sample(surfaces, number)
    if family == "look" and not any(room[index].type in _LAMP_PLACES for index in chosen):
        chosen[0] = rng.choice(
            [index for index in range(len(room)) if room[index].type in _LAMP_PLACES]
        )
        if not any(sought in load_tables().contains[room[index].type] for index in chosen):
            chosen.append(rng.choice(surfaces))
    kept = set(chosen)
    for needed in (goal, _TOOLS.get(family)):
        candidates = [index for index, place in enumerate(room) if place.type == needed]
        if candidates:
            kept.add(rng.choice(candidates))
    rest = [index for index in _rest(room, surfaces, goal) if index not in kept]
    low, high = rooms.receptacles or (0, len(room))
    kept.update(rng.sample(rest, min(max(rng.randint(low, high) - len(kept), 0), len(rest))))
    order = sorted(kept)
    return _apart(room[index] for index in order), tuple(
        order.index(index) for index in sorted(chosen)
    )


def _apart(places: Iterable[Place]) -> tuple[Place, ...]:
    """The places with no two used from one pose, which would forbid to go from one to the other: a
    rule that small rooms do without.
    """
    used: set[Pose] = set()
    apart = []
    for place in places:
        x, z, turn, tilt = place.pose
        while (x, z, turn, tilt) in used:
            tilt += 15
        used.add((x, z, turn, tilt))
        apart.append(dataclasses.replace(place, pose=(x, z, turn, tilt)))
    return tuple(apart)


def _surfaces(room: tuple[Place, ...], family: str, sought: str, goal: str) -> list[int]:
    """The open places of a room that may hold what is sought, beside the goal and the tool."""
    tables = load_tables()
    barred = tables.openable | {goal, _TOOLS.get(family)}
    return [
        index
        for index, place in enumerate(room)
        if place.type not in barred and sought in tables.contains[place.type]
    ]


def _rest(room: tuple[Place, ...], surfaces: Sequence[int], goal: str) -> list[int]:
    """The places of a room that need no search: closed, or unfit for what is sought."""
    searched = {
        index
        for index, place in enumerate(room)
        if place.type == goal and goal not in load_tables().openable
    }.union(surfaces)
    return [index for index in range(len(room)) if index not in searched]


@functools.cache
def _feasible(family: str, rooms: Rooms) -> Mapping[int, tuple[tuple[str, tuple[str, ...]], ...]]:
    """Floor plan -> the tasks that it allows: (type sought, types of goals)."""
    tables = load_tables()
    found = {}
    for number, plan in tables.plans.items():
        room = _furniture(number)
        present = {place.type for place in room}
        tool = _TOOLS.get(family)
        if plan.room not in tables.rooms[family] or (tool and tool not in present):
            continue
        tasks = []
        for sought in plan.types:
            if family == "look":
                goals = [_LAMP] if _LAMP in plan.types and present & _LAMP_PLACES else []
            else:
                goals = [
                    goal
                    for goal in sorted(present - _NEVER_GOALS - {tool})
                    if sought in tables.contains[goal]
                ]
                if rooms.surfaces is not None and family == "pick_two":
                    goals = [goal for goal in goals if goal not in tables.openable]
            if tool and sought not in tables.actions[_TOOL_NEEDS[family]]:
                continue
            goals = [goal for goal in goals if _has_home(room, rooms, family, sought, goal)]
            if goals:
                tasks.append((sought, tuple(goals)))
        if tasks:
            found[number] = tuple(tasks)
    return MappingProxyType(found)


def _has_home(room: tuple[Place, ...], rooms: Rooms, family: str, sought: str, goal: str) -> bool:
    """Whether what is sought can lie somewhere in the room, and the room is as large as `rooms`
    says.
    """
    if rooms.surfaces is None:
        return any(
            place.type != goal and sought in load_tables().contains[place.type] for place in room
        )
    surfaces = _surfaces(room, family, sought, goal)
    open_goal = goal not in load_tables().openable and any(place.type == goal for place in room)
    size = min(len(surfaces), rooms.surfaces[0]) + open_goal + len(_rest(room, surfaces, goal))
    return bool(surfaces) and size >= (rooms.receptacles or (0, 0))[0]


@functools.cache
def _furniture(number: int) -> tuple[Place, ...]:
    """The receptacles of a floor plan; those that the tables give no place get one that depends on
    the plan alone.
    """
    rng = random.Random(f"ictjax alfworld {_FORMAT} plan {number}")
    plan = load_tables().plans[number]
    used = {name.lower() for name, _ in plan.receptacles}
    poses = {pose for _, pose in plan.receptacles}
    places = []
    for name, pose in plan.receptacles:
        kind = thor_type(name)
        while pose is None:
            name, pose = _thor_id(rng, kind), _pose(rng)
            if name.lower() in used or pose in poses:
                pose = None
        used.add(name.lower())
        poses.add(pose)
        places.append(Place(thor=name, type=kind, pose=pose))
    return tuple(places)


@functools.cache
def _fixtures() -> frozenset[str]:
    """Types of objects that lie on no receptacle: windows, chairs, switches. Lamps are placed by
    themselves.
    """
    tables = load_tables()
    return frozenset(tables.object_types) - frozenset().union(*tables.contains.values()) - {_LAMP}


def _thor_id(rng: random.Random, kind: str) -> str:
    """An id as THOR makes them: type and position in metres; basins name the thing that they are in
    first.
    """
    position = "|".join(
        f"{rng.randint(*span) / 100:+06.2f}" for span in ((-399, 399), (5, 190), (-399, 399))
    )
    return f"{kind.removesuffix('Basin')}|{position}" + (
        f"|{kind}" if kind.endswith("Basin") else ""
    )


def _pose(rng: random.Random) -> Pose:
    return rng.randint(-16, 16), rng.randint(-16, 16), rng.randrange(4), 30


# --- writing ---


@functools.lru_cache(maxsize=4096)
def _pddl(name: str) -> str:
    for character, word in _WORDS:
        name = name.replace(character, word)
    return name


def _location(pose: Pose) -> str:
    return _pddl("loc|" + "|".join(map(str, pose)))


def names(draft: Draft) -> dict[str, str]:
    """THOR id -> the name a player reads ("cabinet 3")."""
    return _numbered(item.thor for item in (*draft.places, *draft.things))


def _numbered(thor_ids: Iterable[str]) -> dict[str, str]:
    """Counts within each type, from the last of the sorted lower-case PDDL ids to the first, as the
    stock environment does.
    """
    numbers: collections.Counter[str] = collections.Counter()
    found = {}
    for lower, thor in sorted(
        ((_pddl(thor_id).lower(), thor_id) for thor_id in thor_ids), reverse=True
    ):
        kind = lower.partition("_bar_")[0] + ("basin" if "basin" in lower else "")
        numbers[kind] += 1
        found[thor] = f"{kind} {numbers[kind]}"
    return found


def walkthrough(draft: Draft) -> list[str]:
    """Commands that win the game, without any search."""
    return _Walk(draft).commands()


class _Walk:
    """Writes the commands of an agent that knows where everything is."""

    def __init__(self, draft: Draft):
        self._draft, self._names = draft, names(draft)
        self._here, self._opened, self._commands = draft.start, set[str](), list[str]()

    def commands(self) -> list[str]:
        draft, do = self._draft, self._commands.append
        lamp = draft.family == "look"
        # What needs no opening comes first, as in a planner's shortest walkthrough.
        thing, *more = sorted(
            (thing for thing in draft.things if thing.type == draft.sought),
            key=lambda thing: self._shut(self._place(thing)),
        )
        self._take(thing)
        name = self._names[thing.thor]
        if lamp:
            light = next(
                thing
                for thing in draft.things
                if thing.type == draft.goal and thing.place is not None
            )
            self._go(self._place(light))
            do(f"use {self._names[light.thor]}")
            return self._commands
        if draft.family in _TOOLS:
            tool = next(place for place in draft.places if place.type == _TOOLS[draft.family])
            self._go(tool)
            do(f"{draft.family} {name} with {self._names[tool.thor]}")
        goal = next(place for place in draft.places if place.type == draft.goal)
        self._put(thing, goal)
        if draft.family == "pick_two":
            self._take(more[0])
            self._put(more[0], goal)
        return self._commands

    def _take(self, thing: Thing):
        place = self._place(thing)
        self._go(place)
        self._open(place)
        self._commands.append(f"take {self._names[thing.thor]} from {self._names[place.thor]}")

    def _put(self, thing: Thing, place: Place):
        self._go(place)
        self._open(place)
        self._commands.append(f"move {self._names[thing.thor]} to {self._names[place.thor]}")

    def _go(self, place: Place):
        if place.pose != self._here:  # going to where one stands is no admissible command
            self._commands.append(f"go to {self._names[place.thor]}")
            self._here = place.pose

    def _open(self, place: Place):
        if self._shut(place):
            self._commands.append(f"open {self._names[place.thor]}")
            self._opened.add(place.thor)

    def _place(self, thing: Thing) -> Place:
        assert thing.place is not None  # fixtures are neither sought nor switched on
        return self._draft.places[thing.place]

    def _shut(self, place: Place) -> bool:
        return place.type in load_tables().openable and place.thor not in self._opened


def _problem(draft: Draft, name: str, tables: Tables) -> str:
    places = [(_pddl(place.thor), place.type, _location(place.pose)) for place in draft.places]
    things = [
        (_pddl(thing.thor), thing.type, thing.place, _location(thing.pose))
        for thing in draft.things
    ]
    locations = sorted(
        {pose for _, _, pose in places} | {pose for *_, pose in things} | {_location(draft.start)}
    )
    receptacle_types = sorted({kind for _, kind, _ in places})
    object_types = sorted({kind for _, kind, *_ in things})
    facts = [f"(receptacleType {place} {kind}Type)" for place, kind, _ in places]
    facts += [f"(objectType {thing} {kind}Type)" for thing, kind, *_ in things]
    facts += [
        f"(canContain {kind}Type {object_type}Type)"
        for kind in receptacle_types
        for object_type in object_types
        if object_type in tables.contains[kind]
    ]
    facts += [
        f"(pickupable {thing})"
        for thing, kind, place, _ in things
        if place is not None and kind != _LAMP
    ]
    facts += [
        f"(isReceptacleObject {thing})" for thing, kind, *_ in things if kind in tables.movable
    ]
    facts += [f"(openable {place})" for place, kind, _ in places if kind in tables.openable]
    facts += [f"(atLocation agent1 {_location(draft.start)})"]
    for action, types in tables.actions.items():
        facts += [f"({action.lower()} {thing})" for thing, kind, *_ in things if kind in types]
    facts += [
        f"(inReceptacle {thing} {places[place][0]})"
        for thing, _, place, _ in things
        if place is not None
    ]
    facts += [f"(receptacleAtLocation {place} {pose})" for place, _, pose in places]
    facts += [f"(objectAtLocation {thing} {pose})" for thing, *_, pose in things]
    objects = [f"{thing} - object" for thing, *_ in things]
    objects += [f"{place} - receptacle" for place, *_ in places]
    objects += [f"{pose} - location" for pose in locations]
    goal = tables.goals[draft.family].format(obj=draft.sought, recep=draft.goal, toggle=draft.goal)
    return (
        f"(define (problem plan_{name})\n(:domain"
        f" alfred)\n(:objects\n{_types()}\n{_lines(objects)}\n)\n"
        f"(:init\n{_lines(facts)}\n)\n{goal}\n"
    )


@functools.cache
def _types() -> str:
    tables = load_tables()
    lines = ["agent1 - agent"]
    # one bare object of each type, as the official files have
    lines += [f"{kind} - object" for kind in tables.object_types]
    lines += [f"{kind}Type - otype" for kind in tables.object_types]
    lines += [f"{kind}Type - rtype" for kind in tables.receptacle_types]
    return _lines(lines)


def _lines(items: Iterable[str]) -> str:
    return "\n".join(f"        {item}" for item in items)
