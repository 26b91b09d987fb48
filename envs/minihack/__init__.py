"""MiniHack as text games: 107 families, re-seeded live games, three text styles, verbs in words."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from envs import prompts
from envs.api import GameId
from envs.minihack.families import FAMILIES, check_family, package_versions
from envs.renamings import base_family, parse_count, with_renamed

__all__ = ["FAMILIES", "MiniHack"]

_STYLES = ("full", "short", "compact")


class MiniHack:
    """The MiniHack environment; implements `envs.api.Environment`. `text` is "full" (language
    models), "short" (small ones) or "compact" (tiny word-level models). With `renamings` every
    family comes again so many times with verbs of other names (`envs.renamings`): `eat~0`,
    `eat~1`, ...; that needs the short style.
    """

    def __init__(self, text: str = "full", renamings: str = "0"):
        if text not in _STYLES:
            raise ValueError(f"Unknown text style {text!r}; the styles are: {', '.join(_STYLES)}.")
        self._text = text
        self._renamings = parse_count(renamings, text)

    @property
    def name(self) -> str:
        """The `env` of every game id."""
        return "minihack"

    @property
    def families(self) -> tuple[str, ...]:
        """All families, sorted."""
        return with_renamed(FAMILIES, self._renamings)

    @property
    def initial_prompt(self) -> str:
        """The system prompt at meta-turn 0, in the style of the text."""
        return prompts.MINIHACK[self._text]

    @property
    def expert_prompt(self) -> str:
        """What people know about winning, in the style of the text."""
        return prompts.MINIHACK_EXPERT[self._text]

    def describe(self) -> dict[str, Any]:
        """For the manifest of a run: the packages, which decide what a seed means, and how games
        were split.
        """
        return {
            "packages": package_versions(),
            "text": self._text,
            **({"renamings": self._renamings} if self._renamings else {}),
            "splits": "seeds, disjoint by initial state",
        }

    def games(self, family: str, split: str) -> Sequence[GameId]:
        """The games of one split, disjoint from the others by initial state. The first call for a
        family takes seconds, later ones none.
        """
        from envs.minihack.index import load_index

        base = self._base(family)
        return self._as(family, load_index(base, split))

    def more_games(self, family: str, split: str, count: int) -> Sequence[GameId]:
        """So many games of one split, as disjoint from the others, or as many as its seeds give:
        small rooms have few initial states. Takes seconds the first time, and is kept.
        """
        from envs.minihack.index import load_more

        base = self._base(family)
        return self._as(family, load_more(base, split, count))

    def open(self, family: str):
        """A live game of a family, ready to be reset."""
        from envs.minihack.game import MiniHackGame
        from envs.minihack.renamed import RenamedGame

        base = check_family(self._base(family))
        game = MiniHackGame if base == family else RenamedGame
        return game(family, style=self._text)

    def _base(self, family: str) -> str:
        """The family whose levels are played; a name that is none stays as it is."""
        return base_family(family, self._renamings)

    @staticmethod
    def _as(family: str, games: Sequence[GameId]) -> Sequence[GameId]:
        if games and games[0].family == family:
            return games
        return tuple(dataclasses.replace(game, family=family) for game in games)
