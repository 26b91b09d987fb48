"""MiniHack families whose verbs have other names (`envs.renamings`)."""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence

from envs.api import GameId, Observation, Step
from envs.minihack.game import MiniHackGame
from envs.minihack.text import OFFERED
from envs.minihack.view import View
from envs.renamings import LABELS, MARK, draw_names

# The verbs that are renamed; "pickup" keeps its name.
VERBS: Sequence[str] = tuple(verb for verb in OFFERED if verb != "pickup")


def renaming(family: str) -> Mapping[str, str]:
    """The verbs of the game -> what they are called in a renamed family: the same for each of its
    games.
    """
    return draw_names(VERBS, LABELS, random.Random(family))


def rename_verbs(text: str, names: Mapping[str, str]) -> str:
    """A text with verbs renamed, all at once, "put on" like "puton"."""
    if not names:
        return text
    either = "|".join(map(re.escape, names))

    def new(found: re.Match[str]) -> str:
        name = names[found[0].lower().replace(" ", "")]
        return name.capitalize() if found[0][0].isupper() else name

    return re.sub(rf"(?<!staircase )\b(?:put on|{either})\b", new, text, flags=re.IGNORECASE)


class RenamedGame:
    """A live game of a renamed family; implements `envs.api.Game`. The game's own names of renamed
    verbs mean nothing in it.
    """

    def __init__(self, family: str, *, style: str):
        self._family = family
        self._base, _, _ = family.partition(MARK)
        self._names = renaming(family)
        # a verb that lost its name is an unknown word, and the note about that names what was typed
        self._verbs = {name: verb for verb, name in self._names.items()}
        self._lost = {verb: f"un{verb}" for verb in self._names}
        self._shown = {**self._names, **{word: verb for verb, word in self._lost.items()}}
        self._game = MiniHackGame(self._base, style=style)

    def reset(self, game: GameId) -> Observation:
        """Starts the game whose key is a seed. Raises ValueError for an id of another family."""
        if game.family != self._family:
            raise ValueError(f"{game} is not a game of minihack|{self._family}.")
        return self._renamed(self._game.reset(dataclasses.replace(game, family=self._base)))

    def step(self, action: str) -> Step:
        """Plays one action, its first word being a verb as it is called here."""
        word, space, rest = action.strip().partition(" ")
        verb = self._verbs.get(word.lower()) or self._lost.get(word.lower(), word)
        step = self._game.step(f"{verb}{space}{rest}")
        return dataclasses.replace(step, observation=self._renamed(step.observation))

    def state_hash(self) -> str:
        """That of the family whose levels are played."""
        return self._game.state_hash()

    def raw(self) -> View:
        """The visible state as data, for scripted players."""
        return self._game.raw()

    def close(self) -> None:
        """Ends the game and removes its temporary folder."""
        self._game.close()

    def _renamed(self, observation: Observation) -> Observation:
        return dataclasses.replace(
            observation,
            text=rename_verbs(observation.text, self._shown),
            actions=tuple(rename_verbs(action, self._names) for action in observation.actions),
        )
