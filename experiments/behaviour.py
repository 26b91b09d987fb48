"""What actors did and what prompts held: counted from episodes, contexts and prompts. Pure
functions of rows of the files.
"""

import collections
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from experiments.report_data import game_name
from experiments.report_loops import Loop

Json = dict[str, Any]

_NAME = re.compile(r"\b[a-z]+ \d+\b")  # "drawer 3": of one game, useless in others
# "an amulet 2 south", "- orange (1 north)": what an observation says to be somewhere
_THING = re.compile(
    r"\b(?!north|south|east|west)([a-z]+)(?: up| down)? \(?\d+ (?:north|south|east|west)\b"
)
_WORD = re.compile(r"[a-z]+")


def of_actor(episodes: Sequence[Json], draws: int) -> Json:
    """How diverse the play of some episodes was; shares, null where there is nothing to share.

    Args:
      episodes: of one arm.
      draws: so many episodes are drawn for "different_of_draws": arms with more of them can be
        compared with others then.

    Returns:
      "episodes"; "sequences", the share of different sequences of observations and actions;
      "different_of_draws", how many different ones so many episodes hold on average; "verb_bits",
      the entropy of the first words of actions; "repeated_turns" repeat an observation and action
      of the same game; "turns_without_action" had no usable action; "unavailable_actions", those
      that were not among the available ones, of turns that listed some.
    """
    sequences = collections.Counter(
        tuple((turn["observation"], turn["action"]) for turn in episode["turns"])
        for episode in episodes
    )
    turns = [turn for episode in episodes for turn in episode["turns"]]
    repeated = sum(
        len(episode["turns"])
        - len({(turn["observation"], turn["action"]) for turn in episode["turns"]})
        for episode in episodes
    )
    verbs = collections.Counter(turn["action"].split(" ")[0] for turn in turns if turn["action"])
    listed = [turn for turn in turns if turn["action"] and turn.get("actions")]
    return {
        "episodes": len(episodes),
        "sequences": _share(len(sequences), len(episodes)),
        "draws": draws,
        "different_of_draws": rarefied(sequences.values(), draws),
        "verb_bits": entropy(verbs.values()) if verbs else None,
        "repeated_turns": _share(repeated, len(turns)),
        "turns_without_action": _share(sum(bool(t.get("failure")) for t in turns), len(turns)),
        "unavailable_actions": _share(
            sum(turn["action"] not in turn["actions"] for turn in listed), len(listed)
        ),
    }


def of_prompts(loops: Sequence[Loop]) -> Json:
    """What the loops of one arm read and wrote.

    Returns:
      "stream" and "select", the shares of games won, all meta-turns together; "words" of the last
      prompt, and "words_by_turn"; "words_changed" from one meta-turn to the next, and
      "changed_by_turn"; "names", the share of last prompts that name something of a single game
      they were written from: a word with a number ("drawer 3") that its observations hold; or a
      thing that they say to be somewhere, of one of the games that the loop read and of no other
      one, whose name is not in the first prompt.
    """
    stream = [
        episode["outcome"] == "success"
        for loop in loops
        for context in loop.contexts.values()
        for episode in context["trajectories"]
        if episode["outcome"] != "failed"
    ]
    select = [
        line["select_success"]
        for loop in loops
        for line in loop.prompts
        if line.get("select_success") is not None
    ]
    words: dict[int, list[int]] = {}
    changed: dict[int, list[int]] = {}
    for loop in loops:
        for turn, text in enumerate(line["system_prompt"] for line in loop.prompts):
            words.setdefault(turn, []).append(len(text.split()))
        for turn, count in enumerate(_changes(loop), start=1):
            changed.setdefault(turn, []).append(count)
    read = [loop for loop in loops if loop.contexts]
    last = [len(loop.prompts[-1]["system_prompt"].split()) for loop in loops]
    return {
        "stream": _share(sum(stream), len(stream)),
        "select": _share(sum(select), len(select)),
        "words": _mean(last),
        "words_by_turn": [_mean(words[turn]) for turn in sorted(words)],
        "words_changed": _mean([count for counts in changed.values() for count in counts]),
        "changed_by_turn": [_mean(changed[turn]) for turn in sorted(changed)],
        "names": _share(sum(map(_names_something, read)), len(read)),
    }


def rarefied(counts: Iterable[int], draws: int) -> float | None:
    """How many different kinds so many draws without replacement hold on average: a kind is missed
    with the chance that all draws are of the others (Hurlbert 1971). None where there are fewer.
    """
    kinds = collections.Counter(counts)  # how many kinds there are of every size
    total = sum(size * number for size, number in kinds.items())
    if not 0 < draws <= total:
        return None
    drawn = math.comb(total, draws)
    return sum(
        number * (1 - math.comb(total - size, draws) / drawn) for size, number in kinds.items()
    )


def entropy(counts: Iterable[int]) -> float:
    """Of the shares of these counts, in bits."""
    counts = list(counts)
    return -sum(n / sum(counts) * math.log2(n / sum(counts)) for n in counts) + 0.0


def _changes(loop: Loop) -> Iterator[int]:
    """New and gone words of every meta-turn, wherever they stand."""
    words = [collections.Counter(line["system_prompt"].split()) for line in loop.prompts]
    for before, after in itertools.pairwise(words):
        yield ((after - before) + (before - after)).total()


def _names_something(loop: Loop) -> bool:
    first, last = (loop.prompts[at]["system_prompt"].lower() for at in (0, -1))
    numbered, words = set(_NAME.findall(last)), {*_WORD.findall(last)} - {*_WORD.findall(first)}
    things: dict[str, set[str]] = {}  # of every game
    for context in loop.contexts.values():
        for episode in context["trajectories"]:
            of_game = things.setdefault(game_name(episode), set())
            for turn in episode["turns"]:
                observation = turn["observation"].lower()
                if not numbered.isdisjoint(_NAME.findall(observation)):
                    return True
                of_game.update(_THING.findall(observation))
    games = collections.Counter(thing for of_game in things.values() for thing in of_game)
    return len(things) > 1 and any(games[word] == 1 for word in words)


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
