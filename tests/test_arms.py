"""What arms ask and make of the replies, of episodes that nobody played."""

import dataclasses
import threading

import pytest

from envs.api import GameId, Outcome
from experiments.arms.arm import MetaTurn, Place, written
from experiments.arms.gepa import Gepa
from experiments.arms.insights import Insight, Insights, changed, operations
from experiments.arms.opro import Opro
from experiments.presets import PRESETS
from experiments.tasks import FAKE
from experiments.wishes import Play, Reflect
from ictjax.config import ReflectorConfig
from ictjax.records import Candidate, Context, ParseFailure, Trajectory, Turn

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


def reply(text, failure=None):
    return Candidate(
        prompt_ids=(),
        reply_ids=(),
        logprobs=(),
        reply=text,
        analysis="",
        system_prompt=None,
        failure=failure or ParseFailure.NO_ANALYSIS,  # as the reflector's own question has it
    )


def answered(arm, text, now, history=(), where=None, failure=None):
    """What the arm makes of a reply to its question."""
    steps = arm.reflect(now, history, where or place())
    next(steps)
    with pytest.raises(StopIteration) as ended:
        steps.send([reply(text, failure)])
    return ended.value.value


@pytest.mark.parametrize(
    ("line", "operation"),
    [
        ("ADD: look first", ("add", 0, "look first")),
        ("ADD look first", ("add", 0, "look first")),
        ("- **Add 3:** look 2 ways.", ("add", 0, "look 2 ways.")),
        ("1. add [4] : look", ("add", 0, "look")),
        ("ADD:", ("add", 0, "")),
        ("Add a key to your bag.", None),
        ("Added: nothing", None),
        ("EDIT 12: open it", ("edit", 12, "open it")),
        ("* `Edit` (2) - open  it", ("edit", 2, "open it")),
        ("Edit insight #2: open", ("edit", 2, "open")),
        ("EDIT [2]: open it", ("edit", 2, "open it")),
        ("EDIT: open it", ("edit", 0, "open it")),
        ("UPVOTE 2", ("upvote", 2, "")),
        ("**DOWNVOTE 1** (it lost)", ("downvote", 1, "(it lost)")),
        ("downvote: 3", ("downvote", 3, "")),
        ("UPVOTE the first", ("upvote", 0, "the first")),
        ("UPVOTE " + "9" * 5000, ("upvote", 999_999_999, "")),
        ("We upvote 2", None),
    ],
)
def test_operations_on_insights_are_read_leniently(line, operation):
    found = [tuple(one) for one in operations(f"<think>ADD: no</think>\nWell:\n{line}\nDone.")]
    assert found == ([] if operation is None else [operation])


def test_insights_are_voted_on_by_the_numbers_that_were_shown():
    before = [Insight("a", 3), Insight("b", 2), Insight("c", 1)]
    text = "ADD: d\nDOWNVOTE 3\nEDIT 2: B\nUPVOTE 2\nUPVOTE 4\nEDIT 1:\nADD: A\nADD: d\nUPVOTE 0"
    found = changed(before, text)
    # a is added once more and c loses its only vote; b counts once, and d has no number yet
    assert found.insights == [Insight("a", 4), Insight("B", 3), Insight("d", 2)]
    assert [one.name for one in found.used] == ["add", "downvote", "edit", "add"]
    assert found.num_unusable == 5
    assert changed(before, "nothing") == (before, [], 0)
    endless = changed([], "".join(f"ADD: {n}\n" for n in range(100_000)))
    assert (len(endless.insights), endless.num_unusable) == (50, 99_950)


