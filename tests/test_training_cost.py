"""What a training took, by its metrics."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.evaluation_report import protocol, summary
from experiments.presets import PRESETS
from experiments.training_cost import NAMES, of_all_runs, training_cost
from tests.evaluations import part


def line(number, episodes=10, decoded=100, began=1, **more):
    return {
        "iteration": number,
        "episodes": episodes,
        "candidates": 4,
        **more,
        "time": {
            "actor_decoded_tokens": decoded,
            "reflector_decoded_tokens": 10 * decoded,
            "process_began": began,
        },
    }


def cost(folder, lines, step, **meta):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    config = PRESETS["fake-tiny"]
    return training_cost(
        folder, dataclasses.replace(config, meta=dataclasses.replace(config.meta, **meta)), step
    )


def values(found):
    return [found[name] for name in NAMES]


def test_sums_go_to_the_step_that_is_evaluated_over_all_processes(tmp_path):
    # the third iteration was made by a process that went on with the run
    later = [line(3, decoded=270, began=3), line(4, decoded=400, began=3)]
    lines = [line(1), line(2, decoded=250), *later]
    assert values(cost(tmp_path, lines, 3)) == [30, 520, 12, 5200]
    assert values(cost(tmp_path, lines, 0)) == [0, 0, 0, 0]


def test_what_was_drawn_again_counts(tmp_path):
    again = line(2, refill_episodes=7, refill_thrown_away=2)
    group_size = PRESETS["fake-tiny"].grpo.group_size
    assert cost(tmp_path, [line(1), again], 2)["training_actor_episodes"] == 27
    assert cost(tmp_path, [line(1), again], 2)["training_reflector_calls"] == 8 + 2 * group_size


def test_contexts_that_are_read_again_were_played_once(tmp_path):
    """Two loops of three meta-turns with four games each, of which every iteration reads two."""
    meta = dict(
        collection="precollected",
        precollected_loops=2,
        meta_turns=3,
        contexts_per_iteration=2,
        games_per_context=4,
    )
    found = cost(tmp_path, [line(n, episodes=8 + 5) for n in range(1, 11)], 10, **meta)
    assert found["training_actor_episodes"] == 10 * 5 + 2 * 3 * 4
    assert found["training_reflector_calls"] == 10 * 4 + 2 * 2  # none behind the last meta-turn


@pytest.mark.parametrize(
    "lines",
    [
        [],  # adopted
        [line(1), line(3)],
        [line(1), line(2), line(3, episodes=None)],
        [line(1), line(2), line(3, episodes=1.5)],
        [line(1), line(2), line(3, refill_episodes=-1)],
    ],
)
def test_what_is_not_known_of_every_iteration_is_not_said(tmp_path, lines):
    assert cost(tmp_path, lines, 3) == {}


def test_tokens_are_those_that_whoever_answers_counts(tmp_path):
    lines = [line(1), line(2)]
    for one in lines:
        one["time"] = {"actor_reply_tokens": 30 * one["iteration"]}
    found = cost(tmp_path, lines, 2)
    assert found["training_actor_tokens"] == 60
    assert "training_reflector_tokens" not in found


def test_of_several_runs_what_is_known_of_all_is_summed():
    assert of_all_runs([{NAMES[0]: 1, NAMES[1]: 2}, {NAMES[0]: 3}]) == {NAMES[0]: 4}
    assert of_all_runs([{NAMES[0]: 1}, {}]) == {}


def test_budgets_of_those_who_ask_a_reflector_of_a_run_name_its_training():
    """Of all seeds together, and the same in every family."""
    generator = np.random.default_rng(0)
    rest = {"malformed": 0, "actor_failures": {}, "failed_episodes": 0}
    results = {
        (arm, family): [
            part(np.full(3, 0.5), generator) | rest | {"budget": {"actor_episodes": 6}}
            for _ in range(seeds)
        ]
        for family in ("eat", "zap")
        for arm, seeds in (
            ("initial", 1),
            ("untrained", 1),
            ("trained", 2),
            ("trained-flipped", 2),
            ("sft-best", 2),
        )
    }
    splits = {"eat": "train", "zap": "heldout"}
    found = summary(results, splits, "", [{NAMES[0]: 100}, {NAMES[0]: 50, NAMES[1]: 7}])
    for family in splits:
        assert found["families"][family]["budget"] == {
            "initial": {"actor_episodes": 6},
            "untrained": {"actor_episodes": 6},
            **{
                arm: {"actor_episodes": 12, NAMES[0]: 150}
                for arm in ("trained", "trained-flipped", "sft-best")
            },
        }


def test_runs_of_which_it_is_not_known_are_named(tmp_path):
    runs = [tmp_path / name for name in ("a", "adopted", "lost")]
    for run in runs:
        run.mkdir()
    (runs[1] / "manifest.json").write_text(json.dumps({"adopted": "0"}))
    config = PRESETS["fake-tiny"]

    def said(*costs):
        return protocol(config, config, 3, runs, costs, {})["training_budget"]

    known = {NAMES[0]: 1}
    assert "stands in the budget" in said(known, known, known)
    text = said(known, {}, {})
    assert f"{runs[1]} (trained elsewhere" in text and f"{runs[2]} (its metrics.jsonl" in text
    assert f"{runs[0]} (" not in text
