import collections
import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import types
import warnings

import pytest

from envs.api import GameId, Outcome
from envs.cache_files import write_json
from envs.minihack import FAMILIES, MiniHack, console
from envs.minihack import game as game_module
from envs.minihack import index as splits
from envs.minihack.expert import make_expert
from envs.minihack.families import (
    FAMILY_SPLITS,
    GYM_IDS,
    LEFT_OUT,
    SOUND_RESERVE,
    STEPS,
    step_limit,
    why_left_out,
)
from envs.minihack.game import MiniHackGame
from envs.minihack.verbs import Command, find_item, parse
from envs.minihack.view import Item, object_noun, plain_name


def game_id(family, seed):
    return GameId(env="minihack", family=family, key=str(seed))


@pytest.fixture(scope="module")
def open_game():
    """Live games, one per family and style, shared by the tests of this file."""
    games = {}

    def get(family, style="full"):
        if (family, style) not in games:
            games[family, style] = MiniHack(text=style).open(family)
        return games[family, style]

    yield get
    for game in games.values():
        game.close()


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"Unknown MiniHack family 'eet': use one of eat \(of \d+\);"
    ):
        MiniHack().open("eet")
    with pytest.raises(ValueError, match="Unknown text style 'terse'.*compact"):
        MiniHack(text="terse")
    with pytest.raises(ValueError, match="Unknown split 'dev'.*train, select, test"):
        MiniHack().games("eat", "dev")
    with pytest.raises(ValueError, match="Unknown MiniHack family"):
        MiniHack().games("eet", "train")


def test_a_game_refuses_ids_of_others(open_game):
    game = open_game("eat")
    with pytest.raises(ValueError, match="not a game of minihack|eat"):
        game.reset(game_id("zap", 0))
    with pytest.raises(ValueError, match="a seed from 0"):
        game.reset(GameId(env="minihack", family="eat", key="-1"))


def test_construction_and_play_are_silent(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        game = MiniHack().open("eat")
        game.reset(game_id("eat", 1))
        game.step("north")
        game.close()
        game.close()
    assert capfd.readouterr() == ("", "")


# --- determinism ---

SCRIPT = ("go north", "search", "far east", "pickup", "zap wand", "kick west", "pray")
PLAYED = (("zap", 3), ("room_monster", 5), ("zap", 4), ("lava_cross", 10003))


def transcript(game, family, seed):
    texts = [game.reset(game_id(family, seed)).text, game.state_hash()]
    for action in SCRIPT:
        step = game.step(action)
        texts.append(step.observation.text + str(step.outcome))
    return texts


@pytest.mark.parametrize(
    "name", ["two words", "a\nline", "star*", "[1]", "it's", '"', "\\b", "é", "$(x)"]
)
def test_the_name_of_the_temporary_folder_does_not_choose_the_game(
    open_game, tmp_path, monkeypatch, capfd, name
):
    expected = open_game("eat").reset(game_id("eat", 3))
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    game = MiniHackGame("eat", style="full")
    assert list((tmp_path / name).iterdir())
    assert game.reset(game_id("eat", 3)) == expected
    assert game.state_hash() == open_game("eat").state_hash()
    game.close()
    assert capfd.readouterr() == ("", "")


def test_a_temporary_folder_that_nethack_cannot_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("é" * 225)))
    with pytest.raises(ValueError, match="more than 450 bytes, like .*name another in TMPDIR"):
        MiniHackGame("eat", style="full")


@pytest.mark.parametrize(
    ("level", "cause"),
    [("LEVEL: what\n", "lev_comp could not write"), ("no_such_level.des", "no_such_level.des")],
)
def test_a_level_that_cannot_be_put_in_place_is_an_error(tmp_path, level, cause):
    environment = types.SimpleNamespace(nethack=types.SimpleNamespace(_vardir=str(tmp_path)))
    with pytest.raises(OSError, match=cause):
        console._put_level(environment, level)
    assert not (tmp_path / "nhdat").exists()


