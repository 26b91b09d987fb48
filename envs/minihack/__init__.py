"""MiniHack as text games: 107 families, re-seeded live games, three text styles, verbs in words."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from envs import prompts
from envs.api import GameId
from envs.minihack.families import FAMILIES, MARK, check_family, package_versions

__all__ = ["FAMILIES", "MiniHack"]

_STYLES = ("full", "short", "compact")
_MOST_RENAMINGS = 1000


class MiniHack:
    """The MiniHack environment; implements `envs.api.Environment`. `text` is "full" (language
    models), "short" (small ones) or "compact" (tiny word-level models). With `renamings` every
    family comes again so many times with verbs of other names (`envs.minihack.renamed`): `eat~0`,
    `eat~1`, ...; that needs the short style.
    """

    def __init__(self, text: str = "full", renamings: str = "0"):
        if text not in _STYLES:
            raise ValueError(f"Unknown text style {text!r}; the styles are: {', '.join(_STYLES)}.")
        if not renamings.isdecimal() or int(renamings) > _MOST_RENAMINGS:
            raise ValueError(
                f"renamings is a number from 0 to {_MOST_RENAMINGS}, got {renamings!r}."
            )
        if int(renamings) and text != "short":
            raise ValueError(f"renamings={renamings} needs text=short, got text={text}.")
        self._text = text
        self._renamings = int(renamings)

    @property
    def name(self) -> str:
        """The `env` of every game id."""
        return "minihack"

    @property
    def families(self) -> tuple[str, ...]:
        """All families, sorted."""
        if not self._renamings:
            return FAMILIES
        numbers = range(self._renamings)
        return tuple(
            sorted([*FAMILIES, *(f"{family}{MARK}{n}" for family in FAMILIES for n in numbers)])
        )

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
        base, mark, number = family.partition(MARK)
        known = mark and number.isdecimal() and str(int(number)) == number
        return base if known and int(number) < self._renamings else family

    @staticmethod
    def _as(family: str, games: Sequence[GameId]) -> Sequence[GameId]:
        if games and games[0].family == family:
            return games
        return tuple(dataclasses.replace(game, family=family) for game in games)
