"""Finds an environment by its short name, by the entry point of an installed package, or by its
import path.
"""

import difflib
import importlib
import importlib.metadata
import inspect
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from envs import prompts
from envs.api import Described, Environment, Introduced

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "alfworld": "envs.alfworld:ALFWorld",
        "fake": "envs.fake:FakeEnvironment",
        "minihack": "envs.minihack:MiniHack",
    }
)
# the group in which an installed package registers its environments
ENTRY_POINTS = "ictjax.environments"

_MOST_NAMES = 12  # of a list in one sentence
_SEE = "(see envs.api.Environment)"


class _Registered(NamedTuple):
    """One way in which a short name is taken."""

    path: str
    by: str


def known_names() -> tuple[str, ...]:
    """All short names, sorted: the built-in ones and those of installed packages. Nothing is
    imported.
    """
    return tuple(sorted({*BUILT_IN, *_entry_points()}))


def import_path(name: str) -> str:
    """The "package.module:attribute" behind a name, without importing it.

    Raises ValueError for a name that cannot be one, that two packages claim, or whose entry point
    is no import path.
    """
    if ":" in name:
        path, source = name, ""
    else:
        found = _entry_points().get(name, ())
        claims = dict.fromkeys(entry.path for entry in found)
        if name in BUILT_IN:
            claims[BUILT_IN[name]] = None
        if len(claims) > 1:
            who = [*(["ictjax"] if name in BUILT_IN else []), *(entry.by for entry in found)]
            raise ValueError(
                f"The environment name {name!r} is claimed by {' and '.join(dict.fromkeys(who))}:"
                f" uninstall one, or use an import path ({' or '.join(sorted(claims))})."
            )
        path = next(iter(claims), name)
        source = found[0].by if found else ""
    module, colon, attribute = path.partition(":")
    if (
        colon
        and attribute.isidentifier()
        and all(part.isidentifier() for part in module.split("."))
    ):
        return path
    if source:
        raise ValueError(
            f"The entry point {name!r} of {source} reads {path!r}, which is no import path"
            " 'package.module:attribute': correct it there."
        )
    raise ValueError(
        f"Unknown environment {name!r}: use one of {', '.join(known_names())}, or an import path"
        " 'package.module:attribute'."
    )


def load_environment(name: str, options: Mapping[str, str] = MappingProxyType({})) -> Environment:
    """Imports and builds an environment.

    `name` is a short name ("minihack", "fake", one that an installed package registers) or
    "package.module:attribute" of a callable that takes `options` as keyword arguments. Raises
    ValueError, naming the environment and the cause, when it cannot be found, built, or is none.
    """
    path = import_path(name)
    module_name, _, attribute = path.partition(":")
    shown = repr(name) if name == path or name in BUILT_IN else f"{name!r} ({path})"
    try:
        build: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever a module of somebody else raises
        cause = (
            str(error)
            if isinstance(error, ImportError | AttributeError)
            else f"{type(error).__name__}: {error}"
        )
        raise ValueError(
            f"Environment {shown} cannot be imported: {cause}. Install what it needs, or correct"
            " the path."
        ) from error
    if not callable(build):
        raise ValueError(
            f"{shown} is not an environment: a {type(build).__name__} cannot be called to build one"
            f" {_SEE}."
        )
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        given = ",".join(f"{key}={value}" for key, value in options.items()) or "none"
        raise ValueError(
            f"Environment {shown} does not take the options {given}: {error}."
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    try:
        environment = build(**options)
    except ValueError:  # names its cause already
        raise
    except Exception as error:
        raise ValueError(
            f"Environment {shown} cannot be built: {type(error).__name__}: {error}."
        ) from error
    if fault := fault_of(environment):
        raise ValueError(f"{shown} is not an environment: {fault} {_SEE}.")
    return environment


def fault_of(environment: object) -> str:
    """What is wrong with the members of a would-be environment, in a clause; empty when nothing is.
    No game is opened.
    """
    kind = type(environment).__name__
    missing = [
        member
        for member in ("name", "families", "games", "open")
        if not hasattr(environment, member)
    ]
    if missing:
        return f"{kind} lacks {', '.join(missing)}"
    name, families = environment.name, environment.families  # type: ignore[attr-defined]
    if not _is_id_part(name):
        return f"{kind}.name must be a non-empty string without '|', got {name!r}"
    if isinstance(families, str) or not all(map(_is_id_part, families)) or not families:
        return f"{kind}.families must be a tuple of non-empty strings without '|', got {families!r}"
    if list(families) != sorted(set(families)):
        return f"{kind}.families must be sorted and hold each name once, got {tuple(families)!r}"
    for member in ("games", "open"):
        if not callable(getattr(environment, member)):
            return f"{kind}.{member} must be a method"
    if hasattr(environment, "initial_prompt") and not (
        isinstance(environment.initial_prompt, str) and environment.initial_prompt.strip()
    ):
        return f"{kind}.initial_prompt must be a non-empty string"
    return ""


def describe(environment: Environment) -> dict[str, Any]:
    """What an environment says about itself, as JSON reads it back, for the manifest of a run;
    empty when it says nothing.

    Raises ValueError for a description that is no JSON object.
    """
    if not isinstance(environment, Described):
        return {}
    description = environment.describe()
    try:
        return json.loads(json.dumps(dict(description)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The description of environment {environment.name!r} cannot be written as a JSON"
            f" object: {error}."
        ) from error


def nearest(name: str, known: Sequence[str]) -> str:
    """Names that may have been meant, as a message lists them: all, or of many the nearest few."""
    if len(known) <= _MOST_NAMES:
        return ", ".join(known)
    few = difflib.get_close_matches(name, known) or known[:_MOST_NAMES]
    return f"{', '.join(few)} (of {len(known)})"


def initial_prompt(environment: Environment) -> str:
    """The first system prompt of an environment's actors: its own, else one for any game."""
    return environment.initial_prompt if isinstance(environment, Introduced) else prompts.ANY_GAME


def _is_id_part(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "|" not in value


def _entry_points() -> dict[str, tuple[_Registered, ...]]:
    """The registered names. Read anew each time (some milliseconds): a package may have been
    installed meanwhile.
    """
    found: dict[str, list[_Registered]] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        by = (
            f"package {entry.dist.name} {entry.dist.version}"
            if entry.dist is not None
            else "an unnamed package"
        )
        found.setdefault(entry.name, []).append(_Registered(entry.value.strip(), by))
    return {name: tuple(entries) for name, entries in found.items()}
