"""`ictjax.MetaEnv`: its interface, and one test for each defect of the published library that it
must not have.
"""

import collections
import dataclasses
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time

import pytest

from envs.api import GameId, Observation, Outcome, Step
from envs.fake import FakeEnvironment
from envs.prompts import ANY_GAME
from ictjax import MetaEnv, Reflector, open_speaker
from ictjax.config import ReflectorConfig
from ictjax.function_speaker import FunctionSpeaker
from ictjax.manners import manners_for
from ictjax.records import Context, Message, ParseFailure
from ictjax.reflector import FULL, parse_reply, reflector_messages
from ictjax.rollout import success_rate
from ictjax.speaker import estimate_tokens
from tests.tiny import save_tiny_model

ROOT = pathlib.Path(__file__).resolve().parent.parent


def obedient(messages, actions):
    """Walks up to the thing, then says the last word of the system prompt."""
    return messages[0].content.split()[-1] if "right here" in messages[-1].content else "walk"


class Few(FakeEnvironment):
    """Ten games per split."""

    def games(self, family, split):
        return super().games(family, split)[:10]


def make(environment=None, actor=obedient, **settings):
    return MetaEnv(
        environment or FakeEnvironment(),
        actor,
        **{"families": ["door"], "max_steps": 5, **settings},
    )


def question(context, config=FULL):
    return reflector_messages(context, config, estimate_tokens)


def played(context):
    return [trajectory.game for trajectory in context.trajectories]


# --- the interface ---


def test_a_loop_returns_trajectories_reward_and_info_per_game():
    with make(num_games=3, meta_turns=2) as env:
        context, info = env.reset()
        assert isinstance(context, Context)
        assert (context.meta_turn, context.family, context.system_prompt) == (
            0,
            "door",
            ANY_GAME,
        )
        assert info["reward"] == 0.0
        context, reward, terminated, truncated, info = env.step("Say open")
        assert (reward, terminated, truncated) == (1.0, False, False)
        assert context.system_prompt == "Say open"
        assert [result.game for result in info["games"]] == played(context)
        for result, trajectory in zip(info["games"], context.trajectories, strict=True):
            assert (result.outcome, result.reward, result.num_unusable, result.error) == (
                Outcome.SUCCESS,
                1.0,
                0,
                "",
            )
            assert result.num_steps == len(trajectory.turns)
            assert result.state_hash == trajectory.state_hash
        context, reward, terminated, truncated, info = env.step("Say ring")
        assert (reward, terminated, truncated) == (0.0, False, True)
        assert (info["loop"], info["meta_turn"], info["family"], info["failed"]) == (
            0,
            2,
            "door",
            0,
        )
        with pytest.raises(ValueError, match="No loop is running: call reset first"):
            env.step("Say open")
        _, info = env.reset()
        assert (info["loop"], info["meta_turn"]) == (1, 0)


def test_a_replay_plays_the_batch_of_a_context_again():
    with make(num_games=4) as env:
        context, _ = env.reset()
        again = env.play("Say open", context.games)
        assert [trajectory.game for trajectory in again] == played(context)
        assert success_rate(again) == 1.0
        assert played(env.step("Say open")[0]) != played(context)  # a replay uses up no games


def test_a_fixed_draw_plays_the_same_games_every_time():
    with make(num_games=4, draw="fixed", split="select") as env:
        batches = [played(env.reset()[0]), played(env.step("Say open")[0]), played(env.reset()[0])]
    assert batches[0] == batches[1] == batches[2]
    assert {int(game.key) for game in batches[0]} <= set(range(1000, 1200))


def test_families_take_turns_and_a_seed_starts_everything_over():
    with make(families=(), num_games=2, seed=5) as env:
        first = [env.reset()[0] for _ in range(6)]
        assert (
            sorted(context.family for context in first[:3])
            == sorted(context.family for context in first[3:])
            == ["bell", "door", "lamp"]
        )
        assert env.reset(seed=5)[0] == first[0]
        assert env.reset(seed=6)[0] != first[0]


def test_workers_and_this_process_give_the_same_results():
    with make("fake", num_workers=1) as pooled, make() as local:
        for env in (pooled, local):
            env.reset()
        assert pooled.step("Say open")[:4] == local.step("Say open")[:4]


def test_a_model_folder_is_an_actor(tmp_path):
    save_tiny_model(tmp_path / "actor")
    with make(actor=tmp_path / "actor", num_games=2, max_steps=2, max_turn_tokens=3) as env:
        context, info = env.reset()
    assert [trajectory.outcome for trajectory in context.trajectories] == [Outcome.STEP_LIMIT] * 2
    assert info["parse_failures"]["truncated"] + info["parse_failures"]["no_action"] == 4


