"""Episodes that were played already: an actor that repeats itself need not play them again."""

from collections.abc import Sequence

from envs.api import GameId, Outcome
from ictjax.loops import Arena
from ictjax.records import Trajectory
from ictjax.rollout import Episode, turn_limits


class PlayedGames:
    """Plays episodes, each pair of system prompt and game once, where the actor repeats itself: a
    greedy model. Arms often write the same prompt, and all loops of one place have the same games.

    Args:
      max_turns: that are remembered; the oldest episodes are forgotten first. What the environment
        failed is not remembered.
    """

    def __init__(self, max_turns: int = 100_000):
        self._max_turns, self._num_turns = max_turns, 0
        self._known: dict[tuple[str, GameId], Trajectory] = {}

    def play(self, arena: Arena, episodes: Sequence[Episode], phase: str) -> list[Trajectory]:
        """As `Arena.play`; the arenas of all calls have the same actor and settings."""
        if not arena.actor.repeats(turn_limits(arena.task.rollout)):
            return arena.play(episodes, phase)
        places = [(episode.system_prompt, episode.game) for episode in episodes]
        found = {place: self._known[place] for place in places if place in self._known}
        new = [
            episode for episode, place in zip(episodes, places, strict=True) if place not in found
        ]
        for episode, trajectory in zip(new, arena.play(new, phase), strict=True):
            found[episode.system_prompt, episode.game] = trajectory
            self._remember(trajectory)
        return [found[place] for place in places]

    def _remember(self, trajectory: Trajectory) -> None:
        place = (trajectory.system_prompt, trajectory.game)
        if trajectory.outcome is Outcome.FAILED or place in self._known:
            return
        self._known[place] = trajectory
        self._num_turns += len(trajectory.turns)
        while self._num_turns > self._max_turns:
            self._num_turns -= len(self._known.pop(next(iter(self._known))).turns)
