"""Prompts without one of their sentences: what is left out, and what that costs."""

import pytest

from experiments.deletions import largest_drop, sentences, shortened, summarise_deletions
from experiments.wording import points


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("look , then act . open it .", ["look , then act . ", "open it ."]),
        ("Look. Really?! Go.\n- 1. Open 2.5 doors.\n\nEnd", [
            "Look. ", "Really?! ", "Go.\n", "- 1. Open 2.5 doors.\n\n", "End"]),
        ("", []),
    ],
)  # fmt: skip
def test_pieces_make_up_the_prompt(prompt, pieces):
    assert sentences(prompt) == pieces
    assert "".join(pieces) == prompt


def test_every_sentence_is_left_out_once_and_never_all():
    assert shortened("Look. Go.\nLook.") == [
        ("Look.", "Go.\nLook."),
        ("Go.", "Look. Look."),
        ("Look.", "Look. Go."),
    ]
    assert shortened("Look. \n") == shortened("") == []


def loop(run, whole, seed=0, **outcomes):
    sentences = [{"text": text, "outcomes": found} for text, found in outcomes.items()]
    return {"seed": seed, "run": run, "prompt": "p", "whole": whole, "sentences": sentences}


def test_a_sentence_is_worth_what_is_lost_without_it():
    found = summarise_deletions(
        [
            # without A three of four games are lost; one of B's failed and counts for neither
            loop(0, [1, 1, 1, 0], A=[0, 0, 0, 0], B=[1, 1, None, 1]),
            loop(1, [0, 0, 1, 1], A=[0, 0, 0, 1], C=[None] * 4),
        ]
    )
    assert (found["prompts"], found["seeds"], found["games"]) == (2, 1, 16)
    first, second = found["sentences"]  # nothing is known of C
    assert (first["text"], first["prompts"], first["whole"], first["drop"]) == ("A", 2, 0.625, 0.5)
    assert (second["text"], second["whole"]) == ("B", pytest.approx(2 / 3))
    assert second["drop"] == pytest.approx(-1 / 3)
    for row in found["sentences"]:
        low, high = row["ci95"]
        assert -1 <= low <= row["drop"] <= high <= 1 and low < high
    # all games alike: as far as so many games can tell
    alike = summarise_deletions([loop(0, [1] * 4, A=[0] * 4)])["sentences"][0]
    assert (alike["drop"], alike["ci95"]) == (1, [pytest.approx(2 * 0.025**0.25 - 1), 1])


def test_prompts_of_all_seeds_count_the_same_and_seeds_that_lack_a_sentence_say_nothing():
    found = summarise_deletions(
        [
            loop(0, [1, 1], seed=0, A=[0, 0], B=[1, 1]),
            loop(1, [1, 0], seed=0, A=[1, 0]),
            loop(0, [1, 0], seed=1, A=[0, 0]),
        ]
    )
    first, second = found["sentences"]
    assert (found["seeds"], first["text"], first["prompts"], first["seeds"]) == (2, "A", 3, 2)
    assert (first["drop"], first["whole"]) == (
        pytest.approx((1 + 0 + 0.5) / 3),
        pytest.approx(2 / 3),
    )
    assert (second["text"], second["prompts"], second["seeds"]) == ("B", 1, 1)
    low, high = first["ci95"]
    assert -1 <= low < first["drop"] < high <= 1


def test_a_sentence_that_stands_twice_in_a_prompt_is_one():
    twice = loop(0, [1, 1, 0])
    twice["sentences"] = [
        {"text": "A", "outcomes": [0, 0, 0]},
        {"text": "A", "outcomes": [1, 0, 0]},
    ]
    (found,) = summarise_deletions([twice, loop(1, [1, 0, 1], A=[1, 0, 1])])["sentences"]
    assert (found["prompts"], found["drop"]) == (2, pytest.approx((0.5 + 0) / 2))


def test_intervals_know_that_seeds_differ():
    """Of four seeds two lose all without the sentence, two nothing: with eight runs of one seed
    that do the same it is known better.
    """

    def width(places):
        loops = [
            loop(run, [1] * 6, seed, A=[int(place % 2)] * 6)
            for place, (seed, run) in enumerate(places)
        ]
        (found,) = summarise_deletions(loops)["sentences"]
        assert found["drop"] == pytest.approx(0.5)
        return found["ci95"][1] - found["ci95"][0]

    of_seeds = width([(seed, run) for run in range(8) for seed in range(4)])
    assert of_seeds > 1.2 * width([(0, run) for run in range(32)])


def test_the_sentence_that_is_worth_most_is_named():
    door = summarise_deletions([loop(0, [1, 1, 1, 0], A=[1, 1, 1, 0], B=[0, 0, 1, 0])])
    lamp = summarise_deletions([loop(0, [1, 0, 0, 0], C=[0, 0, 0, 0])])
    (most,) = [row for row in door["sentences"] if row["text"] == "B"]
    low, high = (points(-end) for end in reversed(most["ci95"]))
    assert largest_drop({"lamp": lamp, "door": door}) == (
        "Of 3 sentences left out, the one worth most: door: 'B', -50 points without it (95 %"
        f" interval {low} to {high}; 1 prompt). The report has all."
    )
    assert largest_drop({"door": {**door, "sentences": []}}).startswith("Nothing could be left out")
