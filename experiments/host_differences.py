"""Whether the hosts of a run were started alike: with the same flags, and the same program, on the
same models and games. What one of them was told otherwise, it would play and learn otherwise.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from envs.api import Refusal
from experiments.local_path import typed
from experiments.manifest import PACKAGES, git_revision, package_versions
from ictjax.hosts import Hosts
from ictjax.run_config import TrainConfig

_OURS = ("envs", "ictjax", "experiments")  # packages, beside each other
_SHOWN = 4  # differences in one sentence
_LONGEST = 60  # characters of a value
_DIGITS = 12  # of a digest, in a sentence
_COMMIT = "the commit"
# Flags that are each host's own, beside --hosts.*: where its files lie (see `check_same_files` for
# what they hold), how many workers it has, and what the first one alone uses.
_OWN = (
    "config",
    "trust",
    "reflector.model",
    "actor.adapter",
    "reflector.adapter",
    "num_workers",
    "task.environment.num_workers",
    "task.environment.deadline_s",
    "track",
    "track_project",
)


def check_started_alike(hosts: Hosts, args: Any, config: TrainConfig) -> None:
    """Compares flags, versions and source of all hosts. All call it, before anything is fetched.

    Args:
      args: the flags of this host, every one with its value; a dataclass.
      config: of the run. Where it is no part of the flags, as `settings`, it is compared beside
        them: a run directory may be another folder on each host.

    Raises:
      Refusal: on all hosts, with one sentence: a host differs from the first one.
      CannotGoOn: another host could not do what came before.
    """
    if hosts.count == 1:
        return
    at_endpoint = bool(config.actor.endpoint.url)  # then its model is a name, no folder
    told = {
        f"--{name.replace('_', '-')}": value
        for name, value in _fields(args)
        if not _is_own(name, at_endpoint=at_endpoint)
    }
    if not hasattr(args, "settings"):
        told |= {
            f"{name} of config.json": value
            for name, value in _fields(config)
            if not _is_own(name, at_endpoint=at_endpoint)
        }
    with hosts.told():
        mine = {"program": _program(), "told": _jsonable(told)}
    said = hosts.all_say(mine)
    _compare(
        [one["program"] for one in said],
        "does not run the program of host 0",
        "install the same on every host",
    )
    _compare(
        [one["told"] for one in said],
        "was not started as host 0 was",
        "start the same command on every host",
    )


def check_same_files(hosts: Hosts, models: Mapping[str, str], games: str) -> None:
    """Compares what the hosts play with. All call it.

    Args:
      models: see `contents.content_hashes`.
      games: see `manifest.games_sha256`.

    Raises:
      Refusal: on all hosts, with one sentence: a host has other models or games than the first one.
      CannotGoOn: another host could not do what came before.
    """
    if hosts.count == 1:
        return
    mine = {f"the sha256 of the {name}": value[:_DIGITS] for name, value in models.items()}
    _compare(
        hosts.all_say({**mine, "the sha256 of the games": games[:_DIGITS]}),
        "does not have the files of host 0",
        "give every host the same models and games",
    )


def _fields(record: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass by their dotted names; those of `settings` have none before
    them.
    """
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(
                value, place if field.name == "settings" else f"{place}{field.name}."
            )
        else:
            yield f"{place}{field.name}", value


def _is_own(name: str, *, at_endpoint: bool) -> bool:
    if name == "actor.model":
        return not at_endpoint
    return name in _OWN or name.startswith("hosts.")


def _program() -> dict[str, str | None]:
    """What computes here, by name: this program by its source, which no version tells."""
    source = hashlib.sha256()
    root = pathlib.Path(__file__).parents[1]
    for package in _OURS:
        for path in sorted((root / package).rglob("*.py")):
            if not path.is_file():  # a link to nowhere, as editors leave beside what they change
                continue
            text = path.read_bytes()
            source.update(f"{path.relative_to(root).as_posix()} {len(text)} ".encode() + text)
    (version,) = package_versions(("ictjax",)).values()  # a checkout needs no installation
    return {
        "ictjax": f"{version} (source {source.hexdigest()[:_DIGITS]})",
        _COMMIT: git_revision(),
        **package_versions(PACKAGES),
    }


def _jsonable(told: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(told, default=_text))


def _text(value: Any) -> str:
    return typed(value) if isinstance(value, pathlib.Path) else str(value)


def _compare(said: Sequence[Mapping[str, Any]], complaint: str, remedy: str) -> None:
    """Raises Refusal for the first host that says something else than host 0, by the same names."""
    first = said[0]
    found = [_differing(first, one) for one in said]
    odd = [index for index, names in enumerate(found) if names]
    if not odd:
        return
    host, names = odd[0], found[odd[0]]
    shown = [
        f"{name} is {_value(said[host].get(name))}, not {_value(first.get(name))}" for name in names
    ]
    if len(shown) > _SHOWN:
        shown[_SHOWN:] = [f"and {len(shown) - _SHOWN} more"]
    others = f" (nor do {len(odd) - 1} others agree)" if len(odd) > 1 else ""
    raise Refusal(f"Host {host} of {len(said)} {complaint}{others}: {'; '.join(shown)}: {remedy}.")


def _differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = [name for name in dict.fromkeys([*first, *other]) if first.get(name) != other.get(name)]
    # a commit may change what is no source, and is not known everywhere
    return [] if names == [_COMMIT] else names


def _value(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
