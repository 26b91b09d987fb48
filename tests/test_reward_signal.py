"""What rewards are worth, against values worked out by hand."""

import json

import numpy as np
import pytest

from experiments.reward_signal import (
    centred_ranks,
    histogram,
    rank_correlation,
    reliability,
    reward_signal,
    signal_of_run,
)
from experiments.training_records import Group, newest_within

META = {"replay_weight": 0.5, "fresh_games": 1, "reward": "success"}


def played(prompt, *outcomes):
    return [{"system_prompt": prompt, "outcome": outcome} for outcome in outcomes]


def test_reliability_is_that_of_halves_taken_to_all_games():
    sure = np.array([[1, 1], [0, 0]])  # V = C = 1 of two games
    torn = np.array([[1, 0], [0, 0]])  # V = 1/2, of one game; C = 0
    assert reliability([sure] * 2)["value"] == 1
    # V: (2 x 1 + 2 x 1/2) / (2 x 2 groups) = 3/8 of a game, C: 1/4; halves: 2/3, both: 4/5
    found = reliability([sure, torn] * 2)
    assert found["value"] == pytest.approx(0.8)
    assert found["games"] == found["games_needed"] == 2
    # halves: C / V = 1/3 in other shares; two games 1/2, eight 4/5
    assert reliability([sure, torn, torn, torn, torn])["games_needed"] == 8
    # rewards that other games would turn round
    assert reliability([np.array([[1, 0], [0, 1]]), sure, sure])["value"] < 1
    assert reliability([np.array([[1, 0], [0, 1]])] * 3)["value"] is None


def test_reliability_leaves_out_what_says_nothing_and_says_what_is_too_little():
    sure, dead = np.array([[1, 1, 1], [0, 0, 0]]), np.ones((4, 3))
    found = reliability([sure, dead, sure, np.ones((2, 2)), np.empty((0, 0))])
    assert (found["value"], found["groups"], found["games"]) == (1, 2, 3)
    assert "2 groups are too few" in found["note"] and found["ci95"] is None
    assert "fewer than two games" in reliability([np.array([[1], [0]])] * 20)["note"]
    many = reliability([sure, np.array([[1, 0, 0], [0, 0, 1]])] * 10)
    low, high = many["ci95"]
    assert -1 <= low < many["value"] < high <= 1


def test_ranks_are_compared_within_groups_alone():
    # the second group is better in both, which says nothing
    first, second = [(0, 5), (1, 5), (2, 6)], [(10, 20), (11, 19)]
    units = list(map(centred_ranks, (first, second)))
    # ranks 1 2 3 beside 1.5 1.5 3, and 1 2 beside 2 1: (1.5 - 0.5) / sqrt(2.5 x 2)
    assert rank_correlation(units)["value"] == pytest.approx(1 / 5**0.5)
    assert centred_ranks([(1, 2), (1, 3)]) is None
    assert rank_correlation(units[:1])["note"] == "fewer than two groups in which both differ"


def group(iteration, meta_turn, prompt, rewards, outcomes=("success",), loop=0):
    return Group(
        iteration=iteration,
        context={
            "loop": loop,
            "meta_turn": meta_turn,
            "family": "door",
            "system_prompt": prompt,
            "trajectories": [{"outcome": outcome} for outcome in outcomes],
        },
        candidates=[
            {"system_prompt": text, "reward": reward, "replay_reward": None, "fresh_reward": None}
            for text, reward in rewards.items()
        ],
        episodes=[[] for _ in rewards],
    )


def test_a_reward_is_compared_with_what_its_prompt_wins_next():
    def loop(number, above, *outcomes):
        rewards = {"A": 0.5 + above, "B": 0.5 - above}
        return [
            group(1, 0, "x", rewards, loop=number),
            group(2, 1, "A", {"C": 1.0}, outcomes, loop=number),
        ]

    lost, won = "step_limit", "success"
    run = [*loop(0, 0.1, lost, lost), *loop(1, 0.2, lost, won), *loop(2, 0.3, won, "failed")]
    found = reward_signal([run])
    assert found["reward_and_next"]["value"] == pytest.approx(1)
    assert found["reward_and_next"]["pairs"] == 3
    # what a loop went on with is none of the candidates
    assert (
        reward_signal([[run[0], group(2, 1, "other", {"C": 1.0})]])["reward_and_next"]["pairs"] == 0
    )
    assert found["replay_and_fresh"]["value"] is None
    assert reward_signal([]) is reward_signal([[]]) is None


def test_rewards_are_counted_in_bins_and_groups_that_teach_nothing():
    run = [
        group(1, 0, "x", {"A": 0.5, "B": 0.5, "C": None}),  # equal
        group(2, 0, "x", {"A": 1.0, "B": None}),  # nothing to compare it with
        group(3, 0, "x", {"A": 0.0, "B": 0.05, "C": 0.1}),
    ]
    found = reward_signal([run])
    assert found["dead_groups"] == 2
    assert found["histogram"]["counts"] == [2, 1, 0, 0, 0, 2, 0, 0, 0, 1]
    assert found["histogram"]["edges"] == pytest.approx([n / 10 for n in range(11)])
    # of another scale: all are in it
    wide = histogram([-1.0, 3.0, 3.0])
    assert (wide["edges"][0], wide["edges"][-1]) == (-1, 3)
    assert (wide["counts"][0], wide["counts"][-1], sum(wide["counts"])) == (1, 2, 3)
    assert sum(histogram([])["counts"]) == 0


def write(run, folder, number, rows):
    path = run / folder / f"iteration_{number:05d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_games_are_given_to_the_candidates_that_they_rewarded(tmp_path):
    def candidate(number, prompt):
        rewards = dict.fromkeys(("reward", "replay_reward", "fresh_reward"), 0.5)
        return {"context": 0, "candidate": number, "reply": "r", "system_prompt": prompt, **rewards}

    context = group(1, 0, "x", {}).context
    for number in (1, 2, 3):
        write(tmp_path, "contexts", number, [context])
        write(
            tmp_path, "prompts", number, [candidate(0, "A"), candidate(1, None), candidate(2, "B")]
        )
        write(tmp_path, "episodes", number, [*played("A", "success", "failed"),
                                             *played("B", "step_limit", "success")])  # fmt: skip
    write(tmp_path, "episodes", 2, played("A", "success"))  # not what rewards were made of
    groups = signal_of_run(tmp_path, META, 3)
    assert [found.iteration for found in groups] == [1, 3]
    assert [[row["outcome"] for row in rows] for rows in groups[0].episodes] == [
        ["success", "failed"],
        [],
        ["step_limit", "success"],
    ]
    assert [found.iteration for found in signal_of_run(tmp_path, META, 2)] == [1]
    assert newest_within(tmp_path, 3, 10) == [3]
    # the previous prompt's games stand behind those of the candidates
    meta = {**META, "reward": "improvement"}
    assert signal_of_run(tmp_path, meta, 1) == []
    write(tmp_path, "episodes", 1, [*played("A", "success", "failed"),
                                    *played("B", "step_limit", "success"),
                                    *played("x", "success")])  # fmt: skip
    assert len(signal_of_run(tmp_path, meta, 1)) == 1