def test_order_of_episodes_and_prompts_left_behind_do_not_matter(open_game):
    first = [transcript(open_game(family), family, seed) for family, seed in PLAYED]
    for family, seed in reversed(PLAYED):
        open_game(family).reset(game_id(family, seed + 100))
        open_game(family).step("east")
    second = [transcript(open_game(family), family, seed) for family, seed in reversed(PLAYED)]
    assert first == second[::-1]


def test_another_process_plays_the_same(open_game):
    here = [transcript(open_game(family), family, seed) for family, seed in PLAYED[:2]]
    code = (
        "import json, sys; sys.path.insert(0, ''); from tests.test_minihack import *; "
        "print(json.dumps([transcript(MiniHack().open(f), f, s) for f, s in PLAYED[:2]]))"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here


def test_state_hash_is_of_the_visible_state(open_game):
    game = open_game("eat")
    hashes = {}
    for seed in (0, 1, 2, 0):
        game.reset(game_id("eat", seed))
        before = game.state_hash()
        game.step("search")
        assert game.state_hash() == before
        hashes.setdefault(seed, before)
        assert hashes[seed] == before
    assert len(set(hashes.values())) == 3


# --- ends ---


def test_success_is_told_in_a_clean_sentence(open_game):
    game = open_game("levitate_ring", "full")
    game.reset(game_id("levitate_ring", 10003))
    outcome = None

    act = make_expert("levitate_ring", random.Random(0))
    while outcome is None:
        step = game.step(act(game.raw()))
        outcome = step.outcome
    assert outcome is Outcome.SUCCESS and step.reward == 1.0
    assert step.observation.text.endswith("You succeeded.")
    assert (
        "float" in step.observation.text
        and "|" not in step.observation.text
        and "\n" not in step.observation.text
    )
    assert game.step("north") == dataclasses.replace(step, reward=0.0)


@pytest.mark.parametrize("style", ["full", "compact"])
def test_death_is_told_in_a_clean_sentence(open_game, style):
    game = open_game("lava_cross", style)
    game.reset(game_id("lava_cross", 10003))
    for _ in range(12):
        step = game.step("go east")
        if step.outcome:
            break
    assert step.outcome is Outcome.DEATH and step.reward == 0.0
    text = step.observation.text.lower()
    assert "lava" in text and "you died" in text
    assert "points" not in text and "possessions" not in text and "rank" not in text


def test_messages_before_a_more_prompt_are_kept(open_game):
    game = open_game("wield", "full")
    game.reset(game_id("wield", 3))
    text = game.step("pray").observation.text
    assert "You begin praying" in text and "You feel" in text


def test_no_step_limit_of_its_own(open_game):
    game = open_game("room_random")
    game.reset(game_id("room_random", 1))
    assert all(game.step("search").outcome is None for _ in range(260))


# --- prompts and arguments ---


def test_one_of_two_objects_can_be_picked_up(open_game):
    game = open_game("wield")
    game.reset(game_id("wield", 3))
    game.step("drop club")
    game.step("drop sling")
    assert {t.noun for t in game.raw().here if t.kind == "object"} == {"club", "sling"}
    game.step("pickup club")
    assert [t.noun for t in game.raw().here if t.kind == "object"] == ["sling"]
    assert "club" in {item.noun for item in game.raw().items}
    game.step("drop club")
    game.step("pickup")
    assert not [t for t in game.raw().here if t.kind == "object"]
    assert {"club", "sling"} <= {item.noun for item in game.raw().items}


def test_what_cannot_be_read_costs_a_step_but_no_time(open_game):
    game = open_game("wield")
    game.reset(game_id("wield", 3))
    turn, position = game.raw().turn, game.raw().position
    for action, note in (
        ("dance", "Unknown action: 'dance'"),
        ("", "No action was given"),
        ("wield excalibur", "You have no excalibur"),
        ("wield Z", "You have no item 'Z'"),
        ("wield", "wield what?"),
        ("kick", "kick needs a direction"),
        ("kick door", "no such thing is next to you"),
        ("go up", "eight directions"),
        ("throw rock", "throw needs a direction"),
        ("pickup apple", "There is no apple here"),
        ("up", "the answer was no"),
    ):
        step = game.step(action)
        assert step.outcome is None and step.reward == 0.0
        assert note in step.observation.text, action
        assert (game.raw().turn, game.raw().position) == (turn, position), action
    assert game.step("wield sling").observation.text.startswith("b - a ")


def test_a_name_that_fits_several_items_is_answered_with_the_list(open_game):
    game = open_game("room_monster")
    game.reset(game_id("room_monster", 5))
    text = game.step("drop uncursed").observation.text
    assert "You have no uncursed" in text
    items = tuple(
        Item(letter=letter, noun="wand", name=name, text=f"a {name}", gained=True)
        for letter, name in (("f", "iron wand"), ("g", "pine wand"))
    )

    assert find_item("wand", items, "fg") == "Which wand? f - a iron wand, g - a pine wand."
    assert find_item("pine wand", items, "").letter == "g"
    assert find_item("f", items, "").letter == "f"
    assert find_item("wand", items, "g").letter == "g"


def test_a_missing_direction_wastes_no_charge(open_game):
    game = open_game("lava_cross")
    game.reset(game_id("lava_cross", 10003))
    game.step("pickup wand")
    for _ in range(4):
        game.step("east")
    before = game.raw()
    step = game.step("zap wand")
    assert "needs a direction" in step.observation.text
    after = game.raw()
    assert (after.turn, after.position, after.items, after.rows) == (
        before.turn,
        before.position,
        before.items,
        before.rows,
    )
    assert "lava cools" in game.step("zap f e").observation.text


def test_eat_takes_what_lies_here_and_quaff_drinks_from_the_sink(open_game):

    for family, action in (("eat", "eat"), ("sink", "quaff"), ("pray", "pray")):
        game = open_game(family, "compact")
        game.reset(game_id(family, 7))
        act = make_expert(family, random.Random(0))
        while (typed := act(game.raw())).startswith("go "):
            game.step(typed)
        assert game.step(action).outcome is Outcome.SUCCESS, family


def test_fight_attacks_and_leaves_no_key_pending(open_game):
    game = open_game("room_monster", "full")
    game.reset(game_id("room_monster", 10021))
    assert "jackal" in game.step("fight jackal").observation.text.split("Map:")[0]
    game.reset(game_id("room_monster", 10021))
    text = game.step("fight south").observation.text
    assert "thin air" in text or "attack" in text
    position = game.raw().position
    game.step("search")
    assert game.raw().position == position


def test_a_door_is_known_to_be_locked_once_tried(open_game):
    game = open_game("locked_door", "compact")
    text = game.reset(game_id("locked_door", 10003)).text
    assert "see : closed door 1 north 2 east" in text
    text = game.step("go northeast").observation.text
    assert "east : closed door" in text
    assert "east : locked door" in game.step("open door").observation.text


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("north", Command(verb="go", direction="north")),
        ("Go East.", Command(verb="go", direction="east")),
        ("go ne", Command(verb="go", direction="northeast")),
        ("far south", Command(verb="far", direction="south")),
        ("pick up the apple", Command(verb="pickup", item="apple")),
        ("put on amulet", Command(verb="puton", item="amulet")),
        ("take off boots", Command(verb="takeoff", item="boots")),
        ("zap f e", Command(verb="zap", item="f", direction="east")),
        ("zap e", Command(verb="zap", item="e")),
        ("zap the wand at east", Command(verb="zap", item="wand", direction="east")),
        ("wield a", Command(verb="wield", item="a")),
        ("kick n", Command(verb="kick", direction="north")),
        ("kick door", Command(verb="kick", direction="door")),
        ("eat", Command(verb="eat")),
        ("pray here", Command(verb="pray")),
        ("wear B", Command(verb="wear", item="B")),
    ],
)
def test_actions_are_read_as_people_write_them(text, command):
    assert parse(text) == command


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("wear f - a robe", Command(verb="wear", item="f - robe")),
        ("wear f - a robe (being worn)", Command(verb="wear", item="f - robe")),
        ("Take off f - an uncursed +0 robe (being worn).", Command(verb="takeoff", item="f - uncursed +0 robe")),
        ("remove g - a ring (on left hand)", Command(verb="remove", item="g - ring")),
        ("wield b - 12 +0 daggers (alternate weapon; not wielded)", Command(verb="wield", item="b - 12 +0 daggers")),
        ("wield a - a +1 club (weapon in hand)", Command(verb="wield", item="a - +1 club")),
        ("wield robe (being worn)", Command(verb="wield", item="robe")),
        ("drop the robe (f)", Command(verb="drop", item="robe f")),
        ("drop (robe)", Command(verb="drop", item="robe")),
        ("drop $ - 5 gold pieces", Command(verb="drop", item="$ - 5 gold pieces")),
        ("drop A - a robe", Command(verb="drop", item="A - robe")),
        ("zap f - a wand (0:4) east", Command(verb="zap", item="f - wand", direction="east")),
        ("zap f - a wand e", Command(verb="zap", item="f - wand", direction="east")),
        ("zap wand (east)", Command(verb="zap", item="wand", direction="east")),
        ("zap f - a wand", Command(verb="zap", item="f - wand")),
        ("throw a - a dagger to the east", Command(verb="throw", item="a - dagger", direction="east")),
        ("throw a e", Command(verb="throw", item="a", direction="east")),
        ("throw a north", Command(verb="throw", item="a", direction="north")),
        ("throw a dagger north", Command(verb="throw", item="dagger", direction="north")),
        ("apply a", Command(verb="apply", item="a")),
        ("apply a pick", Command(verb="apply", item="pick")),
        ("What do you want to wear? [f or ?*] f", Command(verb="wear", item="f")),
        ("What do you want to take off? [ef or ?*] f - a robe (being worn)", Command(verb="takeoff", item="f - robe")),
        ("what do you want to use or apply? [ef or ?*] e", Command(verb="apply", item="e")),
        ("What do you want to drink? [d or ?*]", Command(verb="quaff")),
        ("What do you want to zap? f east", Command(verb="zap", item="f", direction="east")),
        ("wear f [f or ?*]", Command(verb="wear", item="f")),
        ("wear [f or ?*]", Command(verb="wear")),
        ("wear [f]", Command(verb="wear", item="f")),
        ("wear: f", Command(verb="wear", item="f")),
        ("search --More--", Command(verb="search")),
    ],
)  # fmt: skip
def test_lines_of_the_pack_and_questions_are_read_whole(text, command):
    assert parse(text) == command


