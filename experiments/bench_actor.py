"""Benchmarks of an actor on the games of a run, which are said to it again: with more or fewer
tokens of a reply guessed in a step.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.bench_run import Design, Note, Result, interleave, ratio
from experiments.commands.bench import SpeculationBench
from experiments.presets import in_folders
from experiments.run_dir import read_run
from ictjax.config import RolloutConfig
from ictjax.model_speaker import ModelSpeaker
from ictjax.players import open_model
from ictjax.records import Message, Trajectory, trajectory_from_json
from ictjax.rollout import user_message
from ictjax.speaker import Limits

_PLAIN = "nothing guessed"

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
) -> list[list[str]]:
    """Says the observations of every game to an actor, whatever it answers; returns its answers.

    Args:
      speaker: the actor.
      games: in the order in which they begin.
      rollout: limits of a reply; it is greedy.
      at_once: games in flight.
    """
    limits = Limits(max_tokens=rollout.max_turn_tokens, temperature=0.0, stop=rollout.stop)
    replies: list[list[str]] = [[] for _ in games]
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
            replies[index].append(reply.text)
            if len(replies[index]) < len(games[index].turns):
                ask(reply.conversation, index)
            else:
                del playing[reply.conversation]
                speaker.close(reply.conversation)
                start(1)
    return replies


def bench_speculation(bench: SpeculationBench, note: Note) -> Result:
    """A greedy actor that guesses more or fewer tokens of its reply in a step."""
    config = in_folders(read_run(bench.run))
    games = recorded(bench.run, bench.games)
    sizes = config.actor_sampler
    sizes = sizes.with_slots(bench.rows or sizes.num_slots)
    stats: dict[str, Stats] = {}
    with contextlib.ExitStack() as stack:
        designs: dict[str, Design] = {}
        for number in (0, *bench.guessed):
            name = f"{number} guessed" if number else _PLAIN
            guessing = dataclasses.replace(sizes, guessed_tokens=number)
            speaker = stack.enter_context(
                open_model(config.actor.model, num_conversations=sizes.num_slots, sizes=guessing)
            )
            replay = functools.partial(
                say_again, speaker, games, config.task.rollout, sizes.num_slots
            )
            designs[name] = functools.partial(_timed, replay, speaker, name, stats)
        seconds, replies = interleave(designs, bench.repetitions, note)
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
        for name in designs
    ]
    turns = sum(len(game.turns) for game in games)
    title = (
        f"Speculation, {config.actor.model}: {len(games)} games of {bench.run.name},"
        f" {turns} replies, {sizes.num_slots} games at once"
    )
    notes = [
        f"same replies: share of the {turns} that equal those with nothing guessed, the stop token"
        " included. accepted: of proposed tokens; accepted of sampled: of all tokens, which no"
        " step of their own was needed for. Counts of the last round; others keep what they found"
        " in the cache.",
    ]
    return Result(title, _PLAIN, rows, notes)


def same(replies: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> float:
    """The share of replies that are equal."""
    pairs = [
        one == other
        for ours, theirs in zip(replies, others, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return sum(pairs) / len(pairs)


def _timed(
    replay: Any, speaker: ModelSpeaker, name: str, stats: dict[str, Stats]
) -> tuple[float, list[list[str]]]:
    """One round, and what the speaker counted in it."""
    before, start = speaker.stats, time.perf_counter()
    replies = replay()
    seconds = time.perf_counter() - start
    stats[name] = {field: count - before[field] for field, count in speaker.stats.items()}
    return seconds, replies


def _share(stats: Stats, part: str, whole: str) -> float | None:
    return stats[part] / stats[whole] if stats.get(part) is not None and stats[whole] else None
