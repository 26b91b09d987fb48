"""Benchmarks of a greedy actor on the games of a run: with more or fewer tokens of a reply guessed
in a step, and with weights and cache in 8 bits.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.bench_run import Design, Note, Result, interleave, ratio
from experiments.commands.bench import ActorBench, Int8Bench, SpeculationBench
from experiments.intervals import clopper_pearson
from experiments.memory import uses
from experiments.presets import in_folders
from experiments.run_dir import open_pool, read_run
from ictjax.config import CacheKind, MeshConfig, RolloutConfig
from ictjax.model_speaker import ModelSpeaker
from ictjax.models import transformer
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params
from ictjax.players import actor_speaker, frozen_weights
from ictjax.records import Message, Trajectory, trajectory_from_json
from ictjax.rollout import Episode, rollout, user_message
from ictjax.run_config import TrainConfig
from ictjax.speaker import Limits, Reply

_PLAIN, _FLOAT = "nothing guessed", "float"
_COMPARED = 16  # games whose logits are compared
_Weights = Literal["float", "int8"]
# of weights and cache
_INT8: Mapping[str, tuple[_Weights, CacheKind]] = MappingProxyType(
    {
        _FLOAT: ("float", "float"),
        "int8 weights": ("int8", "float"),
        "int8 cache": ("float", "int8"),
        "both": ("int8", "int8"),
    }
)

Stats = Mapping[str, int | float]


def recorded(folder: pathlib.Path, number: int) -> list[Trajectory]:
    """The first different games of a run directory. Raises ValueError where it holds none."""
    lines = itertools.chain.from_iterable(
        path.read_text(encoding="utf-8").splitlines()
        for path in sorted((folder / "episodes").glob("*.jsonl"))
    )
    games = (game for game in map(trajectory_from_json, lines) if game.turns)
    found: dict[tuple[Any, str], Trajectory] = {}
    for game in games:
        found.setdefault((game.game, game.system_prompt), game)
        if len(found) == number:
            break
    if not found:
        raise ValueError(f"--run {folder} holds no episodes: name the directory of a run.")
    return list(found.values())


def say_again(
    speaker: ModelSpeaker, games: Sequence[Trajectory], rollout: RolloutConfig, at_once: int
) -> list[list[Reply]]:
    """Says the observations of every game to an actor, whatever it answers; returns its answers.

    Args:
      speaker: the actor.
      games: in the order in which they begin.
      rollout: limits of a reply; it is greedy.
      at_once: games in flight.
    """
    limits = Limits(max_tokens=rollout.max_turn_tokens, temperature=0.0, stop=rollout.stop)
    replies: list[list[Reply]] = [[] for _ in games]
    waiting = iter(range(len(games)))
    playing: dict[int, int] = {}  # conversation -> game

    def ask(conversation: int, index: int) -> None:
        turn = games[index].turns[len(replies[index])]
        message = user_message(turn.observation, turn.actions, rollout.show_actions)
        speaker.hear(conversation, message)
        speaker.ask(conversation, limits, (0, 0))

    def start(number: int) -> None:
        for index in itertools.islice(waiting, number):
            prompt = Message(role="system", content=games[index].system_prompt)
            conversation = speaker.open([prompt])
            playing[conversation] = index
            ask(conversation, index)

    start(at_once)
    while playing:
        for reply in speaker.step():
            index = playing[reply.conversation]
            replies[index].append(reply)
            if len(replies[index]) < len(games[index].turns):
                ask(reply.conversation, index)
            else:
                del playing[reply.conversation]
                speaker.close(reply.conversation)
                start(1)
    return replies


class _Designs:
    """Actors side by side, each with the same games; a context manager that closes them."""

    def __init__(self, bench: ActorBench) -> None:
        config = in_folders(read_run(bench.run))
        if config.actor.endpoint.url:
            raise ValueError(f"The actor of --run {bench.run} is at an endpoint: name another run.")
        sizes = config.actor_sampler
        sizes = sizes.with_slots(bench.rows or sizes.num_slots)
        # on one device, as `ictjax play`
        actor = dataclasses.replace(config.actor, mesh=MeshConfig())
        self.config = dataclasses.replace(config, actor=actor, actor_sampler=sizes)
        self.games = recorded(bench.run, bench.games)
        self.stats: dict[str, Stats] = {}
        self.speakers: dict[str, ModelSpeaker] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add(self, name: str, config: TrainConfig, model: ModelConfig, params: Params) -> None:
        """One more actor, of these settings and weights."""
        speaker = actor_speaker(config, model, params, None)
        self.speakers[name] = self._stack.enter_context(speaker)

    def run(
        self, repetitions: int, note: Note
    ) -> tuple[dict[str, list[float]], dict[str, list[list[Reply]]]]:
        """Seconds of every actor in each round, and its replies."""
        designs: dict[str, Design] = {
            name: functools.partial(self._timed, name) for name in self.speakers
        }
        return interleave(designs, repetitions, note)

    def describe(self, bench: ActorBench) -> str:
        """What is measured, for a title."""
        turns = sum(len(game.turns) for game in self.games)
        return (
            f"{self.config.actor.model}: {len(self.games)} games of {bench.run.name}, {turns}"
            f" replies, {self.config.actor_sampler.num_slots} games at once"
        )

    def _timed(self, name: str) -> tuple[float, list[list[Reply]]]:
        speaker, sizes = self.speakers[name], self.config.actor_sampler
        before, start = speaker.stats, time.perf_counter()
        replies = say_again(speaker, self.games, self.config.task.rollout, sizes.num_slots)
        seconds = time.perf_counter() - start
        self.stats[name] = {
            field: count - before.get(field, 0) for field, count in speaker.stats.items()
        }
        return seconds, replies


def bench_speculation(bench: SpeculationBench, note: Note) -> Result:
    """A greedy actor that guesses more or fewer tokens of its reply in a step."""
    with _Designs(bench) as designs:
        config = designs.config
        model, params = frozen_weights(config.actor, None)
        for number in (0, *bench.guessed):
            sizes = dataclasses.replace(config.actor_sampler, guessed_tokens=number)
            changed = dataclasses.replace(config, actor_sampler=sizes)
            designs.add(f"{number} guessed" if number else _PLAIN, changed, model, params)
        seconds, replies = designs.run(bench.repetitions, note)
        stats = designs.stats
        title = f"Speculation, {designs.describe(bench)}"
    rows = [
        {
            "design": name,
            "seconds": statistics.median(seconds[name]),
            "tokens_per_s": stats[name]["decoded_tokens"] / statistics.median(seconds[name]),
            "tokens_per_dispatch": stats[name]["decoded_tokens"] / stats[name]["dispatches"],
            "proposed": stats[name].get("proposed_tokens"),
            "accepted": _share(stats[name], "accepted_tokens", "proposed_tokens"),
            "accepted_of_sampled": _share(stats[name], "accepted_tokens", "decoded_tokens"),
            "same_replies": same(replies[name], replies[_PLAIN]),
            "speedup": ratio(seconds, name, _PLAIN),
        }
        for name in seconds
    ]
    notes = [
        "same replies: share of them that equal those with nothing guessed, token by token."
        " accepted: of proposed tokens; accepted of sampled: of all tokens, which needed no step of"
        " their own. Counts of the last round; each actor finds in its cache what its last round"
        " left there.",
    ]
    return Result(title, _PLAIN, rows, notes)


def bench_int8(bench: Int8Bench, note: Note) -> Result:
    """A greedy actor with weights, cache, or both in 8 bits."""
    found: dict[str, dict[str, Any]] = {}
    with _Designs(bench) as designs:
        config = designs.config
        read: dict[str, tuple[ModelConfig, Params]] = {}
        for name, (weights, cache) in _INT8.items():
            actor = dataclasses.replace(config.actor, weights=weights)
            sizes = dataclasses.replace(config.actor_sampler, cache=cache)
            changed = dataclasses.replace(config, actor=actor, actor_sampler=sizes)
            held = {part: use.device_bytes for use in uses(changed) for part in use.parts}
            note(f"{name}: weights")
            if weights not in read:
                read[weights] = frozen_weights(actor, None)
            designs.add(name, changed, *read[weights])
            found[name] = {
                "weights_mib": held["actor weights"] / 2**20,
                "cache_mib": held["actor cache"] / 2**20,
            }
        seconds, replies = designs.run(bench.repetitions, note)
        rows = [asked(game) for game in replies[_FLOAT][:_COMPARED]]
        reference: np.ndarray | None = None
        for name, (weights, cache) in _INT8.items():
            note(f"{name}: logits")
            logits = np.concatenate([_logits(*read[weights], cache, *row) for row in rows])
            reference = logits if reference is None else reference
            difference = np.abs(logits - reference)
            found[name] |= {
                "max_logit_difference": float(difference.max()),
                "mean_logit_difference": float(difference.mean()),
                "same_greedy": float((logits.argmax(axis=-1) == reference.argmax(axis=-1)).mean()),
                "same_replies": same(replies[name], replies[_FLOAT]),
            }
        with open_pool(config.task.environment) as pool:
            episodes = [
                Episode(game=game.game, system_prompt=game.system_prompt) for game in designs.games
            ]
            for name, speaker in designs.speakers.items():
                note(f"{name}: playing")
                played = rollout(speaker, pool, episodes, config.task.rollout)
                won = sum(game.success for game in played)
                low, high = clopper_pearson(won, len(played))
                found[name] |= {"success": won / len(played), "from": low, "to": high}
        title = f"8 bits, {designs.describe(bench)}"
    table = [
        {
            "design": name,
            **values,
            "seconds": statistics.median(seconds[name]),
            "speedup": ratio(seconds, name, _FLOAT),
        }
        for name, values in found.items()
    ]
    notes = [
        f"Logits, and same greedy, at the tokens of replies to the first {_COMPARED} games, after"
        " equal tokens. same replies: share of all of them that equal those of float, each after"
        " its actor's own earlier replies. success: of the games played, with its 95% interval.",
    ]
    return Result(title, _FLOAT, table, notes)


def asked(replies: Sequence[Reply]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a conversation, and the positions that its replies were sampled from."""
    last = replies[-1]
    places = [
        np.arange(len(reply.prompt_ids) - 1, len(reply.prompt_ids) + len(reply.ids) - 1)
        for reply in replies
    ]
    return np.asarray([*last.prompt_ids, *last.ids], np.int32), np.concatenate(places)


