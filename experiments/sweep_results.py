"""What the variants of a sweep came to, beside the first of them: numbers, JSON and a table."""

import collections
import dataclasses
import pathlib
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from experiments.evaluation_folder import read_part
from experiments.evaluation_results import SPLITS, is_number, read_results
from experiments.outcomes import mean, read_outcomes
from experiments.report_data import Json
from experiments.stats import ALPHA, correct
from experiments.summary import Claims, claims, judge, read_family, summarise
from experiments.sweep_file import Sweep, Variant, run_dir_of
from experiments.training_cost import training_cost
from experiments.wording import counted, interval, number, p_value, percent, points
from ictjax.metrics import read_metrics

FORMAT = 1  # of sweep.json
_LAST = 5  # iterations whose mean reward is shown
_PAIR = ("trained", "first")  # as arms: a variant's reflectors, and those of the first variant


class Reward(NamedTuple):
    """Of an iteration of training, over the seeds."""

    iteration: int
    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Games won by the trained reflectors of a variant less those of the first variant, paired by
    seed, loop and game; p is corrected for all variants (Holm).
    """

    value: float
    ci95: tuple[float, float]
    p: float
    p_corrected: float
    smallest_p: float  # after the correction
    verdict: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A variant. Games won are shares, means over the families of a split; None is not known."""

    name: str
    flags: tuple[str, ...]
    rewards: Sequence[Reward]
    games: float | None  # that the actor played to train one reflector
    untrained: float | None
    trained: float
    ci95: tuple[float, float]
    by_seed: Sequence[float]  # of trained
    difference: Difference | None  # None of the first variant

    @property
    def reward(self) -> float | None:
        """The mean of the last iterations of training."""
        last = [reward.mean for reward in self.rewards[-_LAST:]]
        return statistics.fmean(last) if last else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """All results, the first variant's first, and what was played for them."""

    results: Sequence[Result]
    split: str  # one of SPLITS
    families: Sequence[str]
    left_out: Sequence[str]  # families of other splits that were evaluated too
    runs: int
    test_games: int


def compared(sweep: Sweep, variants: Sequence[Variant], out: pathlib.Path) -> Compared:
    """What is kept of these variants, all of them trained and evaluated.

    Raises ValueError for a file that is damaged.
    """
    evaluations = [read_results(out / variant.name / "evaluation.json") for variant in variants]
    split, overall = next(iter(evaluations[0]["overall"].items()))
    names = overall["families"]
    parts = [
        _trained_parts(sweep, variant, out, evaluation, names)
        for variant, evaluation in zip(variants, evaluations, strict=True)
    ]
    first, *others = parts
    paired = {
        variant.name: {
            name: dict(zip(_PAIR, (of[name], first[name]), strict=True)) for name in names
        }
        for variant, of in zip(variants[1:], others, strict=True)
    }
    differences = _differences(paired, split)
    return Compared(
        results=[
            _result(sweep, variant, out, evaluation["overall"][split], of, differences)
            for variant, evaluation, of in zip(variants, evaluations, parts, strict=True)
        ],
        split=split,
        families=names,
        left_out=tuple(name for name in evaluations[0]["families"] if name not in names),
        runs=evaluations[0]["protocol"]["runs"],
        test_games=evaluations[0]["protocol"]["test_games"],
    )


def on_other_games(sweep: Sweep, variants: Sequence[Variant], out: pathlib.Path) -> dict[str, str]:
    """Variants that played other TEST games than the first, by name, with what to do: nothing is
    paired then.

    Raises ValueError for a file that is damaged.
    """
    of_first: dict[str, list[Any]] = {}
    found = {}
    for variant in variants:
        evaluation = read_results(out / variant.name / "evaluation.json")
        families = next(iter(evaluation["overall"].values()))["families"]
        parts = _trained_parts(sweep, variant, out, evaluation, families)
        games = {name: [part["games"]["test"] for part in of] for name, of in parts.items()}
        of_first = of_first or games
        others = [name for name, of in games.items() if of != of_first.get(name)]
        if others:
            found[variant.name] = (
                f"{variant.name} played other TEST games of family {others[0]!r} than"
                f" {variants[0].name}: a training saw some of these, or they were drawn at another"
                " time; evaluate held-out families (--evaluation.families), or remove"
                f" {out}/*/seed*/evaluation to draw all anew"
            )
    return found


def _trained_parts(
    sweep: Sweep,
    variant: Variant,
    out: pathlib.Path,
    evaluation: Json,
    families: Sequence[str],
) -> dict[str, list[Json]]:
    """Of every family the records of the trained reflectors, by seed."""
    return {
        family: [
            read_part(run_dir_of(out, variant, seed), evaluation["folder"], "trained", family)
            for seed in sweep.seeds
        ]
        for family in families
    }


def _differences(
    paired: Mapping[str, Mapping[str, Mapping[str, Sequence[Json]]]], split: str
) -> dict[str, Difference]:
    """By variant, from the parts of each family as `_PAIR`."""
    families = {
        variant: {name: read_family(arms, name) for name, arms in of.items()}
        for variant, of in paired.items()
    }
    tests: dict[str, Claims] = {name: claims(of, _PAIR) for name, of in families.items()}
    corrected = correct({name: test.overall for name, test in tests.items()})
    found = {}
    for variant, of in paired.items():
        parts = {(arm, name): records[arm] for arm in _PAIR for name, records in of.items()}
        overall = summarise(parts, dict.fromkeys(of, split))["overall"][split]
        low, high = overall["tests"]["_vs_".join(_PAIR)]["ci95"]
        test, p = tests[variant].overall, corrected[variant]
        word = judge(families[variant], _PAIR, test, p, (low, high))
        found[variant] = Difference(
            value=test.difference,
            ci95=(low, high),
            p=test.p,
            p_corrected=p.p,
            smallest_p=p.smallest_p,
            verdict=word.word,
            reason=word.reason,
        )
    return found


