"""A tiny deterministic game for tests and examples: walk to a thing, then say the one word that
works for its family.

`door` needs "open", `lamp` needs "light", `bell` needs "ring". The other two words do nothing,
"jump" is deadly, and nothing in the text says which word is right: a player has to have been told.
"""

import hashlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from envs.api import GameId, Observation, Outcome, Step

# family -> the action that wins next to the thing
WORDS = {"bell": "ring", "door": "open", "lamp": "light"}
ACTIONS = ("walk", "look", "open", "light", "ring", "jump")
_SPLITS = {"train": range(1000), "select": range(1000, 1200), "test": range(1200, 1400)}
_MADE_ANEW = 1400
_MAX_DISTANCE = 2


class FakeEnvironment:
    """The families `bell`, `door` and `lamp`; a game's key is a whole number.

    The options make the game misbehave, for tests of the pool: each names the action on which a
    fault happens, or "reset:KEY" for the reset of one game. `hang_on` never returns, `crash_on`
    kills the process (SIGSEGV), `raise_on` raises, `print_on` writes to stdout, `drift_on` makes
    the text differ from process to process. With `once_in`, a folder, each fault happens once and
    then never again.
    """

    name = "fake"
    families = tuple(sorted(WORDS))

    def __init__(
        self,
        *,
        hang_on: str = "",
        crash_on: str = "",
        raise_on: str = "",
        print_on: str = "",
        drift_on: str = "",
        once_in: str = "",
    ):
        self._faults = {
            "hang": hang_on,
            "crash": crash_on,
            "raise": raise_on,
            "print": print_on,
            "drift": drift_on,
        }
        self._once_in = once_in

    def games(self, family: str, split: str) -> Sequence[GameId]:
        """1000 games to train on, 200 to select on and 200 to test on, for each family."""
        _check_family(family)
        if split not in _SPLITS:
            raise ValueError(f"Unknown split {split!r}: use one of {', '.join(_SPLITS)}.")
        return tuple(GameId(env=self.name, family=family, key=str(key)) for key in _SPLITS[split])

    def more_games(self, family: str, split: str, count: int) -> Sequence[GameId]:
        """So many games of a split; keys from 1400 on belong to the splits in turn."""
        games = self.games(family, split)
        beyond = itertools.count(_MADE_ANEW + list(_SPLITS).index(split), len(_SPLITS))
        keys = itertools.islice(beyond, max(count - len(games), 0))
        more = (GameId(env=self.name, family=family, key=str(key)) for key in keys)
        return (*games[:count], *more)

    def open(self, family: str) -> "FakeGame":
        _check_family(family)
        return FakeGame(family, self._faults, self._once_in)


class FakeGame:
    """One live game of one family."""

    def __init__(self, family: str, faults: dict[str, str], once_in: str):
        self._family = family
        self._faults = {trigger: fault for fault, trigger in faults.items() if trigger}
        self._once_in = once_in
        self._room = 0
        self._distance = 0
        self._outcome: Outcome | None = None
        self._state_hash = ""

    def reset(self, game: GameId) -> Observation:
        if (
            game.env != FakeEnvironment.name
            or game.family != self._family
            or not (game.key.isascii() and game.key.isdigit())
        ):
            raise ValueError(f"{game} is not a game of fake|{self._family}|WHOLE NUMBER.")
        note = self._misbehave(f"reset:{game.key}")
        self._room = int(game.key)
        self._distance = hashlib.sha256(f"{self._family} {self._room}".encode()).digest()[0] % (
            _MAX_DISTANCE + 1
        )
        self._outcome = None
        self._state_hash = hashlib.sha256(
            f"{self._family} {self._room} {self._distance}".encode()
        ).hexdigest()
        return self._observe(f"You are in room {self._room}.{note}")

    def step(self, action: str) -> Step:
        if self._outcome is not None:
            return Step(observation=self._observe("The game is over."), outcome=self._outcome)
        note = self._misbehave(action)
        word = action.strip()
        if word == "jump":
            self._outcome = Outcome.DEATH
            message = "You jump into a hole in the floor and die."
        elif word == "walk":
            message = "You walk on." if self._distance else "You are there already."
            self._distance = max(0, self._distance - 1)
        elif word == "look":
            message = f"You are in room {self._room}."
        elif word in WORDS.values() and self._distance:
            message = f"You are too far away from the {self._family}."
        elif word == WORDS[self._family]:
            self._outcome = Outcome.SUCCESS
            message = f"You {word} the {self._family}. You win."
        elif word in WORDS.values():
            message = f"You cannot {word} the {self._family}."
        else:
            message = f"Nothing happens: you know {', '.join(ACTIONS)}."
        reward = 1.0 if self._outcome is Outcome.SUCCESS else 0.0
        return Step(observation=self._observe(message + note), reward=reward, outcome=self._outcome)

    def state_hash(self) -> str:
        return self._state_hash

    def close(self) -> None:
        pass

    def _observe(self, message: str) -> Observation:
        where = (
            f"{self._distance} steps away"
            if self._distance > 1
            else "1 step away"
            if self._distance
            else "right here"
        )
        return Observation(
            text=f"{message} The {self._family} is {where}.",
            actions=() if self._outcome else ACTIONS,
        )

    def _misbehave(self, trigger: str) -> str:
        fault = self._faults.get(trigger)
        if fault is None:
            return ""
        if self._once_in:
            done = Path(self._once_in) / fault
            if done.exists():
                return ""
            done.touch()
        if fault == "hang":
            while True:
                time.sleep(3600)
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "raise":
            raise RuntimeError(f"the fake game was told to raise on {trigger!r}")
        if fault == "drift":
            return f" The clock shows {os.getpid()}."
        sys.stdout.write("noise " * 2000 + "\n")
        os.write(1, b"\x00\xffraw noise\n")
        return ""


def _check_family(family: str) -> None:
    if family not in WORDS:
        raise ValueError(f"Unknown family {family!r}: use one of {', '.join(sorted(WORDS))}.")
