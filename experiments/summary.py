"""The contents of evaluation.json that are computed: what every arm won, how arms differ, and what
that shows, by family and by split.

The headline is one claim, chosen before anything is played: the trained reflector against the
untrained one on the held-out families (on those of another benchmark where that is what is
played), under the last prompt of every loop. It is tested alone. Holm's correction holds among the
families of a split, among the comparisons of the trained reflector with all other arms, and among
those of the other arms with the initial prompt.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.evaluation_results import SPLITS
from experiments.intervals import interval, resampled_means
from experiments.outcomes import Outcomes, area, mean, read_outcomes
from experiments.stats import (
    Corrected,
    PairedTest,
    correct,
    detectable_difference,
    improvement,
    paired_test,
    sign_flip_p,
    smallest_p,
)
from experiments.verdict import Verdict, verdict
from experiments.wording import percent, points

_OF_A_RUN = ("trained", "sft-best")  # how arms begin that every trained run has its own of

Json = dict[str, Any]
Part = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The outcomes of all arms on one family, of the runs that are whole: in which every arm of
    every trained seed has an outcome under its last prompt.
    """

    arms: Mapping[str, Outcomes]
    runs: np.ndarray  # which of those played are whole
    num_runs: int  # that were played
    num_games: int
    runs_share_games: bool


def summarise(
    parts: Mapping[tuple[str, str], Sequence[Part]], splits: Mapping[str, str], about: str = ""
) -> dict[str, Any]:
    """The computed part of evaluation.json: "headline", "overall" and "families", held-out families
    first.

    Args:
      parts: of every (arm, family), a part record per trained seed, or one for arms that do not
        depend on training; the arms in the order in which they are shown.
      splits: "heldout", "transfer" or "train" of every family.
      about: whose families, where it is another task than the one trained on: " of alfworld".

    Raises:
      ValueError: arms that played different games, or a family without a whole run.
    """
    arms = tuple(dict.fromkeys(arm for arm, _ in parts))
    report: dict[str, Any] = {"headline": None, "overall": {}, "families": {}}
    for split in SPLITS:
        names = [family for family, where in splits.items() if where == split]
        if not names:
            continue
        families = {
            name: read_family({arm: parts[arm, name] for arm in arms}, name) for name in names
        }
        overall, each = _summarise_split(split, families)
        report["overall"][split] = overall
        report["families"] |= each
        report["headline"] = report["headline"] or _headline(split, overall, about)
    return report


def read_family(parts: Mapping[str, Sequence[Part]], name: str) -> Family:
    """One family from the parts of its arms. Raises ValueError as `summarise`."""
    played = [part["games"]["test"] for of_arm in parts.values() for part in of_arm]
    if any(games != played[0] for games in played):
        raise ValueError(
            f"The arms played different games of family {name!r}, so nothing is paired: remove the"
            " evaluation's folder and evaluate again."
        )
    arms = {arm: read_outcomes(of_arm) for arm, of_arm in parts.items()}
    known = [~np.isnan(arm.last_srg).all(axis=2) for arm in arms.values()]
    (runs,) = np.nonzero(np.all([each.all(axis=0) for each in known], axis=0))
    if not runs.size:
        raise ValueError(
            f"The environment failed every test game of family {name!r} in one arm or another: see"
            " the errors in episodes/ of the evaluation's folder, and remove that folder to play it"
            " again."
        )
    games = {game for run in played[0] for game in run}
    whole = {
        arm: Outcomes(
            test_srtg=outcomes.test_srtg[:, runs],
            select_srtg=outcomes.select_srtg[:, runs],
            scored_srt=outcomes.scored_srt[:, runs],
        )
        for arm, outcomes in arms.items()
    }
    return Family(
        arms=whole,
        runs=runs,
        num_runs=len(played[0]),
        num_games=len(games),
        runs_share_games=len(games) < sum(map(len, played[0])),
    )


