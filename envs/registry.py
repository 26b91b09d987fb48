"""Finds an environment by its short name or import path."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from envs.api import Environment

BUILT_IN: Mapping[str, str] = MappingProxyType({"fake": "envs.fake:FakeEnvironment", "minihack": "envs.minihack:MiniHack"})


def import_path(name: str) -> str:
    """The "package.module:attribute" behind a name, without importing it. Raises ValueError for a name that cannot be one."""
    path = BUILT_IN.get(name, name)
    module, colon, attribute = path.partition(":")
    if not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        known = ", ".join(sorted(BUILT_IN))
        raise ValueError(f"Unknown environment {name!r}: use one of {known}, or an import path 'package.module:attribute'.")
    return path


def load_environment(name: str, options: Mapping[str, str] = MappingProxyType({})) -> Environment:
    """Imports and builds an environment.

    `name` is a short name ("minihack", "fake") or "package.module:attribute" of a callable that takes `options` as keyword arguments.
    Raises ValueError, naming the environment and the cause, when it cannot be found, built, or is none.
    """
    module_name, _, attribute = import_path(name).partition(":")
    try:
        build: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Environment {name!r} cannot be imported: {error}. Install what it needs, or correct the path.") from error
    try:
        environment = build(**options)
    except TypeError as error:
        raise ValueError(f"Environment {name!r} does not take the options {dict(options)!r}: {error}.") from error
    missing = [field for field in ("name", "families", "games", "open") if not hasattr(environment, field)]
    if missing:
        raise ValueError(
            f"{name!r} is not an environment: {type(environment).__name__} lacks {', '.join(missing)} (see envs.api.Environment)."
        )
    return environment
