"""Benchmarks of an actor on recorded games: every design answers the same observations, and shares
are those of what was recorded; nothing is timed.
"""

import json

import numpy as np
import pytest

from envs.api import GameId, Outcome
from experiments.bench_actor import asked, bench_int8, bench_speculation, recorded
from experiments.commands.bench import Int8Bench, SpeculationBench
from experiments.presets import FAKE_TINY, in_folders
from ictjax.records import Trajectory, Turn, to_json
from ictjax.run_config import to_dict
from ictjax.speaker import Finish, Reply


@pytest.fixture
def run(tmp_path):
    """A run directory with three episodes, two of which are of one game under one prompt."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(in_folders(FAKE_TINY))))
    episodes = tmp_path / "episodes"
    episodes.mkdir()
    turn = {"actions": (), "thought": "", "action": "", "reward": 0.0}
    lines = [
        to_json(
            Trajectory(
                game=GameId(env="fake", family="door", key=key),
                system_prompt="play",
                turns=tuple(Turn(observation=said, reply="", **turn) for said in ("open", "push")),
                outcome=Outcome.STEP_LIMIT,
                final_observation="",
                state_hash="",
            )
        )
        for key in ("0", "0", "1")
    ]
    (episodes / "iteration_00001.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def quiet(_text: str) -> None:
    pass


def test_speculation_is_compared_on_the_same_replies(run):
    result = bench_speculation(
        SpeculationBench(run=run, games=8, repetitions=1, guessed=(2,)), quiet
    )
    plain, guessing = result.rows
    assert "2 games" in result.title and "4 replies" in result.title
    assert plain["same_replies"] == guessing["same_replies"] == plain["speedup"] == 1.0
    assert plain["proposed"] is plain["accepted"] is None and guessing["proposed"] > 0
    assert 0 <= guessing["accepted"] <= 1 and 0 <= guessing["accepted_of_sampled"] < 1
    assert guessing["tokens_per_dispatch"] >= plain["tokens_per_dispatch"]


def test_8_bits_are_compared_on_the_same_tokens(run):
    result = bench_int8(Int8Bench(run=run, games=2, repetitions=1), quiet)
    found = {row["design"]: row for row in result.rows}
    assert list(found) == ["float", "int8 weights", "int8 cache", "both"]
    assert found["float"]["max_logit_difference"] == 0
    assert found["float"]["same_greedy"] == found["float"]["same_replies"] == 1
    for name in ("int8 weights", "int8 cache", "both"):
        # hand-made weights are hardly rounded
        assert found[name]["mean_logit_difference"] <= found[name]["max_logit_difference"] < 1
        assert found[name]["same_greedy"] > 0.9
        assert found[name]["from"] <= found[name]["success"] <= found[name]["to"]
    assert found["both"]["weights_mib"] == found["int8 weights"]["weights_mib"]
    assert found["int8 weights"]["weights_mib"] < found["float"]["weights_mib"] / 2
    assert found["int8 cache"]["cache_mib"] < found["float"]["cache_mib"]


def test_replies_are_sampled_from_the_position_before_them():
    replies = [
        Reply(conversation=0, text="", finish=Finish.STOP, prompt_ids=(1, 2), ids=(3, 4)),
        Reply(conversation=0, text="", finish=Finish.STOP, prompt_ids=(1, 2, 3, 4, 5), ids=(6,)),
    ]
    ids, places = asked(replies)
    np.testing.assert_array_equal(ids, [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(ids[places + 1], [3, 4, 6])


def test_a_run_without_episodes_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no episodes: name the directory of a run\.$"):
        recorded(tmp_path, 4)
