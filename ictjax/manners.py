"""How a model expects to be spoken to: `ictjax.json`, a small file beside a model's config.json.

    {"environments": {"minihack": {"options": {"text": "compact"}, "initial_prompt": "play .",
     "max_steps": 10, "max_turn_tokens": 16, "show_actions": false}}}

Language models need none. A tiny model that was taught one wording of one benchmark has one, so
that whoever plays with it need not know: `ictjax play --model`, `MetaEnv` and the commands that
train and evaluate follow it, and refuse environments that it does not name.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from envs.files import replacing
from ictjax.json_lines import to_json_text
from ictjax.ranges import shown

FILE_NAME = "ictjax.json"
_MOST_NAMES = 8  # of environments in one sentence
_MOST_UNKNOWN = 0.2  # of the words of a first prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manners:
    """How a model is spoken to in one environment."""

    options: Mapping[str, str]  # of the environment: the style of its text, above all
    initial_prompt: str  # the system prompt that it starts with
    max_steps: int  # of an episode
    max_turn_tokens: int  # of a reply
    show_actions: bool = False  # whether the available actions are listed

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_turn_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {shown(value)}")
        if not isinstance(self.initial_prompt, str):
            raise ValueError(f"initial_prompt must be a text, got {shown(self.initial_prompt)}")
        if not isinstance(self.show_actions, bool):
            raise ValueError(f"show_actions must be true or false, got {shown(self.show_actions)}")
        options = self.options
        if not isinstance(options, Mapping) or not all(
            isinstance(v, str) for v in options.values()
        ):
            raise ValueError(f"options must be texts by name, got {shown(options)}")


def read_manners(folder: str | os.PathLike[str]) -> dict[str, Manners]:
    """The manners of a model by the name of the environment; empty where the folder has no file.

    Raises:
      ValueError: the file is there and cannot be used.
    """
    path = pathlib.Path(folder) / FILE_NAME
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entries = data.get("environments") if isinstance(data, dict) else None
        if not isinstance(entries, dict):
            raise ValueError("it has no object 'environments'")
        return {name: _read(name, entry) for name, entry in entries.items()}
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(
            f"{path} does not say how its model is spoken to ({error}): restore it, or remove it."
        ) from error


def _read(name: str, entry: Any) -> Manners:
    known = {field.name: field for field in dataclasses.fields(Manners)}
    if not isinstance(entry, dict):
        raise ValueError(f"its entry {name!r:.60} is no object")
    for field in entry:
        if field not in known:
            raise ValueError(
                f"its entry {name!r:.60} has a field {field!r:.60}, which is not known"
            )
    for field, about in known.items():
        if field not in entry and about.default is dataclasses.MISSING:
            raise ValueError(f"its entry {name!r:.60} lacks {field!r}")
    return Manners(**entry)


def write_manners(folder: pathlib.Path, manners: Mapping[str, Manners]) -> None:
    """Writes the file of a model."""
    entries = {
        name: {**vars(entry), "options": dict(entry.options)} for name, entry in manners.items()
    }
    text = to_json_text({"environments": entries}, indent=1) + "\n"
    with replacing(folder / FILE_NAME) as temporary:
        temporary.write_text(text, encoding="utf-8")


def manners_folder(
    model: str | os.PathLike[str], adapter: str | os.PathLike[str]
) -> str | os.PathLike[str]:
    """Whose file says how a model with an adapter is spoken to: the adapter's, which taught it,
    where it has one.

    Args:
      model: its folder.
      adapter: the folder of its adapter; empty where it has none.
    """
    has_own = os.fspath(adapter) and (pathlib.Path(adapter) / FILE_NAME).is_file()
    return adapter if has_own else model


def manners_for(folder: str | os.PathLike[str], environment: str) -> Manners | None:
    """How the model of a folder is spoken to in an environment; None where it does not say.

    Raises:
      ValueError: it names environments, and this one is not among them; or its file is damaged.
    """
    known = read_manners(folder)
    if known and environment not in known:
        raise ValueError(
            f"The model in {os.fspath(folder)} knows {_listed(known)} only, not"
            f" {environment}: it has no words for that."
        )
    return known.get(environment)


def _listed(names: Collection[str]) -> str:
    shown_names = (name if name.isprintable() else repr(name) for name in sorted(names))
    return " and ".join(name[:60] for name in itertools.islice(shown_names, _MOST_NAMES))


def check_style(
    folder: str | os.PathLike[str], manners: Manners, options: Mapping[str, str]
) -> None:
    """Refuses an environment whose text a model cannot read.

    Raises:
      ValueError: its option `text` is another than the model expects.
    """
    expected = manners.options.get("text")
    if expected is not None and options.get("text") != expected:
        raise ValueError(
            f"The model in {os.fspath(folder)} reads {expected} text only: set the environment's"
            f" option text={expected}."
        )


def check_words(folder: str | os.PathLike[str], prompt: str, unknown: float) -> None:
    """Refuses a first prompt that a model cannot read.

    Args:
      folder: of the model, for the message.
      prompt: the first prompt.
      unknown: the share of its tokens that the model has no word for.

    Raises:
      ValueError: it is too large for the model to be told anything.
    """
    if unknown > _MOST_UNKNOWN:
        raise ValueError(
            f"The model in {os.fspath(folder)} has no words for {unknown:.0%} of the prompt"
            f" {prompt[:60]!r}: actor and task do not speak the same language."
        )
