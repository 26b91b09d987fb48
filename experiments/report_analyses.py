"""What actors did and what prompts held, arm by arm: counted from episodes and prompts."""

import collections
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence

from experiments.html import Html
from experiments.report_data import Evaluation, Json
from experiments.report_loops import Loop
from experiments.report_parts import Section, cell, on, row, section, table

_NAME = re.compile(r"\b[a-z]+ \d+\b")  # "drawer 3": of one game, useless in others


def analyses(evaluation: Evaluation, loops: Sequence[Loop], anchor: str) -> Section | None:
    """A row per arm, over all families; None without episodes."""
    arms = dict.fromkeys(arm for arm, _ in evaluation.episodes)
    ordered = [arm for arm in ("trained", "untrained", "initial") if arm in arms]
    ordered += [arm for arm in arms if arm not in ordered]
    if not ordered:
        return None
    columns = ["arm", *_of_actor([]), *_of_prompts([])]
    rows = (
        row(
            arm,
            *map(cell, _of_actor(_test(evaluation, arm)).values()),
            *map(cell, _of_prompts([loop for loop in loops if loop.arm == arm]).values()),
        )
        for arm in ordered
    )
    return section(
        anchor,
        f"What actors did and prompts held{on(evaluation)}",
        Html(
            "Of the TEST games under the last prompts, all families together: how many sequences of"
            " actions are different ones; how evenly verbs are used, in bits (the first word of an"
            " action); turns that repeat an observation and action of the same game; turns without"
            " a usable action. Of the loops: games won that reflectors read about (STREAM) and that"
            " prompts are chosen by (SELECT), all meta-turns together; words of the last prompt;"
            " words that a meta-turn changes; and last prompts that name something of a single"
            " game they were written from, such as <i>drawer 3</i>."
        ),
        table("By arm", columns, rows),
    )


def _test(evaluation: Evaluation, arm: str) -> list[Json]:
    return [
        episode
        for (of_arm, _), played in evaluation.episodes.items()
        if of_arm == arm
        for episode in played
    ]


def _of_actor(episodes: Sequence[Json]) -> dict[str, str]:
    sequences = {tuple(turn["action"] for turn in episode["turns"]) for episode in episodes}
    turns = [turn for episode in episodes for turn in episode["turns"]]
    repeated = sum(
        len(episode["turns"])
        - len({(turn["observation"], turn["action"]) for turn in episode["turns"]})
        for episode in episodes
    )
    verbs = collections.Counter(turn["action"].split(" ")[0] for turn in turns if turn["action"])
    return {
        "different sequences": _share(len(sequences), len(episodes)),
        "verbs, bits": f"{_entropy(verbs.values()):.2f}" if verbs else "",
        "repeated turns": _share(repeated, len(turns)),
        "turns without action": _share(sum(bool(t.get("failure")) for t in turns), len(turns)),
    }


def _of_prompts(loops: Sequence[Loop]) -> dict[str, str]:
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
    lengths = [len(loop.prompts[-1]["system_prompt"].split()) for loop in loops]
    changed = list(_changes(loops))
    read = [loop for loop in loops if loop.contexts]
    return {
        "STREAM won": _share(sum(stream), len(stream)),
        "SELECT won": _share(sum(select), len(select)),
        "words": f"{statistics.fmean(lengths):.0f}" if lengths else "",
        "words changed": f"{statistics.fmean(changed):.0f}" if changed else "",
        "prompts with names": _share(sum(map(_names_something, read)), len(read)),
    }


def _changes(loops: Sequence[Loop]) -> Iterator[int]:
    """New and gone words of every meta-turn, wherever they stand."""
    for loop in loops:
        words = [collections.Counter(line["system_prompt"].split()) for line in loop.prompts]
        for before, after in itertools.pairwise(words):
            yield ((after - before) + (before - after)).total()


def _names_something(loop: Loop) -> bool:
    prompt = set(_NAME.findall(loop.prompts[-1]["system_prompt"].lower()))
    return any(
        not prompt.isdisjoint(_NAME.findall(turn["observation"].lower()))
        for context in (loop.contexts.values() if prompt else ())
        for episode in context["trajectories"]
        for turn in episode["turns"]
    )


def _entropy(counts: Iterable[int]) -> float:
    counts = list(counts)
    return -sum(n / sum(counts) * math.log2(n / sum(counts)) for n in counts) + 0.0


def _share(part: float, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""