def comparisons(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Which arms are compared, the headline's pair first: the trained reflector with every other
    arm, and what does not depend on training with the initial prompt.
    """
    others = [arm for arm in arms if arm != "trained"]
    pairs = [("trained", arm) for arm in others if "trained" in arms]
    pairs += [(arm, "initial") for arm in others if arm != "initial" and "initial" in arms]
    return sorted(pairs, key=_claimed)


def _claimed(pair: tuple[str, str]) -> int:
    """Which claims are corrected together: the headline, those of the trained reflector, others."""
    return 0 if pair == ("trained", "untrained") else 1 if pair[0] == "trained" else 2


def differences(family: Family, first: str, second: str, score: str) -> np.ndarray:
    """[S, R, G], paired by run and game; nan where one of the two has no outcome. Loops that have
    no game in common are paired by their means.
    """
    a, b = _scores(family.arms[first], score), _scores(family.arms[second], score)
    paired = a - b
    means = mean(a, axis=2)[:, :, None] - mean(b, axis=2)[:, :, None]
    return np.where(np.isnan(paired).all(axis=2, keepdims=True), means, paired)


def over_families(families: Sequence[Family], loops: Sequence[np.ndarray]) -> np.ndarray:
    """[S, R] of every family averaged by run, over the families in which that run is whole."""
    num_runs = max(family.num_runs for family in families)
    padded = []
    for family, loops_sr in zip(families, loops, strict=True):
        whole_sr = np.full((len(loops_sr), num_runs), np.nan)
        whole_sr[:, family.runs] = loops_sr
        padded.append(whole_sr)
    averaged = mean(np.stack(padded), axis=0)
    return averaged[:, ~np.isnan(averaged).any(axis=0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claims:
    """What one comparison is tested for: in every family, and in all together by the mean over
    families within each seed and run.
    """

    pair: tuple[str, str]
    by_family: Mapping[str, PairedTest]
    overall: PairedTest


def claims(families: Mapping[str, Family], pair: tuple[str, str]) -> Claims:
    """Of the last prompts of every loop."""
    loops = {
        name: mean(differences(family, *pair, "last"), axis=2) for name, family in families.items()
    }
    return Claims(
        pair=pair,
        by_family={name: paired_test(loops_sr) for name, loops_sr in loops.items()},
        overall=paired_test(over_families(list(families.values()), list(loops.values()))),
    )


def judge(
    families: Mapping[str, Family],
    pair: tuple[str, str],
    test: PairedTest,
    corrected: Corrected,
    ends: tuple[float, float] | None = None,
) -> Verdict:
    """The verdict on a test of some families, which says no more than what its units are a sample
    of.

    Args:
      ends: of the interval of the difference, for the reason alone.
    """
    whose = ""
    if test.units == "runs":
        one = " of this one trained reflector" if pair[0].startswith(_OF_A_RUN) else ""
        shared = any(family.runs_share_games for family in families.values())
        whose = f"{one} on the same games" if shared else one
    return verdict(test, corrected, whose, ends)


def _scores(outcomes: Outcomes, score: str) -> np.ndarray:
    return outcomes.last_srg if score == "last" else outcomes.chosen_srg


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Estimate:
    """A mean over some families with its interval, and [S, R] behind it."""

    mean: float
    ci: tuple[float, float]
    loops_sr: np.ndarray

    def to_json(self, name: str) -> Json:
        return {name: self.mean, "ci95": list(self.ci)}


class _Estimates:
    """Means, differences and their intervals, of every family of a split and of all together; one
    bootstrap for all.
    """

    def __init__(self, families: Mapping[str, Family], pairs: Sequence[tuple[str, str]]):
        self._families = families
        self._samples = {
            name: {
                **{
                    (arm, "", score): _scores(outcomes, score)
                    for arm, outcomes in family.arms.items()
                    for score in ("last", "chosen")
                },
                **{
                    (arm, "", "rise"): outcomes.rise_srg
                    for arm, outcomes in family.arms.items()
                    if outcomes.rise_srg is not None
                },
                **{
                    (*pair, score): differences(family, *pair, score)
                    for pair in pairs
                    for score in ("last", "chosen")
                },
            }
            for name, family in families.items()
        }
        self._resampled = dict(
            zip(families, resampled_means(list(self._samples.values())), strict=True)
        )

    def loops(self, pair: tuple[str, str], name: str) -> np.ndarray:
        """[S, R]: the differences of the last prompts in one family."""
        return mean(self._samples[name][*pair, "last"], axis=2)

    def of(self, first: str, second: str, score: str, *names: str) -> _Estimate:
        """Of an arm (`second` empty) or a difference, over the families that are named."""
        what = (first, second, score)
        samples = [self._samples[name][what] for name in names]
        loops = [mean(values, axis=2) for values in samples]
        loops_sr = over_families([self._families[name] for name in names], loops)
        # a rise may lack runs that are whole under the last prompts
        centre = float(np.mean([mean(values, axis=(0, 1)) for values in loops]))
        resampled = np.mean([self._resampled[name][what] for name in names], axis=0)
        signed = bool(second) or score == "rise"
        ends = interval(samples, centre, loops_sr, resampled, -1.0 if signed else 0.0)
        return _Estimate(mean=centre, ci=ends, loops_sr=loops_sr)


def _summarise_split(split: str, families: Mapping[str, Family]) -> tuple[Json, dict[str, Json]]:
    arms = tuple(next(iter(families.values())).arms)
    pairs = comparisons(arms)
    estimates = _Estimates(families, pairs)
    made = [claims(families, pair) for pair in pairs]
    by_family: dict[str, dict[str, Json]] = {name: {} for name in families}
    overall: dict[str, Json] = {}
    for claim in made:
        corrected = correct(claim.by_family)
        for name, test in claim.by_family.items():
            by_family[name][_vs(claim.pair)] = _test(
                estimates, {name: families[name]}, claim.pair, test, corrected[name]
            )
    for _, group in itertools.groupby(made, key=lambda claim: _claimed(claim.pair)):
        together = {claim.pair: claim for claim in group}
        corrected = correct({pair: claim.overall for pair, claim in together.items()})
        for pair, claim in together.items():
            overall[_vs(pair)] = {
                **_test(estimates, families, pair, claim.overall, corrected[pair]),
                "over_families": _over_families(claim),
            }
    each = {
        name: {
            "split": split,
            "games": family.num_games,
            "runs": len(family.runs),
            "arms": {arm: _arm(estimates, {name: family}, arm) for arm in arms},
            "tests": by_family[name],
        }
        for name, family in families.items()
    }
    return {
        "split": split,
        "families": list(families),
        "games": sum(family.num_games for family in families.values()),
        "runs": len({int(run) for family in families.values() for run in family.runs}),
        "seeds": max(
            len(o.test_srtg) for family in families.values() for o in family.arms.values()
        ),
        "arms": {arm: _arm(estimates, families, arm) for arm in arms},
        "tests": overall,
    }, each


def _over_families(claim: Claims) -> Json:
    """The other claim, about families like these: its units are the families."""
    means = np.array([test.difference for test in claim.by_family.values()])
    return {
        "num_families": len(means),
        "p": sign_flip_p(means),
        "smallest_p": smallest_p(len(means)),
    }


def _test(
    estimates: _Estimates,
    families: Mapping[str, Family],
    pair: tuple[str, str],
    test: PairedTest,
    corrected: Corrected,
) -> Json:
    last = estimates.of(*pair, "last", *families)
    found = judge(families, pair, test, corrected, last.ci)
    return {
        **last.to_json("difference"),
        "p": test.p,
        "p_corrected": corrected.p,
        "smallest_p": corrected.smallest_p,
        "num_tests": corrected.num_tests,
        "units": test.units,
        "num_units": test.num_units,
        "verdict": found.word,
        "reason": found.reason,
        "detectable": detectable_difference(test, corrected),
        "improvement": float(
            np.mean([improvement(estimates.loops(pair, name)) for name in families])
        ),
        "chosen": estimates.of(*pair, "chosen", *families).to_json("difference"),
    }


def _vs(pair: tuple[str, str]) -> str:
    return "_vs_".join(pair)


def _arm(estimates: _Estimates, families: Mapping[str, Family], arm: str) -> Json:
    last = estimates.of(arm, "", "last", *families)
    curves = itertools.zip_longest(*(f.arms[arm].curve_t for f in families.values()))
    curve_t = np.array([mean(np.array(turn, dtype=float), axis=0) for turn in curves])
    num_seeds, num_runs = last.loops_sr.shape
    return {
        **last.to_json("mean"),
        # a typical reflector's runs around its mean
        "sd_runs": math.sqrt(last.loops_sr.var(axis=1, ddof=1).mean()) if num_runs > 1 else None,
        "sd_seeds": float(last.loops_sr.mean(axis=1).std(ddof=1)) if num_seeds > 1 else None,
        "chosen": estimates.of(arm, "", "chosen", *families).to_json("mean"),
        "curve": [None if math.isnan(value) else float(value) for value in curve_t],
        "area": area(curve_t),
        "rise": _rise(estimates, families, arm),
    }


def _rise(estimates: _Estimates, families: Mapping[str, Family], arm: str) -> Json | None:
    """From the first meta-turn to the last, paired by loop; None where there are no two."""
    if any(family.arms[arm].rise_srg is None for family in families.values()):
        return None
    found = estimates.of(arm, "", "rise", *families)
    return {**found.to_json("difference"), "p": paired_test(found.loops_sr).p}


def _headline(split: str, overall: Json, about: str) -> Json | None:
    """The claim of a split in one sentence; None without the arms that it is about."""
    test = overall["tests"].get("trained_vs_untrained")
    if test is None:
        return None
    trained, untrained = (percent(overall["arms"][a]["mean"]) for a in ("trained", "untrained"))
    low, high = map(points, test["ci95"])
    several = overall["seeds"] > 1
    who = f"{overall['seeds']} trained reflectors" if several else "this one trained reflector"
    result = {
        "better": "better than before training",
        "worse": "worse than before training",
        "not shown": "no difference is shown",
    }[test["verdict"]]
    text = (
        f"On the {SPLITS[split]}{about}, prompts of {who} win {trained} % of the games, those of"
        f" the untrained one {untrained} %: {result} ({points(test['difference'])} points, 95 %"
        f" interval {low} to {high}; {test['reason']})."
    )
    if not several:
        text += " How much trained seeds differ is not measured."
    return {
        "split": split,
        "comparison": "trained_vs_untrained",
        "verdict": test["verdict"],
        "reason": test["reason"],
        "text": text,
    }