def _result(
    sweep: Sweep,
    variant: Variant,
    out: pathlib.Path,
    overall: Json,
    parts: Mapping[str, Sequence[Json]],
    differences: Mapping[str, Difference],
) -> Result:
    run_dirs = [run_dir_of(out, variant, seed) for seed in sweep.seeds]
    arms = overall["arms"]
    costs = [training_cost(path, variant.config, variant.config.iterations) for path in run_dirs]
    games = [cost["training_actor_episodes"] for cost in costs if cost]
    # every loop counts alike, as in the mean, however many of its games the environment failed
    of_families = [mean(mean(read_outcomes(of).last_srg, axis=2), axis=1) for of in parts.values()]
    low, high = arms["trained"]["ci95"]
    return Result(
        name=variant.name,
        flags=variant.flags,
        rewards=_rewards(run_dirs),
        games=statistics.fmean(games) if len(games) == len(costs) else None,
        untrained=arms["untrained"]["mean"] if "untrained" in arms else None,
        trained=arms["trained"]["mean"],
        ci95=(low, high),
        by_seed=[float(won) for won in mean(np.array(of_families), axis=0)],
        difference=differences.get(variant.name),
    )


def _rewards(run_dirs: Sequence[pathlib.Path]) -> list[Reward]:
    """By iteration, of the seeds that say it."""
    of_iteration: dict[int, list[float]] = collections.defaultdict(list)
    for run_dir in run_dirs:
        for line in read_metrics(run_dir):
            if is_number(line.get("reward")):
                of_iteration[line["iteration"]].append(line["reward"])
    return [
        Reward(iteration, statistics.fmean(rewards), min(rewards), max(rewards))
        for iteration, rewards in sorted(of_iteration.items())
    ]


def to_json(sweep: Sweep, found: Compared) -> dict[str, Any]:
    """The contents of sweep.json."""
    return {
        "format": FORMAT,
        "preset": sweep.preset,
        "train": shlex.join(sweep.train),
        "seeds": list(sweep.seeds),
        "evaluate": shlex.join(sweep.evaluate),
        "split": found.split,
        "families": list(found.families),
        "left_out": list(found.left_out),
        "runs": found.runs,
        "test_games": found.test_games,
        "compared_with": found.results[0].name,
        "variants": {
            result.name: {
                "flags": shlex.join(result.flags),
                "reward": result.reward,
                "rewards": [reward._asdict() for reward in result.rewards],
                "training_actor_episodes": result.games,
                "untrained": result.untrained,
                "trained": {
                    "mean": result.trained,
                    "ci95": list(result.ci95),
                    "seeds": list(result.by_seed),
                },
                "difference": result.difference and dataclasses.asdict(result.difference),
            }
            for result in found.results
        },
    }


HEAD = ("variant", "reward", "games", "untrained", "trained", "minus {first}", "p", "verdict")
"""Of the columns of `cells`."""


def cells(result: Result) -> list[str]:
    """A row of the table."""
    found = result.difference
    return [
        result.name,
        number(result.reward, 2),
        number(result.games, 0),
        "" if result.untrained is None else percent(result.untrained),
        f"{percent(result.trained)} {interval(result.ci95)}",
        "" if found is None else f"{points(found.value)} {interval(found.ci95, signed=True)}",
        "" if found is None else p_value(found.p_corrected),
        "" if found is None else found.verdict,
    ]


def title(sweep: Sweep, found: Compared) -> str:
    """What the numbers are of."""
    return (
        f"Games won on {SPLITS[found.split]}, %, seeds {', '.join(map(str, sweep.seeds))};"
        f" {found.runs} loops x {found.test_games} games a family"
    )


def note(sweep: Sweep, found: Compared) -> str:
    """What the columns are, and what so many seeds cannot show."""
    words = (
        f"reward: mean of the last {_LAST} iterations; games: that the actor played to train one"
        " reflector; p: corrected for all variants (Holm)."
    )
    smallest = [r.difference.smallest_p for r in found.results if r.difference is not None]
    if smallest and min(smallest) > ALPHA:
        words += (
            f" {counted(len(sweep.seeds), 'seed')} can give no p below {p_value(min(smallest))}:"
            " intervals say what there is to say."
        )
    if found.left_out:
        words += f" Evaluated too, not compared here: {', '.join(found.left_out)}."
    return words


def table(sweep: Sweep, found: Compared) -> Table:
    """For a terminal of 80 columns."""
    shown = Table(
        title=title(sweep, found),
        title_justify="left",
        caption=note(sweep, found),
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
    )
    first, *others = (name.format(first=found.results[0].name) for name in HEAD)
    shown.add_column(first, overflow="fold", min_width=8)
    for name in others:
        shown.add_column(name, justify="left" if name == "verdict" else "right", overflow="fold")
    for result in found.results:
        shown.add_row(*cells(result))
    return shown
