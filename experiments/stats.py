"""Tests of paired differences, their correction and their power: pure functions of numbers,
deterministic, numpy and scipy only.

`differences_sr` is everywhere [S, R]: a loop of reflection (run) r of trained seed s under one arm,
minus the same under another; S is 1 where no trained seed is compared, or a single one. Runs of
different seeds play the same games and, where the other arm does not depend on training and is not
drawn anew beside each (`EvaluationConfig.draws`), have its loops in common.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, TypeVar

import numpy as np
from scipy import stats

ALPHA = 0.05
POWER = 0.8
EXACT_UNITS = 16  # up to 2^16 sign patterns are enumerated, beyond that they are drawn
PERMUTATIONS = 2**EXACT_UNITS
SEED = 20_240_607

Units = Literal["trained seeds", "runs"]

_Name = TypeVar("_Name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The mean difference, and the two-sided p-value of "no difference".

    `smallest_p` is what the design can reach at most, were all units to agree. `error` is the
    standard error with its degrees of freedom, None where nothing measures it.
    """

    difference: float
    p: float
    units: Units
    num_units: int
    num_runs: int
    smallest_p: float
    error: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrected:
    """A test among others: its p after Holm's correction, and the smallest that it could reach."""

    p: float
    smallest_p: float
    num_tests: int


def paired_test(differences_sr: np.ndarray) -> PairedTest:
    """Tests on the highest independent level there is: trained seeds, else runs.

    One seed: sign-flip permutation over the runs, a claim about that one reflector. Several: over
    the means of the seeds. These have games, and mostly the other arm's loops, in common, so that
    one lucky draw of them moves all seeds alike and flips would count it once a seed (four in ten
    "better" under the null at eight seeds). p is therefore the larger one of the flips' and of a
    t-test whose variance is the sum of that between seeds and that between runs
    (Welch-Satterthwaite degrees of freedom).
    Raises ValueError for another shape, an empty or a non-finite sample.
    """
    differences = _sample(differences_sr)
    num_seeds, num_runs = differences.shape
    error = standard_error(differences)
    units = differences.mean(axis=1) if num_seeds > 1 else differences[0]
    p, smallest = sign_flip_p(units), smallest_p(len(units))
    if num_seeds > 1:
        p = max(p, _shared_p(float(differences.mean()), error))
        smallest = smallest if num_runs > 1 else 1.0
    return PairedTest(
        difference=float(differences.mean()),
        p=p,
        units="trained seeds" if num_seeds > 1 else "runs",
        num_units=len(units),
        num_runs=num_runs,
        smallest_p=smallest,
        error=error,
    )


def sign_flip_p(units: np.ndarray) -> float:
    """Two-sided p of the mean of independent units, each of whose signs is a fair coin under the
    null hypothesis.

    With at most `EXACT_UNITS` nonzero units all patterns are counted and p is exact; beyond that p
    is (1 + hits) / (1 + PERMUTATIONS) with a fixed seed, never 0. Zeros change no sum and are left
    out of the patterns.
    """
    nonzero = units[units != 0]
    if nonzero.size == 0:
        return 1.0
    # Sums that are equal on paper differ in the last bits by their order: count those too.
    observed = abs(nonzero.sum()) - 1e-9 * np.abs(nonzero).sum()
    if nonzero.size <= EXACT_UNITS:
        return float((np.abs(_signs(nonzero.size) @ nonzero) >= observed).mean())
    generator = np.random.default_rng(SEED)
    block = max(1, 4_000_000 // nonzero.size)
    hits = 0
    for start in range(0, PERMUTATIONS, block):
        size = (min(block, PERMUTATIONS - start), nonzero.size)
        signs = generator.integers(2, size=size, dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ nonzero) >= observed).sum())
    return (1 + hits) / (1 + PERMUTATIONS)


def smallest_p(num_units: int) -> float:
    """Of the sign-flip test: only the pattern observed and its opposite reach the sum."""
    return 2 / 2**num_units if num_units <= EXACT_UNITS else 1 / (1 + PERMUTATIONS)


