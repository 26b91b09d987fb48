"""ALFWorld as text games: official games or generated ones, the package's own rules and wording at
the speed of plain Python.
"""

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from envs import prompts
from envs.alfworld import generate, index
from envs.alfworld.sources import open_source
from envs.alfworld.tables import FAMILIES
from envs.api import Game, GameId
from envs.renamings import base_family, parse_count, with_renamed

__all__ = ["FAMILIES", "ALFWorld"]

_SPLITS = ("train", "select", "test")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "engine": ("python", "textworld"),
    "text": ("full", "short", "compact"),
    "test": ("auto", "valid_seen", "valid_unseen"),
    "rooms": tuple(generate.ROOMS),
}


class ALFWorld:
    """The ALFWorld environment; implements `envs.api.Environment`. All options are text, so that a
    configuration can carry them.

    - `data`: "auto" (official games where a download is found in $ALFWORLD_DATA, then in
      ~/.cache/alfworld, else generated ones), "official", "generated", or the path of a downloaded
      tree or a packed file.
    - `rooms`: "full", or "small" for tiny models; official games have no small rooms, so with
      "auto" these are generated.
    - `test`: the official split behind "test": "auto" takes valid_unseen where it is present, else
      valid_seen.
    - `text`: "full" is the official wording, "short" (small language models) and "compact" (tiny
      word-level models) take coarser actions.
    - `renamings`: with the short style every family comes again so many times with verbs of other
      names (`envs.renamings`): `clean~0`, `clean~1`, ...
    - `engine`: "python", or "textworld" for the stock one.
    - `keep`: so many compiled games, of about 92 kB, stay at hand in each process: the candidates
      of a group replay the same few games.

    Raises ValueError for other values, and for data that is not there.
    """

    def __init__(
        self,
        data: str = "auto",
        engine: str = "python",
        text: str = "full",
        test: str = "auto",
        rooms: str = "full",
        keep: str = "128",
        renamings: str = "0",
    ):
        for option, value in (("engine", engine), ("text", text), ("test", test), ("rooms", rooms)):
            if value not in _CHOICES[option]:
                raise ValueError(
                    f"Unknown {option} {value!r} of ALFWorld: use one of"
                    f" {', '.join(_CHOICES[option])}."
                )
        if not keep.isdecimal():
            raise ValueError(f"The option keep of ALFWorld is a number of games, got {keep!r}.")
        if rooms != "full" and data not in ("auto", "generated"):
            raise ValueError(
                f"Official games have no {rooms} rooms: use rooms=full with data={data}, or"
                " data=generated."
            )
        self._renamings = parse_count(renamings, text)
        self._engine, self._text, self._test = engine, text, test
        self._rooms = generate.rooms_named(rooms)
        self._source = open_source(data if rooms == "full" else "generated")
        self._compiled = functools.lru_cache(maxsize=int(keep))(self._compile)

    @property
    def name(self) -> str:
        """The `env` of every game id."""
        return "alfworld"

    @property
    def initial_prompt(self) -> str:
        """The system prompt at meta-turn 0, in the style of the text."""
        return prompts.ALFWORLD[self._text]

    @property
    def expert_prompt(self) -> str:
        """What people know about winning, in the style of the text."""
        return prompts.ALFWORLD_EXPERT[self._text]

    @property
    def families(self) -> tuple[str, ...]:
        """All families, sorted."""
        return with_renamed(tuple(FAMILIES), self._renamings)

    def games(self, family: str, split: str) -> Sequence[GameId]:
        """The games of "train", "select" or "test", or of official "valid_seen" or "valid_unseen",
        sorted by key (generated ones by seed).

        "select" is held out of official train by whole task folders. Raises ValueError for an
        unknown family or split, and for a split without games.
        """
        base = self._base(family)
        if self._source is None:
            if split not in _SPLITS:
                raise ValueError(
                    f"Generated ALFWorld games have no split {split!r}: use one of"
                    f" {', '.join(_SPLITS)}."
                )
            keys = tuple(generate.key_of(seed, self._rooms) for seed in generate.seeds(base, split))
        else:
            keys = self._downloaded(base, split)
            if not keys:
                raise ValueError(
                    f"No {family} games for {split}."
                    f" {index.what_is_missing(self._source.index(), self._source.path)}".rstrip()
                )
        return tuple(GameId(env="alfworld", family=family, key=key) for key in keys)

    def more_games(self, family: str, split: str, count: int) -> Sequence[GameId]:
        """So many games of a split: generated ones have no end, of official ones there are those of
        `games`.
        """
        games = self.games(family, split)
        if self._source is None and count > len(games):
            seeds = generate.seeds(self._base(family), split, count)
            games = tuple(
                GameId(env="alfworld", family=family, key=generate.key_of(seed, self._rooms))
                for seed in seeds
            )
        return games[:count]

    def open(self, family: str) -> Game:
        """A live game of a family, ready to be reset."""
        from envs.alfworld.game import AlfworldGame  # the engine is for those who play

        base, names = self._base(family), {}
        if base != family:
            from envs.alfworld.short import renaming

            names = renaming(family)
        return AlfworldGame(
            family,
            functools.partial(self._load, base),
            style=self._text,
            engine=self._engine,
            compiled=self._compiled,
            names=names,
        )

    def walkthrough(self, game: GameId) -> tuple[str, ...]:
        """Official commands that win a game, as it came with them. Raises ValueError for a game
        that cannot be read.
        """
        return tuple(self._load(self._base(game.family), game.key)["walkthrough"])

    def describe(self) -> dict[str, Any]:
        """For the manifest of a run: where games come from, how many there are, what "test" is, and
        a hash that names exactly these games.
        """
        found = {
            "engine": self._engine,
            "text": self._text,
            "packages": {"alfworld": importlib.metadata.version("alfworld")},
            **({"renamings": self._renamings} if self._renamings else {}),
        }
        if self._source is None:
            counts = {split: dict.fromkeys(FAMILIES, generate.WANTED[split]) for split in _SPLITS}
            games = {
                "source": "generated",
                "rooms": self._rooms.name,
                "test": "test",
                "manifest_sha256": generate.manifest(self._rooms),
            }
            return {**games, "counts": counts, **found}
        counts = {
            split: {family: len(self._downloaded(family, split)) for family in FAMILIES}
            for split in _SPLITS
        }
        held = self._source.index()
        return {
            "source": "official" if held.official else "generated",
            "test": self._stands_for("test"),
            "manifest_sha256": held.manifest,
            "incomplete": index.what_is_missing(held, self._source.path),
            "counts": counts,
            **found,
        }

    def _base(self, family: str) -> str:
        """The family whose games are played. Raises ValueError for an unknown one."""
        base = base_family(family, self._renamings)
        if base not in FAMILIES:
            raise ValueError(
                f"Unknown family {family!r} of ALFWorld: use one of {', '.join(self.families)}."
            )
        return base

    def _compile(self, game: GameId):
        from envs.alfworld.game import playable

        return playable(game, self._load(self._base(game.family), game.key))

    def _load(self, family: str, key: str) -> Mapping[str, Any]:
        if key.startswith("generated/"):
            rooms, seed = generate.parse_key(key)
            found, read = (
                generate.family_of(seed),
                functools.partial(generate.generate, seed, rooms),
            )
        else:
            if self._source is None:
                raise ValueError(f"The game {key!r} is no generated one: use data=official for it.")
            found, read = index.key_family(key), functools.partial(self._source.load, key)
        if found != family:
            raise ValueError(
                f"The ALFWorld game {key!r} is of family {found!r}, not {family!r}: correct the"
                " game id."
            )
        return read()

    def _downloaded(self, family: str, split: str) -> tuple[str, ...]:
        assert self._source is not None
        games = self._source.index()
        if split not in (*_SPLITS, *index.OFFICIAL_SPLITS):
            raise ValueError(
                f"Unknown split {split!r} of ALFWorld: use one of"
                f" {', '.join((*_SPLITS, *index.OFFICIAL_SPLITS[1:]))}."
            )
        if split in ("train", "select") and games.official:
            return tuple(
                key
                for key in games.games["train"][family]
                if index.held_out(key) == (split == "select")
            )
        return games.games[self._stands_for(split)][family]

    def _stands_for(self, split: str) -> str:
        """The split of the download behind one of ours. A tree of generated games has ours under
        official names.
        """
        assert self._source is not None
        if split == "test":
            return (
                self._test
                if self._test != "auto"
                else "valid_unseen"
                if self._source.index().count("valid_unseen")
                else "valid_seen"
            )
        return "valid_seen" if split == "select" else split
