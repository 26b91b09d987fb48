"""The loops of an evaluation, from one prompt to the next: which there are, which are shown, and
how arms did on the same games.
"""

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from experiments.report_data import Evaluation, Json, game_name

RULE = (
    "Of every family three loops of the trained reflector: by how many more TEST games the last"
    " prompt won than the first one, the best, the one in the middle, and the worst, whether it"
    " gained or lost (of equals the first). Beside each stands the loop of the untrained reflector"
    " on the same games."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """One loop of one arm: what was written in meta-turns 0..T, and what was read for it."""

    arm: str
    family: str
    seed: int  # which trained seed, from 0
    run: int
    prompts: Sequence[Json]  # rows of turns.jsonl
    contexts: Mapping[int, Json]  # by meta-turn: what was read for the prompt behind it

    @property
    def gain(self) -> float | None:
        """Success of the last prompt on TEST over that of the first; None where one is unknown."""
        first, last = (row.get("success") for row in (self.prompts[0], self.prompts[-1]))
        return None if first is None or last is None else last - first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A loop that is shown, why, and the untrained one beside it."""

    why: str
    loop: Loop
    beside: Loop | None


def loops(evaluation: Evaluation) -> list[Loop]:
    """All loops, held-out families first."""
    found: dict[tuple[str, str, int, int], list[Json]] = {}
    for row, seed in zip(evaluation.turns, seeds(map(_place, evaluation.turns)), strict=True):
        family, arm, run, _ = _place(row)
        found.setdefault((family, arm, seed, run), []).append(row)
    of_family = {
        family: [
            _loop(evaluation, place, rows) for place, rows in found.items() if place[0] == family
        ]
        for family in evaluation.families
    }
    return [loop for family in of_family.values() for loop in family]


def seeds(places: Iterable[Hashable]) -> list[int]:
    """Which trained seed each row is of, by its place: the n-th row of the same place is of the
    n-th.
    """
    found: collections.Counter[Hashable] = collections.Counter()
    numbers = []
    for place in places:
        numbers.append(found[place])
        found[place] += 1
    return numbers


def context_seeds(contexts: Sequence[Json]) -> list[int]:
    """Which trained seed each context of a part is of."""
    return seeds((row["loop"], row["meta_turn"]) for row in contexts)


def _place(row: Json) -> tuple[str, str, int, int]:
    return row["family"], row["arm"], row.get("run", 0), row["turn"]


def _loop(evaluation: Evaluation, place: tuple[str, str, int, int], rows: Sequence[Json]) -> Loop:
    family, arm, seed, run = place
    contexts = evaluation.contexts.get((arm, family), ())
    return Loop(
        arm=arm,
        family=family,
        seed=seed,
        run=run,
        prompts=sorted(rows, key=lambda row: row["turn"]),
        contexts={
            row["meta_turn"]: row
            for row, of_seed in zip(contexts, context_seeds(contexts), strict=True)
            if (of_seed, row["loop"]) == (seed, run)
        },
    )


def shown_loops(all_loops: Sequence[Loop]) -> dict[str, list[Shown]]:
    """By family, in the order of `all_loops`: those of `RULE`, each once."""
    chosen: dict[str, list[Shown]] = {}
    for family in dict.fromkeys(loop.family for loop in all_loops):
        here = [loop for loop in all_loops if loop.family == family]
        trained = [loop for loop in here if loop.arm == "trained" and loop.gain is not None]
        untrained = {(loop.seed, loop.run): loop for loop in here if loop.arm == "untrained"}
        # of the same trained run, where it was played beside each
        beside = {
            (loop.seed, loop.run): untrained.get(
                (loop.seed, loop.run), untrained.get((0, loop.run))
            )
            for loop in trained
        }
        ranked = sorted(trained, key=lambda loop: loop.gain, reverse=True)  # equals as they were
        if not ranked:
            continue
        best = ranked[0]
        worst = next(loop for loop in ranked if loop.gain == ranked[-1].gain)
        others = [loop for loop in ranked if loop is not best and loop is not worst]
        places = [("largest gain", best)]
        if others:
            places.append(("in the middle", others[(len(others) - 1) // 2]))
        if worst is not best:
            lost = worst.gain is not None and worst.gain < 0
            places.append(("largest regression" if lost else "smallest gain", worst))
        chosen[family] = [
            Shown(why=why, loop=loop, beside=beside[loop.seed, loop.run]) for why, loop in places
        ]
    return chosen


def middle_half(all_loops: Sequence[Loop], families: Sequence[str], arm: str) -> list[Json]:
    """Between which success rates the middle half of an arm's loops lies, by meta-turn: "turn",
    "low", "high"; over several families of their mean by seed and run.
    """
    by_place: dict[tuple[int, int, int], list[float]] = {}
    for loop in all_loops:
        if loop.arm == arm and loop.family in families:
            for row in loop.prompts:
                if row.get("success") is not None:
                    place = (row["turn"], loop.seed, loop.run)
                    by_place.setdefault(place, []).append(row["success"])
    turns: dict[int, list[float]] = {}
    for (turn, _, _), rates in by_place.items():
        if len(rates) == len(families):
            turns.setdefault(turn, []).append(statistics.fmean(rates))
    return [
        {"turn": turn, "low": quartiles[0], "high": quartiles[2]}
        for turn, rates in sorted(turns.items())
        if len(rates) > 1
        for quartiles in [statistics.quantiles(rates, n=4, method="inclusive")]
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedGames:
    """The games of one family under the last prompts of two arms: how many both won, how many
    neither, and the two episodes of each game that one alone won.
    """

    family: str
    both: int
    neither: int
    gained: list[tuple[Json, Json]]  # first lost, second won
    lost: list[tuple[Json, Json]]


def paired_games(evaluation: Evaluation, first: str, second: str) -> Iterator[PairedGames]:
    """Of every family, game by game as they were played; several seeds of the second arm each
    beside the same games of the first. Games that the environment failed are left out.
    """
    for family in evaluation.families:
        before = evaluation.episodes.get((first, family), [])
        after = evaluation.episodes.get((second, family), [])
        found: dict[tuple[bool, bool], list[tuple[Json, Json]]] = {}
        for a, b in zip(itertools.cycle(before), after, strict=False):
            if game_name(a) == game_name(b) and "failed" not in (a["outcome"], b["outcome"]):
                won = (a["outcome"] == "success", b["outcome"] == "success")
                found.setdefault(won, []).append((a, b))
        if found:
            yield PairedGames(
                family=family,
                both=len(found.get((True, True), ())),
                neither=len(found.get((False, False), ())),
                gained=found.get((False, True), []),
                lost=found.get((True, False), []),
            )
