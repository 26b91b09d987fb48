import re

import pytest

from envs.api import GameId, Outcome
from envs.contract import check_environment
from envs.minihack import FAMILIES, MiniHack
from envs.minihack.renamed import RenamedGame, rename_verbs, renaming
from envs.minihack.text import OFFERED
from envs.minihack.verbs import Command, parse
from envs.renamings import LABELS


@pytest.fixture(scope="module")
def game():
    game = RenamedGame("eat~1", style="short")
    yield game
    game.close()


def _first() -> GameId:
    return MiniHack(text="short", renamings="2").games("eat~1", "train")[0]


def test_a_family_comes_again_with_other_names() -> None:
    environment = MiniHack(text="short", renamings="2")
    assert set(environment.families) == {
        name for family in FAMILIES for name in (family, f"{family}~0", f"{family}~1")
    }
    plain, renamed = (environment.games(family, "test") for family in ("eat", "eat~1"))
    assert [game.key for game in plain] == [game.key for game in renamed]
    assert {game.family for game in renamed} == {"eat~1"}
    assert environment.describe()["renamings"] == 2
    assert "renamings" not in MiniHack(text="short").describe()


@pytest.mark.parametrize("family", ["eat~2", "eat~01", "eat~x", "eat~", "eat~1~1"])
def test_other_renamings_are_unknown(family: str) -> None:
    environment = MiniHack(text="short", renamings="2")
    with pytest.raises(ValueError, match="Unknown MiniHack family"):
        environment.open(family)
    with pytest.raises(ValueError, match="Unknown MiniHack family"):
        environment.games(family, "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "short", "renamings": "-1"}, "from 0 to 1000, got '-1'"),
        ({"text": "short", "renamings": "1001"}, "from 0 to 1000, got '1001'"),
        ({"text": "full", "renamings": "1"}, "renamings=1 needs text=short, got text=full"),
    ],
)
def test_renamings_that_make_no_sense_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniHack(**options)


def test_names_are_those_of_the_family_and_mean_nothing_to_the_game() -> None:
    names = renaming("eat~1")
    assert names == renaming("eat~1") != renaming("eat~0")
    assert set(names) == set(OFFERED) - {"pickup"}
    assert len(set(names.values())) == len(names)
    assert not any(isinstance(parse(label), Command) for label in LABELS)


def test_a_verb_does_what_the_game_calls_otherwise(game: RenamedGame) -> None:
    names = renaming("eat~1")
    first = game.reset(_first()).text
    listed = re.search(r"Verbs: (.*)\.", first)
    assert listed is not None
    assert set(listed[1].split(", ")) == {"pickup", *names.values()}
    for action in ("north", "north", "north", "pickup apple"):
        step = game.step(action)
    assert "You carry an apple." in step.observation.text
    # its own name is an unknown word, and no note gives away what others are called
    step = game.step("Eat apple")
    assert step.outcome is None and "Unknown action: 'eat apple'" in step.observation.text
    step = game.step(f"{names['zap']} apple")
    assert step.observation.text.startswith(f"You don't have anything to {names['zap']}.")
    step = game.step(f"{names['eat'].upper()} apple")
    assert step.outcome is Outcome.SUCCESS and step.reward == 1


def test_ids_of_other_families_are_refused(game: RenamedGame) -> None:
    with pytest.raises(ValueError, match=r"is not a game of minihack\|eat~1"):
        game.reset(GameId(env="minihack", family="eat", key="3"))


def test_renamed_families_keep_the_contract() -> None:
    report = check_environment(
        "minihack",
        options={"text": "short", "renamings": "2"},
        families=["eat~1"],
        num_games=2,
        num_steps=4,
    )
    assert report.violations == ()


def test_verbs_are_renamed_all_at_once() -> None:
    text = (
        "You see a staircase down. Verbs: down, puton. Eat it, then put on the ring. You wear it."
    )
    renamed = rename_verbs(text, {"down": "eat", "eat": "fold", "puton": "lift"})
    assert renamed == (
        "You see a staircase down. Verbs: eat, lift. Fold it, then lift the ring. You wear it."
    )
    assert rename_verbs(text, {}) == text
