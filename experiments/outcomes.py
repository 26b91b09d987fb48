"""What the games of an evaluation came to, as arrays: of one arm on one family, by trained seed,
run, meta-turn and game.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcomes:
    """1 for a game that was won, 0 for one that was not, nan for one that the environment failed or
    that was not played.

    Arms that do not depend on training have one seed. Turn 0 is the initial prompt.
    """

    test_srtg: np.ndarray
    select_srtg: np.ndarray  # what prompts are chosen by: with protocol "paper" the TEST games
    scored_srt: np.ndarray  # whether TEST games were played, failed ones too

    @property
    def last_srg(self) -> np.ndarray:
        """Under the last prompt of every loop."""
        return self.test_srtg[:, :, -1]

    @property
    def chosen_srg(self) -> np.ndarray:
        """On TEST games, under the prompt of each loop that won most SELECT games; of equals the
        earliest, and the last one where no SELECT game has an outcome.
        """
        rates_srt = mean(self.select_srtg, axis=3)
        unknown = np.isnan(rates_srt) | np.isnan(self.test_srtg).all(axis=3)
        turn_sr = np.where(
            unknown.all(axis=2), -1, np.where(unknown, -1.0, rates_srt).argmax(axis=2)
        )
        return np.take_along_axis(self.test_srtg, turn_sr[:, :, None, None], axis=2)[:, :, 0]

    @property
    def rise_srg(self) -> np.ndarray | None:
        """Under the last prompt less under that of the first meta-turn, by game; None where these
        are one, or a loop was not scored under both: those that were are no sample of all.

        A run in which the environment failed one of the two altogether, of any seed, is left out;
        None where that leaves none.
        """
        if self.test_srtg.shape[2] < 3 or not self.scored_srt[:, :, [1, -1]].all():
            return None
        rise_srg = self.test_srtg[:, :, -1] - self.test_srtg[:, :, 1]
        failed_sr = np.isnan(rise_srg).all(axis=2)
        rise_srg[:, failed_sr.any(axis=0)] = np.nan
        return None if np.isnan(rise_srg).all() else rise_srg

    @property
    def curve_t(self) -> np.ndarray:
        """Games won after every meta-turn, the mean over seeds and runs; nan where not every loop
        was scored: those that chose a prompt are no sample of all. Loops of which the environment
        failed all games are left out.
        """
        known_t = mean(mean(self.test_srtg, axis=3), axis=(0, 1))
        return np.where(self.scored_srt.all(axis=(0, 1)), known_t, np.nan)


def read_outcomes(parts: Sequence[Mapping[str, Any]]) -> Outcomes:
    """Those of an arm on a family from its part records, one per trained seed; of loops with fewer
    games than others the places that are missing count as not played.
    """
    test_srtg = _array([part["test"] for part in parts])
    chosen_on_test = not any(part["select"] for part in parts)
    select_srtg = test_srtg if chosen_on_test else _array([part["select"] for part in parts])
    scored_srt = np.zeros(test_srtg.shape[:3], dtype=bool)
    for s, part in enumerate(parts):
        for r, run in enumerate(part["test"]):
            scored_srt[s, r, : len(run)] = [len(games) > 0 for games in run]
    return Outcomes(test_srtg=test_srtg, select_srtg=select_srtg, scored_srt=scored_srt)


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """The mean of what is known; nan where nothing is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)


def area(curve_t: np.ndarray) -> float:
    """The mean height of a curve over its meta-turns, by trapezoids between those that are known;
    of a single one its height, nan of none.
    """
    (known,) = np.nonzero(~np.isnan(curve_t))
    if known.size == 0:
        return float("nan")
    if known.size == 1:
        return float(curve_t[known[0]])
    return float(np.trapezoid(curve_t[known], known) / (known[-1] - known[0]))


def _array(seeds: Sequence[Sequence[Sequence[Sequence[float | None]]]]) -> np.ndarray:
    turns = [turn for seed in seeds for run in seed for turn in run]
    shape = (
        len(seeds),
        max(map(len, seeds)),
        max((len(run) for seed in seeds for run in seed), default=0),
        max(map(len, turns), default=0),
    )
    array = np.full(shape, np.nan)
    for s, seed in enumerate(seeds):
        for r, run in enumerate(seed):
            for t, games in enumerate(run):
                array[s, r, t, : len(games)] = [np.nan if game is None else game for game in games]
    return array
