"""Live games in this process: for notebooks, debuggers, and environments that a worker process
could not import.
"""

import dataclasses
import json
from collections import deque

from envs import wire
from envs.api import Environment, GameId, Observation, Outcome, PoolEvent, PoolStats, Step
from envs.pool import sanitize
from envs.worker import LiveGames, describe, play_reset, play_step


@dataclasses.dataclass(kw_only=True)
class _Episode:
    game: GameId
    steps_left: int


class LocalPool:
    """Implements `envs.api.Pool` without workers: the same answers as `envs.pool.WorkerPool`, and
    none of its protection.

    A game that hangs, hangs the caller; one that kills its process, kills it. One that raises ends
    its own episode as FAILED.
    """

    def __init__(self, environment: Environment, *, max_idle_games: int = 64):
        self._games = LiveGames(environment, max_idle_games)
        self._episodes: dict[int, _Episode] = {}
        self._calls: deque[tuple[int, str | None]] = deque()  # ticket, action (None: the reset)
        self._num_tickets = 0
        self._counts = {"resets": 0, "steps": 0, "quarantined": 0}
        self._closed = False

    def __enter__(self) -> "LocalPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def stats(self) -> PoolStats:
        return PoolStats(**self._counts)

    def reset(self, game: GameId, *, max_steps: int) -> int:
        """Queues the start of an episode until `poll`; at `max_steps` actions it ends with
        STEP_LIMIT.
        """
        self._check_open()
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
        ticket = self._num_tickets
        self._num_tickets += 1
        self._episodes[ticket] = _Episode(game=game, steps_left=max_steps)
        self._calls.append((ticket, None))
        return ticket

    def step(self, ticket: int, action: str) -> None:
        """Queues one action until `poll`."""
        self._check_open()
        if ticket not in self._episodes:
            raise ValueError(
                f"Ticket {ticket!r} names no running episode: it was never given out, has ended, or"
                " was released."
            )
        if any(ticket == queued for queued, _ in self._calls):
            raise ValueError(
                f"Ticket {ticket} still waits for the answer to its last call: poll until it"
                " arrives."
            )
        self._calls.append((ticket, action))

    def release(self, ticket: int) -> None:
        self._check_open()
        if self._episodes.pop(ticket, None) is not None:
            self._games.release(ticket)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Plays every queued call; `timeout_s` is part of the interface and has no effect here."""
        self._check_open()
        events = []
        while self._calls:
            ticket, action = self._calls.popleft()
            if ticket in self._episodes:
                events.append(self._play(ticket, self._episodes[ticket], action))
        return events

    def close(self) -> None:
        self._closed = True
        self._games.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("The local pool was closed: open a new one.")

    def _play(self, ticket: int, episode: _Episode, action: str | None) -> PoolEvent:
        state_hash = ""
        try:
            if action is None:
                live = self._games.take(ticket, episode.game.family)
                # by way of JSON: what a worker would refuse or replace is refused or replaced here
                step, state_hash = wire.decode_step(json.loads(play_reset(live, episode.game)))
                self._counts["resets"] += 1
            else:
                action, note = sanitize(action)
                encoded, _ = play_step(self._games.playing(ticket), action)
                step, _ = wire.decode_step(json.loads(encoded))
                self._counts["steps"] += 1
                episode.steps_left -= 1
                if step.outcome is None and not episode.steps_left:
                    step = dataclasses.replace(step, outcome=Outcome.STEP_LIMIT)
                if note:
                    seen = dataclasses.replace(step.observation, text=note + step.observation.text)
                    step = dataclasses.replace(step, observation=seen)
        except (Exception, SystemExit) as error:
            self._games.discard(ticket)
            self._counts["quarantined"] += 1
            reason = f"The game {episode.game} failed: it raised {describe(error)}."
            step = Step(observation=Observation(text=""), outcome=Outcome.FAILED, error=reason)
        if step.outcome is not None:
            self.release(ticket)
        return PoolEvent(ticket=ticket, step=step, state_hash=state_hash)
