"""Fake environments that each break one promise, for tests of `envs.contract`. Importable by worker
processes.
"""

import dataclasses
import itertools
import os
import random

from envs.api import Outcome
from envs.fake import WORDS, FakeEnvironment, FakeGame

_COUNT = itertools.count()


class _Environment(FakeEnvironment):
    game = FakeGame

    def open(self, family):
        super().open(family)
        return self.game(family, self._faults, "")


def _with(game_type):
    """An environment around a broken game."""
    return type(game_type.__name__ + "Environment", (_Environment,), {"game": game_type})


def _say(step, text):
    return dataclasses.replace(step, observation=dataclasses.replace(step.observation, text=text))


class AnyFamily(_Environment):
    def open(self, family):
        return FakeGame(family if family in WORDS else "door", self._faults, "")


class AnySplit(_Environment):
    def games(self, family, split):
        return super().games(family, split if split in ("train", "select", "test") else "train")


class _AnyId(FakeGame):
    def reset(self, game):
        return super().reset(dataclasses.replace(game, env="fake", family=self._family))


class _ListedActions(FakeGame):
    def _observe(self, message):
        seen = super()._observe(message)
        return dataclasses.replace(seen, actions=list(seen.actions))


class Overlap(_Environment):
    def games(self, family, split):
        return (
            super().games(family, "train")[500:510]
            if split == "test"
            else super().games(family, split)
        )


class SameStates(_Environment):
    def games(self, family, split):
        games = super().games(family, "train" if split == "test" else split)
        return (
            tuple(dataclasses.replace(game, key=f"0{game.key}") for game in games[:10])
            if split == "test"
            else games
        )


class Unsorted(_Environment):
    def games(self, family, split):
        games = list(super().games(family, split))
        random.shuffle(games)
        return games


class _Counting(FakeGame):
    def step(self, action):
        step = super().step(action)
        return _say(step, f"{step.observation.text} Call {next(_COUNT)}.")


class _Leftover(FakeGame):
    """Remembers its very first game."""

    first = None

    def reset(self, game):
        self.first = self.first or game
        super().reset(self.first)
        return self._observe("You are somewhere.")


class _ConstantHash(FakeGame):
    def state_hash(self):
        return "0" * 64


class _MovingHash(FakeGame):
    def step(self, action):
        step = super().step(action)
        self._state_hash += "1"
        return step


class _HashOrder(FakeGame):
    """Names things in the order of a set of strings, which PYTHONHASHSEED decides."""

    def _observe(self, message):
        return super()._observe(
            f"{message} You see: {', '.join({'cup', 'egg', 'key', 'mug', 'pan', 'pot'})}."
        )


class _Pid(FakeGame):
    def step(self, action):
        step = super().step(action)
        return _say(step, f"{step.observation.text} Process {os.getpid()}.")


class _Unrewarded(FakeGame):
    def step(self, action):
        return dataclasses.replace(super().step(action), reward=0.0)


class _RewardedDeath(FakeGame):
    def step(self, action):
        step = super().step(action)
        return dataclasses.replace(step, reward=0.5) if step.outcome is Outcome.DEATH else step


class _Rewarding(FakeGame):
    """Pays again for every step after the win."""

    def step(self, action):
        step = super().step(action)
        return dataclasses.replace(step, reward=float(step.outcome is Outcome.SUCCESS))


class _Undead(FakeGame):
    def step(self, action):
        if self._outcome is not Outcome.DEATH:
            return super().step(action)
        self._outcome = None
        return super().step("look")


class _Limited(FakeGame):
    def reset(self, game):
        self._left = 3
        return super().reset(game)

    def step(self, action):
        self._left -= 1
        step = super().step(action)
        return dataclasses.replace(
            step, outcome=step.outcome or (Outcome.STEP_LIMIT if self._left <= 0 else None)
        )


class _NoNumber(FakeGame):
    def step(self, action):
        return dataclasses.replace(super().step(action), reward=float("nan"))


class _Unwinnable(FakeGame):
    def step(self, action):
        return super().step("look" if action in WORDS.values() else action)


class _Raising(FakeGame):
    def step(self, action):
        action.encode()
        return super().step(action)


class _Echo(FakeGame):
    def step(self, action):
        step = super().step(action)
        return _say(step, f"You said: {action}")


class _EmptyWins(FakeGame):
    """Reads what it does not know as its first action, and the first action wins."""

    def step(self, action):
        self._distance = 0
        return super().step(action if action.strip() else WORDS[self._family])


class _Silent(FakeGame):
    def step(self, action):
        step = super().step(action)
        return step if step.outcome is not None or "walk" in action else _say(step, "")


class _ClosesOnce(FakeGame):
    closed = False

    def close(self):
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


AnyId, ListedActions = _with(_AnyId), _with(_ListedActions)
Counting, Leftover, ConstantHash, MovingHash = (
    _with(_Counting),
    _with(_Leftover),
    _with(_ConstantHash),
    _with(_MovingHash),
)
HashOrder, Pid = _with(_HashOrder), _with(_Pid)
Unrewarded, RewardedDeath, Rewarding, Undead = (
    _with(_Unrewarded),
    _with(_RewardedDeath),
    _with(_Rewarding),
    _with(_Undead),
)
Limited, NoNumber, Unwinnable = _with(_Limited), _with(_NoNumber), _with(_Unwinnable)
Raising, Echo, EmptyWins, Silent, ClosesOnce = (
    _with(_Raising),
    _with(_Echo),
    _with(_EmptyWins),
    _with(_Silent),
    _with(_ClosesOnce),
)
