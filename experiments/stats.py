"""Intervals and paired tests for evaluation: pure functions of numbers, deterministic, numpy and
scipy only.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

EXACT_PAIRS = 16  # up to 2^16 sign patterns are enumerated, beyond that they are drawn
PERMUTATIONS = 100_000
RESAMPLES = 10_000
SEED = 20_240_607


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanInterval:
    """A mean with its sample standard deviation (0 for one value) and confidence interval."""

    mean: float
    sd: float
    ci: tuple[float, float]
    num_values: int

    def to_json(self) -> dict[str, Any]:
        """The fields of one arm in evaluation.json: mean, sd, ci95."""
        return {"mean": self.mean, "sd": self.sd, "ci95": list(self.ci)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The mean of the paired differences a - b, its confidence interval, and the two-sided p-value
    of "no difference".
    """

    difference: float
    ci: tuple[float, float]
    p: float
    num_pairs: int

    def to_json(self) -> dict[str, Any]:
        """The fields of one test in evaluation.json: difference, ci95, p."""
        return {"difference": self.difference, "ci95": list(self.ci), "p": self.p}


def mean_ci(values: Sequence[float], confidence: float = 0.95) -> MeanInterval:
    """Mean of independent values (one per game, averaged over its runs) with Student's t interval.

    One value, or equal values, give an interval of no width: such a sample cannot tell its own
    error. Values that all lie in [0, 1] (success rates) get an interval cut to [0, 1]. Raises
    ValueError for an empty or non-finite sample, or a confidence outside (0, 1).
    """
    sample = _sample("values", values)
    _check_confidence(confidence)
    mean = float(sample.mean())
    sd = float(sample.std(ddof=1)) if sample.size > 1 else 0.0
    half = (
        float(stats.t.ppf((1 + confidence) / 2, sample.size - 1)) * sd / np.sqrt(sample.size)
        if sample.size > 1
        else 0.0
    )
    low, high = mean - half, mean + half
    if sample.min() >= 0.0 and sample.max() <= 1.0:
        low, high = max(low, 0.0), min(high, 1.0)
    return MeanInterval(mean=mean, sd=sd, ci=(float(low), float(high)), num_values=sample.size)


def paired_test(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> PairedTest:
    """Sign-flip permutation test of the mean paired difference a - b, with a percentile bootstrap
    interval over the pairs.

    Pair i is game i under both arms. Under the null hypothesis the sign of every difference is a
    fair coin: with at most `EXACT_PAIRS` nonzero differences all patterns are counted and p is
    exact; beyond that p is (1 + hits) / (1 + PERMUTATIONS) with a fixed seed, never 0. Zero
    differences change no sum and are left out of the patterns. Raises ValueError for empty,
    non-finite or unequally long samples.
    """
    first, second = _sample("a", a), _sample("b", b)
    if first.size != second.size:
        raise ValueError(
            f"A paired test needs one value per pair in both samples, got {first.size} and"
            f" {second.size}."
        )
    _check_confidence(confidence)
    difference = first - second
    generator = np.random.default_rng(SEED)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(_bootstrap_means(difference, generator), [tail, 100 - tail])
    return PairedTest(
        difference=float(difference.mean()),
        ci=(float(low), float(high)),
        p=_sign_flip_p(difference, generator),
        num_pairs=difference.size,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction: p-values adjusted for testing all of them, in the order given.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979. Raises
      ValueError for values outside [0, 1].
    """
    for name, p in p_values.items():
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"A p-value lies in [0, 1], got {p!r} for {name!r}.")
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def _sample(name: str, values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(
            f"{name} must be a flat, non-empty sample of finite numbers, got {values!r}."
        )
    return sample


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies strictly between 0 and 1, got {confidence!r}.")


def _bootstrap_means(sample: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of RESAMPLES resamples, drawn in blocks that bound the memory."""
    block = max(1, 4_000_000 // sample.size)
    means = [
        sample[
            generator.integers(sample.size, size=(min(block, RESAMPLES - start), sample.size))
        ].mean(axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    return np.concatenate(means)


def _sign_flip_p(difference: np.ndarray, generator: np.random.Generator) -> float:
    nonzero = difference[difference != 0]
    if nonzero.size == 0:
        return 1.0
    # Sums that are equal on paper differ in the last bits by their order: count those too.
    observed = abs(nonzero.sum()) - 1e-9 * np.abs(nonzero).sum()
    if nonzero.size <= EXACT_PAIRS:
        # The first sign stays: a pattern and its opposite have the same absolute sum.
        signs = np.array(
            [(1, *rest) for rest in itertools.product((1, -1), repeat=nonzero.size - 1)]
        )
        return float((np.abs(signs @ nonzero) >= observed).mean())
    block = max(1, 4_000_000 // nonzero.size)
    hits = 0
    for start in range(0, PERMUTATIONS, block):
        signs = (
            generator.integers(
                2, size=(min(block, PERMUTATIONS - start), nonzero.size), dtype=np.int8
            )
            * 2
            - 1
        )
        hits += int((np.abs(signs @ nonzero) >= observed).sum())
    return (1 + hits) / (1 + PERMUTATIONS)
