"""Intervals of games won: what they cover, and that they have a width."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments import intervals
from experiments.intervals import interval, resampled_means
from experiments.outcomes import mean


def of(values, lowest=0.0):
    """The interval of one sample on one family."""
    (resampled,) = resampled_means([{("x",): values}])
    loops = mean(values, axis=2)
    return interval([values], float(np.nanmean(loops)), loops, resampled["x",], lowest)


def test_agreeing_games_have_the_interval_of_clopper_and_pearson():
    exact = scipy_stats.binomtest(20, 20).proportion_ci(0.95, "exact")
    assert of(np.ones((1, 4, 5))) == pytest.approx((exact.low, exact.high))
    exact = scipy_stats.binomtest(0, 20).proportion_ci(0.95, "exact")
    assert of(np.zeros((1, 4, 5))) == pytest.approx((exact.low, exact.high))
    # trained seeds play the same games: no more of them
    assert of(np.ones((3, 4, 5))) == of(np.ones((1, 4, 5)))


def test_agreeing_differences_have_a_width_too():
    share = 0.025 ** (1 / 20)  # of games that agree, at least
    assert of(np.zeros((1, 4, 5)), -1.0) == pytest.approx((share - 1, 1 - share))
    assert of(np.ones((1, 4, 5)), -1.0) == pytest.approx((2 * share - 1, 1.0))
    assert of(-np.ones((1, 4, 5)), -1.0) == pytest.approx((-1.0, 1 - 2 * share))


def test_no_interval_is_without_width():
    """Over all outcomes of three runs of two games, one of which may have failed."""
    generator = np.random.default_rng(0)
    for values in itertools.product((0.0, 1.0), repeat=6):
        sample = np.reshape(values, (1, 3, 2))
        sample[0, 0, 1] = np.nan if generator.random() < 0.2 else sample[0, 0, 1]
        low, high = of(sample)
        assert 0.0 <= low <= mean(sample, axis=2).mean() <= high <= 1.0
        assert high - low > 0.1


@pytest.mark.parametrize("num_seeds", [1, 8])
def test_intervals_cover_the_truth_as_often_as_they_say(monkeypatch, num_seeds):
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    generator = np.random.default_rng(num_seeds)
    covered, num_runs, num_games = 0, 10, 6
    for _ in range(300):
        games = generator.normal(0.5, 0.2, (1, num_runs, num_games))
        seeds = generator.normal(0, 0.08 if num_seeds > 1 else 0.0, (num_seeds, 1, 1))
        loops = generator.normal(0, 0.12, (num_seeds, num_runs, 1))
        others = generator.normal(0, 0.12, (1, num_runs, 1))
        chance = generator.random((2, num_seeds, num_runs, num_games))
        won = 1.0 * (chance[0] < games + seeds + loops) - (chance[1, :1] < games + others)
        low, high = of(won, -1.0)
        covered += low <= 0 <= high
    low, high = scipy_stats.binom.interval(0.999, 300, 0.95)
    assert low <= covered <= high


def test_seeds_are_drawn_alike_in_all_families():
    """A reflector that is good on one family is so on the other: the mean of both varies as much
    as either.
    """
    values = np.repeat([0.0, 1.0, 1.0, 0.0], 10).reshape(4, 5, 2)
    first, second = resampled_means([{("x",): values}, {("x",): values}])
    np.testing.assert_array_equal(first["x",], second["x",])
    assert first["x",].std() == pytest.approx(0.25, abs=0.02)


def test_arms_are_resampled_by_the_same_games():
    generator = np.random.default_rng(1)
    first, second = (generator.integers(2, size=(1, 6, 4)).astype(float) for _ in range(2))
    (means,) = resampled_means([{("a",): first, ("b",): second, ("d",): first - second}])
    np.testing.assert_allclose(means["d",], means["a",] - means["b",], atol=1e-12)


def test_a_run_that_a_seed_lacks_changes_nothing_about_the_others():
    """What is missing has no weight; what is there is the mean of the loops."""
    generator = np.random.default_rng(2)
    whole = generator.integers(2, size=(3, 5, 4)).astype(float)
    ragged = whole.copy()
    ragged[0, 1:] = np.nan
    ragged[2, 0] = np.nan
    (means,) = resampled_means([{("a",): ragged, ("b",): whole}])
    expected = np.nanmean(mean(ragged, axis=2))
    assert means["a",].mean() == pytest.approx(expected, abs=0.02)
    assert np.isfinite(means["a",]).all() and means["a",].std() > means["b",].std()
    low, high = of(ragged)
    assert 0 <= low < expected < high <= 1
    alone = np.full((2, 2, 3), np.nan)  # each seed has another run
    alone[0, 0], alone[1, 1] = (0, 1, 0), (1, 1, 0)
    (means,) = resampled_means([{("x",): alone}])
    assert means["x",].mean() == pytest.approx(0.5, abs=0.03)  # half a time no loop is drawn
