"""95 % intervals of games won: a hierarchical bootstrap over trained seeds, runs and games; exact
where all outcomes agree. Deterministic.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from experiments.outcomes import mean
from experiments.stats import ALPHA, SEED, standard_error

RESAMPLES = 4000

Samples = Mapping[tuple[str, ...], np.ndarray]  # by name, [S or 1, R, G]


def resampled_means(families: Sequence[Samples]) -> list[dict[tuple[str, ...], np.ndarray]]:
    """The mean of every named sample in every family, `RESAMPLES` times over.

    A resample draws trained seeds (the same for all families: a reflector plays them all), then
    runs, then games of each run. All samples of a family get the same runs and games, for they
    were measured on these: differences stay paired. The samples of a family agree in R and G. A
    seed may lack a run (nan): the mean is over the loops there are, each with the same weight;
    every seed and every run has one with an outcome.
    """
    generator = np.random.default_rng(SEED)
    num_seeds = max(len(values) for samples in families for values in samples.values())
    seeds_bs = _draw(generator, num_seeds, ())
    return [_family_means(samples, seeds_bs, generator) for samples in families]


def interval(
    values: Sequence[np.ndarray],
    centre: float,
    loops_sr: np.ndarray,
    resampled: np.ndarray,
    lowest: float,
) -> tuple[float, float]:
    """Of a mean over families, in [lowest, 1].

    The percentiles of the bootstrap, scaled about the mean by t x (standard error) / (1.96 x their
    standard deviation): drawing every level anew counts the chance of the games twice, and few
    units resampled are too alike. With it they cover what they say, and agree with the tests. Where
    all outcomes agree there is no spread; then as many games that all agree have an exact binomial
    (Clopper and Pearson) bound.

    Args:
      values: [S, R, G] of each family; won games (lowest is 0) or paired differences (-1).
      centre: the mean.
      loops_sr: of the loops, averaged over the families; what the spread is read off. nan where a
        seed lacks a run.
      resampled: the mean, by resample.
      lowest: 0 or -1.
    """
    outcomes = np.concatenate([family.ravel() for family in values])
    known = outcomes[~np.isnan(outcomes)]
    if (known == known[0]).all():
        return _agreed(float(known[0]), sum(_num_games(family) for family in values), lowest)
    ends = np.percentile(resampled, [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])
    low, high = np.clip(centre + _scale(loops_sr, resampled) * (ends - centre), lowest, 1.0)
    return float(min(low, centre)), float(max(high, centre))


def clopper_pearson(hits: int, count: int) -> tuple[float, float]:
    """The exact 95 % interval of a share."""
    low = stats.beta.ppf(ALPHA / 2, hits, count - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - ALPHA / 2, hits + 1, count - hits) if hits < count else 1.0
    return float(low), float(high)


def _scale(loops_sr: np.ndarray, resampled: np.ndarray) -> float:
    """1 where the loops do not tell their spread: a single one, or equal ones."""
    error = standard_error(loops_sr)
    if error is None or error[0] < 1e-9:  # of equal loops nothing but rounding
        return 1.0
    t, z = stats.t.ppf(1 - ALPHA / 2, error[1]), stats.norm.ppf(1 - ALPHA / 2)
    return float(t * error[0] / (z * resampled.std()))


def _agreed(value: float, num_games: int, lowest: float) -> tuple[float, float]:
    bound, _ = clopper_pearson(num_games, num_games)  # of games that agree, at least
    if lowest == 0:
        return (bound, 1.0) if value else (0.0, 1 - bound)
    # of differences: at least so many games have this one, the others any
    return max(-1.0, value - (1 - bound) * (1 + value)), min(1.0, value + (1 - bound) * (1 - value))


def _num_games(values_srg: np.ndarray) -> int:
    """Places that were played; trained seeds play the same ones."""
    return int((~np.isnan(values_srg)).any(axis=0).sum())


def _draw(generator: np.random.Generator, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """How often each of `size` units is in a resample of as many."""
    return generator.multinomial(size, [1 / size] * size, size=(RESAMPLES, *shape)).astype(float)


def _family_means(
    samples: Samples, seeds_bs: np.ndarray, generator: np.random.Generator
) -> dict[tuple[str, ...], np.ndarray]:
    _, num_runs, num_games = next(iter(samples.values())).shape
    runs_br = _draw(generator, num_runs, ())
    sums, counts = ({name: np.zeros(RESAMPLES) for name in samples} for _ in range(2))
    for run in range(num_runs):  # a run at a time bounds the memory
        games_bg = _draw(generator, num_games, ())
        for name, values_srg in samples.items():
            known_gs = ~np.isnan(values_srg[:, run].T)
            won_bs = games_bg @ np.where(known_gs, values_srg[:, run].T, 0.0)
            drawn_bs = games_bg @ known_gs
            # of no known game drawn: the loop's own mean
            rates_bs = np.where(
                drawn_bs > 0,
                won_bs / np.maximum(drawn_bs, 1),
                mean(values_srg[:, run], axis=1),
            )
            played_s = known_gs.any(axis=0)
            drawn_seeds_bs = seeds_bs if len(values_srg) > 1 else np.ones((RESAMPLES, 1))
            weights_bs = drawn_seeds_bs * played_s * runs_br[:, run, None]
            sums[name] += (np.where(played_s, rates_bs, 0.0) * weights_bs).sum(axis=1)
            counts[name] += weights_bs.sum(axis=1)
    return {
        # of no loop drawn: the mean of all
        name: np.where(
            counts[name] > 0,
            sums[name] / np.maximum(counts[name], 1),
            np.nanmean(mean(values_srg, axis=2)),
        )
        for name, values_srg in samples.items()
    }
