"""Which candidates of a training are the best."""

import pytest

from experiments.best_candidates import best_candidates
from experiments.training_records import Group


def group(iteration, family, *rewards):
    return Group(
        iteration=iteration,
        context={"family": family},
        candidates=[
            {"system_prompt": None if reward is None else f"{reward}", "reward": reward or 0.0}
            for reward in rewards
        ],
        episodes=[],
    )


GROUPS = [
    group(1, "door", 0.5, 1.0, 1.0),
    group(1, "bell", 1.0, 0.0),  # held out
    group(2, "lamp", 0.4, 0.4),  # nothing is better than another one
    group(2, "door", None, 0.2),
    group(3, "lamp", 0.1, 1.0),
]


@pytest.mark.parametrize(
    ("number", "found"),
    [(9, [(1, "1.0"), (2, "0.2"), (3, "1.0")]), (2, [(1, "1.0"), (3, "1.0")]), (1, [(1, "1.0")])],
)
def test_the_best_of_every_group_of_a_training_family_is_learned(number, found):
    chosen = best_candidates(GROUPS, ("door", "lamp"), number)
    assert [(one.iteration, row["system_prompt"]) for one, row in chosen] == found
    assert {one.family for one, _ in chosen} <= {"door", "lamp"}
    assert chosen[0][1] is GROUPS[0].candidates[1]  # of equals the first


def test_there_may_be_none():
    assert best_candidates(GROUPS, (), 5) == best_candidates(GROUPS[2:3], ("lamp",), 5) == []
