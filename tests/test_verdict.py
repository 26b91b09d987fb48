"""One function decides what a comparison shows."""

import numpy as np
import pytest

from experiments.stats import correct, paired_test
from experiments.verdict import verdict


def of(differences, among=1):
    """The verdict on the first of so many equal tests."""
    test = paired_test(np.array(differences))
    return verdict(test, correct(dict.fromkeys(range(among), test))[0])


def test_five_units_show_nothing_and_six_do():
    assert of([[0.5] * 5]).word == "not shown"
    assert of([[0.5] * 5]).reason == "5 runs cannot give p < 0.062: 6 runs are needed"
    assert of([[0.5] * 6]) == of([[0.4] * 6])
    assert (of([[0.5] * 6]).word, of([[-0.5] * 6]).word) == ("better", "worse")
    assert of([[0.5] * 6]).reason == "p = 0.031, 6 runs"


@pytest.mark.parametrize(("among", "needed"), [(2, 7), (3, 7), (4, 8)])
def test_correction_needs_more_units(among, needed):
    assert of([[0.5] * needed], among).word == "better"
    few = of([[0.5] * (needed - 1)], among)
    assert few.word == "not shown"
    assert few.reason.endswith(f"corrected for {among} tests: {needed} runs are needed")


def test_what_a_design_would_have_found_is_said():
    found = of([[0.3, -0.2, 0.1, -0.1, 0.2, 0.0, -0.2, 0.3]])
    assert found.word == "not shown"
    assert found.reason == (
        "p = 0.609, 8 runs; a difference of 24 points would be found in four of five such"
        " evaluations"
    )


def test_equal_arms_are_not_shown_to_be_equal():
    assert of([[0.0] * 8]).word == "not shown"
    assert of([[0.0] * 8]).reason == "p = 1.000, 8 runs"


def test_trained_seeds_are_named_as_the_units():
    rng = np.random.default_rng(0)
    many = 0.4 + 0.05 * rng.normal(size=(8, 6))
    assert of(many).word == "better"
    assert of(many).reason == "p = 0.008, 8 trained seeds"
    assert (
        of(many[:2]).reason == "2 trained seeds cannot give p < 0.500: 6 trained seeds are needed"
    )
    assert of(many[:, :1]).word == "not shown"
    assert of(many[:, :1]).reason == "one run does not show how much runs differ: play two or more"
    assert of(many[:1, :1]).reason == "1 run cannot give p < 1.000: 6 runs are needed"


@pytest.mark.parametrize(("ends", "sign"), [((0.23, 0.94), 1), ((-0.94, -0.23), -1)])
def test_an_interval_without_0_that_shows_nothing_is_explained(ends, sign):
    test = paired_test(sign * np.array([[1.0, 1.0, 0.9, 0.6, 0.5, -0.5]]))
    corrected = correct({0: test})[0]
    found = verdict(test, corrected, ends=ends)
    assert found.word == "not shown"
    assert found.reason == (
        "p = 0.094, 6 runs: p decides, and it is above 0.05, though the interval is without 0; the"
        " smallest p that 6 runs can reach is 0.031"
    )
    # with 0 in it, or no verdict to explain: as ever
    around = verdict(test, corrected, ends=(-0.1, 0.9)).reason
    assert around == verdict(test, corrected).reason and "would be found" in around
    all_agree = paired_test(np.full((1, 6), 0.5))
    assert verdict(all_agree, correct({0: all_agree})[0], ends=ends).reason == "p = 0.031, 6 runs"