@pytest.mark.parametrize(
    "text", ["y", "f", "yes", "--More--", "esc", "n", "f - a robe (being worn)"]
)
def test_an_answer_without_a_question_is_told_what_to_say(text):
    assert parse(text).endswith("say the whole action, for example: wear f.")


PACK = tuple(
    Item(letter=letter, noun=noun, name=name, text=text, gained=False)
    for letter, noun, name, text in (
        ("a", "club", "club", "a +1 club (weapon in hand)"),
        ("b", "dagger", "daggers", "12 +0 daggers (alternate weapon; not wielded)"),
        ("f", "robe", "robe", "an uncursed +0 robe (being worn)"),
        ("g", "wand", "wand of digging", "a wand of digging (0:4)"),
        ("h", "wand", "oak wand", "a cursed oak wand"),
        ("$", "gold", "gold pieces", "5 gold pieces"),
    )
)


@pytest.mark.parametrize(
    ("typed", "letter"),
    [
        *(("wear " + wanted, "f") for wanted in (
            "f", "robe", "f - a robe", "f - an uncursed +0 robe (being worn)", "an uncursed robe",
            "uncursed +0 robe", "robe (being worn)", "f robe", "the robe (f)", "f) robe", "f: robe",
            "f. an uncursed +0 robe (being worn)", "item f"[5:], "the robe",
        )),
        *(("wield " + wanted, "b") for wanted in (
            "b", "dagger", "12 daggers", "b - 12 +0 daggers (alternate weapon; not wielded)",
        )),
        *(("zap " + wanted, "g") for wanted in (
            "g - a wand of digging (0:4) east", "wand of digging", "digging", "g wand east",
        )),
        ("zap cursed wand", "h"),
        ("drop $", "$"),
        ("drop $ - 5 gold pieces", "$"),
        ("drop gold", "$"),
        ("wield a - a +1 club (weapon in hand)", "a"),
    ],
)  # fmt: skip
def test_an_item_is_meant_by_its_letter_its_name_or_its_whole_line(typed, letter):
    found = find_item(parse(typed).item, PACK, "")
    assert isinstance(found, Item) and found.letter == letter