def test_the_initial_prompt_and_the_description_are_the_environments_own():
    class Introduced(FakeEnvironment):
        initial_prompt = "Find the thing."

        def describe(self):
            return {"source": "made up"}

    with make(Introduced()) as env:
        assert env.reset()[0].system_prompt == "Find the thing."
        assert env.describe() == {"source": "made up"}
    with make(Introduced(), initial_prompt="Say open") as env:
        assert env.reset()[1]["reward"] == 1.0


def test_a_reflector_over_any_speaker_closes_the_loop():
    """The published library's example, in as few lines: any model reflects, any model acts."""

    def advise(messages, actions):
        assert "Success: No" in messages[1].content
        return "ANALYSIS: it never opened the door.\nIMPROVED PROMPT: Say open"

    with FunctionSpeaker(advise) as speaker, make(num_games=2) as env:
        context, _ = env.reset()
        reflection = Reflector(speaker)(context)
        _, reward, *_ = env.step(reflection.system_prompt)
    assert (reflection.analysis, reward) == ("it never opened the door.", 1.0)


def test_a_reflector_that_fails_says_so_and_is_no_prompt():
    with FunctionSpeaker(lambda messages, actions: 1 / 0) as speaker, make(num_games=2) as env:
        context, _ = env.reset()
        reflection = Reflector(speaker)(context)
        assert reflection is ParseFailure.NO_REPLY
        with pytest.raises(ValueError, match="step takes a system prompt"):
            env.step(reflection)


def test_a_context_becomes_the_reflectors_question_within_its_budget():
    with make(num_games=2) as env:
        context, _ = env.reset()
        system, user = question(context)
        assert (system.role, user.role) == ("system", "user")
        assert (
            "ANALYSIS:" in system.content
            and "Success: No" in user.content
            and ANY_GAME in user.content
        )
        budget = ReflectorConfig(
            style="full", max_context_tokens=700, max_reply_tokens=9, max_prompt_tokens=9
        )
        short = question(context, budget)
        assert (
            sum(len(message.content) for message in short) // 3
            <= 700
            < sum(len(m.content) for m in (system, user)) // 3
        )
        assert "steps left out]" in short[1].content


