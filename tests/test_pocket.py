"""The pocket lessons and rows, and the shipped actor: it obeys its prompt in real games of both
benchmarks, right or wrong.
"""

import random

import pytest

from envs.registry import load_environment
from experiments.pocket import lessons
from experiments.pocket.data import PlayedTurn, rename_words, things_in
from experiments.pocket.play import play_alfworld
from experiments.presets import POCKET_ALFWORLD, POCKET_MINIHACK, model_folder
from experiments.run_dir import open_pool
from ictjax.players import open_model
from ictjax.rollout import Episode, rollout

pytestmark = pytest.mark.usefixtures("optimised")

GAMES = 2


def test_lessons_name_one_thing_each_and_mislead_only_with_wrong_verbs():
    things = [lesson.thing for lesson in lessons.FAMILY_LESSONS.values()]
    assert len(set(things)) == len(things)
    rng = random.Random(0)
    for family, right in lessons.FAMILY_LESSONS.items():
        wrong = {lessons.misleading_lesson(right, rng).verb for _ in range(60)}
        assert right.verb not in wrong and not wrong & set(lessons.EQUIVALENT_VERBS.get(right, ()))
        for held_out in (False, True):
            sentence = lessons.word_lesson(right, rng, held_out=held_out).split()
            assert right.thing in sentence and right.verb in sentence
        assert lessons.reflector_prompt(right).startswith(lessons.headers(family)[0])


def test_held_out_wordings_are_no_training_wordings():
    texts = set(lessons.training_texts())
    for lesson in lessons.FAMILY_LESSONS.values():
        for seed in range(8):
            assert lessons.word_lesson(lesson, random.Random(seed), held_out=True) not in texts


def test_a_task_is_renamed_where_it_is_named_and_not_where_it_is_a_verb():
    renaming = {"task clean": "kettle", "apple": "sock"}
    turn = "task clean apple fridge . at sinkbasin . carry clean apple ."
    assert (
        rename_words(turn, renaming)
        == "task kettle sock fridge . at sinkbasin . carry clean sock ."
    )
    reply = "Thought: clean sinkbasin clean Action: clean apple"
    assert rename_words(reply, renaming) == "Thought: kettle sinkbasin clean Action: clean sock"
    assert things_in([PlayedTurn(observation=turn, thought="", action="")]) == {
        "task clean",
        "apple",
    }


def test_scripted_players_win_by_the_right_lesson_alone():
    played = list(play_alfworld(games_per_family=3, max_steps=16, seed=0))
    assert len(played) == 4 * 3 * len(lessons.ALFWORLD_LESSONS)
    for game in played:
        if game.lesson is None or game.lesson == lessons.FAMILY_LESSONS[game.family]:
            assert game.success == (game.lesson is not None), game
        assert all(turn.action.split() and len(turn.action.split()) <= 2 for turn in game.turns)


@pytest.mark.parametrize(
    ("preset", "group"),
    [(POCKET_ALFWORLD, lessons.ALFWORLD_LESSONS), (POCKET_MINIHACK, lessons.MINIHACK_LESSONS)],
)
def test_the_shipped_actor_obeys_its_prompt(preset, group):
    """The right lesson wins, none and the lesson of another family do not. Rates, not single games:
    the actor is a small network.
    """
    families = preset.task.environment.train_families + preset.task.environment.heldout_families
    environment = load_environment(preset.task.environment.name, preset.task.environment.options)
    folder = model_folder(preset.actor.model)
    rng = random.Random(0)
    prompts = {
        "right": {family: lessons.reflector_prompt(group[family]) for family in families},
        "other": {
            family: lessons.reflector_prompt(
                group[rng.choice([name for name in families if name != family])]
            )
            for family in families
        },
        "none": dict.fromkeys(families, preset.task.initial_prompt),
    }
    cases = [
        (arm, family, game)
        for arm in prompts
        for family in families
        for game in environment.games(family, "test")[:GAMES]
    ]
    with (
        open_pool(preset.task.environment) as pool,
        open_model(folder, num_conversations=1, sizes=preset.actor_sampler) as speaker,
    ):
        episodes = [
            Episode(game=game, system_prompt=prompts[arm][family]) for arm, family, game in cases
        ]
        played = rollout(speaker, pool, episodes, preset.task.rollout)
    wins = {
        arm: [
            t.outcome == "success" for t, case in zip(played, cases, strict=True) if case[0] == arm
        ]
        for arm in prompts
    }
    assert sum(wins["right"]) >= 0.85 * len(wins["right"]), wins
    assert sum(wins["other"]) + sum(wins["none"]) <= 0.1 * len(wins["right"]), wins
