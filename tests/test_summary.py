"""What evaluation.json says of outcomes that are known."""

import copy
import json
import pathlib

import numpy as np
import pytest

from experiments import evaluation_results
from experiments.evaluation_results import read_results
from experiments.outcomes import area, read_outcomes
from experiments.summary import comparisons, summarise
from tests.evaluations import RATES, evaluation, part

SPLITS = {"eat": "train", "zap": "heldout", "read": "heldout"}
SCHEMA = pathlib.Path(evaluation_results.__file__).with_name("evaluation.schema.json")


@pytest.fixture(scope="module")
def results():
    return evaluation(SPLITS)


def record(*turns, select=(), games=("a", "b")):
    """A part of one run: its outcomes by turn."""
    return {
        "test": [list(turns)],
        "select": [list(select)] if select else [],
        "games": {"test": [list(games)]},
    }


def test_the_headline_is_about_held_out_families(results):
    assert list(results["overall"]) == ["heldout", "train"]
    assert list(results["families"]) == ["zap", "read", "eat"]
    headline, test = results["headline"], results["overall"]["heldout"]["tests"]
    assert (headline["split"], headline["verdict"]) == ("heldout", "better")
    assert test["trained_vs_untrained"]["num_tests"] == 1
    assert "On the held-out families, prompts of this one trained reflector win" in headline["text"]
    assert headline["text"].endswith("How much trained seeds differ is not measured.")
    assert "8 runs of this one trained reflector" in headline["reason"]


def test_families_and_other_comparisons_are_corrected(results):
    tests = results["overall"]["heldout"]["tests"]
    assert {name: test["num_tests"] for name, test in tests.items()} == {
        "trained_vs_untrained": 1,
        "trained_vs_initial": 1,
        "untrained_vs_initial": 1,
    }
    for family, count in (("zap", 2), ("read", 2), ("eat", 1)):
        test = results["families"][family]["tests"]["trained_vs_untrained"]
        assert test["num_tests"] == count
        assert test["p"] <= test["p_corrected"] <= count * test["p"]
    assert tests["trained_vs_untrained"]["over_families"]["smallest_p"] == 0.5


def test_means_are_those_of_the_outcomes():
    played = {
        ("untrained", "eat"): [record([1, 0], [0, 0])],
        ("trained", "eat"): [record([1, 0], [1, None]), record([0, 0], [1, 1])],
    }
    family = summarise(played, {"eat": "train"})["families"]["eat"]
    trained, untrained = family["arms"]["trained"], family["arms"]["untrained"]
    assert (trained["mean"], trained["curve"], trained["area"]) == (1.0, [0.25, 1.0], 0.625)
    assert (untrained["mean"], untrained["curve"]) == (0.0, [0.5, 0.0])
    assert (trained["sd_runs"], trained["sd_seeds"], untrained["sd_seeds"]) == (None, 0.0, None)
    test = family["tests"]["trained_vs_untrained"]
    assert (test["difference"], test["improvement"], test["units"]) == (1.0, 1.0, "trained seeds")
    assert (family["games"], family["runs"]) == (2, 1)


def test_what_meta_turns_behind_the_first_add_is_paired_by_loop():
    played = {
        ("initial", "eat"): [record([1, 0]), record([1, 0])][:1],
        ("untrained", "eat"): [record([0, 0], [1, 0], [1, 1])],
        ("trained", "eat"): [
            record([0, 0], [0, 0], [1, 1]),
            record([0, 0], [0, 1], [1, None]),
        ],
    }
    arms = summarise(played, {"eat": "heldout"})["overall"]["heldout"]["arms"]
    assert arms["initial"]["rise"] is None
    assert arms["untrained"]["rise"]["difference"] == 0.5
    # of two games two more; of the one known under both one more
    assert arms["trained"]["rise"]["difference"] == 1.0
    low, high = arms["trained"]["rise"]["ci95"]
    assert -1.0 <= low < 1.0 == high
    assert 0 < arms["trained"]["rise"]["p"] <= 1


