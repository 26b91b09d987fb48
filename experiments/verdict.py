"""Whether one arm is better than another: decided here, and nowhere else."""

import dataclasses
from typing import Literal

from experiments.stats import ALPHA, Corrected, PairedTest, detectable_difference, units_needed
from experiments.wording import p_is, p_value

Word = Literal["better", "worse", "not shown"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The word, and the reason in a clause without a full stop."""

    word: Word
    reason: str


def verdict(
    test: PairedTest,
    corrected: Corrected,
    whose: str = "",
    ends: tuple[float, float] | None = None,
) -> Verdict:
    """The first arm is better or worse than the second where the corrected p is at most 0.05 and
    the design has the power to say so; else nothing is shown.

    "Power allows" means that the smallest p that so many units can reach is at most 0.05 after
    correction: 6 units for one test, 7 for two or three, 8 for four to six. Fewer have no power at
    all, however large the difference, and the reason says so and how many are needed. A design that
    could have found a difference and did not says which one it would have found in four of five
    evaluations; "not shown" is never "equal". Where the interval is without 0 all the same, the
    reason says that p decides, and what p so many units can reach.

    Args:
      test: of the paired differences.
      corrected: the same test among those of its family of claims.
      whose: what the units belong to, for example " of this one trained reflector".
      ends: of the interval of the difference, which decides nothing.
    """
    units = f"{test.num_units} {_noun(test)}{whose}"
    if corrected.smallest_p > ALPHA:
        return Verdict(word="not shown", reason=_powerless(test, corrected, units))
    correction = f" corrected for {corrected.num_tests} tests" if corrected.num_tests > 1 else ""
    found = f"{p_is(corrected.p)}{correction}, {units}"
    if corrected.p <= ALPHA:
        return Verdict(word="better" if test.difference > 0 else "worse", reason=found)
    if ends is not None and (ends[0] > 0 or ends[1] < 0):
        return Verdict(
            word="not shown",
            reason=f"{found}: p decides, and it is above {ALPHA}, though the interval is without 0;"
            f" the smallest p that {test.num_units} {_noun(test)} can reach is"
            f" {p_value(corrected.smallest_p)}",
        )
    detectable = detectable_difference(test, corrected)
    if detectable is None and test.error is not None and test.error[0] > 0:
        found += "; not even a difference of 100 points would be found in four of five such"
        found += " evaluations"
    if detectable is None:
        return Verdict(word="not shown", reason=found)
    return Verdict(
        word="not shown",
        reason=f"{found}; a difference of {100 * detectable:.0f} points would be found in four of"
        " five such evaluations",
    )


def _powerless(test: PairedTest, corrected: Corrected, units: str) -> str:
    if test.units == "trained seeds" and test.num_runs < 2:
        return "one run does not show how much runs differ: play two or more"
    needed = units_needed(corrected.smallest_p / test.smallest_p)
    correction = f" corrected for {corrected.num_tests} tests" if corrected.num_tests > 1 else ""
    return (
        f"{units} cannot give p < {p_value(corrected.smallest_p)}{correction}: {needed}"
        f" {test.units} are needed"
    )


def _noun(test: PairedTest) -> str:
    return test.units if test.num_units > 1 else test.units.removesuffix("s")
