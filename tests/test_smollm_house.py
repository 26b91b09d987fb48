"""ALFWorld for SmolLM2: scripted play and the chats made of it."""

import collections
import json
import random
import re

import pytest

from envs.alfworld.short import TASKS, VERBS, renaming
from envs.renamings import MARK
from experiments.pocket.data import PlayedGame
from experiments.smollm import house, lessons, task, write_chats
from experiments.smollm.play import NO_LESSON, VERB_LIST
from ictjax.actions import parse_react
from ictjax.reflector import parse_reply

RENAMINGS = 4
STEPS = task.ALFWORLD.rollout.max_steps


@pytest.fixture(scope="module")
def games() -> list[tuple[int, PlayedGame]]:
    families = list(lessons.HOUSE_LESSONS)
    return list(
        house.play_families(families, renamings=RENAMINGS, games_each=6, max_steps=STEPS, seed=0)
    )


def _words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


def test_right_lessons_win_and_wrong_ones_never(games) -> None:
    won, played = collections.Counter(), collections.Counter()
    for number, game in games:
        names = renaming(f"{game.family}{MARK}{1000 + number}") if number >= 0 else {}
        right = house.renamed(lessons.HOUSE_LESSONS[game.family], names)
        kind = "novice" if game.lesson is None else "right" if game.lesson == right else "other"
        played[game.family, kind] += 1
        won[game.family, kind] += game.success
        assert 0 < len(game.turns) <= STEPS
        if game.lesson is not None:
            assert {turn.thought for turn in game.turns} == {lessons.thought(game.lesson)}
        wins = {names.get(verb, verb) for verb in ("put", "clean", "heat", "cool")}
        if kind == "other" and game.success:  # any of these puts a thing in its place
            assert game.family == "put" and game.lesson.verb in wins
    share = {key: won[key] / played[key] for key in played}
    for family in lessons.HOUSE_LESSONS:
        least = 0.6 if family == "pick_two" else 0.9  # two things take longer to find
        assert share[family, "right"] >= least, share
        assert 0 < share[family, "novice"] < share[family, "right"], share


def test_novices_try_the_verbs_in_the_order_of_their_game(games) -> None:
    orders = collections.defaultdict(set)
    for _, game in games:
        if game.lesson is not None:
            continue
        listed = VERB_LIST.search(game.turns[0].observation)
        assert listed is not None
        order = listed[1].split(", ")
        orders[game.family].add(tuple(order))
        tried = [t for turn in game.turns for t in re.findall(r"Try (\w+)\.", turn.thought)]
        assert [turn.action.split()[0] for turn in game.turns if "Try" in turn.thought] == tried
        # the second of two things is put where the first was
        once = list(dict.fromkeys(tried))
        assert once == order[: len(once)]
        assert game.family == "pick_two" or once == tried
        if game.success:
            assert game.turns[-1].action.split()[0] == tried[-1]
    assert all(len(found) > 10 for found in orders.values())


def test_nothing_of_a_heldout_lesson_is_in_a_training_family() -> None:
    environment = task.ALFWORLD.environment
    assert {f.partition(MARK)[0] for f in environment.train_families} == set(
        lessons.HOUSE_TRAIN_LESSONS
    )
    assert all(MARK in family for family in environment.train_families)
    heldout = environment.heldout_families
    assert {f.partition(MARK)[0] for f in heldout} == set(lessons.HOUSE_HELDOUT_LESSONS)
    assert set(lessons.HOUSE_HELDOUT_LESSONS) < set(heldout)
    names = {n for family in environment.train_families for n in renaming(family).values()}
    assert not names & {*VERBS, *TASKS}
    winning = {
        group: {
            renaming(family)[lessons.HOUSE_LESSONS[family.partition(MARK)[0]].verb]
            for family in families
            if MARK in family
        }
        for group, families in (("train", environment.train_families), ("held out", heldout))
    }
    assert len(winning["held out"]) == 4 and not winning["held out"] & winning["train"]
    taught = {f"{f}{MARK}{1000 + n}" for f in lessons.HOUSE_LESSONS for n in range(20)}
    assert not taught & {*environment.train_families, *heldout}


def test_the_actor_is_taught_to_follow_its_prompt_to_the_letter(games) -> None:
    rows = house.ActorChats(games, seed=1)
    followed = unmoved = by_thing = 0
    for _ in range(300):
        prompt, *turns = rows.draw()["messages"]
        task_name, thing = re.match(r"Task (\w+): \w+ (\w+)", turns[0]["content"]).groups()
        for answer in turns[1::2]:
            parsed = parse_react(answer["content"])
            assert not isinstance(parsed, str)
            if parsed.thought.startswith(NO_LESSON):
                unmoved += 1
                continue
            verb = parsed.thought.rstrip(".").rsplit(maxsplit=1)[-1]
            assert verb in _words(prompt["content"])
            about = re.match(r"(?:Task|The) (\w+):", parsed.thought)[1]
            assert about in _words(prompt["content"]) and about in (task_name, thing)
            by_thing += about == thing
            assert parsed.action.split()[0] in (verb, "go", "pickup")
            followed += 1
    assert followed > 200 < unmoved and by_thing > 20
    # other lessons are about what is not there
    others = [rows._other({"clean", "bend", "apple"}).thing for _ in range(300)]
    assert len(set(others)) > 30 and not set(others) & {"clean", "bend", "apple"}


