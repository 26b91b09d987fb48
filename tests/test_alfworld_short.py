import random
import re

import pytest

from envs.alfworld import FAMILIES, ALFWorld
from envs.alfworld.compact import kind_of
from envs.alfworld.short import TASKS, VERBS, ShortText, renaming, task_word
from envs.api import GameId
from envs.contract import check_environment
from envs.renamings import LABELS

WINS = {"look": "use", "pick_two": "put"}  # else the family's own name
OPTIONS = {"data": "generated", "rooms": "small", "text": "short"}


def _shown(environment, family, game_id):
    """A live game, and the short text behind it for its notes."""
    game = environment.open(family)
    game.reset(game_id)
    return game, game._short


def _find(short: ShortText) -> str:
    """The action that leads to the thing of the task."""
    notes = short.notes
    thing = notes.task.thing
    if known := notes.find(thing):
        there = known[0][1]
        return f"pickup {thing}" if there == notes.here else f"go {kind_of(there)}"
    return f"go {kind_of(notes.unseen()[0])}"


def _win(game, short: ShortText, verb: str, limit: int = 60):
    steps = []
    for _ in range(limit):
        action = f"{verb} {short.notes.task.thing}" if short.notes.held else _find(short)
        steps.append((action, game.step(action)))
        if steps[-1][1].outcome:
            break
    return steps


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verb_decides(family: str) -> None:
    environment = ALFWorld(**OPTIONS)
    right = WINS.get(family, family)
    for game_id in environment.games(family, "train")[:6]:
        game, short = _shown(environment, family, game_id)
        steps = _win(game, short, right)
        assert steps[-1][1].outcome == "success" and steps[-1][1].reward == 1, steps
        assert steps[-1][1].observation.text.endswith("You succeeded.")
        assert steps[-1][0].split()[0] == right
        # after the end nothing changes
        again = game.step("go nowhere")
        assert (again.observation, again.reward) == (steps[-1][1].observation, 0)
        # examine, open and slice win nothing
        for verb in ("examine", "open", "slice"):
            game, short = _shown(environment, family, game_id)
            steps = _win(game, short, verb, 12)
            assert not any(step.outcome for _, step in steps)
            assert steps[-1][1].observation.text.startswith("Nothing happens. ")


def test_sentences_are_short_and_list_verbs_once() -> None:
    environment = ALFWorld(**OPTIONS)
    orders = set()
    for family in FAMILIES:
        for game_id in environment.games(family, "train")[:8]:
            game, short = _shown(environment, family, game_id)
            first = short.text
            listed = re.search(r"Verbs: (.*)\.", first)
            assert listed and sorted(listed[1].split(", ")) == sorted(VERBS)
            orders.add(listed[1])
            for _, step in _win(game, short, WINS.get(family, family)):
                text = step.observation.text
                assert "Verbs:" not in text and len(text.split()) < 50 and text[0].isupper()
                assert not re.search(r"\b[aA] [aeiou]|\d", text), text
                assert step.observation.actions == ()
            again, _ = _shown(environment, family, game_id)
            assert again.reset(game_id).text == first
    assert len(orders) > 40


def test_a_turn_shows_what_was_seen_and_no_more() -> None:
    environment = ALFWorld(**OPTIONS)
    game_id = environment.games("clean", "train")[0]
    game, short = _shown(environment, "clean", game_id)
    assert short.text.startswith("Task clean: a cloth for the countertop. Places: bathtubbasin, ")
    shown = {
        "go bathtubbasin": "At the bathtubbasin you see nothing. Not seen yet: countertop, ",
        "clean cloth": "You carry no cloth. At the bathtubbasin you see nothing. Not seen yet: ",
        "pickup cloth": "There is no cloth to pick up. At the bathtubbasin you see nothing. ",
        "go fridge": "There is no fridge here. At the bathtubbasin you see nothing. Not ",
        "Go to the toilet.": "At the toilet you see a cloth, a handtowel, a soapbar and a soap",
        "take cloth": "At the toilet you see a handtowel, a soapbar and a soapbottle. You carry a",
        "pickup soapbar": "Your hands are full. At the toilet you see a handtowel, a soapbar",
        "sing loudly": "Unknown action: 'sing loudly'. At the toilet you see a handtowel, a",
        "heat cloth": "Nothing happens. At the toilet you see a handtowel, a soapbar and a",
        "put cloth": "You put the cloth: it is at the countertop.",
        "go toilet": "At the toilet you see a handtowel, a soapbar and a soapbottle.",
        "CLEAN cloth 1": "You clean the cloth and bring it to the countertop. You succeeded.",
    }
    for action, text in shown.items():
        assert game.step(action).observation.text.startswith(text), action


