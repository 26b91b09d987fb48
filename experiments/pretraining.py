"""Which games a pair of models was taught with before any training: `pretraining.json`, beside the
folders of its actor and reflector.

    {"minihack": {"options": {}, "families": ["eat", "wield"], "split": "train", "first": 80}}

An evaluation leaves these games out. Of most language models nobody knows what they have seen.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from envs.api import Environment, GameId
from envs.registry import load_environment
from envs.renamings import MARK
from ictjax.ranges import shown
from ictjax.run_config import TrainConfig
from ictjax.run_files import write_lines

FILE_NAME = "pretraining.json"


def taught_games(config: TrainConfig, environment: Environment, family: str) -> list[GameId]:
    """The games of a family that one of a run's models or adapters was taught with, as far as that
    is recorded. A renaming (`envs.renamings`) plays the games of its family, and was taught with
    them under whatever name.

    Raises:
      ValueError: a record is damaged; names it.
    """
    games: dict[GameId, None] = {}
    for path in filter(pathlib.Path.is_file, {_record(model) for model in _models(config)}):
        about = _read(path).get(environment.name)
        if about is None:
            continue
        names = (family, family.partition(MARK)[0])
        if known := next((name for name in names if name in about["families"]), None):
            taught = load_environment(environment.name, about["options"])
            games |= dict.fromkeys(taught.games(known, about["split"])[: about["first"]])
    return list(games)


def unrecorded(config: TrainConfig, named: TrainConfig | None = None) -> list[str]:
    """The models and adapters of which nothing says what they were taught with.

    Args:
      config: models in folders.
      named: the same as people wrote it, whose names are returned.
    """
    pairs = zip(_places(config), _places(named or config), strict=True)
    found = (name for place, name in pairs if place and not _record(place).is_file())
    return list(dict.fromkeys(found))


def write_record(folder: pathlib.Path, taught: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the record of the pair in a folder, environment by environment."""
    write_lines(folder / FILE_NAME, [json.dumps(taught, indent=1)])


def entry(
    options: Mapping[str, str], families: Sequence[str], split: str, first: int
) -> dict[str, Any]:
    """What stands under the name of an environment: the first games of a split."""
    return {
        "options": dict(options),
        "families": list(families),
        "split": split,
        "first": first,
    }


def _models(config: TrainConfig) -> list[str]:
    return list(dict.fromkeys(filter(None, _places(config))))


def _places(config: TrainConfig) -> list[str]:
    """Of both models and both adapters; nothing where there is none."""
    roles = (config.actor, config.reflector)
    return [*(role.model for role in roles), *(role.adapter for role in roles)]


def _record(model: str) -> pathlib.Path:
    return pathlib.Path(model).parent / FILE_NAME


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"it holds {shown(data)}")
        for name, about in data.items():
            if not (
                isinstance(about, dict)
                and about.keys() == entry({}, (), "", 0).keys()
                and isinstance(about["options"], dict)
                and isinstance(about["families"], list)
                and isinstance(about["split"], str)
                and type(about["first"]) is int
                and about["first"] >= 0
            ):
                raise ValueError(f"its entry {name!r:.60} is not what is written there")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} does not say which games its models were taught with ({error}): restore it."
        ) from None
    return data