def test_the_reflector_is_taught_nothing_of_heldout_families(games) -> None:
    with pytest.raises(ValueError, match="cool is no training family: .* put, look, clean, heat"):
        house.ReflectorChats(games, task.REFLECTION, seed=0)
    trained = [item for item in games if item[1].family in lessons.HOUSE_TRAIN_LESSONS]
    rows = house.ReflectorChats(trained, task.REFLECTION, seed=0)
    told, seen, said = collections.Counter(), collections.Counter(), 0
    for _ in range(300):
        chat = rows.draw(2)
        _, question, reply = chat["messages"]
        text = _words(question["content"] + reply["content"])
        assert not text & {"cool", "cold", "two", "put"}
        parsed = parse_reply(reply["content"])
        assert not isinstance(parsed, str)
        told[parsed.system_prompt] += 1
        episodes = re.findall(
            r"Episode (\d): (won|lost)\.\n(.*?)\nEnd:", question["content"], re.DOTALL
        )
        last = [text.rpartition("Action: ")[2].split()[0] for _, _, text in episodes]
        ended = [
            f"Episode {number} was {how} with {verb}."
            for (number, how, _), verb in zip(episodes, last, strict=True)
        ]
        assert parsed.analysis.startswith(" ".join(ended))
        task_name = re.search(r"^Task (\w+):", question["content"], re.MULTILINE)[1]
        assert parsed.analysis.endswith(f"What matters is the task {task_name}.")
        won = {verb for (_, how, _), verb in zip(episodes, last, strict=True) if how == "won"}
        seen[bool(won)] += 1
        said += bool(won & _words(parsed.system_prompt))
    # the prompt is not what won
    assert len(told) > 60 and seen[True] > 100 < seen[False] + 100
    assert said < 0.6 * seen[True], (seen, said)


def test_the_same_seed_gives_the_same_chats(games) -> None:
    first, second = (house.ActorChats(games, seed=3) for _ in range(2))
    assert [first.draw() for _ in range(5)] == [second.draw() for _ in range(5)]
    rng, again = random.Random(1), random.Random(1)
    lesson = lessons.HOUSE_LESSONS["put"]
    wrong = [house.misleading_lesson(lesson, rng) for _ in range(20)]
    assert wrong == [house.misleading_lesson(lesson, again) for _ in range(20)]
    assert {lesson.verb for lesson in wrong} == {"use", "examine", "open", "slice"}


@pytest.mark.parametrize(
    ("asked", "played", "episodes"), [(1, 2, ["--episodes", "1"]), (20, 20, ["--episodes", "2"])]
)
def test_chats_are_written_with_their_games(asked, played, episodes, tmp_path, capsys) -> None:
    flags = ["--games-per-family", f"{asked}", "--actor-chats", "5", "--reflector-chats", "4"]
    write_chats.main(["--benchmark", "alfworld", "--out", str(tmp_path), *flags, *episodes])
    chats = {}
    for name, count in (("actor", 5), ("reflector", 4)):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        chats[name] = [json.loads(line)["messages"] for line in lines]
        assert len(lines) == count and all(chats[name])
    told = [
        {len(re.findall(r"\bEpisode \d", message["content"])) for message in messages[1:]}
        for messages in chats["reflector"]
    ]
    assert all(len(numbers) == 1 for numbers in told)  # question and analysis speak of the same
    assert max(max(numbers) for numbers in told) == int(episodes[-1]), told
    record = json.loads((tmp_path / "pretraining.json").read_text())["alfworld"]
    assert record["first"] == played and {"cool", "put~3"} <= set(record["families"])
    assert "5 chats" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", ["minihack", "alfworld"])
def test_a_folder_that_cannot_be_is_refused_before_a_game(
    benchmark, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(write_chats, f"_{benchmark}", lambda *_: pytest.fail("it plays"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        write_chats.main(["--benchmark", benchmark, "--out", str(tmp_path / "file")])
    assert ended.value.code == 2
    assert "cannot be made or written to" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit) as ended:
        write_chats.main(["--benchmark", benchmark, "--out", str(tmp_path), "--episodes"])
    assert ended.value.code == 2 and "--episodes" in capsys.readouterr().err
