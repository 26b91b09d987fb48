"""The whole procedure under the null: outcomes, tests, correction, verdict."""

import numpy as np
import pytest
from scipy import stats

from experiments import intervals
from experiments.commands.bench import FalseAlarmsBench
from experiments.false_alarms import Design, bench_false_alarms, draw, evaluations
from experiments.stats import correct, sign_flip_p
from experiments.summary import claims, judge, read_family

PAIR = ("trained", "untrained")
DESIGN = Design(
    seeds=1,
    runs=10,
    games=5,
    families=2,
    rate=0.4,
    effect=0.0,
    seed_sd=0.08,
    loop_sd=0.12,
    game_sd=0.2,
)


def words(design, count):
    """The headline's and the families' verdicts of so many evaluations, without the intervals, and
    what seeds alone would have given.
    """
    for number in range(count):
        parts = draw(design, np.random.default_rng((number, *design[:4])))
        families = {
            name: read_family({arm: parts[arm, name] for arm in PAIR}, name)
            for name in map(str, range(design.families))
        }
        claim = claims(families, PAIR)
        alone = correct({"headline": claim.overall})["headline"]
        each = correct(claim.by_family)
        yield (
            judge(families, PAIR, claim.overall, alone),
            [judge(families, PAIR, test, each[name]) for name, test in claim.by_family.items()],
        )


def said(design, count):
    """How often the headline, and any family, is "better" or "worse"."""
    found = list(words(design, count))
    return (
        sum(headline.word != "not shown" for headline, _ in found),
        sum(any(one.word != "not shown" for one in families) for _, families in found),
    )


@pytest.mark.parametrize("seeds", [1, 8])
def test_false_alarms_stay_within_five_per_cent(seeds):
    count = 500
    headline, family = said(DESIGN._replace(seeds=seeds), count)
    most = stats.binom.ppf(0.999, count, 0.05)
    assert 0 < headline <= most
    assert family <= most


def test_seeds_that_differ_more_than_loops_raise_no_more_alarms():
    headline, _ = said(DESIGN._replace(seeds=8, seed_sd=0.15, loop_sd=0.03, games=10), 500)
    assert 0 < headline <= stats.binom.ppf(0.999, 500, 0.05)


def test_four_trained_seeds_never_show_anything():
    """Their smallest p is 0.125, however large the difference."""
    for effect in (0.0, 0.5):
        found = list(words(DESIGN._replace(seeds=4, effect=effect), 30))
        assert {headline.word for headline, _ in found} == {"not shown"}
        assert {headline.reason for headline, _ in found} == {
            "4 trained seeds cannot give p < 0.125: 6 trained seeds are needed"
        }


def test_what_is_there_is_found():
    """Most of the time, and never as its opposite."""
    for seeds in (1, 8):
        found = [
            headline.word
            for headline, _ in words(DESIGN._replace(seeds=seeds, runs=16, effect=0.25), 60)
        ]
        assert found.count("better") >= 54 and "worse" not in found


def test_flips_of_seeds_alone_would_raise_many_false_alarms():
    """All trained seeds stand beside the same untrained loops: what these happened to win moves
    every difference, and is no evidence eight times over.
    """
    alone = 0
    for number in range(200):
        parts = draw(DESIGN._replace(seeds=8), np.random.default_rng(number))
        trained = np.array([np.mean(part["test"]) for part in parts["trained", "0"]])
        untrained = np.mean(parts["untrained", "0"][0]["test"])
        alone += sign_flip_p(trained - untrained) <= 0.05
    assert alone > 40


def test_whole_evaluations_cover_what_they_say(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    found = list(evaluations(DESIGN._replace(runs=6, effect=0.1), 25, seed=0))
    assert sum(one.covered for one in found) >= 20
    assert 0 < sum(one.headline for one in found) < 25


def test_the_bench_has_a_row_for_each_number_of_seeds(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 100)
    said = []
    result = bench_false_alarms(
        FalseAlarmsBench(evaluations=2, seeds=(1, 4), runs=3, games=2, families=1), said.append
    )
    assert [row["trained_seeds"] for row in result.rows] == ["1", "4"]
    assert {row["said"] for row in result.rows} == {"0.0"}  # so few units never say anything
    assert said[-1] == "4 trained seeds: 2 of 2"