@pytest.mark.parametrize(
    ("typed", "note"),
    [
        ("wear z - a robe", "You have no item 'z'."),
        ("wear a - a robe", "a is no robe: you have a - a +1 club (weapon in hand)."),
        ("wear f - a cursed robe", "f is no cursed robe: you have f - an uncursed"),
        ("wear cursed robe", "You have no cursed robe."),
        ("wield 3 daggers", "You have no 3 daggers."),
        ("drop uncursed", "You have no uncursed."),
        ("drop being worn", "You have no being worn."),
        ("wear b robe", "You have no b robe."),
        ("zap wand", "Which wand? g - a wand of digging (0:4), h - a cursed oak wand."),
    ],
)
def test_what_contradicts_the_pack_is_not_guessed(typed, note):
    assert find_item(parse(typed).item, PACK, "").startswith(note)


def test_the_real_game_takes_letters_names_and_lines_alike(open_game):
    game = open_game("room_monster")
    texts = {}
    for wanted in ("c", "armor", "c - an uncursed +1 leather armor (being worn)"):
        game.reset(game_id("room_monster", 10003))
        first = {item.letter: item for item in game.raw().items}
        assert first["c"].text == "an uncursed +1 leather armor (being worn)"
        said = [game.step(f"takeoff {wanted}").observation.text]
        worn = {item.letter: item.text for item in game.raw().items}["c"]
        assert worn == "an uncursed +1 leather armor"
        said.append(game.step(f"What do you want to wear? [c or ?*] {wanted}").observation.text)
        assert {item.letter: item for item in game.raw().items} == first
        texts[wanted] = said
    assert len({tuple(said) for said in texts.values()}) == 1


