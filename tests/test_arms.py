"""What arms ask and make of the replies, of episodes that nobody played."""

import dataclasses

import pytest

from envs.api import GameId, Outcome
from experiments.arms.arm import MetaTurn, Place, written
from experiments.arms.opro import Opro
from experiments.presets import PRESETS
from experiments.tasks import FAKE
from experiments.wishes import Reflect
from ictjax.config import ReflectorConfig
from ictjax.records import Context, Trajectory, Turn

TURN = Turn(observation="A room.", actions=(), reply="r", thought="", action="walk", reward=0.0)


def context(prompt, *outcomes, turn=0):
    """Episodes under a prompt: 1 for won, 0 for lost, None for failed by the environment."""
    kinds = {1: Outcome.SUCCESS, 0: Outcome.STEP_LIMIT, None: Outcome.FAILED}
    played = [
        Trajectory(
            game=GameId(env="fake", family="door", key=str(number)),
            system_prompt=prompt,
            turns=(TURN,),
            outcome=kinds[outcome],
            final_observation="The end.",
            state_hash=str(number),
        )
        for number, outcome in enumerate(outcomes)
    ]
    return Context(
        loop=0,
        meta_turn=turn,
        family="door",
        system_prompt=prompt,
        trajectories=tuple(played),
    )


def place(**reflection):
    about = {"style": "full", "max_context_tokens": 10_000, "max_prompt_tokens": 1000}
    return Place(
        family="door",
        run=0,
        meta_turn=0,
        key=(1, 2),
        task=dataclasses.replace(FAKE, initial_prompt="Play."),
        evaluation=PRESETS["qwen2.5-7b-minihack"].evaluation,
        reflection=ReflectorConfig(**{**about, "max_reply_tokens": 100, **reflection}),
        expert_prompt="",
        num_tokens=lambda text: len(text.split()),
    )


def words(messages):
    return sum(len(message.content.split()) for message in messages)


def question(arm, now, history=(), where=None):
    """What an arm asks first, in the first meta-turn."""
    where = where or place()
    wish = next(arm.reflect(now, history, where))
    assert isinstance(wish, Reflect) and callable(wish.asked) and list(wish.keys) == [where.key]
    return [message.content for message in wish.asked(where.reflection, words)]


def past(*contexts):
    return [MetaTurn(one, written(None)) for one in contexts]


def test_opro_shows_prompts_from_the_worst_to_the_best_and_no_episode():
    history = past(context("A.", 1, 1, None), context("B.", 0, 0), context("C.", 0, 1))
    system, user = question(Opro(), context("B.", 1, 0, 0), history)
    assert "IMPROVED PROMPT:" in system
    shown = [block for block in user.split("\n\n") if block.startswith("Instructions")]
    assert shown == [
        f"Instructions:\n<<<\n{prompt}\n>>>\nGames won: {won}"
        for prompt, won in (("B.", "1 of 5"), ("C.", "1 of 2"), ("A.", "2 of 2"))
    ]
    assert "room" not in user.lower()


def test_opro_leaves_out_the_worst_prompts_where_not_all_fit():
    history = past(*(context(f"P{n}.", *[1] * n, *[0] * (25 - n)) for n in range(25)))
    _, user = question(Opro(), context("P25.", *[1] * 25), history)
    assert [f"\nP{n}.\n" in user for n in range(26)] == [n > 5 for n in range(26)]
    bare = words_of(Opro(), place())
    few = place(max_context_tokens=bare + 20)
    _, user = question(Opro(), context("P25.", 1), history, few)
    assert [n for n in range(26) if f"\nP{n}.\n" in user] == [24, 25]
    with pytest.raises(ValueError, match=r"opro needs \d+ tokens .* is 9: raise it"):
        question(Opro(), context("P25.", 1), history, place(max_context_tokens=9))


def words_of(arm, where):
    """The size of its question without anything to show."""
    system, user = question(arm, context("X", 1), where=where)
    return (
        len(system.split())
        + len(user.split())
        - len("Instructions: <<< X >>> Games won: 1 of 1".split())
    )


def test_opro_tells_word_level_models_of_episodes_without_turns():
    compact = place(style="compact")
    asked = question(Opro(), context("Open it.", 1), past(context("Go.", 0, 0)), compact)
    assert asked == [
        "reflect",
        "prompt : go. episode : success no . episode : success no ."
        " prompt : open it. episode : success yes .",
    ]
