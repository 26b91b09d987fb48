"""Tests of paired differences against hand-computed values and scipy."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments import stats
from experiments.stats import PairedTest, correct, holm, paired_test, sign_flip_p


def of_runs(*differences):
    return paired_test(np.array([differences]))


def test_a_permutation_test_by_hand():
    # Differences 1, 1, 1, 2: only the two all-equal sign patterns of 16 reach |sum| = 5.
    result = of_runs(1.0, 1.0, 1.0, 2.0)
    assert result.difference == pytest.approx(1.25)
    assert (result.p, result.smallest_p) == (pytest.approx(2 / 16), 2 / 16)
    assert (result.units, result.num_units, result.num_runs) == ("runs", 4, 4)
    # 0.1 + 0.2 and 0.3 differ in the last bit: the pattern -0.3 + 0.1 + 0.2 must not be lost by it
    assert of_runs(0.1, 0.2, 0.3).p == pytest.approx(2 / 8)
    assert of_runs(0.0, 0.0).p == 1.0
    assert of_runs(0.5, -0.2, 0.4).p == of_runs(-0.5, 0.2, -0.4).p


def test_the_permutation_test_equals_scipys():
    differences = np.random.default_rng(3).normal(0.4, 1, size=9)
    expected = scipy_stats.permutation_test(
        (differences, np.zeros(9)),
        lambda x, y: np.mean(x - y),
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="two-sided",
    )
    assert sign_flip_p(differences) == pytest.approx(expected.pvalue)


def test_drawn_p_agrees_with_the_exact_one(monkeypatch):
    differences = np.random.default_rng(5).integers(-1, 3, size=14) + 0.1
    exact = sign_flip_p(differences)
    assert 0.02 < exact < 0.5
    monkeypatch.setattr(stats, "EXACT_UNITS", 4)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.006)


def test_many_units_are_deterministic_and_never_give_zero():
    differences = np.ones(200)
    smallest = pytest.approx(1 / (stats.PERMUTATIONS + 1))
    assert sign_flip_p(differences) == sign_flip_p(differences) == smallest
    assert stats.smallest_p(200) == smallest
    # zeros change no sum
    some = np.array([0.8, 0.6, 0.4, 0.2, 0.7])
    assert sign_flip_p(np.append(some, np.zeros(30))) == sign_flip_p(some) == pytest.approx(2 / 32)


def test_several_trained_seeds_are_the_units():
    differences = np.array([[0.3, 0.1], [0.2, 0.2], [0.1, 0.3], [0.25, 0.15]])
    result = paired_test(differences)
    assert (result.units, result.num_units, result.num_runs) == ("trained seeds", 4, 2)
    assert (result.smallest_p, result.p) == (2 / 16, pytest.approx(2 / 16))
    assert result.difference == pytest.approx(0.2)


def test_trained_seeds_share_the_noise_of_the_loops_they_are_compared_with():
    """Eight seeds that agree within every run, and runs that do not agree at all: flips of seeds
    alone would find it (2 / 256).
    """
    by_run = np.array([0.5, -0.4, 0.6, -0.5, 0.3])
    result = paired_test(np.tile(by_run, (8, 1)))
    assert sign_flip_p(np.full(8, by_run.mean())) == 2 / 256
    # all variance is that of the runs: a plain t-test
    assert result.p == pytest.approx(scipy_stats.ttest_1samp(by_run, 0).pvalue)
    assert result.error == (pytest.approx(scipy_stats.sem(by_run)), pytest.approx(4))


def test_two_way_error_by_hand():
    # Means of seeds 0.1, 0.3 (variance 0.02, of their mean 0.01); of runs 0.15, 0.25 (0.005,
    # 0.0025). Welch: 0.0125^2 / (0.01^2 + 0.0025^2) = 1.4706.
    result = paired_test(np.array([[0.05, 0.15], [0.25, 0.35]]))
    assert result.error == (pytest.approx(math.sqrt(0.0125)), pytest.approx(1.470588))


def test_one_run_of_several_seeds_can_show_nothing():
    result = paired_test(np.full((8, 1), 0.5))
    assert (result.p, result.smallest_p, result.error) == (1.0, 1.0, None)


@pytest.mark.parametrize("values", [[], [0.1], [[float("nan")]], [[]]])
def test_bad_samples_are_refused(values):
    with pytest.raises(ValueError, match="a row per trained seed and a column per run"):
        paired_test(np.array(values))


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, made monotone: 0.04, 0.06, 0.06, 0.06.
    adjusted = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert list(adjusted) == ["d", "a", "c", "b"]
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}
    with pytest.raises(ValueError, match=r"1\.5"):
        holm({"x": 1.5})


def test_correction_says_what_could_be_reached():
    few, many = of_runs(*[0.1] * 6), of_runs(*[0.1] * 10)
    corrected = correct({"few": few, "many": many, "more": many})
    # 10 runs reach 3 * 2^-9 first; 6 runs come last and stay at 2^-5
    assert corrected["many"].smallest_p == pytest.approx(3 / 512)
    assert corrected["few"].smallest_p == corrected["few"].p == pytest.approx(1 / 32)
    alone = correct({"few": few})["few"]
    assert (alone.p, alone.smallest_p, alone.num_tests) == (few.p, few.smallest_p, 1)


def test_units_needed_reach_the_level_and_one_less_does_not():
    for factor in (1, 2, 3, 6, 7):
        units = stats.units_needed(factor)
        assert factor * stats.smallest_p(units) <= 0.05 < factor * stats.smallest_p(units - 1)
    assert [stats.units_needed(factor) for factor in (1, 2, 3, 6, 7)] == [6, 7, 7, 8, 9]


def test_a_detectable_difference_is_detected_four_times_in_five():
    generator = np.random.default_rng(2)
    spread = PairedTest(
        difference=0.0,
        p=1.0,
        units="runs",
        num_units=12,
        num_runs=12,
        smallest_p=2 / 2**12,
        error=(0.2 / math.sqrt(12), 11),
    )
    effect = stats.detectable_difference(spread, correct({"one": spread})["one"])
    found = [sign_flip_p(generator.normal(effect, 0.2, 12)) <= 0.05 for _ in range(1000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_nothing_is_detectable_where_the_design_cannot_find_it():
    few = of_runs(0.1, 0.2, 0.3)
    assert stats.detectable_difference(few, correct({"few": few})["few"]) is None
    # nor where it would have to be larger than there can be
    wide = dataclasses.replace(of_runs(*[0.9, -0.9] * 4), error=(0.8, 2))
    assert stats.detectable_difference(wide, correct({"wide": wide})["wide"]) is None


def test_improvement_counts_ties_half():
    assert stats.improvement(np.array([[0.1, 0.0, -0.2, 0.4]])) == pytest.approx(2.5 / 4)