def test_every_line_of_a_real_pack_is_understood(open_game):
    for family in ("room_monster", "levitate_ring"):
        game = open_game(family)
        game.reset(game_id(family, 10003))
        for item in game.raw().items:
            for wanted in (item.letter, f"{item.letter} - {item.text}", item.text, item.name):
                game.reset(game_id(family, 10003))
                game.step(f"drop {wanted}")
                left = {kept.letter for kept in game.raw().items}
                assert item.letter not in left or "being worn" in item.text, (family, wanted)


def test_the_letter_a_is_thrown_where_a_direction_follows(open_game):
    game = open_game("levitate_ring")
    game.reset(game_id("levitate_ring", 10003))
    assert game.raw().items[0].letter == "a"
    game.step("throw a w")
    assert "a" not in {item.letter for item in game.raw().items}


@pytest.mark.parametrize(
    "text", ["", "!!!", "zapp wand", "north please", "pray loudly", "kick", "n"]
)
def test_other_actions_give_a_note(text):
    assert isinstance(parse(text), str)


@pytest.mark.parametrize(
    ("text", "name", "noun"),
    [
        ("a +1 club (weapon in hand)", "club", "club"),
        ("12 uncursed flint stones (in quiver pouch)", "flint stones", "stone"),
        ("a pair of combat boots", "combat boots", "boots"),
        ("a key named The Master Key of Thievery", "key named The Master Key of Thievery", "key"),
        ("a blessed +0 robe", "robe", "robe"),
        ("a +0 robe (being worn) (unpaid, 5 zorkmids)", "robe", "robe"),
        ("2 +0 daggers (alternate weapon; not wielded)", "daggers", "dagger"),
    ],
)
def test_names_and_nouns(text, name, noun):
    assert plain_name(text) == name
    assert object_noun(name, -1) == noun