def units_needed(factor: float) -> int:
    """So many units can reach a p of 0.05 that correction has multiplied by so much."""
    return math.ceil(math.log2(2 * factor / ALPHA))


def standard_error(values_sr: np.ndarray) -> tuple[float, float] | None:
    """Of the mean over seeds and runs, with its degrees of freedom. nan where a seed lacks a run;
    every seed and every run has a number.

    One seed: that of the runs. Several: sqrt(V_seeds / S + V_runs / R), the variances of the means
    over the other axis, which errs on the large side (what is neither seed nor run counts twice),
    with Welch's degrees of freedom. None where a level that varies has a single unit.
    """
    num_seeds, num_runs = values_sr.shape
    if num_runs < 2:
        return None
    of_runs = float(np.nanmean(values_sr, axis=0).var(ddof=1)) / num_runs
    if num_seeds == 1:
        return math.sqrt(of_runs), num_runs - 1
    of_seeds = float(np.nanmean(values_sr, axis=1).var(ddof=1)) / num_seeds
    total = of_seeds + of_runs
    if total == 0:
        return 0.0, min(num_seeds, num_runs) - 1
    freedom = total**2 / (of_seeds**2 / (num_seeds - 1) + of_runs**2 / (num_runs - 1))
    return math.sqrt(total), freedom


def detectable_difference(test: PairedTest, corrected: Corrected) -> float | None:
    """The smallest true difference that this design finds with a power of 80 %, at the observed
    spread: error x (t(1 - alpha / 2) + t(0.8)), alpha being 0.05 over the number of tests.

    None where no p-value that the design can reach is small enough, no spread was observed, or no
    difference that there can be is large enough.
    """
    if test.error is None or corrected.smallest_p > ALPHA or test.error[0] == 0:
        return None
    error, freedom = test.error
    quantiles = stats.t.ppf([1 - ALPHA / (2 * corrected.num_tests), POWER], freedom)
    difference = float(error * quantiles.sum())
    return difference if difference <= 1 else None


def improvement(differences_sr: np.ndarray) -> float:
    """The share of pairs of loops in which the first arm won more games, ties counting half."""
    return float(((differences_sr > 0) + 0.5 * (differences_sr == 0)).mean())


def correct(tests: Mapping[_Name, PairedTest]) -> dict[_Name, Corrected]:
    """Holm's correction of tests that make one family of claims; a test alone stays as it is."""
    adjusted = holm({name: test.p for name, test in tests.items()})
    # no p grows when another one falls: what the smallest ones give, no others can pass under
    smallest = holm({name: test.smallest_p for name, test in tests.items()})
    return {
        name: Corrected(p=adjusted[name], smallest_p=smallest[name], num_tests=len(tests))
        for name in tests
    }


def holm(p_values: Mapping[_Name, float]) -> dict[_Name, float]:
    """Holm's step-down correction: p-values adjusted for testing all of them, in the order given.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979. Raises
      ValueError for values outside [0, 1].
    """
    for name, p in p_values.items():
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"A p-value lies in [0, 1], got {p!r} for {name!r}.")
    adjusted: dict[_Name, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def _sample(differences: np.ndarray) -> np.ndarray:
    sample = np.asarray(differences, dtype=np.float64)
    if sample.ndim != 2 or sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(
            "A paired test needs finite differences, a row per trained seed and a column per run,"
            f" got shape {sample.shape}."
        )
    return sample


@functools.lru_cache(maxsize=4)
def _signs(num_units: int) -> np.ndarray:
    """All patterns but for their opposites, which have the same absolute sum: the last sign
    stays.
    """
    bits = np.arange(2 ** (num_units - 1))[:, None] >> np.arange(num_units) & 1
    return 1.0 - 2.0 * bits


def _shared_p(difference: float, error: tuple[float, float] | None) -> float:
    if error is None:
        return 1.0
    size, freedom = error
    if size == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stats.t.sf(abs(difference) / size, freedom))
