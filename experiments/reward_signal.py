"""What the rewards of candidate prompts are worth: whether other games would say the same, and what
they go along with. Pure functions of the groups of a training; deterministic.

Everything is compared within groups, the candidates of one context: what families, contexts and the
progress of training have in common does not count. Intervals have 95 % and are percentiles of a
bootstrap over groups.
"""

import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.stats import ALPHA, SEED
from experiments.training_records import Group, newest_within, read_groups, with_episodes

RESAMPLES = 2000
WANTED = 0.8  # reliability that `games_needed` is about
_FEW = 10  # groups: with fewer the interval is a guess
_BINS = 10  # of a histogram
_MAX_BYTES = 256_000_000  # of records that are looked at, the newest ones
_BLOCK = 100  # resamples at a time

Json = dict[str, Any]


def signal_of_run(run_dir: pathlib.Path, meta: Mapping[str, Any], last: int) -> list[Group]:
    """The groups of a run that its signal is measured on, up to iteration `last`: the newest ones,
    where their files are very large.
    """
    return [
        group
        for number in newest_within(run_dir, last, _MAX_BYTES)
        for group in with_episodes(run_dir, meta, read_groups(run_dir, number))
    ]


def reward_signal(runs: Sequence[Sequence[Group]]) -> Json | None:
    """Of the groups of one run, or of several that are one experiment; None without any.

    "histogram": see `histogram`. "dead_groups": in how many groups all rewards are equal, or fewer
    than two are known: nothing is learned from these.
    "reliability": see `reliability`. "replay_and_fresh": whether what is rewarded for games that
    the reflector has read about does better on other ones. "reward_and_next": whether the candidate
    that a loop went on with won more at the next meta-turn, on new games, the more its reward was
    above its group's mean; within families. "reward_and_words": with the length of the prompt.
    The last three are rank correlations (Spearman).
    """
    groups = [group for run in runs for group in run]
    if not groups:
        return None
    numbers = [group.iteration for group in groups]
    return {
        "first_iteration": min(numbers),
        "last_iteration": max(numbers),
        "groups": len(groups),
        "candidates": sum(len(group.candidates) for group in groups),
        "dead_groups": sum(len(set(rewards)) < 2 for rewards in map(_rewards, groups)),
        "histogram": histogram([reward for group in groups for reward in _rewards(group)]),
        "reliability": reliability([outcomes(group) for group in groups]),
        "replay_and_fresh": _within_groups(groups, "replay_reward", "fresh_reward"),
        "reward_and_next": _next_success(runs),
        "reward_and_words": _within_groups(groups, "reward", "words"),
    }


def histogram(rewards: Sequence[float]) -> Json:
    """How often rewards are in each of ten equal bins, from 0 to 1, or as far as there are others:
    "edges", ascending, one more than "counts". The last bin holds its upper edge.
    """
    ends = (min(0.0, *rewards), max(1.0, *rewards)) if rewards else (0.0, 1.0)
    counts, edges = np.histogram(np.array(rewards, dtype=float), bins=_BINS, range=ends)
    return {"edges": edges.round(12).tolist(), "counts": counts.tolist()}


def outcomes(group: Group) -> np.ndarray:
    """[C, M]: of every candidate with a usable prompt and every reward game 1 or 0; games that the
    environment failed for any of them are left out.
    """
    won_cm = np.array(
        [
            [
                np.nan if row["outcome"] == "failed" else float(row["outcome"] == "success")
                for row in played
            ]
            for played in group.episodes
            if played
        ]
    )
    if won_cm.ndim < 2:
        return np.empty((0, 0))
    return won_cm[:, ~np.isnan(won_cm).any(axis=0)]


def reliability(groups: Sequence[np.ndarray]) -> Json:
    """How far the rewards of candidates would be the same on other games.

    The correlation of the games won in two random halves of a group's games, over all ways to halve
    them, which Spearman and Brown's formula takes to the whole number of games. With V the mean
    variance of single games over the candidates of their groups, and C the mean covariance of two
    of them, halves of h games correlate with C / (V / h + (1 - 1/h) C), and all M games with
    M C / (V + (M - 1) C), which is Cronbach's alpha.

    Args:
      groups: [C, M] each, see `outcomes`. Those with fewer games than others do not count.

    Returns:
      Beside the correlation "games", M, and "games_needed", with how many games it would be
      `WANTED`; null where no number would do.
    """
    most = max((won_cm.shape[1] for won_cm in groups), default=0)
    used = [won_cm for won_cm in groups if won_cm.shape[1] == most and len(won_cm) > 1]
    about = {"games": most, "games_needed": None}
    if most < 2:
        return {**_unknown("a reward comes from fewer than two games"), **about}
    sums_u2 = np.array([_game_sums(won_cm) for won_cm in used]).reshape(-1, 2)
    sums_u2 = sums_u2[sums_u2[:, 0] > 0]  # others say nothing of any difference

    def alpha(sums_b2: np.ndarray) -> np.ndarray:
        variance, covariance = sums_b2.T / [[most], [most * (most - 1)]]
        whole = variance + (most - 1) * covariance
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.clip(np.where(whole > 1e-12, most * covariance / whole, np.nan), -1, 1)

    found = _estimate(sums_u2, alpha, sum(map(len, used)))
    variance, covariance = sums_u2.sum(axis=0) / (most, most * (most - 1))
    if covariance > 1e-12:
        needed = WANTED / (1 - WANTED) * (variance - covariance) / covariance
        about["games_needed"] = max(1, math.ceil(needed - 1e-9))
    return {**found, **about}