# --- text ---


def test_full_text_shows_the_pack_only_when_it_changed(open_game):
    game = open_game("zap", "full")
    text = game.reset(game_id("zap", 5)).text
    assert (
        "You carry:" in text
        and "- wand (2 north)" in text
        and "Legend:" in text
        and "/ wand" in text
    )
    assert "welcome to NetHack" not in text
    game.step("north")
    text = game.step("north").observation.text
    assert text.startswith("You see here an iron wand.") and "You carry:" not in text
    assert "f - an iron wand" in game.step("pickup").observation.text
    assert "You carry:" in game.step("inventory").observation.text


def test_compact_text_is_short_lower_case_and_names_classes(open_game):
    lengths = []
    for family in ("zap", "levitate", "lava_cross", "keyroom", "room_monster"):
        game = open_game(family, "compact")

        for seed in range(8):
            observation = game.reset(game_id(family, seed))
            act = make_expert(family, random.Random(seed))
            for _ in range(20):
                text = observation.text
                assert text == text.lower() and set(text) <= set(
                    "abcdefghijklmnopqrstuvwxyz0123456789 .,:"
                )
                lengths.append(len(text.split()))
                step = game.step(act(game.raw()))
                observation = step.observation
                if step.outcome:
                    break
    assert 20 <= sum(lengths) / len(lengths) <= 35
    assert max(lengths) <= 60


def test_compact_transcript_of_a_known_game(open_game):
    game = open_game("zap", "compact")
    assert (
        game.reset(game_id("zap", 5)).text == "here : upstairs . west : wall . see : wand 2 north ."
    )
    game.step("north")
    assert (
        game.step("go north").observation.text
        == "you see here a wand . here : wand . west : wall . see : upstairs 2 south ."
    )
    assert (
        game.step("pickup wand").observation.text
        == "a wand . west : wall . see : upstairs 2 south . items : wand ."
    )
    step = game.step("zap wand")
    assert step.outcome is Outcome.SUCCESS and step.observation.text.endswith("you succeeded .")


# --- splits ---


def test_splits_are_disjoint_by_layout_and_skip_repeats(open_game):
    game = open_game("eat", "compact")
    hashes = []
    for seed in range(250):
        game.reset(game_id("eat", seed))
        hashes.append((game.state_hash(), game.layout_hash()))
    chosen = splits.assign(hashes)
    layouts = {name: {hashes[seed][1] for seed in seeds} for name, seeds in chosen.items()}
    assert all(layouts.values())
    assert (
        not layouts["train"] & layouts["test"]
        and not layouts["train"] & layouts["select"]
        and not layouts["select"] & layouts["test"]
    )
    states = [hashes[seed][0] for seeds in chosen.values() for seed in seeds]
    assert len(set(states)) == len(states)


def test_a_family_with_one_layout_is_split_by_state():
    digests = [f"{i * 2654435761 % 2**32:08x}" for i in range(100)]
    chosen = splits.assign([(digest, "0" * 8) for digest in digests] + [(digests[0], "0" * 8)])
    assert collections.Counter(
        seed for seeds in chosen.values() for seed in seeds
    ) == collections.Counter(range(100))
    assert all(chosen.values())


