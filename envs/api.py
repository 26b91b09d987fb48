"""What a text game, an environment and a pool of games look like to the rest of the system."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class GameId:
    """Names one game: the same id always gives the same initial state and the same answers to the
    same actions.
    """

    env: str
    family: str
    key: str

    def __post_init__(self):
        for field in ("env", "family", "key"):
            value = getattr(self, field)
            if not value or "|" in value:
                raise ValueError(
                    f"GameId.{field} must be a non-empty string without '|', got {value!r}."
                )

    def __str__(self) -> str:
        return f"{self.env}|{self.family}|{self.key}"

    @classmethod
    def parse(cls, text: str) -> "GameId":
        """Reads what `str` wrote; raises ValueError for anything else."""
        parts = text.split("|")
        if len(parts) != 3:
            raise ValueError(f"A game id reads 'env|family|key', got {text!r}.")
        return cls(env=parts[0], family=parts[1], key=parts[2])


class CannotGoOn(RuntimeError):
    """A run has come to where nothing further can be gained; the text says why and what to do."""


class Refusal(ValueError):
    """Bad input, or a store that is away, in this program's own words: where several hosts compute
    together no sign that one of them is gone, though the words may be those of a connection.
    """


class Outcome(enum.StrEnum):
    """How an episode ended. `FAILED` is a fault of the environment, never of the agent."""

    SUCCESS = "success"
    DEATH = "death"
    STEP_LIMIT = "step_limit"
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """What the agent is shown: `text`, and `actions` it may take (empty when they are not
    enumerable).
    """

    text: str
    actions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The answer to a reset or to one action. `outcome` is None while the episode runs; `reward` is
    of this step alone.

    `error` says, in one sentence, why an outcome is FAILED; it is empty otherwise.
    """

    observation: Observation
    reward: float = 0.0
    outcome: Outcome | None = None
    error: str = ""


class Game(Protocol):
    """One live game of one family, re-seeded by every reset. Not thread-safe; never shared between
    episodes at once.

    A new one is checked by `envs.contract`; docs/adding_an_environment.md walks through an example.
    """

    def reset(self, game: GameId) -> Observation:
        """Starts the game. Raises ValueError for an id that is not of this family."""
        ...

    def step(self, action: str) -> Step:
        """Plays one action. Junk costs a step and gets a note in the text; it never raises. No step
        limit of its own.

        SUCCESS comes with a reward above 0, DEATH with none, FAILED with an `error`. After the end
        the outcome repeats, with reward 0.
        """
        ...

    def state_hash(self) -> str:
        """A hex digest of the state after the last reset: equal for equal initial states, whatever
        their ids.
        """
        ...

    def close(self) -> None:
        """Frees what the game holds; may be called twice."""
        ...


class Environment(Protocol):
    """A benchmark: families of games, their splits, and how to open one live game. Named by an
    import path or a short name.

    It is built in this process and in every worker, so it is cheap to build and holds no process,
    file or seed of its own. It may have more members: `describe`, `initial_prompt`,
    `expert_prompt` and `more_games`, see `Described`, `Introduced`, `Advised` and `Extensible`.
    """

    @property
    def name(self) -> str:
        """The short name: `GameId.env` of all its games."""
        ...

    @property
    def families(self) -> tuple[str, ...]:
        """All families, sorted."""
        ...

    def games(self, family: str, split: str) -> Sequence[GameId]:
        """The games of a family in "train", "select" or "test": disjoint, also by initial state,
        and in a fixed order.

        Raises ValueError for a family or split that it does not know.
        """
        ...

    def open(self, family: str) -> Game:
        """Builds a live game for a family. Raises ValueError for one that it does not know."""
        ...


@runtime_checkable
class Described(Protocol):
    """An environment that has something to say in the manifest of a run."""

    def describe(self) -> Mapping[str, Any]:
        """What a reader of results needs to know about the games, as JSON takes it: source, counts,
        hashes, versions.
        """
        ...


@runtime_checkable
class Introduced(Protocol):
    """An environment that knows how to introduce itself to an actor."""

    @property
    def initial_prompt(self) -> str:
        """The system prompt at meta-turn 0: what the games are about and the form of a reply; no
        hint at how to win.
        """
        ...


@runtime_checkable
class Advised(Protocol):
    """An environment whose makers know how it is won."""

    @property
    def expert_prompt(self) -> str:
        """A system prompt with all that people know about winning its games, in the form of
        `Introduced.initial_prompt`.
        """
        ...


@runtime_checkable
class Extensible(Protocol):
    """An environment that can make more games than its splits hold."""

    def more_games(self, family: str, split: str, count: int) -> Sequence[GameId]:
        """So many games of a split, or as many as there are: those of `games` first, then others,
        which are as disjoint from the other splits, however long these become.

        Raises ValueError for a family or split that it does not know.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolEvent:
    """One finished reset or step: `ticket` is what `Pool.reset` returned for the episode."""

    ticket: int
    step: Step
    state_hash: str = ""  # set on the answer to a reset


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolStats:
    """Counts since the pool was opened."""

    resets: int = 0
    steps: int = 0
    crashes: int = 0  # workers that died
    timeouts: int = 0  # calls past their deadline (the worker is killed)
    replays: int = 0  # episodes restored by playing their actions again
    quarantined: int = 0  # games given up after failing twice


class Pool(Protocol):
    """Many live games in worker processes. Every call returns at once; `poll` waits. A context
    manager.
    """

    def reset(self, game: GameId, *, max_steps: int) -> int:
        """Queues the start of an episode and returns its ticket; at `max_steps` actions it ends
        with STEP_LIMIT.
        """
        ...

    def step(self, ticket: int, action: str) -> None:
        """Queues one action of a running episode (one at a time per ticket)."""
        ...

    def release(self, ticket: int) -> None:
        """Ends an episode early, or forgets a finished one; the live game is free again.
        Idempotent.
        """
        ...

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Answers that have arrived; waits up to `timeout_s` for the first. Empty when none
        came.
        """
        ...

    @property
    def stats(self) -> PoolStats: ...

    def close(self) -> None:
        """Ends the workers and removes the temporary folder. Idempotent."""
        ...