def test_meta_turns_that_were_not_scored_have_no_rise():
    # the second loop chose the prompt of its first meta-turn, which was scored for that
    part = {
        "test": [[[0, 0], [], [1, 1]], [[0, 0], [1, 0], [1, 1]]],
        "select": [],
        "games": {"test": [["a", "b"], ["c", "d"]]},
    }
    arms = summarise({("trained", "eat"): [part]}, {"eat": "heldout"})["overall"]["heldout"]["arms"]
    assert arms["trained"]["rise"] is None
    assert arms["trained"]["curve"] == [0.0, None, 1.0]


def test_a_loop_that_the_environment_failed_costs_a_rise_its_run_alone():
    test = [[[0], [0], [1]], [[0], [1], [1]], [[0], [None], [1]], [[0], [0], [1]]]
    others = [[[0], [0], [1]], [[0], [0], [1]], [[0], [1], [0]], [[0], [0], [0]]]
    games = {"test": [["a"], ["b"], ["c"], ["d"]]}
    seeds = [{"test": of, "select": [], "games": games} for of in (test, others)]
    played = {("trained", "eat"): seeds, ("trained", "zap"): [seeds[1], seeds[1]]}
    results = summarise(played, {"eat": "heldout", "zap": "heldout"})
    arm = results["families"]["eat"]["arms"]["trained"]
    # runs a, b and d, of either seed: 1, 0, 1 and 1, 1, 0
    assert arm["rise"]["difference"] == pytest.approx(2 / 3)
    assert arm["rise"]["ci95"][0] < 2 / 3 < arm["rise"]["ci95"][1]
    assert arm["curve"] == pytest.approx([0.0, 2 / 7, 6 / 8])
    both = results["overall"]["heldout"]["arms"]["trained"]["rise"]
    # and 1, 1, -1, 0 of the other family
    assert both["difference"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert 0 < both["p"] <= 1


def test_no_rise_where_no_run_is_whole():
    part = {
        "test": [[[0], [None], [1]], [[0], [None], [1]]],
        "select": [],
        "games": {"test": [["a"], ["b"]]},
    }
    arms = summarise({("trained", "eat"): [part]}, {"eat": "heldout"})["overall"]["heldout"]["arms"]
    assert arms["trained"]["rise"] is None
    assert arms["trained"]["curve"] == [0.0, None, 1.0]


def test_a_rise_is_the_difference_of_the_curve():
    arms = evaluation({"zap": "heldout", "eat": "heldout"}, seeds=3)["overall"]["heldout"]["arms"]
    for arm in ("untrained", "trained"):
        found = arms[arm]
        assert found["rise"]["difference"] == pytest.approx(found["curve"][-1] - found["curve"][1])
        assert found["rise"]["ci95"][0] <= found["rise"]["difference"] <= found["rise"]["ci95"][1]


def test_several_seeds_are_what_is_spoken_of():
    results = evaluation({"zap": "heldout"}, seeds=8)
    assert results["overall"]["heldout"]["seeds"] == 8
    assert "prompts of 8 trained reflectors win" in results["headline"]["text"]
    assert "8 trained seeds)." in results["headline"]["text"]
    tests = results["families"]["zap"]["tests"]
    assert tests["trained_vs_initial"]["units"] == "trained seeds"
    assert tests["untrained_vs_initial"]["units"] == "runs"


def test_a_prompt_is_chosen_on_other_games():
    # turns 1 and 2 are equal on SELECT: the earlier one is taken, whatever TEST says
    outcomes = read_outcomes([record([0, 0], [1, 0], [1, 1], select=([0], [1], [1]))])
    assert outcomes.chosen_srg.tolist() == [[[1, 0]]]
    assert outcomes.last_srg.tolist() == [[[1, 1]]]
    # on the same games (protocol "paper") the best one is
    assert read_outcomes([record([0, 0], [1, 1], [1, 0])]).chosen_srg.tolist() == [[[1, 1]]]
    # a turn that was not scored on TEST cannot be, and without any SELECT outcome it is the last
    assert read_outcomes(
        [record([0, 0], [], [1, 0], select=([0], [1], [0]))]
    ).chosen_srg.tolist() == [[[0, 0]]]
    unknown = read_outcomes([record([0, 0], [1, 0], select=([None], [None]))])
    assert unknown.chosen_srg.tolist() == [[[1, 0]]]
    # where no SELECT games are played, nothing is chosen on TEST games instead
    none = read_outcomes([record([0, 0], [1, 1], [1, 0], select=([], [], []))])
    assert none.chosen_srg.tolist() == none.last_srg.tolist() == [[[1, 0]]]


def test_curves_are_of_all_loops_and_their_area_of_what_is_known():
    outcomes = read_outcomes([record([0, 0], [], [1, 0])])
    np.testing.assert_array_equal(outcomes.curve_t, [0.0, np.nan, 0.5])
    assert area(outcomes.curve_t) == 0.25
    assert area(np.array([0.3])) == 0.3
    assert area(np.array([0.0, 1.0, 1.0])) == 0.75


def test_runs_that_an_arm_lacks_count_for_none():
    generator = np.random.default_rng(0)
    parts = {
        (arm, "zap"): [part(np.full(4, 1.0 if arm == "trained" else 0.0), generator, turns=0)]
        for arm in RATES
    }
    parts["untrained", "zap"][0]["test"][2] = [[None] * 5]
    family = summarise(parts, {"zap": "heldout"})["families"]["zap"]
    assert family["runs"] == 3
    assert family["tests"]["trained_vs_initial"]["num_units"] == 3
    for run in range(4):
        parts["untrained", "zap"][0]["test"][run] = [[None] * 5]
    with pytest.raises(ValueError, match="failed every test game of family 'zap'"):
        summarise(parts, {"zap": "heldout"})


def test_loops_without_a_game_in_common_are_paired_by_their_means():
    played = {
        ("untrained", "a"): [record([0, 0], [0, None])],
        ("trained", "a"): [record([0, 0], [None, 1])],
    }
    test = summarise(played, {"a": "train"})["families"]["a"]["tests"]["trained_vs_untrained"]
    assert (test["difference"], test["chosen"]["difference"]) == (1.0, 1.0)


def test_arms_that_played_other_games_are_refused():
    played = {("initial", "a"): [record([1, 0])], ("trained", "a"): [record([1, 0], games="ac")]}
    with pytest.raises(ValueError, match="different games of family 'a', so nothing is paired"):
        summarise(played, {"a": "train"})


def test_loops_on_the_same_games_speak_of_these():
    generator = np.random.default_rng(0)
    parts = {(arm, "zap"): [part(np.full(8, rate), generator)] for arm, rate in RATES.items()}
    for of_arm in parts.values():
        of_arm[0]["games"]["test"] = [list("abcde")] * 8
    results = summarise(parts, {"zap": "heldout"})
    assert results["headline"]["reason"].endswith("of this one trained reflector on the same games")
    assert results["families"]["zap"]["games"] == 5


def test_every_arm_is_compared_with_training_and_with_the_first_prompt():
    assert comparisons(["initial", "untrained", "trained", "expert"]) == [
        ("trained", "untrained"),
        ("trained", "initial"),
        ("trained", "expert"),
        ("untrained", "initial"),
        ("expert", "initial"),
    ]
    assert comparisons(["initial"]) == []


def test_one_arm_has_no_headline():
    results = evaluation({"zap": "heldout"}, {"initial": 0.2}, runs=2)
    assert results["headline"] is None
    assert results["overall"]["heldout"]["tests"] == {}


@pytest.mark.parametrize("seeds", [1, 3])
def test_results_are_what_the_schema_says(tmp_path, seeds):
    jsonschema = pytest.importorskip("jsonschema", reason="a development dependency")
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    whole = evaluation(SPLITS, {**RATES, "expert": 0.9}, runs=3, seeds=seeds)
    written = json.loads(json.dumps(whole))
    validator.validate(written)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(written))
    assert read_results(path) == written
    # what the reader refuses, the schema does
    for change in (
        lambda data: data.update(format=2),
        lambda data: data.update(folder="../elsewhere"),
        lambda data: data["overall"].clear(),
        lambda data: data["headline"].update(verdict="best"),
        lambda data: data["families"]["zap"].update(split="other"),
        lambda data: data["families"]["zap"]["arms"]["trained"].pop("ci95"),
        lambda data: data["families"]["zap"]["tests"]["trained_vs_expert"].update(p=2),
    ):
        wrong = copy.deepcopy(written)
        change(wrong)
        assert not validator.is_valid(wrong)
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="evaluate again"):
            read_results(path)
