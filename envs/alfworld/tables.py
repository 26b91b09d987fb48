"""What the installed alfworld package knows about rooms: its data files, read without importing it
(the import makes folders and sets variables).
"""

import ast
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "clean": "pick_clean_then_place_in_recep",
        "cool": "pick_cool_then_place_in_recep",
        "heat": "pick_heat_then_place_in_recep",
        "look": "look_at_obj_in_light",
        "pick_two": "pick_two_obj_and_place",
        "put": "pick_and_place_simple",
    }
)
"""Our short names of the six families -> `task_type` of the benchmark."""

# by the hundreds of a floor plan's number
_ROOMS = {0: "Kitchen", 2: "LivingRoom", 3: "Bedroom", 4: "Bathroom"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloorPlan:
    """One of the 120 rooms: its number, type of room, the types of things in it, and its
    receptacles with where one stands to use them.
    """

    number: int
    room: str
    types: tuple[str, ...]
    # THOR's id -> pose; None where the tables have none
    receptacles: tuple[tuple[str, tuple[int, int, int, int] | None], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """The package's rules, text and object tables. Every collection is sorted."""

    domain: str
    grammar: str
    # type of receptacle -> types of objects that it may hold
    contains: Mapping[str, frozenset[str]]
    # Heatable, Coolable, Cleanable, Toggleable, Sliceable -> types of objects
    actions: Mapping[str, frozenset[str]]
    movable: frozenset[str]  # receptacles that can be carried: objects to the rules
    openable: frozenset[str]
    object_types: tuple[str, ...]
    receptacle_types: tuple[str, ...]
    rooms: Mapping[str, frozenset[str]]  # family -> types of rooms where the benchmark has it
    goals: Mapping[str, str]  # family -> goal in PDDL, with {obj}, {recep} and {toggle} to fill in
    sentences: Mapping[str, tuple[str, ...]]  # family -> task sentences to fill in
    plans: Mapping[int, FloorPlan]


def package_folder() -> pathlib.Path:
    """Where alfworld is installed. Raises ValueError when it is not."""
    spec = importlib.util.find_spec("alfworld")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "The package alfworld is not installed: pip install 'alfworld>=0.4.2,<0.5'."
        )
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def package_text(name: str) -> str:
    """A data file of the installed package, by its path inside it. Raises ValueError when it is
    missing.
    """
    path = package_folder() / name
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"The installed alfworld lacks {name} ({error.strerror}): install alfworld 0.4.2 again."
        ) from error


@functools.cache
def load_tables() -> Tables:
    """Reads all tables once (about 30 ms). Raises ValueError when the installed package has other
    ones.
    """
    constants = _literals(package_text("gen/constants.py"))
    goals = _literals(package_text("gen/goal_library.py"))
    try:
        movable = frozenset(constants["MOVABLE_RECEPTACLES"])
        receptacles = frozenset(constants["RECEPTACLES"]) - movable
        contains = {
            kind: frozenset(constants["VAL_RECEPTACLE_OBJECTS"].get(kind, ()))
            for kind in sorted(receptacles)
        }
        texts = {family: goals["gdict"][task] for family, task in FAMILIES.items()}
        return Tables(
            domain=package_text("data/alfred.pddl"),
            grammar=package_text("data/alfred.twl2"),
            contains=contains,
            actions={
                name: frozenset(types) for name, types in constants["VAL_ACTION_OBJECTS"].items()
            },
            movable=movable,
            openable=frozenset(constants["OPENABLE_CLASS_LIST"]) & receptacles,
            object_types=tuple(sorted((frozenset(constants["OBJECTS"]) | movable) - receptacles)),
            receptacle_types=tuple(sorted(receptacles)),
            rooms={
                family: frozenset(constants["GOALS_VALID"][task])
                for family, task in FAMILIES.items()
            },
            goals={family: _goal(goal["pddl"]) for family, goal in texts.items()},
            sentences={family: tuple(goal["templates"]) for family, goal in texts.items()},
            plans=_floor_plans(receptacles),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The tables of the installed alfworld are not those of version 0.4.2 (at {error}):"
            " install that version."
        ) from error


def _literals(source: str) -> dict[str, Any]:
    """The module-level names that are bound to literals; `X[a] = X[b]` and `del X[a]` are followed,
    all else is left out.
    """
    names: dict[str, Any] = {}

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            return names[node.value.id][ast.literal_eval(node.slice)]
        return ast.literal_eval(node)

    for statement in ast.parse(source).body:
        try:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    names[name] = value(statement.value)
                case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name), slice=key)]):
                    names[name][ast.literal_eval(key)] = value(statement.value)
                case ast.Delete(targets=[ast.Subscript(value=ast.Name(id=name), slice=key)]):
                    del names[name][ast.literal_eval(key)]
        except (ValueError, KeyError, TypeError):  # not a literal
            continue
    return names


def _goal(text: str) -> str:
    """The goal as PDDL has it: the package writes '#' for '-', and one bracket more than it opens,
    which closes the problem.
    """
    return text.replace("#", "-").strip()


def _floor_plans(receptacles: frozenset[str]) -> dict[int, FloorPlan]:
    folder = package_folder() / "gen" / "layouts"
    plans = {}
    for path in folder.glob("FloorPlan*-objects.json"):
        number = int(re.findall(r"\d+", path.name)[0])
        types = frozenset(json.loads(path.read_text(encoding="utf-8")))
        poses = json.loads(
            (folder / f"FloorPlan{number}-openable.json").read_text(encoding="utf-8")
        )
        standing: list[tuple[str, tuple[int, int, int, int] | None]] = [
            (name, (round(x / 0.25), round(z / 0.25), round(turn / 90), round(tilt)))
            for name, (x, z, turn, tilt) in poses.items()
            if thor_type(name) in receptacles
        ]
        found = {thor_type(name) for name, _ in standing}
        standing += [
            (kind, None)
            for kind in types & receptacles - found
            for _ in range(4 if kind == "StoveBurner" else 1)
        ]
        plans[number] = FloorPlan(
            number=number,
            room=_ROOMS[number // 100],
            types=tuple(sorted(types)),
            receptacles=tuple(sorted(standing, key=lambda receptacle: receptacle[0])),
        )
    if not plans:
        raise KeyError("gen/layouts")
    return dict(sorted(plans.items()))


def thor_type(name: str) -> str:
    """The type in a THOR id: "Cabinet|+00.68|..." -> Cabinet, "Sink|...|SinkBasin" -> SinkBasin."""
    parts = name.split("|")
    return parts[-1] if parts[-1].endswith("Basin") else parts[0]