def test_games_are_cached_and_an_unreadable_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(splits, "WANTED", {"train": 3, "select": 1, "test": 2})
    calls = []

    def fake_run(command, **options):
        calls.append(command)
        data = {"train": [0, 2, 3], "select": [4], "test": [1, 5]}
        splits.write_json(splits.cache_path("eat"), data)
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(data) + "\n", stderr="")

    monkeypatch.setattr(splits.subprocess, "run", fake_run)
    for content in (None, "", "{}", '{"train": 1, "select": 2, "test": 3}', "\xff"):
        splits._splits.cache_clear()
        if content is not None:
            splits.cache_path("eat").write_text(content, encoding="latin-1")
        games = MiniHack().games("eat", "test")
        assert games == (game_id("eat", 1), game_id("eat", 5))
    assert len(calls) == 5
    splits._splits.cache_clear()
    assert len(MiniHack().games("eat", "train")) == 3 and len(calls) == 5
    splits._splits.cache_clear()


@pytest.fixture
def thousand_states(monkeypatch):
    """A family of 1,000 initial states, each of which two seeds have; counts those started."""
    started = []

    def start(family, games):
        for game in games:
            started.append(int(game.key))
            digest = f"{int(game.key) % 1000 * 2654435761 % 2**32:08x}"
            yield digest, digest

    monkeypatch.setattr(splits, "_start", start)
    return started


def test_more_games_go_on_where_those_of_a_split_end(thousand_states, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        splits.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(
            command, splits.main(command[4:]), stdout="", stderr=""
        ),
    )
    monkeypatch.setattr(splits, "_parsed", lambda _: splits._read(found[-1], sys.maxsize))
    found = []
    monkeypatch.setattr(
        splits, "write_json", lambda path, data: (found.append(path), write_json(path, data))
    )
    splits._splits.cache_clear()
    games = {name: MiniHack().games("eat", name) for name in splits.SPLITS}
    assert [len(of_split) for of_split in games.values()] == [400, 60, 120]
    more = MiniHack().more_games("eat", "test", 170)
    assert len(more) == 170 and more[:120] == games["test"]
    assert more[:5] == MiniHack().more_games("eat", "test", 5)
    assert {*more}.isdisjoint({*games["train"], *games["select"]})
    scans = len(found)
    assert MiniHack().more_games("eat", "test", 190)[:170] == more and len(found) == scans
    # there are 20 % of 1,000; then seeds tell nothing new, and the scan ends
    thousand_states.clear()
    assert 170 < len(MiniHack().more_games("eat", "test", 700)) < 230
    assert max(thousand_states) < 5000
    splits._splits.cache_clear()
    splits._more.cache_clear()


def test_the_scanner_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "envs.minihack.index", "eet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Unknown MiniHack family 'eet'" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "envs.minihack.index", "eat"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    data = json.loads(done.stdout)
    assert {name: len(seeds) for name, seeds in data.items()} == splits.WANTED
    assert [json.loads(path.read_text()) for path in (tmp_path / "ictjax").iterdir()] == [data]


