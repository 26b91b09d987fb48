import random

import pytest

from envs.api import GameId, Outcome
from envs.experts import main, make_player, measure, play_episode
from envs.minihack import FAMILIES
from envs.minihack.expert import (
    EXCEPTIONS,
    beside,
    find,
    line_direction,
    make_expert,
    random_action,
    walk_beside,
    walk_towards,
)
from envs.minihack.families import step_limit
from envs.minihack.game import MiniHackGame
from envs.minihack.view import Thing, View


def picture(*rows, floating=False, here=()):
    """A view of a drawn map: @ hero, . floor, # wall, + closed door, o open door, ~ lava, ^ trap, M
    monster, > stairs.
    """
    kinds = {
        ".": ("floor", "floor"),
        "#": ("wall", "wall"),
        "+": ("closed", "closed door"),
        "o": ("open", "open door"),
        "~": ("liquid", "lava"),
        "^": ("trap", "trap"),
        "M": ("monster", "goblin"),
        ">": ("feature", "stairs"),
    }
    cells, hero = {}, None
    for y, row in enumerate(rows):
        for x, char in enumerate(row):
            if char == "@":
                hero = (x, y)
            elif char != " ":
                kind, noun = kinds[char]
                cells[x, y] = Thing(noun=noun, name=noun, kind=kind, position=(x, y))
    return View(
        position=hero,
        cells=cells,
        here=here,
        items=(),
        messages=(),
        hp=10,
        max_hp=10,
        turn=1,
        floating=floating,
        blind=False,
        rows=tuple(rows),
    )


def test_ways_go_around_lava_traps_and_monsters():
    view = picture(".....", "@~^.>", ".....")
    assert walk_towards(view, find(view, "stairs").position) in ("northeast", "southeast")
    assert walk_towards(picture("@~>", floating=True), (2, 0)) == "east"
    assert walk_towards(picture("@~>"), (2, 0)) is None
    assert walk_towards(picture("@^>"), (2, 0)) == "east"
    assert walk_towards(picture("@M>"), (2, 0)) == "east"
    assert walk_towards(picture("@+>"), (2, 0)) is None
    assert walk_towards(picture("@."), (0, 0)) is None


def test_doors_are_passed_straight():
    view = picture("#o#", "..@")
    assert walk_towards(view, (1, 0)) == "west"
    door = Thing(noun="open door", name="open door", kind="open", position=(1, 1))
    assert walk_towards(picture(".>", "#@", "..", here=(door,)), (0, 0)) == "north"


def test_directions_to_neighbours_and_in_line():
    view = picture("...", ".@.", "..+")
    assert beside(view, (1, 0)) == "north" and beside(view, (2, 2)) is None
    assert walk_beside(view, (2, 2)) in ("east", "south")
    assert line_direction(view, (2, 2)) == "southeast" and line_direction(view, (0, 1)) == "west"
    assert line_direction(picture("@.", "..", ".."), (1, 2)) is None


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="Unknown MiniHack family"):
        make_expert("eet", random.Random(0))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in EXCEPTIONS])
def test_the_expert_solves_the_family_and_reads_no_hidden_state(family):
    game = MiniHackGame(family, style="compact")
    limit = step_limit(family)
    num_games = 6 if limit == 25 else 3
    try:
        wins = 0
        for seed in range(10_000, 10_000 + num_games):
            game_id = GameId(env="minihack", family=family, key=str(seed))
            player = make_player("minihack", family, random.Random(seed))
            outcome, steps = play_episode(game, game_id, player, max_steps=limit)
            wins += outcome is Outcome.SUCCESS
            assert 1 <= steps <= limit
    finally:
        game.close()
    assert wins >= (num_games - 1 if num_games > 3 else 2)


@pytest.mark.parametrize("family", sorted(EXCEPTIONS))
def test_the_exceptions_can_be_played(family):
    game = MiniHackGame(family, style="full")
    try:
        for seed in range(10_000, 10_002):
            game_id = GameId(env="minihack", family=family, key=str(seed))
            player = make_player("minihack", family, random.Random(seed))
            outcome, steps = play_episode(game, game_id, player, max_steps=40)
            assert outcome is not Outcome.FAILED and steps >= 1
    finally:
        game.close()


def test_random_play_rarely_wins():
    row = measure("wear", num_games=10, max_steps=25)
    assert row["expert"] == 1.0 and row["random"] <= 0.2 and 3 <= row["mean_steps"] <= 8


def test_random_actions_are_all_understood():
    game = MiniHackGame("zap", style="full")
    try:
        rng = random.Random(0)
        game.reset(GameId(env="minihack", family="zap", key="1"))
        for _ in range(40):
            text = game.step(random_action(game.raw(), rng)).observation.text
            assert "Unknown action" not in text
    finally:
        game.close()


def test_the_table_is_written(capsys):
    assert main(["--families", "eat", "--games", "2"]) == 0
    assert "| eat | 100 |" in capsys.readouterr().out


def test_the_table_of_alfworld_is_written(capsys):
    flags = [
        "--env",
        "alfworld",
        "--data",
        "generated",
        "--rooms",
        "small",
        "--families",
        "put",
        "--games",
        "3",
    ]
    assert main(flags) == 0
    assert "| put | 100 |" in capsys.readouterr().out


def test_players_of_unknown_games_are_refused():
    with pytest.raises(ValueError, match="no scripted expert for 'chess'"):
        make_player("chess", "put", random.Random(0))
    with pytest.raises(ValueError, match="Unknown family 'eat' of ALFWorld"):
        make_player("alfworld", "eat", random.Random(0))
