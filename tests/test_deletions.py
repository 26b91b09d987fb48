"""Prompts without one of their sentences: what is left out, and what that costs."""

import pytest

from experiments.deletions import sentences, shortened, summarise_deletions


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


def loop(run, whole, **outcomes):
    sentences = [{"text": text, "outcomes": found} for text, found in outcomes.items()]
    return {"run": run, "prompt": "p", "whole": whole, "sentences": sentences}


def test_a_sentence_is_worth_what_is_lost_without_it():
    found = summarise_deletions(
        [
            # without A three of four games are lost; one of B's failed and counts for neither
            loop(0, [1, 1, 1, 0], A=[0, 0, 0, 0], B=[1, 1, None, 1]),
            loop(1, [0, 0, 1, 1], A=[0, 0, 0, 1], C=[None] * 4),
        ]
    )
    assert (found["prompts"], found["games"]) == (2, 16)
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
