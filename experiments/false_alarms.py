"""How often an evaluation says "better" or "worse" of a reflector that is neither: whole
evaluations of outcomes drawn at random, summarised and judged as real ones are.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from experiments.bench_run import Note, Result
from experiments.commands.bench import FalseAlarmsBench
from experiments.intervals import clopper_pearson
from experiments.summary import Part, summarise

_PAIR = "trained_vs_untrained"


class Design(NamedTuple):
    """What an evaluation plays, and by what it varies: standard deviations of the chance to win."""

    seeds: int
    runs: int
    games: int
    families: int
    rate: float  # of games won by the untrained reflector
    effect: float  # of training
    seed_sd: float  # of what training gave this or that reflector; nothing beside `effect` to one
    loop_sd: float  # of the prompts that a reflector writes
    game_sd: float  # of how hard games are; all arms play the same ones


class Found(NamedTuple):
    """What one evaluation says: in its headline, in any family, and whether the interval of the
    headline holds the truth.
    """

    headline: bool
    family: bool
    covered: bool


def draw(design: Design, generator: np.random.Generator) -> dict[tuple[str, str], list[Part]]:
    """The part records of one evaluation of the trained and the untrained reflector, as
    `summarise` takes them. All trained seeds stand beside the same untrained loops.
    """
    # a single reflector is the one that the claim is about: it has no other effect
    spread = design.seed_sd if design.seeds > 1 else 0.0
    means = {
        "trained": design.effect + generator.normal(0, spread, design.seeds),
        "untrained": np.zeros(1),
    }
    parts: dict[tuple[str, str], list[Part]] = {}
    for family in range(design.families):
        games_rg = design.rate + generator.normal(0, design.game_sd, (design.runs, design.games))
        names = [[f"{run}-{game}" for game in range(design.games)] for run in range(design.runs)]
        for arm, means_s in means.items():
            parts[arm, str(family)] = [
                {
                    "test": _played(games_rg + mean, design.loop_sd, generator),
                    "select": [],
                    "games": {"test": names},
                }
                for mean in means_s
            ]
    return parts


def _played(
    chance_rg: np.ndarray, loop_sd: float, generator: np.random.Generator
) -> list[list[list[int]]]:
    """Outcomes by run, turn (one) and game."""
    loops_r = generator.normal(0, loop_sd, len(chance_rg))
    won_rg = generator.random(chance_rg.shape) < chance_rg + loops_r[:, None]
    return won_rg[:, None].astype(int).tolist()


def evaluations(design: Design, count: int, seed: int) -> Iterator[Found]:
    """So many of one design, whole: outcomes, summary, verdicts."""
    for number in range(count):
        generator = np.random.default_rng((seed, number, *design[:4]))
        summary = summarise(
            draw(design, generator), dict.fromkeys(map(str, range(design.families)), "heldout")
        )
        low, high = summary["overall"]["heldout"]["tests"][_PAIR]["ci95"]
        yield Found(
            headline=summary["headline"]["verdict"] != "not shown",
            family=any(
                family["tests"][_PAIR]["verdict"] != "not shown"
                for family in summary["families"].values()
            ),
            covered=low <= design.effect <= high,
        )


def bench_false_alarms(bench: FalseAlarmsBench, note: Note) -> Result:
    """A row per number of trained seeds."""
    rows = []
    for seeds in bench.seeds:
        design = Design(
            seeds=seeds,
            runs=bench.runs,
            games=bench.games,
            families=bench.families,
            rate=bench.rate,
            effect=bench.effect,
            seed_sd=bench.seed_sd,
            loop_sd=bench.loop_sd,
            game_sd=bench.game_sd,
        )
        found = []
        for result in evaluations(design, bench.evaluations, bench.seed):
            found.append(result)
            note(f"{seeds} trained seeds: {len(found)} of {bench.evaluations}")
        rows.append(_row(design, found))
    return Result(
        title=f'"better" or "worse" in {bench.evaluations} evaluations where the truth is'
        f" {100 * bench.effect:+.0f} points",
        peer=None,
        rows=rows,
        notes=[
            "said: of the headline, %, with its exact 95 % interval. any family: of the families,"
            " corrected by Holm. covered: the headline's 95 % interval holds the truth, %.",
            "1 trained seed: the claim is about this one reflector, its own effect is the truth.",
        ],
    )


def _row(design: Design, found: list[Found]) -> dict[str, Any]:
    said = sum(result.headline for result in found)
    low, high = clopper_pearson(said, len(found))
    return {
        "trained_seeds": str(design.seeds),
        "said": f"{100 * said / len(found):.1f}",
        "95_%_interval": f"{100 * low:.1f} to {100 * high:.1f}",
        "any_family": f"{100 * sum(result.family for result in found) / len(found):.1f}",
        "covered": f"{100 * sum(result.covered for result in found) / len(found):.1f}",
    }