def test_there_is_nothing_else_at_the_top_of_the_package():
    with pytest.raises(ImportError, match="cannot import name 'NoSuchThing'"):
        from ictjax import NoSuchThing  # noqa: F401


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environment": "fkae"}, "Unknown environment 'fkae'"),
        ({"environment": FakeEnvironment}, "got the class FakeEnvironment: call it first"),
        ({"environment": 3}, "3 is not an environment: int lacks name"),
        ({"options": {"a": "b"}}, "options are for an environment given by name"),
        ({"actor": "no/such/folder"}, "no/such/folder' is neither a folder nor a Hugging Face id"),
        ({"actor": 7}, "A speaker needs a function"),
        ({"families": ["cup"]}, "Unknown family 'cup' of fake: use some of bell, door, lamp"),
        ({"families": "door"}, "write \\['door'\\]"),
        ({"num_games": 0}, "num_games must be a whole number of at least 1, got 0"),
        ({"meta_turns": 0}, "meta_turns must be a whole number of at least 1, got 0"),
        ({"draw": "some"}, "draw must be 'fresh' or 'fixed', got 'some'"),
        ({"max_steps": 0}, "max_steps must be a whole number from 1 to 1,000,000, got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_too_few_games_and_unknown_splits_are_refused():
    with (
        make(Few(), num_games=11) as env,
        pytest.raises(ValueError, match="Family 'door' has 10 games in 'train', a batch needs 11"),
    ):
        env.reset()
    with make(split="valid") as env, pytest.raises(ValueError, match="Unknown split 'valid'"):
        env.reset()


def test_close_is_idempotent_and_final():
    env = make("fake", num_workers=1)
    env.close()
    env.close()
    with pytest.raises(ValueError, match="is closed: make another"):
        env.reset()


def test_the_readme_example_runs(capsys):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- metaenv -->\n.*?```python\n(.*?)```", readme, re.DOTALL)
    answers = iter(
        [
            "ANALYSIS: none\nIMPROVED PROMPT: Say ring",
            "I refuse.",
            "ANALYSIS: better\nIMPROVED PROMPT: Say open",
        ]
    )

    def model(messages, actions):
        return f"Action: {obedient(messages, actions)}" if actions else next(answers)

    code = code.replace('"minihack"', '"fake"').replace('"eat"', '"door"')
    code = code.replace('open_speaker("http://localhost:8000/v1")', "open_speaker(model)")
    exec(compile(code, "README.md", "exec"), {"model": model, "__name__": "readme"})
    out = capsys.readouterr().out
    assert "won 0.0" in out and "won 1.0" in out and "no_analysis" in out


# --- the defects of the published library, one by one ---


def test_games_do_not_repeat_after_k_batches():
    with make(Few(), num_games=3) as env:
        _, info = env.reset()
        batches = [info]
        while not batches[-1]["terminated"]:
            batches.append(env.step("Say open")[4])
        seen = [result.game for info in batches for result in info["games"]]
        assert len(seen) == len(set(seen)) == 9  # all but the one that makes no batch
        assert [info["pass"] for info in batches] == [0, 0, 0]
        with pytest.raises(ValueError, match="after terminated or truncated"):
            env.step("Say open")
        _, info = env.reset()  # only now, and said so
        assert info["pass"] == 1
        assert tuple(result.game for result in info["games"]) != tuple(seen[:3])


def test_death_is_not_printed_as_a_step_limit():
    with make(actor=lambda messages, actions: "jump", num_games=1) as env:
        context, info = env.reset()
        assert info["games"][0].outcome is Outcome.DEATH
        shown = question(context)[1].content
    assert "You jump into a hole in the floor and die." in shown
    assert "limit" not in shown.lower()


def test_an_unresolvable_action_is_not_replaced():
    with make(actor=lambda messages, actions: "opne the door", num_games=1, max_steps=2) as env:
        context, _ = env.reset()
    for turn in context.trajectories[0].turns:
        assert (turn.action, turn.failure) == ("opne the door", None)
    assert context.trajectories[0].turns[1].observation.startswith("Nothing happens")
    assert context.trajectories[0].outcome is Outcome.STEP_LIMIT


def test_a_reply_without_an_action_is_counted_and_not_replaced():
    with (
        FunctionSpeaker(lambda messages, actions: "I would rather not.") as actor,
        make(actor=actor, num_games=2) as env,
    ):
        context, info = env.reset()
    assert info["parse_failures"] == {"no_action": 10, "empty_action": 0, "truncated": 0}
    assert [result.num_unusable for result in info["games"]] == [5, 5]
    assert {(turn.action, turn.reply) for turn in context.trajectories[0].turns} == {
        ("", "I would rather not.")
    }


class Numbered(FakeEnvironment):
    """Every observation offers an action of its own."""

    def open(self, family):
        return _NumberedGame()


class _NumberedGame:
    def reset(self, game):
        self.turn = 0
        return self._observe("start")

    def step(self, action):
        self.turn += 1
        return Step(observation=self._observe(f"took {action}"))

    def state_hash(self):
        return "0"

    def close(self):
        pass

    def _observe(self, text):
        return Observation(text=f"turn {self.turn}: {text}", actions=(f"option {self.turn}",))


def test_available_actions_are_those_of_their_own_step():
    with make(Numbered(), actor=lambda messages, actions: actions[0], num_games=1) as env:
        context, _ = env.reset()
    for number, turn in enumerate(context.trajectories[0].turns):
        assert turn.actions == (f"option {number}",)
        assert turn.action == f"option {number}"
        assert turn.observation.startswith(f"turn {number}: ")
    assert context.trajectories[0].final_observation == "turn 5: took option 4"


def test_duplicates_of_a_game_deflate_no_reward():
    win, lose = (GameId(env="fake", family=family, key="3") for family in ("door", "bell"))
    with make() as env:
        trajectories = env.play("Say open", [win, lose, win, win])
    assert [trajectory.game for trajectory in trajectories] == [win, lose, win, win]
    assert success_rate(trajectories) == 0.75


def test_unparseable_reflector_output_is_not_taken_for_the_old_prompt():
    with make() as env:
        env.reset()
        for failure in (
            parse_reply("Looks fine to me."),
            parse_reply("ANALYSIS: x\nIMPROVED PROMPT:"),
            "",
            "  ",
            None,
        ):
            with pytest.raises(ValueError, match="step takes a system prompt, got"):
                env.step(failure)
        assert parse_reply("Looks fine to me.") is ParseFailure.NO_ANALYSIS
        assert env.step("Say open")[1] == 1.0  # a refused prompt uses up no games and no meta-turn


def test_no_history_starts_on_an_assistant_message():
    conversations = []

    def watching(messages, actions):
        conversations.append(messages)
        return "look"

    with make(actor=watching, num_games=2, max_steps=4) as env:
        env.reset()
    assert len(conversations) == 8
    for messages in conversations:
        assert all(type(message) is Message for message in messages)
        assert [message.role for message in messages] == [
            "system",
            *["user", "assistant"] * (len(messages) // 2 - 1),
            "user",
        ]
    assert sorted(map(len, conversations)) == [2, 2, 4, 4, 6, 6, 8, 8]


class Walked(FakeEnvironment):
    """Lists its games as an unsorted directory walk would: in another order every time."""

    def games(self, family, split):
        games = list(super().games(family, split)[:50])
        random.shuffle(games)
        return games


def test_the_order_of_games_follows_no_directory_walk():
    orders = []
    for _ in range(3):
        with make(Walked(), num_games=10) as env:
            orders.append([*played(env.reset()[0]), *played(env.step("Say open")[0])])
    assert orders[0] == orders[1] == orders[2]


def test_the_order_of_games_is_the_same_in_every_process_and_the_package_imports_no_jax_before_it_is_needed():
    code = """
import sys, ictjax
assert "jax" not in sys.modules
from envs.fake import FakeEnvironment
from envs.prompts import ANY_GAME
with ictjax.MetaEnv(FakeEnvironment(), lambda messages, actions: "look", num_games=9, max_steps=1) as env:
    print(*env.reset()[0].games)
"""
    environ = {**os.environ, "PYTHONHASHSEED": "4242"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    with make(families=(), num_games=9, max_steps=1) as env:
        assert done.stdout.split() == [str(game) for game in env.reset()[0].games]


def test_one_server_error_ends_its_own_episode_only():
    rooms = []

    def flaky(messages, actions):
        rooms.append(messages[1].content)
        if messages[1].content == rooms[0]:
            raise ConnectionError("the server hung up")
        return obedient(messages, actions)

    with (
        FunctionSpeaker(flaky, threads=1, replies="action") as actor,
        make(actor=actor, num_games=4, initial_prompt="Say open") as env,
    ):
        context, info = env.reset()
    (failed,) = [result for result in info["games"] if result.outcome is Outcome.FAILED]
    assert failed.error == "The actor failed: ConnectionError: the server hung up."
    assert [result.outcome for result in info["games"]].count(Outcome.SUCCESS) == 3
    # the reward is of those that were played
    assert (info["failed"], info["reward"], len(context.trajectories)) == (1, 1.0, 4)


def test_an_actor_that_always_fails_is_no_lost_game():
    with make(actor=lambda messages, actions: 7, num_games=2) as env:
        _, info = env.reset()
    assert info["reward"] is None
    assert info["failures"] == (
        "The actor failed: TypeError: it returned int where a reply (str) was expected.",
    )
    assert [result.error for result in info["games"]] == [
        "The actor failed: TypeError: it returned int where a reply (str) was expected."
    ] * 2


def test_the_slowest_episode_holds_back_no_other():
    """The first call of one episode waits until all the others have ended: in lockstep it would
    wait for ever.
    """
    lock, others_done, slow = threading.Lock(), threading.Event(), []
    ended = collections.Counter()

    def slowest(messages, actions):
        room = messages[1].content.partition(".")[0]
        with lock:
            if not slow:
                slow.append(room)
        if slow == [room]:
            if len(messages) == 2:
                assert others_done.wait(60)
        elif len(messages) == 2 * 5:
            ended[room] += 1
            if len(ended) == 3:
                others_done.set()
        return "look"

    started = time.monotonic()
    with make(actor=slowest, num_games=4, max_steps=5) as env:
        _, info = env.reset()
    assert time.monotonic() - started < 50
    assert [result.outcome for result in info["games"]] == [Outcome.STEP_LIMIT] * 4


@pytest.mark.parametrize("family", ["pray", "sink", "locked_door", "keyroom", "levitate_potion"])
def test_the_families_that_lacked_verbs_are_won_through_the_interface(family):
    """The expert's actions, written down in one game, win the same game as the text actions of a
    policy.
    """
    pytest.importorskip("minihack")
    from envs.minihack import MiniHack
    from envs.minihack.expert import make_expert
    from envs.minihack.game import MiniHackGame

    game, script = MiniHackGame(family, style="full"), []
    for seed in range(20):
        game_id, script = GameId(env="minihack", family=family, key=str(seed)), []
        expert, step = (
            make_expert(family, random.Random(seed)),
            Step(observation=game.reset(GameId(env="minihack", family=family, key=str(seed)))),
        )
        while step.outcome is None and len(script) < 40:
            script.append(expert(game.raw()))
            step = game.step(script[-1])
        if step.outcome is Outcome.SUCCESS:
            break
    game.close()
    with MetaEnv(
        MiniHack(),
        lambda messages, actions: script[len(messages) // 2 - 1],
        families=[family],
        max_steps=40,
    ) as env:
        (trajectory,) = env.play("Play.", [game_id])
    assert trajectory.success
    assert [turn.action for turn in trajectory.turns] == script


def test_step_east_is_not_taken_for_another_action():
    pytest.importorskip("minihack")
    from envs.minihack import MiniHack

    says = iter(["step east", "step s", "look"])
    with MetaEnv(
        MiniHack(), lambda messages, actions: next(says), families=["room"], max_steps=3
    ) as env:
        (trajectory,) = env.play("Play.", [GameId(env="minihack", family="room", key="1")])
    assert [turn.action for turn in trajectory.turns] == ["step east", "step s", "look"]
    assert "Unknown action: 'step east'" in trajectory.turns[1].observation
    assert "Unknown action: 'step s'" in trajectory.turns[2].observation


def test_turns_are_records_that_survive_json():
    from ictjax.records import context_from_json, to_json

    with make(num_games=2) as env:
        context, _ = env.reset()
    assert context_from_json(to_json(context)) == context
    assert dataclasses.is_dataclass(context)


def test_a_preset_can_be_pointed_at_another_environment_without_its_options(capsys, tmp_path):
    from experiments.train import main

    with pytest.raises(SystemExit):
        main(
            [
                "--preset",
                "pocket-minihack",
                "--task.environment.name",
                "envs.fake:FakeEnvironment",
                "--run-dir",
                str(tmp_path / "run"),
            ]
        )
    assert "Unknown family 'eat' of fake: use one of bell, door, lamp." in capsys.readouterr().err


def test_the_page_shows_what_its_example_prints(capsys):
    page = (ROOT / "docs" / "adding_an_environment.md").read_text()
    ((code, printed),) = re.findall(
        r"```python\n(from ictjax import MetaEnv\n.*?)```\n\n```\n(.*?)```", page, re.DOTALL
    )
    exec(compile(code, "adding_an_environment.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"replies": "json"}, "'text' or 'action', got 'json'"),
    ],
)
def test_settings_of_a_function_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FunctionSpeaker(obedient, **arguments)


def test_a_function_may_answer_in_react_form():
    with make(actor=lambda messages, actions: "Thought: near?\nAction: look", num_games=1) as env:
        context, _ = env.reset()
    assert {(turn.thought, turn.action) for turn in context.trajectories[0].turns} == {
        ("near?", "look")
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"text": "full"}}, "reads compact text only"),
        ({"initial_prompt": "Traverse the labyrinth swiftly"}, "has no words for"),
        ({"families": ["put"], "environment": "alfworld"}, "knows minihack only"),
    ],
)
def test_a_model_that_has_no_words_for_a_task_is_refused(settings, message):
    actor = ROOT / "experiments" / "pocket" / "checkpoints" / "actor"
    chosen = {"environment": "minihack", "families": ["eat"], **settings}
    with pytest.raises(ValueError, match=message):
        MetaEnv(chosen.pop("environment"), actor, num_workers=1, **chosen)


def test_a_model_that_was_opened_is_spoken_to_as_its_folder_says():
    actor = ROOT / "experiments" / "pocket" / "checkpoints" / "actor"
    settings = {"families": ["eat"], "num_games": 1, "num_workers": 1}
    with open_speaker(actor, num_conversations=1) as speaker:
        with MetaEnv("minihack", speaker, **settings) as env:
            assert env.initial_prompt == manners_for(actor, "minihack").initial_prompt
            context, info = env.reset()
        assert not info["failures"]
        assert context.trajectories
        with pytest.raises(ValueError, match="checkpoints/actor reads compact text only"):
            MetaEnv("minihack", speaker, options={"text": "full"}, **settings)
        speaker.folder = ""
        with pytest.raises(ValueError, match="in the speaker that was given has no words for"):
            MetaEnv("minihack", speaker, initial_prompt="Traverse the labyrinth", **settings)


def test_a_closed_environment_says_so_and_a_reflector_wants_a_speaker():
    with make() as env:
        env.reset()
    for call in (env.reset, lambda: env.play("Say open", [])):
        with pytest.raises(ValueError, match="is closed: make another"):
            call()
    with pytest.raises(ValueError, match="needs a speaker, got <function"):
        Reflector(obedient)
