"""The contract test holds on real environments and fails, by name, on an environment that breaks
each rule.
"""

import os
import pathlib
import subprocess
import sys

import pytest

from envs import contract
from envs.contract import RULES, ContractError, check_environment, main
from envs.fake import WORDS
from envs.registry import load_environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAKE = ROOT / "examples" / "frozen_lake.py"
PAGE = ROOT / "docs" / "adding_an_environment.md"


def solve(game):
    """The actions that win a fake game."""
    return ["walk", "walk", WORDS[game.family]]


@pytest.fixture
def lake(tmp_path, monkeypatch):
    """The example as a user has it: a module of their own, in a folder of their own, and the entry
    point of its package.
    """
    (tmp_path / "my_lake.py").write_text(LAKE.read_text())
    info = tmp_path / "my_lake-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_lake\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        "[ictjax.environments]\nfrozen_lake = my_lake:FrozenLake\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_fake_games_keep_every_rule_and_every_rule_compares_something():
    report = check_environment("fake", solve=solve)
    assert report.families == ("bell", "door", "lamp")
    assert list(report.comparisons) == list(RULES)
    assert min(report.comparisons.values()) > 0
    assert report.violations == report.notes == ()


@pytest.mark.parametrize(
    "name", ["frozen_lake", "my_lake:FrozenLake"], ids=["entry point", "import path"]
)
def test_the_example_keeps_every_rule_outside_the_package(lake, name):
    report = check_environment(name, num_games=3, num_steps=6, seed=1)
    assert report.families == ("firm", "slippery")
    assert report.violations == ()


def test_minihack_keeps_every_rule():
    pytest.importorskip("minihack")
    report = check_environment(
        "minihack", families=["eat", "room_random"], num_games=2, num_steps=4
    )
    assert report.violations == ()


def test_alfworld_keeps_every_rule():
    options = {"data": "generated"}
    walkthrough = load_environment("alfworld", options).walkthrough
    report = check_environment(
        "alfworld",
        options=options,
        families=["put", "look"],
        num_games=2,
        num_steps=4,
        solve=walkthrough,
    )
    assert report.violations == report.notes == ()


@pytest.mark.parametrize(
    ("environment", "rule", "message"),
    [
        ("AnyFamily", "names", "open of an unknown family raises no ValueError"),
        ("AnySplit", "names", "games of an unknown split raises no ValueError"),
        ("AnyId", "names", "another|door|0 is of another environment or family, and is played"),
        ("ListedActions", "names", "not with an Observation of text and actions"),
        ("Overlap", "splits", "fake|door|500 stands in the splits train and test"),
        (
            "SameStates",
            "splits",
            "fake|door|00 (test) has the same initial state as fake|door|0 (train)",
        ),
        ("Unsorted", "order", "whose order changes"),
        ("Counting", "determinism", "differs the second time at action 1"),
        ("Leftover", "fresh", "differs on a live game that has played another one"),
        ("ConstantHash", "state_hash", "have only 1 different state hashes"),
        ("MovingHash", "state_hash", "has another state hash after some actions"),
        ("HashOrder", "processes", "fake|door|0 differs in another process at the reset"),
        ("Pid", "processes", "fake|door|0 differs in another process at action 1"),
        ("Pid", "replay", "The game fake|door|0 is not deterministic"),
        ("Unrewarded", "outcome", "is won at action 3 ('open') with the reward 0.0"),
        ("RewardedDeath", "outcome", "ends as death at action"),
        ("Rewarding", "outcome", "is rewarded again after its end"),
        ("Undead", "outcome", "has another outcome when it is played on after its end: None where"),
        ("Limited", "outcome", "has a step limit of its own at action 3"),
        ("NoNumber", "outcome", "has the reward nan at action 1"),
        ("Unwinnable", "outcome", "is not won by the actions that should solve it"),
        ("Raising", "junk", r"raised UnicodeEncodeError on the action '\ud800'"),
        ("Echo", "junk", "repeats the action 'xxx"),
        ("EmptyWins", "junk", "is won by the action ''"),
        ("Silent", "junk", "answers the action '' without a text"),
        ("ClosesOnce", "close", "raised RuntimeError when it was closed, or closed again"),
    ],
)
def test_a_broken_environment_is_named_with_rule_and_game(environment, rule, message):
    name = f"tests.broken:{environment}"
    with pytest.raises(ContractError) as caught:
        check_environment(name, families=["door"], rules=[rule], solve=solve)
    error = str(caught.value)
    assert error.startswith(f"{name} breaks 1 rule of the contract. {rule} (door): ")
    assert message in error
    assert "\n" not in error
    assert [violation.rule for violation in caught.value.report.violations] == [rule]


def test_every_rule_has_a_broken_environment():
    (mark,) = (
        mark
        for mark in test_a_broken_environment_is_named_with_rule_and_game.pytestmark
        if mark.name == "parametrize"
    )
    assert {rule for _, rule, _ in mark.args[1]} == set(RULES)


def test_a_broken_rule_hides_no_other():
    in_process = [rule for rule in RULES if rule not in ("processes", "replay")]
    with pytest.raises(ContractError, match="breaks 4 rules") as caught:
        check_environment("tests.broken:Counting", families=["door"], rules=in_process)
    assert [violation.rule for violation in caught.value.report.violations] == [
        "determinism",
        "fresh",
        "junk",
        "close",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fkae"}, "Unknown environment 'fkae'"),
        ({"families": ["cup"]}, "Unknown family 'cup' of 'fake': use some of bell, door, lamp"),
        ({"rules": ["luck"]}, "Unknown rule 'luck': use some of names, splits"),
        ({"num_games": 1}, "at least 2, got 1 and 12"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_environment(**{"name": "fake", **arguments})


def test_the_command_line_says_what_it_checked(capsys):
    assert (
        main(["fake", "--families", "door", "--rules", "names", "outcome", "--option", "print_on="])
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("names        holds ")
    assert out.endswith(" s.\n") and "fake keeps all 2 rules: 1 family" in out
    assert main(["tests.broken:Unsorted", "--families", "door", "--rules", "names", "order"]) == 1
    out = capsys.readouterr().out
    assert (
        "order        BROKEN" in out
        and "breaks 1 of 2 rules" in out
        and "order (door): fake|door|" in out
    )
    assert main(["fake", "--option", "text"]) == 2
    assert "--option takes KEY=VALUE, got 'text'" in capsys.readouterr().err
    assert main(["nothing"]) == 2


def test_the_command_finds_modules_of_the_working_folder(lake):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "envs.contract",
        "my_lake:FrozenLake",
        "--families",
        "firm",
        "--games",
        "2",
        "--steps",
        "2",
    ]
    done = subprocess.run(
        command, cwd=lake, env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "my_lake:FrozenLake keeps all 11 rules: 1 family" in done.stdout


def test_the_page_shows_the_tested_file_which_is_short():
    code = LAKE.read_text()
    assert f"```python\n{code}```" in PAGE.read_text()
    assert sum(bool(line.strip()) for line in code.splitlines()) < 60


def test_the_page_names_every_rule():
    page = PAGE.read_text()
    for rule in contract.RULES:
        assert f"| `{rule}` | {contract.demand(rule)} |" in page
