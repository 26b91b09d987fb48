import random

import pytest

from envs.alfworld import FAMILIES, ALFWorld
from envs.alfworld.compact import CompactText, Notes, read_task
from envs.alfworld.expert import make_expert, next_command
from envs.alfworld.game import AlfworldGame

ROOM = (
    "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around"
    " you, you see a drawer 2, a drawer 1, a fridge 1, and a shelf 1.\n\nYour task is to: put a"
    " clean apple in fridge."
)
GO = ("go to drawer 1", "go to drawer 2", "go to fridge 1", "go to shelf 1")


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("put a book in sofa.", "put book sofa"),
        ("put some mug on dresser.", "put mug dresser"),
        ("look at laptop under the desklamp.", "look laptop desklamp"),
        ("examine the alarmclock with the desklamp.", "look alarmclock desklamp"),
        ("clean some ladle and put it in diningtable.", "clean ladle diningtable"),
        ("put a clean cloth in cabinet.", "clean cloth cabinet"),
        ("put a hot mug in sidetable.", "heat mug sidetable"),
        ("heat some egg and put it in diningtable.", "heat egg diningtable"),
        ("put a cool tomato in microwave.", "cool tomato microwave"),
        ("cool some pan and put it in stoveburner.", "cool pan stoveburner"),
        ("put two cd in drawer.", "two cd drawer"),
        ("find two cd and put them in drawer.", "two cd drawer"),
    ],
)
def test_every_form_of_a_task_sentence_is_read(sentence, words):
    task = read_task(f"You see a drawer 1.\n\nYour task is to: {sentence}")
    assert f"{task.kind} {task.thing} {task.place}" == words


@pytest.mark.parametrize("text", ["", "Your task is to: UNKNOWN GOAL.", "You arrive at drawer 1."])
def test_text_without_a_known_task_is_refused(text):
    with pytest.raises(ValueError, match="No known ALFWorld task"):
        read_task(text)


def test_a_turn_says_what_the_official_text_showed_and_no_more():
    compact = CompactText(ROOM, GO)
    assert compact.text == "task clean apple fridge . left shelf drawer fridge ."
    text = compact.update(
        "go to shelf 1",
        "You arrive at shelf 1. On the shelf 1, you see a bowl 1, an apple 2, and an apple 1.",
        ("look",),
    )
    assert (
        text == "task clean apple fridge . at shelf . found apple . see bowl . left drawer fridge ."
    )
    text = compact.update(
        "go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.", ("open fridge 1",)
    )
    assert (
        text
        == "task clean apple fridge . at place fridge closed . know apple shelf . left drawer ."
    )
    text = compact.update(
        "open fridge 1",
        "You open the fridge 1. The fridge 1 is open. In it, you see nothing.",
        ("look",),
    )
    assert text == "task clean apple fridge . at place fridge . know apple shelf . left drawer ."
    text = compact.update("jump", "Nothing happens.", ("look",))
    assert (
        text
        == "nothing happens . task clean apple fridge . at place fridge . know apple shelf . left"
        " drawer ."
    )


def test_marks_and_things_put_down_are_remembered():
    compact = CompactText(ROOM, GO)
    compact.update(
        "go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see an apple 1.", ()
    )
    assert "carry apple" in compact.update(
        "take apple 1 from shelf 1", "You pick up the apple 1 from the shelf 1.", ()
    )
    assert "carry clean apple" in compact.update(
        "clean apple 1 with sinkbasin 1", "You clean the apple 1 using the sinkbasin 1.", ()
    )
    text = compact.update("move apple 1 to shelf 1", "You move the apple 1 to the shelf 1.", ())
    assert "done apple" in text and "found" not in text and "carry" not in text


def test_what_was_closed_again_is_not_seen():
    compact = CompactText(ROOM, GO)
    compact.update("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.", ())
    assert "found apple" in compact.update(
        "open fridge 1",
        "You open the fridge 1. The fridge 1 is open. In it, you see an apple 1.",
        (),
    )
    text = compact.update("close fridge 1", "You close the fridge 1.", ())
    assert "at place fridge closed" in text and "found" not in text


