"""FrozenLake of Gymnasium as text games: a new map for every game, on firm or on slippery ice."""

import functools
import hashlib

import gymnasium
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

from envs.api import GameId, Observation, Outcome, Step

MOVES = ("left", "down", "right", "up")  # Gymnasium's actions 0 to 3
SPLITS = {"train": slice(0, 300), "select": slice(300, 400), "test": slice(400, None)}
ENDS = {Outcome.SUCCESS: "You reach G.", Outcome.DEATH: "You fall into a hole."}


class FrozenLake:
    name = "frozen_lake"
    families = ("firm", "slippery")
    initial_prompt = "You cross a lake.\n\nThought: <one sentence>\nAction: <an available action>"

    def games(self, family, split):
        if family not in self.families or split not in SPLITS:
            raise ValueError(f"No {family!r}, {split!r}: use {self.families} and {tuple(SPLITS)}.")
        seeds = _seeds()[SPLITS[split]]
        return tuple(GameId(env=self.name, family=family, key=str(seed)) for seed in seeds)

    def open(self, family):
        if family not in self.families:
            raise ValueError(f"Unknown family {family!r}: use one of {self.families}.")
        return FrozenLakeGame(family)


class FrozenLakeGame:
    def __init__(self, family):
        self._family = family

    def reset(self, game):
        if (game.env, game.family) != (FrozenLake.name, self._family) or not game.key.isdecimal():
            raise ValueError(f"{game} is not a game of {FrozenLake.name}|{self._family}|SEED.")
        self._map = generate_random_map(size=4, p=0.8, seed=int(game.key))
        slippery = self._family == "slippery"
        self._lake = gymnasium.make("FrozenLake-v1", desc=self._map, is_slippery=slippery).unwrapped
        self._position, _ = self._lake.reset(seed=int(game.key))
        self._outcome = None
        return self._observe("You stand at S and want to reach G. F is ice, H is a hole, @ is you.")

    def step(self, action):
        word = action.strip().lower()
        if self._outcome is not None or word not in MOVES:
            note = "The game is over." if self._outcome else f"Use one of {', '.join(MOVES)}."
            return Step(observation=self._observe(note), outcome=self._outcome)
        self._position, reward, ended, _, _ = self._lake.step(MOVES.index(word))
        if ended:
            self._outcome = Outcome.SUCCESS if reward > 0 else Outcome.DEATH
        note = ENDS.get(self._outcome, f"You go {word}.")
        return Step(observation=self._observe(note), reward=float(reward), outcome=self._outcome)

    def state_hash(self):
        return hashlib.sha256(f"{self._family} {self._map}".encode()).hexdigest()

    def close(self):
        pass

    def _observe(self, note):
        row, column = divmod(int(self._position), 4)
        lines = list(self._map)
        lines[row] = lines[row][:column] + "@" + lines[row][column + 1 :]
        return Observation(text="\n".join([note, *lines]), actions=() if self._outcome else MOVES)


@functools.cache
def _seeds():
    """Of seeds 0 to 999, those whose map has not come before: no map stands in two splits."""
    maps = {tuple(generate_random_map(size=4, p=0.8, seed=s)): s for s in range(999, -1, -1)}
    return sorted(maps.values())