def test_insights_stand_below_the_first_prompt_and_are_shown_with_their_votes():
    first = answered(Insights(), "ADD: look\nADD: open\nUPVOTE 7", context("Play.", 0))
    assert first.failure is None
    assert first.system_prompt == "Play.\n\nWhat you learned from earlier games:\n- look\n- open"
    assert first.analysis == "Insights: 2 added, 1 that could not be used."
    history = [MetaTurn(context("Play.", 0), first)]
    now = context("Play. More.", 1, 0)
    system, user = question(Insights(), now, history)
    assert "DOWNVOTE <number>" in system and "=== Episode 2 ===\nSuccess: No" in user
    assert user.endswith(
        "The list of insights:\n1. look (2 votes)\n2. open (2 votes)\n\nStudy these episodes and"
        " write the operations, at least one."
    )
    second = answered(Insights(), "UPVOTE 2\nDOWNVOTE 1", now, history)
    assert second.system_prompt == "Play.\n\nWhat you learned from earlier games:\n- open\n- look"
    history.append(MetaTurn(now, second))
    last = answered(Insights(), "DOWNVOTE 2", now, history)
    assert last.system_prompt == "Play.\n\nWhat you learned from earlier games:\n- open"


@pytest.mark.parametrize(
    ("text", "failure", "expected"),
    [
        ("ADD: look", ParseFailure.TRUNCATED, ParseFailure.TRUNCATED),
        ("ADD: look", ParseFailure.NO_REPLY, ParseFailure.NO_REPLY),
        ("ANALYSIS: x\nIMPROVED PROMPT: y", None, ParseFailure.NO_OPERATION),
        ("UPVOTE 1", None, ParseFailure.NO_OPERATION),
    ],
)
def test_a_reply_without_operations_changes_nothing_and_counts(text, failure, expected):
    found = answered(Insights(), text, context("Play.", 0), failure=failure)
    assert (found.system_prompt, found.failure) == (None, expected)
    _, user = question(Insights(), context("Play.", 0), [MetaTurn(context("Play.", 0), found)])
    assert "The list of insights:\n(empty)" in user


def test_insights_and_their_question_keep_to_the_limits_of_the_reflector():
    where = place(max_prompt_tokens=14, max_context_tokens=300)
    text = "ADD: one two\nADD: " + "long " * 50 + "\nADD: three\nADD: four five six"
    found = answered(Insights(), text, context("Play.", 0), where=where)
    assert found.system_prompt.endswith("games:\n- one two\n- three")
    long = dataclasses.replace(context("Play.", 0).trajectories[0], turns=(TURN,) * 200)
    now = dataclasses.replace(context("Play.", 0), trajectories=(long,))
    asked = question(Insights(), now, [MetaTurn(now, found)], where)
    assert 250 < sum(len(part.split()) for part in asked) <= 300
    assert "steps left out]" in asked[1] and "2. three (2 votes)" in asked[1]


def test_gepa_asks_about_a_minibatch_under_the_prompt_in_force_and_ends_with_its_loop():
    pytest.importorskip("gepa", reason="an optional package")
    before = threading.active_count()
    now = context("Play.", 1, 0, 0, None, 0)
    steps = Gepa().reflect(now, [], place())
    wish = next(steps)  # the context itself is the first evaluation
    assert isinstance(wish, Play) and {episode.system_prompt for episode in wish.episodes} == {
        "Play."
    }
    assert len({episode.game for episode in wish.episodes} & {*now.games}) == 3
    wish = steps.send(now.trajectories[1:4])
    assert isinstance(wish, Reflect) and wish.asked.trajectories == now.trajectories[1:4]
    assert list(wish.keys) == [place().key]  # as the arm untrained
    better = dataclasses.replace(reply("r"), system_prompt="Play well.", failure=None)
    wish = steps.send([better])
    assert {episode.system_prompt for episode in wish.episodes} == {"Play well."}
    wish = steps.send(
        context("Play well.", 1, 0, 0).trajectories
    )  # of three games it wins one more
    assert isinstance(wish, Play) and len(wish.episodes) == 2  # the games that are left
    assert threading.active_count() == before + 1
    steps.close()
    assert threading.active_count() == before
