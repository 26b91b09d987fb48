"""In-context Training as an environment: an action is a system prompt, the answer is how an actor
fares under it on games not seen before.
"""

import contextlib
import dataclasses
import enum
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from envs import registry
from envs.api import Environment, GameId, Outcome, Pool
from envs.local import LocalPool
from envs.pool import WorkerPool
from ictjax import keys, loops
from ictjax.config import RolloutConfig, SamplerConfig
from ictjax.function_speaker import Function
from ictjax.manners import Manners, check_style, check_words, manners_for
from ictjax.model_speaker import ModelSpeaker
from ictjax.models.hf.hub import local_folder
from ictjax.players import is_url, open_speaker
from ictjax.records import Context, Trajectory
from ictjax.rollout import Episode, parse_failures, rollout, success_rate
from ictjax.speaker import Speaker

# Of language models, which do not say.
_ANY = Manners(options={}, initial_prompt="", max_steps=25, max_turn_tokens=256, show_actions=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GameResult:
    """How one game of a batch went."""

    game: GameId
    outcome: Outcome
    reward: float  # the sum over its steps
    num_steps: int
    num_unusable: int  # replies without an action, played as the empty one
    state_hash: str  # of the initial state
    error: str  # why the outcome is FAILED, else empty


class MetaEnv:
    """A meta-environment over the games of a benchmark. A context manager; not thread-safe.

    `reset` starts a loop: it takes the next family and plays a batch of games under the initial
    prompt. `step` plays the next batch under the prompt it is given. Both return the `Context` that
    a reflector reads, with the trajectories in the order of the batch. Games are drawn without
    replacement over steps and loops: none comes back before the family's split is used up, which
    `terminated` announces.

    Args:
      environment: a name for `envs.registry.load_environment`, whose games run in worker processes;
        or an environment object, whose games run in this process, unprotected.
      actor: who plays: a folder with a model in Hugging Face layout or an id on its hub; the base
        URL of an OpenAI-compatible endpoint; a function of (messages, actions) that returns an
        action or a reply; or a speaker (`ictjax.speaker`), which stays the caller's to close.
      actor_model: the name of the model at an endpoint that has more than one.
      families: which take turns; all by default.
      split: "train", "select" or "test".
      num_games: games of a batch (the paper's k).
      draw: "fresh", new games in every batch; or "fixed", the same ones again and again, for
        validation.
      initial_prompt: the actor's at meta-turn 0; by default the one that its model expects, else
        the environment's own (`envs.registry.initial_prompt`).
      max_steps: of an episode; 25 by default. This, the next two and `options` are by default what
        the actor's model expects, where it says so (`ictjax.manners`).
      max_turn_tokens: of a model's reply; 256 by default.
      show_actions: list the available actions below each observation; by default they are.
      meta_turns: steps of a loop, after which `truncated` is true; no limit by default.
      seed: of the order of games and families, and of sampling.
      temperature: of a model; 0 is greedy.
      options: keyword arguments of a named environment.
      num_workers: processes of a named environment.
      deadline_s: of one reset or step of a named environment.
      sampler: sizes of a model's sampler; by default fit for `num_games` conversations of at most
        8,192 tokens.
    Raises:
      ValueError: an argument makes no sense, or names something that does not exist.
    """

    def __init__(
        self,
        environment: str | Environment,
        actor: str | os.PathLike[str] | Function | Speaker,
        *,
        actor_model: str = "",
        families: Sequence[str] = (),
        split: str = "train",
        num_games: int = 3,
        draw: Literal["fresh", "fixed"] = "fresh",
        initial_prompt: str = "",
        max_steps: int | None = None,
        max_turn_tokens: int | None = None,
        show_actions: bool | None = None,
        meta_turns: int | None = None,
        seed: int = 0,
        temperature: float = 0.0,
        options: Mapping[str, str] | None = None,
        num_workers: int = 2,
        deadline_s: float = 20.0,
        sampler: SamplerConfig | None = None,
    ):
        folder, model_name = _folder(actor), _model_name(actor)
        manners = _manners(folder, environment) if folder else None
        if options is None:
            named = isinstance(environment, str)
            options = manners.options if manners is not None and named else {}
        if manners is not None and isinstance(environment, str):
            check_style(model_name, manners, options)
        self._environment = _environment(environment, options)
        if isinstance(families, str):
            raise ValueError(
                f"families is a sequence of names, got the string {families!r}: write"
                f" [{families!r}]."
            )
        for family in families:
            if family not in self._environment.families:
                raise ValueError(
                    f"Unknown family {family!r} of {self._environment.name}: use some of"
                    f" {registry.nearest(family, self._environment.families)}."
                )
        for name, value in (("num_games", num_games), ("meta_turns", meta_turns)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if draw not in ("fresh", "fixed"):
            raise ValueError(f"draw must be 'fresh' or 'fixed', got {draw!r}.")
        self.initial_prompt = (
            initial_prompt
            or (manners.initial_prompt if manners is not None else "")
            or registry.initial_prompt(self._environment)
        )
        self.families = tuple(families or self._environment.families)
        self._split, self._num_games, self._draw, self._meta_turns = (
            split,
            num_games,
            draw,
            meta_turns,
        )
        expected = manners or _ANY
        self._rollout = RolloutConfig(
            max_steps=expected.max_steps if max_steps is None else max_steps,
            max_turn_tokens=(
                expected.max_turn_tokens if max_turn_tokens is None else max_turn_tokens
            ),
            temperature=temperature,
            show_actions=expected.show_actions if show_actions is None else show_actions,
        )
        self._closed = False
        self._games: dict[str, tuple[GameId, ...]] = {}
        self._rewind(seed)
        with contextlib.ExitStack() as stack:
            if isinstance(environment, str):
                pool = WorkerPool(
                    environment, num_workers=num_workers, deadline_s=deadline_s, options=options
                )
            else:
                pool = LocalPool(self._environment)
            self._pool: Pool = stack.enter_context(pool)
            self._actor: Speaker = stack.enter_context(
                open_speaker(
                    actor,
                    model=actor_model,
                    replies="action",
                    num_conversations=num_games,
                    sizes=sampler,
                )
            )
            if isinstance(self._actor, ModelSpeaker):
                unknown = self._actor.chat.unknown(self.initial_prompt)
                check_words(model_name, self.initial_prompt, unknown)
            self._stack = stack.pop_all()

    def __enter__(self) -> "MetaEnv":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and frees the model. Idempotent."""
        self._closed = True
        self._stack.close()

    def describe(self) -> dict[str, Any]:
        """What the environment says about itself (source, counts, versions), for a record of
        results.
        """
        return registry.describe(self._environment)

    def games(self, family: str) -> tuple[GameId, ...]:
        """The games of a family in this split, sorted: their order depends on no directory walk and
        no hash seed.
        """
        if family not in self._games:
            found = tuple(sorted(set(self._environment.games(family, self._split))))
            if len(found) < self._num_games:
                raise ValueError(
                    f"Family {family!r} has {len(found)} games in {self._split!r}, a batch needs"
                    f" {self._num_games}: lower num_games."
                )
            self._games[family] = found
        return self._games[family]

    def reset(self, *, seed: int | None = None) -> tuple[Context, dict[str, Any]]:
        """Starts the next loop: a batch of the next family under the initial prompt. With a seed,
        everything starts over.
        """
        if seed is not None:
            self._rewind(seed)
        self._loop += 1
        self._meta_turn = 0
        self._family = loops.family_of_loop(self._key, sorted(self.families), self._loop)
        context, info = self._turn(self.initial_prompt)
        self._running = not (info["terminated"] or info["truncated"])
        return context, info

    def step(self, system_prompt: str) -> tuple[Context, float | None, bool, bool, dict[str, Any]]:
        """Plays the next batch under a prompt.

        Returns:
          context: the prompt and its episodes, for the reflector.
          reward: the share of games won, over those that were played to an end; None when the
            environment or the actor failed in all,
            and `info["failures"]` then says why.
          terminated: fewer unseen games are left than a batch needs; after the next `reset` games
            come back, in another order.
          truncated: the loop has had its meta-turns.
          info: "games" has one `GameResult` for every game of the batch, in order; further "failed"
            (how many have no outcome of their own), "failures" (why, each reason once),
            "parse_failures", "loop", "meta_turn", "family", "pass" (how often the family's games
            were used up), "pool".
        Raises:
          ValueError: the prompt is no text, for example a reflector's `ParseFailure`; or the loop
            has ended.
        """
        # A ParseFailure is a string too, and would make a fine prompt to look at.
        if (
            not isinstance(system_prompt, str)
            or isinstance(system_prompt, enum.Enum)
            or not system_prompt.strip()
        ):
            raise ValueError(
                f"step takes a system prompt, got {system_prompt!r}: ask the reflector again, or"
                " pass the old prompt on purpose."
            )
        if not self._running:
            raise ValueError(
                "No loop is running: call reset first, and again after terminated or truncated."
            )
        self._meta_turn += 1
        context, info = self._turn(system_prompt)
        terminated, truncated = info["terminated"], info["truncated"]
        self._running = not (terminated or truncated)
        return context, info["reward"], terminated, truncated, info

    def play(self, system_prompt: str, games: Sequence[GameId]) -> tuple[Trajectory, ...]:
        """Plays given games under a prompt, outside of any loop: `context.games` again is the
        paper's replay. One trajectory per entry.
        """
        return self._play(system_prompt, games, keys.fold(self._key, "play", system_prompt))

    def _rewind(self, seed: int) -> None:
        # an old name, kept: as a part of every key it decides which games a seed means
        self._key = keys.fold(keys.root_key(seed), "meta_gym")
        self._loop, self._meta_turn, self._family, self._running = -1, 0, "", False
        self._positions = dict.fromkeys(self.families, 0)

    def _turn(self, system_prompt: str) -> tuple[Context, dict[str, Any]]:
        """One batch under one prompt: draws, plays, tells."""
        family, games = self._family, self.games(self._family)
        position = 0 if self._draw == "fixed" else self._positions[family]
        batch, position = loops.next_games(self._key, games, family, position, self._num_games)
        self._positions[family] = position
        trajectories = self._play(
            system_prompt, batch, keys.fold(self._key, "loop", self._loop, self._meta_turn)
        )
        context = Context(
            loop=self._loop,
            meta_turn=self._meta_turn,
            family=family,
            system_prompt=system_prompt,
            trajectories=trajectories,
        )
        left = len(games) - ((position - 1) % len(games) + 1)
        return context, {
            "reward": success_rate(trajectories),
            "terminated": self._draw == "fresh" and left < self._num_games,
            "truncated": self._meta_turns is not None and self._meta_turn >= self._meta_turns,
            "games": tuple(map(_result, trajectories)),
            "failed": sum(trajectory.outcome is Outcome.FAILED for trajectory in trajectories),
            "failures": tuple(dict.fromkeys(t.error for t in trajectories if t.error)),
            "parse_failures": parse_failures(trajectories),
            "loop": self._loop,
            "meta_turn": self._meta_turn,
            "family": family,
            "pass": (position - 1) // len(games),
            "pool": dataclasses.asdict(self._pool.stats),
        }

    def _play(
        self, system_prompt: str, games: Sequence[GameId], key: keys.Key
    ) -> tuple[Trajectory, ...]:
        if self._closed:
            raise ValueError("This environment is closed: make another.")
        episodes = [
            Episode(game=game, system_prompt=system_prompt, key=keys.fold(key, index, str(game)))
            for index, game in enumerate(games)
        ]
        return tuple(rollout(self._actor, self._pool, episodes, self._rollout))


def _folder(actor: str | os.PathLike[str] | Function | Speaker) -> str:
    """The folder of the actor's model, which may say what it expects of an environment; empty where
    the actor is none that was read from a folder.
    """
    if isinstance(actor, ModelSpeaker):
        return actor.folder
    if not isinstance(actor, str | os.PathLike) or is_url(actor):
        return ""
    return os.fspath(local_folder(actor, weights=False))


def _manners(folder: str, environment: str | Environment) -> Manners | None:
    return manners_for(folder, environment if isinstance(environment, str) else environment.name)


def _model_name(actor: str | os.PathLike[str] | Function | Speaker) -> str:
    """What the actor's model is called in a message."""
    if isinstance(actor, ModelSpeaker):
        return actor.folder or "the speaker that was given"
    return os.fspath(actor) if isinstance(actor, str | os.PathLike) else ""


def _environment(environment: str | Environment, options: Mapping[str, str]) -> Environment:
    if isinstance(environment, str):
        return registry.load_environment(environment, options)
    if isinstance(environment, type):
        raise ValueError(
            f"environment is a name or an object, got the class {environment.__name__}: call it"
            " first."
        )
    if fault := registry.fault_of(environment):
        raise ValueError(
            f"{environment!r} is not an environment: {fault} (see envs.api.Environment)."
        )
    if options:
        raise ValueError(
            "options are for an environment given by name; an object has been built already."
        )
    return environment


def _result(trajectory: Trajectory) -> GameResult:
    return GameResult(
        game=trajectory.game,
        outcome=trajectory.outcome,
        reward=sum(turn.reward for turn in trajectory.turns),
        num_steps=len(trajectory.turns),
        num_unusable=sum(turn.failure is not None for turn in trajectory.turns),
        state_hash=trajectory.state_hash,
        error=trajectory.error,
    )