def test_the_report_counts_what_splits_share(monkeypatch, capsys):
    # Of two families with the same first screen, the second was trained on what the first is tested
    # on.
    seeds = {
        "eat": {"train": [0], "select": [1], "test": [2]},
        "wield": {"train": [2, 3], "select": [4], "test": [5]},
    }
    starts = {
        0: ("a", "A"),
        1: ("b", "B"),
        2: ("c", "C"),
        3: ("d", "B"),
        4: ("e", "E"),
        5: ("f", "F"),
    }
    monkeypatch.setattr(
        splits,
        "load_index",
        lambda family, name: [game_id(family, seed) for seed in seeds[family][name]],
    )
    monkeypatch.setattr(
        splits, "_start", lambda _family, games: [starts[int(game.key)] for game in games]
    )
    check = splits.check_splits(["eat"])
    assert check == (dict(train=1, select=1, test=1), 3, 3, 0, 0)
    check = splits.check_splits(["wield"], ["eat"])
    # state c; screens C, and B by another state
    assert check == (dict(train=2, select=2, test=2), 5, 4, 1, 2)
    assert splits.main(["--report", "eat"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| eat | 1 | 1 | 1 | 3 | 3 | 0 | 0 |"
    assert splits.main(["--report", "eet"]) == 2 and splits.main([]) == 2


def test_real_splits_share_no_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(splits, "WANTED", {"train": 40, "select": 10, "test": 10})
    splits._splits.cache_clear()
    splits.write_json(splits.cache_path("room_monster"), splits.scan("room_monster"))
    check = splits.check_splits(["room_monster"])
    splits._splits.cache_clear()
    assert check.num_games == {"train": 40, "select": 10, "test": 10}
    assert check.num_states == 60 and check.shared_states == check.shared_layouts == 0


def test_every_registered_task_is_a_family_or_left_out_for_a_reason():
    registered = {name for name in console.gymnasium.registry if name.startswith("MiniHack-")}
    assert len(set(GYM_IDS.values())) == len(GYM_IDS)
    ours = {name for name in GYM_IDS.values() if name.startswith("ictjax-")}
    assert set(GYM_IDS.values()) - ours <= registered
    left_out = registered - set(GYM_IDS.values())
    assert [name for name in sorted(left_out) if why_left_out(name) is None] == []
    assert [name for name in GYM_IDS.values() if why_left_out(name) is not None] == []
    for pattern, reason in LEFT_OUT.items():
        assert any(re.fullmatch(pattern, name) for name in left_out) and len(reason) > 20
    assert (len(GYM_IDS) - len(ours), len(ours), len(left_out)) == (98, 9, 63)


@pytest.mark.parametrize(
    "task", ["LavaCross-Levitate-Ring-Inv", "WoD-Hard", "Freeze-Random", "Levitate-Boots"]
)
def test_restricted_tasks_are_the_same_games(task, monkeypatch):
    hashes = []
    for kind in ("Full", "Restricted"):
        monkeypatch.setattr(game_module, "GYM_IDS", {"eat": f"MiniHack-{task}-{kind}-v0"})
        game = MiniHackGame("eat", style="full")
        hashes.append([])
        for seed in range(3):
            text = game.reset(game_id("eat", seed)).text
            hashes[-1].append((game.state_hash(), text, game.step("pickup").observation.text))
        game.close()
    assert hashes[0] == hashes[1]


def test_family_splits_are_disjoint_and_real():
    for train, heldout in FAMILY_SPLITS.values():
        assert not set(train) & set(heldout) and set(train) | set(heldout) <= set(FAMILIES)
    assert not set(SOUND_RESERVE) & {family for part in FAMILY_SPLITS["sound"] for family in part}
    assert set(STEPS) <= set(FAMILIES) and min(STEPS.values()) > step_limit("eat") == 25


def test_what_a_run_writes_down():
    description = MiniHack(text="compact").describe()
    assert description["text"] == "compact" and set(description["packages"]) == {"minihack", "nle"}
    assert json.loads(json.dumps(description)) == description


def test_families_are_sorted_and_named_in_lower_case():
    assert tuple(sorted(FAMILIES)) == FAMILIES == MiniHack().families
    assert all(family == family.lower() and "-" not in family for family in FAMILIES)


def test_a_closed_game_says_so():
    game = MiniHackGame("eat", style="compact")
    with pytest.raises(ValueError, match="never reset"):
        game.raw()
    game.close()
    with pytest.raises(ValueError, match="closed"):
        game.reset(game_id("eat", 0))


def test_the_live_game_is_renewed_after_many_episodes(monkeypatch):
    monkeypatch.setattr(game_module, "_RECYCLE_AFTER", 2)
    game = MiniHackGame("eat", style="compact")
    texts = [game.reset(game_id("eat", seed)).text for seed in (1, 2, 1, 2, 1)]
    game.close()
    assert texts[0] == texts[2] == texts[4] != texts[1] == texts[3]