@pytest.mark.parametrize(
    "action",
    ["", " ", "go", "clean", "\x00", "é" * 10_000, "go " * 5000, "put\ncloth", "go go"]
    + [f"go b{gap * 400_000}x" for gap in (" ", " to", " 1", "\t.")],
)
def test_junk_is_answered_and_costs_a_turn(action: str) -> None:
    environment = ALFWorld(**OPTIONS)
    game, _ = _shown(environment, "clean", environment.games("clean", "train")[0])
    step = game.step(action)
    assert step.outcome is None and len(step.observation.text) < 400


def test_full_rooms_are_played_alike() -> None:
    environment = ALFWorld(data="generated", text="short")
    rng = random.Random(0)
    won = 0
    for family in FAMILIES:
        for game_id in environment.games(family, "train")[:4]:
            game, short = _shown(environment, family, game_id)
            steps = _win(game, short, WINS.get(family, family))
            won += steps[-1][1].outcome == "success"
            game, short = _shown(environment, family, game_id)
            for _ in range(25):
                thing = rng.choice([short.notes.task.thing, "mug", "apple"])
                verb = rng.choice((*VERBS, "pickup", "go"))
                thing = (
                    rng.choice([kind_of(p) for p in short.notes.places]) if verb == "go" else thing
                )
                assert game.step(f"{verb} {thing}").observation.text
    assert won == 24


def test_families_come_again_with_other_names() -> None:
    environment = ALFWorld(**OPTIONS, renamings="2")
    assert set(environment.families) == {
        name for family in FAMILIES for name in (family, f"{family}~0", f"{family}~1")
    }
    assert environment.describe()["renamings"] == 2
    assert "renamings" not in ALFWorld(**OPTIONS).describe()
    plain, again = (environment.games(family, "test") for family in ("heat", "heat~1"))
    assert [game.key for game in plain] == [game.key for game in again]
    assert {game.family for game in again} == {"heat~1"}
    more = environment.more_games("heat~1", "test", 230)
    assert len({*more}) == 230 and {game.family for game in more} == {"heat~1"}
    assert environment.walkthrough(again[0]) == environment.walkthrough(plain[0])
    names = renaming("heat~1")
    assert names == renaming("heat~1") != renaming("heat~0")
    assert set(names) == {*VERBS, *map(task_word, TASKS)} and set(names.values()) <= set(LABELS)
    assert len(set(names.values())) == len(names) and not set(names.values()) & {*VERBS, *TASKS}
    game, short = _shown(environment, "heat~1", environment.games("heat~1", "train")[0])
    text = short.text
    assert text.startswith(f"Task {names['task heat']}: ")
    assert set(text.rpartition("Verbs: ")[2].rstrip(".").split(", ")) == {
        names[verb] for verb in VERBS
    }
    for action, step in _win(game, short, names["heat"]):
        words = set(re.findall("[a-z]+", step.observation.text.lower()))
        assert not words & {*VERBS, *TASKS}, (action, step.observation.text)
    assert step.outcome == "success"
    # the game's own verb is an unknown word
    game, short = _shown(environment, "heat~1", environment.games("heat~1", "train")[0])
    steps = _win(game, short, "heat", 20)
    assert not any(step.outcome for _, step in steps)
    assert steps[-1][1].observation.text.startswith("Unknown action: 'heat ")


@pytest.mark.parametrize("family", ["heat~2", "heat~01", "heat~", "boil", "boil~0", "heat~0~0"])
def test_other_families_are_unknown(family: str) -> None:
    environment = ALFWorld(**OPTIONS, renamings="2")
    with pytest.raises(ValueError, match=f"Unknown family '{family}' of ALFWorld: use one of"):
        environment.open(family)
    with pytest.raises(ValueError, match="Unknown family"):
        environment.games(family, "train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "short", "renamings": "-1"}, "from 0 to 1000, got '-1'"),
        ({"text": "compact", "renamings": "1"}, "renamings=1 needs text=short, got text=compact"),
    ],
)
def test_renamings_that_make_no_sense_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALFWorld(data="generated", **options)


def test_ids_of_other_families_are_refused() -> None:
    environment = ALFWorld(**OPTIONS, renamings="1")
    key = environment.games("heat", "train")[0].key
    game = environment.open("heat~0")
    with pytest.raises(ValueError, match="is no game of the family"):
        game.reset(GameId(env="alfworld", family="heat", key=key))
    cool = environment.games("cool", "train")[0].key
    with pytest.raises(ValueError, match="is of family 'cool', not 'heat'"):
        game.reset(GameId(env="alfworld", family="heat~0", key=cool))


def test_the_short_style_keeps_the_contract() -> None:
    report = check_environment(
        "alfworld",
        options={**OPTIONS, "renamings": "2"},
        families=["clean", "put~1"],
        num_games=2,
        num_steps=6,
    )
    assert report.violations == ()
