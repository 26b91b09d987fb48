"""Statistics of the evaluation against hand-computed values and scipy."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments import stats


def test_mean_ci_is_students_t():
    values = [0.2, 0.5, 0.4, 0.9, 0.7]
    interval = stats.mean_ci(values)
    expected = scipy_stats.t.interval(
        0.95, df=4, loc=np.mean(values), scale=scipy_stats.sem(values)
    )
    np.testing.assert_allclose(interval.ci, expected)
    assert interval.mean == pytest.approx(0.54)
    assert interval.sd == pytest.approx(np.std(values, ddof=1))
    assert interval.num_values == 5


def test_mean_ci_by_hand():
    # sd^2 = 5/3, n = 4, t(0.975, 3) = 3.18245: half width 3.18245 * 1.29099 / 2 = 2.05426.
    interval = stats.mean_ci([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(interval.ci, (2.5 - 2.05426, 2.5 + 2.05426), rtol=1e-5)


def test_mean_ci_of_success_rates_stays_between_zero_and_one():
    assert stats.mean_ci([1.0, 1.0, 0.9]).ci[1] == 1.0
    assert stats.mean_ci([0.0, 0.0, 0.1]).ci[0] == 0.0
    assert stats.mean_ci([-1.0, 0.0, 1.0]).ci[0] < -1.0


def test_mean_ci_of_one_value_has_no_width():
    interval = stats.mean_ci([0.3])
    assert (interval.mean, interval.sd, interval.ci) == (0.3, 0.0, (0.3, 0.3))
    assert interval.to_json() == {"mean": 0.3, "sd": 0.0, "ci95": [0.3, 0.3]}


@pytest.mark.parametrize("values", [[], [float("nan")], [[0.1], [0.2]]])
def test_bad_samples_are_refused(values):
    with pytest.raises(ValueError, match="flat, non-empty sample of finite numbers"):
        stats.mean_ci(values)


def test_mean_ci_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [stats.mean_ci(list(generator.normal(0.5, 1.0, size=12))).ci for _ in range(2_000)]
    covered = np.mean([low <= 0.5 <= high for low, high in intervals])
    assert 0.935 < covered < 0.965


def test_paired_test_by_hand():
    # Differences 1, 1, 1, 2: only the two all-equal sign patterns of 16 reach |sum| = 5.
    result = stats.paired_test([1.0, 2.0, 3.0, 5.0], [0.0, 1.0, 2.0, 3.0])
    assert result.difference == pytest.approx(1.25)
    assert result.p == pytest.approx(2 / 16)
    assert 1.0 <= result.ci[0] <= 1.25 <= result.ci[1] <= 2.0


def test_paired_test_equals_scipys_exact_permutation_test():
    generator = np.random.default_rng(3)
    a, b = generator.normal(0.4, 1, size=9), generator.normal(0, 1, size=9)
    expected = scipy_stats.permutation_test(
        (a, b),
        lambda x, y: np.mean(x - y),
        permutation_type="samples",
        n_resamples=np.inf,
        alternative="two-sided",
    )
    assert stats.paired_test(a, b).p == pytest.approx(expected.pvalue)


def test_drawn_p_agrees_with_the_exact_one(monkeypatch):
    generator = np.random.default_rng(5)
    a, b = (
        generator.integers(2, size=14).astype(float) + 0.3,
        generator.integers(2, size=14).astype(float),
    )
    exact = stats.paired_test(a, b).p
    monkeypatch.setattr(stats, "EXACT_PAIRS", 4)
    assert stats.paired_test(a, b).p == pytest.approx(exact, abs=0.006)


def test_zero_differences_do_not_change_p():
    a, b = [0.9, 0.8, 0.7, 0.6, 0.9], [0.1, 0.2, 0.3, 0.4, 0.2]
    assert (
        stats.paired_test(a + [0.5] * 30, b + [0.5] * 30).p
        == stats.paired_test(a, b).p
        == pytest.approx(2 / 32)
    )


def test_equal_arms_give_p_one_and_the_opposite_order_the_opposite_difference():
    assert stats.paired_test([0.5, 0.25], [0.5, 0.25]).p == 1.0
    forward, backward = (
        stats.paired_test([1, 0, 1], [0, 0, 0]),
        stats.paired_test([0, 0, 0], [1, 0, 1]),
    )
    assert forward.difference == -backward.difference
    assert forward.p == backward.p


def test_ties_by_rounding_are_counted():
    # 0.1 + 0.2 and 0.3 differ in the last bit: the pattern -0.3 + 0.1 + 0.2 - ... must not be lost
    # by it.
    result = stats.paired_test([0.1, 0.2, 0.3], [0.0, 0.0, 0.0])
    assert result.p == pytest.approx(2 / 8)


def test_large_samples_are_deterministic_and_never_zero():
    a, b = np.ones(200), np.zeros(200)
    first, second = stats.paired_test(a, b), stats.paired_test(a, b)
    assert first == second
    assert first.p == pytest.approx(1 / (stats.PERMUTATIONS + 1))


def test_paired_test_keeps_its_level_under_the_null():
    generator = np.random.default_rng(11)
    p_values = [
        stats.paired_test(generator.normal(size=10), generator.normal(size=10)).p
        for _ in range(300)
    ]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        stats.paired_test([1.0, 2.0], [1.0])


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, made monotone: 0.04, 0.06, 0.06, 0.06.
    adjusted = stats.holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert list(adjusted) == ["d", "a", "c", "b"]
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06})
    assert stats.holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}
    with pytest.raises(ValueError, match=r"1\.5"):
        stats.holm({"x": 1.5})