def _game_sums(won_cm: np.ndarray) -> tuple[float, float]:
    """Of a group the sums of the variances of its games, and of the covariances of all pairs."""
    centred = won_cm - won_cm.mean(axis=0)
    products = centred.T @ centred
    return float(np.trace(products)), float(products.sum() - np.trace(products))


def rank_correlation(units: Iterable[np.ndarray]) -> Json:
    """Spearman's correlation within units that are independent of each other.

    Args:
      units: [n, 2] each: pairs as centred ranks, see `centred_ranks`.
    """
    sums, pairs = [], 0
    for pairs_n2 in units:
        pairs += len(pairs_n2)
        x, y = pairs_n2.T
        sums.append((float(x @ y), float(x @ x), float(y @ y)))

    def correlation(sums_b3: np.ndarray) -> np.ndarray:
        xy, xx, yy = sums_b3.T
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(np.minimum(xx, yy) > 1e-12, xy / np.sqrt(xx * yy), np.nan)

    return _estimate(np.array(sums).reshape(-1, 3), correlation, pairs)


def centred_ranks(pairs: Sequence[tuple[float, float]]) -> np.ndarray | None:
    """[n, 2]: the ranks of both among these pairs, about their mean; None where one does not
    differ, and nothing is said of how they go together.
    """
    values = np.array(pairs, dtype=float).reshape(-1, 2)
    if len(values) < 2 or (values == values[0]).all(axis=0).any():
        return None
    ranks = stats.rankdata(values, axis=0)
    return ranks - ranks.mean(axis=0)


def _within_groups(groups: Sequence[Group], first: str, second: str) -> Json:
    found = (
        centred_ranks(
            [
                (row[first], row[second])
                for row in map(_with_words, group.candidates)
                if row.get(first) is not None and row.get(second) is not None
            ]
        )
        for group in groups
    )
    return rank_correlation(ranks for ranks in found if ranks is not None)


def _rewards(group: Group) -> list[float]:
    return [row["reward"] for row in group.candidates if row["reward"] is not None]


def _with_words(candidate: Json) -> Json:
    prompt = candidate["system_prompt"]
    return {**candidate, "words": None if prompt is None else len(prompt.split())}


def _next_success(runs: Sequence[Sequence[Group]]) -> Json:
    """A unit is a context and the one after it in its loop."""
    by_family: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for family, advantage, success in _followed(run):
            by_family.setdefault(family, []).append((advantage, success))
    ranks = [centred_ranks(pairs) for pairs in by_family.values()]
    return rank_correlation(
        pair[None] for of_family in ranks if of_family is not None for pair in of_family
    )


def _followed(groups: Sequence[Group]) -> Iterator[tuple[str, float, float]]:
    """Of loops that went on under one of their candidates: the family, by how much its reward was
    above the mean of its group, and the share of games won under it at the next meta-turn.
    """
    contexts = {(g.context["loop"], g.context["meta_turn"]): g.context for g in groups}
    for group in groups:
        then = contexts.get((group.context["loop"], group.context["meta_turn"] + 1))
        rewards = _rewards(group)
        if then is None or not rewards:
            continue
        own = [
            row["reward"]
            for row in group.candidates
            if row["reward"] is not None and row["system_prompt"] == then["system_prompt"]
        ]
        won = [
            row["outcome"] == "success"
            for row in then["trajectories"]
            if row["outcome"] != "failed"
        ]
        if own and won:
            yield group.family, float(np.mean(own) - np.mean(rewards)), float(np.mean(won))


def _estimate(sums_un: np.ndarray, value: Any, pairs: int) -> Json:
    """A function of the sums over units, its interval by drawing units anew, and what is to be said
    of it.
    """
    if len(sums_un) < 2:
        return _unknown("fewer than two groups in which both differ", len(sums_un), pairs)
    centre = float(value(sums_un.sum(axis=0)[None])[0])
    if math.isnan(centre):
        return _unknown("nothing differs", len(sums_un), pairs)
    generator, size = np.random.default_rng(SEED), len(sums_un)
    resampled = np.concatenate(
        [
            value(generator.multinomial(size, [1 / size] * size, size=_BLOCK) @ sums_un)
            for _ in range(RESAMPLES // _BLOCK)
        ]
    )
    ends = np.nanpercentile(resampled, [100 * ALPHA / 2, 100 - 100 * ALPHA / 2])
    few = f"{size} groups are too few for an interval" if size < _FEW else ""
    return {
        "value": centre,
        "ci95": None if few else [float(end) for end in ends],
        "groups": size,
        "pairs": pairs,
        "note": few,
    }


def _unknown(note: str, groups: int = 0, pairs: int = 0) -> Json:
    return {"value": None, "ci95": None, "groups": groups, "pairs": pairs, "note": note}