def test_words_mean_the_place_and_thing_that_matter():
    compact = CompactText(ROOM, GO)
    assert compact.command("go drawer") == "go to drawer 1"  # the first not looked into
    compact.update(
        "go to drawer 1",
        "You arrive at drawer 1. The drawer 1 is closed.",
        (*GO[1:], "open drawer 1"),
    )
    assert compact.command("open drawer") == "open drawer 1"
    assert compact.command("go drawer") == "go to drawer 2"  # another than where one is
    compact.update(
        "open drawer 1",
        "You open the drawer 1. The drawer 1 is open. In it, you see an apple 3.",
        GO[1:],
    )
    compact.update(
        "go to shelf 1",
        "You arrive at shelf 1. On the shelf 1, you see an apple 1.",
        (*GO[:3], "take apple 1 from shelf 1"),
    )
    assert compact.command("go drawer") == "go to drawer 1"  # it holds the thing of the task
    assert compact.command("take apple") == "take apple 1 from shelf 1"
    # A place that shares the agent's spot cannot be gone to: it is looked at.
    compact.update("go to shelf 1", "Nothing happens.", (*GO[:2], "examine fridge 1"))
    assert compact.command("go fridge") == "examine fridge 1"


@pytest.mark.parametrize(
    "action",
    ["go moon", "take", "eat apple", "", "look", "go to drawer 2", "take apple 1 from shelf 1"],
)
def test_other_actions_pass_unchanged(action):
    assert CompactText(ROOM, GO).command(action) == action


def test_what_the_agent_put_down_is_taken_last():
    compact = CompactText(ROOM, GO)
    compact.update(
        "go to shelf 1",
        "You arrive at shelf 1. On the shelf 1, you see an apple 1, and an apple 2.",
        (),
    )
    compact.update("take apple 1 from shelf 1", "You pick up the apple 1 from the shelf 1.", ())
    compact.update(
        "move apple 1 to shelf 1",
        "You move the apple 1 to the shelf 1.",
        ("take apple 1 from shelf 1", "take apple 2 from shelf 1"),
    )
    assert compact.command("take apple") == "take apple 2 from shelf 1"


@pytest.mark.parametrize("family", FAMILIES)
def test_two_words_are_enough_to_win(family):
    """Each command of the expert, cut to two words, means a command that wins too; the game shows
    what its own notes say.
    """
    environment = ALFWorld(data="generated", rooms="small", text="compact")
    game = environment.open(family)
    assert isinstance(game, AlfworldGame)
    for game_id in environment.games(family, "select")[:4]:
        text = game.reset(game_id).text
        compact = CompactText(game.official().text, game.official().commands)
        for _ in range(20):
            assert text == compact.text and len(text.split()) <= 40
            action = " ".join(
                next_command(compact.notes)
                .replace("go to", "go")
                .replace("move", "put")
                .split()[:2]
            )
            step = game.step(action)
            text = step.observation.text
            compact.update(compact.command(action), game.official().text, game.official().commands)
            if step.outcome is not None:
                break
        assert step.outcome == "success", game_id
    game.close()


@pytest.mark.parametrize("rooms", ["small", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_wins_and_repeats_itself(family, rooms):
    environment = ALFWorld(data="generated", rooms=rooms)
    game = environment.open(family)
    for game_id in environment.games(family, "test")[:5]:
        runs = []
        for _ in range(2):
            seen, act, played = game.reset(game_id), make_expert(), []
            for _ in range(50):
                played.append(act(seen.text, seen.actions))
                assert played[-1] in seen.actions
                step = game.step(played[-1])
                seen = step.observation
                if step.outcome is not None:
                    break
            runs.append(played)
        assert step.outcome == "success", (game_id, played)
        assert runs[0] == runs[1]
    game.close()


def test_the_expert_starts_from_a_reset():
    with pytest.raises(ValueError, match="No known ALFWorld task"):
        make_expert()("You arrive at drawer 1.", ())


def test_notes_follow_any_play():
    """Random commands, good and bad: what the notes say is carried and open is what the game
    says.
    """
    game = ALFWorld(data="generated", rooms="full").open("clean")
    rng = random.Random(0)
    for game_id in ALFWorld(data="generated", rooms="full").games("clean", "test")[:3]:
        seen = game.reset(game_id)
        notes = Notes(seen.text, seen.actions)
        for _ in range(60):
            command = rng.choice([*seen.actions, "take moon 1 from shelf 1"])
            seen = game.step(command).observation
            notes.update(command, seen.text, seen.actions)
            holding = {
                action.split(" to ")[0].removeprefix("move ")
                for action in seen.actions
                if action.startswith("move ")
            }
            assert holding <= {notes.held}
            assert (notes.here in notes.closed) == (f"open {notes.here}" in seen.actions)
    game.close()