def _logits(
    model: ModelConfig, params: Params, kind: CacheKind, ids: np.ndarray, places: np.ndarray
) -> np.ndarray:
    """At some positions of a conversation, by way of a cache."""
    length = -(-len(ids) // 128) * 128  # few shapes
    padded = np.pad(ids, (0, length - len(ids)))[None]
    return np.asarray(_padded_logits(model, params, kind, padded, np.int32(len(ids))))[0, places]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _padded_logits(
    model: ModelConfig, params: Params, kind: CacheKind, tokens_bt: Array, length: Array
) -> Array:
    cache = make_cache(model, 1, tokens_bt.shape[1], kind=kind)
    hidden_btd, _ = transformer.extend(
        model, params, cache, tokens_bt, jnp.zeros(1, jnp.int32), length[None]
    )
    return transformer.unembed(model, params, hidden_btd)


def same(replies: Sequence[Sequence[Reply]], others: Sequence[Sequence[Reply]]) -> float:
    """The share of replies that are equal, token by token."""
    pairs = [
        one.ids == other.ids
        for ours, theirs in zip(replies, others, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return sum(pairs) / len(pairs)


def _share(stats: Stats, part: str, whole: str) -> float | None:
    return stats[part] / stats[whole] if stats.get(part) is not None and stats[whole] else None
