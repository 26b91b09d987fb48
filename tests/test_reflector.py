import dataclasses
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.api import GameId, Outcome
from ictjax.config import ReflectorConfig
from ictjax.records import Context, ParseFailure, Trajectory, Turn
from ictjax.reflector import Reflection, is_cut, parse_reply, reflector_messages


def turn(number, action="walk", failure=None):
    return Turn(
        observation=f"Room {number}.",
        actions=("walk",),
        reply="r",
        thought=f"idea {number}",
        action=action,
        reward=0.5,
        failure=failure,
    )


def trajectory(turns, outcome=Outcome.SUCCESS):
    game = GameId(env="fake", family="door", key="1")
    return Trajectory(
        game=game,
        system_prompt="Play.",
        turns=tuple(turns),
        outcome=outcome,
        final_observation="The end.",
        state_hash="h",
        error="",
    )


def context(*trajectories):
    return Context(
        loop=0, meta_turn=0, family="door", system_prompt="Play.", trajectories=trajectories
    )


def words(messages):
    return sum(len(message.content.split()) for message in messages)


def config(**changes):
    return ReflectorConfig(
        **{
            "style": "full",
            "max_context_tokens": 10_000,
            "max_reply_tokens": 10,
            "max_prompt_tokens": 10,
            **changes,
        }
    )


def test_the_full_style_shows_prompt_episodes_steps_and_rewards_but_no_thoughts():
    shown = context(
        trajectory([turn(1), turn(2, "open")]),
        trajectory([turn(3, "", ParseFailure.NO_ACTION)], Outcome.STEP_LIMIT),
    )
    system, user = reflector_messages(shown, config(), words)
    assert system.role == "system"
    assert "ANALYSIS:" in system.content
    assert "IMPROVED PROMPT:" in system.content
    assert user.content.startswith(
        "The instructions the agent played by:\n<<<\nPlay.\n>>>\n\n=== Episode 1 ===\nSuccess:"
        " Yes\nStep 1\nObservation: Room 1.\nAction: walk\nStep 2\nObservation: Room 2.\nAction:"
        " open\nFinal observation: The end.\nTotal reward: 1\n\n=== Episode 2 ===\nSuccess:"
        " No\nStep 1\nObservation: Room 3.\nAction: (none: the reply could not be used,"
        " no_action)\nFinal observation: The end.\nTotal reward: 0.5\n"
    )
    assert "idea" not in user.content
    assert (
        "Thought: idea 1" in reflector_messages(shown, config(show_thoughts=True), words)[1].content
    )


def test_the_compact_style_is_one_lower_case_line():
    shown = context(trajectory([turn(1), turn(2, "")], Outcome.DEATH))
    system, user = reflector_messages(shown, config(style="compact"), words)
    assert system.content == "reflect"
    assert (
        user.content
        == "prompt : play. episode : success no . room 1. action : walk . room 2. action : none ."
        " the end."
    )


def test_head_and_tail_turns_bound_what_is_shown():
    shown = context(trajectory([turn(i) for i in range(10)]))
    text = reflector_messages(shown, config(head_turns=2, tail_turns=1), words)[1].content
    assert [i for i in range(10) if f"Room {i}." in text] == [0, 1, 9]
    assert "[7 steps left out]" in text
    assert "Step 10\nObservation: Room 9." in text


@pytest.mark.parametrize("budget", [250, 260, 300, 400])
def test_middle_turns_are_dropped_to_meet_the_budget_and_no_more_than_needed(budget):
    shown = context(trajectory([turn(i) for i in range(10, 40)]), trajectory([turn(50)]))
    messages = reflector_messages(shown, config(max_context_tokens=budget), words)
    assert words(messages) <= budget
    assert words(messages) > budget - 2 * 6  # one more turn would not have fitted
    kept = [i for i in range(10, 40) if f"Room {i}." in messages[1].content]
    gaps = [i for i, (a, b) in enumerate(itertools.pairwise(kept), 1) if b != a + 1]
    assert kept[0] == 10
    assert kept[-1] == 39
    assert len(gaps) == 1
    assert abs(gaps[0] - (len(kept) - gaps[0])) <= 1
    assert "Room 50." in messages[1].content


def test_a_context_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="reflection.max_context_tokens is 20"):
        reflector_messages(context(trajectory([turn(1)])), config(max_context_tokens=20), words)


LONG = " ".join(f"word{i}" for i in range(2000))


def with_final(text, number=1):
    return dataclasses.replace(trajectory([turn(number)]), final_observation=text)


@pytest.mark.parametrize(
    ("style", "budget"), [("full", 260), ("full", 230), ("compact", 60), ("compact", 25)]
)
@pytest.mark.parametrize(
    "shown",
    [
        context(with_final(LONG), with_final("The end.", 2)),
        context(with_final("x" * 10_000), with_final("x y " * 5000)),
        dataclasses.replace(context(trajectory([turn(1)])), system_prompt=LONG),
        context(*(with_final(f"End {i}.", i) for i in range(300))),
        dataclasses.replace(context(*[with_final(LONG)] * 50), system_prompt=LONG),
    ],
    ids=["long end", "no words", "long prompt", "many episodes", "all of it"],
)
def test_what_does_not_fit_without_any_turn_is_cut(shown, style, budget):
    settings = config(style=style, max_context_tokens=budget)

    def tokens(messages):  # a word of many letters is many tokens
        return sum(1 + len(word) // 20 for m in messages for word in m.content.split())

    assert is_cut(shown, settings, tokens)
    messages = reflector_messages(shown, settings, tokens)
    assert tokens(messages) <= budget
    assert ("left out" if style == "full" else "...") in messages[1].content


def test_as_much_of_a_long_end_is_shown_as_fits():
    shown = context(with_final(LONG), with_final("The end.", 2))
    settings = config(max_context_tokens=400)
    messages = reflector_messages(shown, settings, words)
    assert 395 <= words(messages) <= 400
    assert "Final observation: word0 word1 " in messages[1].content
    assert "characters, the middle left out] " in messages[1].content
    assert "word1999\nTotal reward" in messages[1].content
    assert "Final observation: The end.\n" in messages[1].content


def test_a_context_that_fits_without_its_turns_is_not_cut():
    shown = context(trajectory([turn(i) for i in range(10, 40)]))
    assert not is_cut(shown, config(max_context_tokens=250), words)


def test_episodes_that_the_environment_broke_off_are_not_shown():
    failed = trajectory([turn(7)], Outcome.FAILED)
    text = reflector_messages(context(failed, trajectory([turn(1)])), config(), words)[1].content
    assert "Room 7." not in text
    assert "=== Episode 1 ===" in text
    assert "=== Episode 2 ===" not in text


@pytest.mark.parametrize(
    ("text", "analysis", "prompt"),
    [
        (
            "ANALYSIS:\nIt lost.\n\nIMPROVED PROMPT:\nOpen the door.\nThen win.",
            "It lost.",
            "Open the door.\nThen win.",
        ),
        ("**Analysis:** It lost.\n\n**Improved Prompt:**\nOpen it.", "It lost.", "Open it."),
        ("## ANALYSIS:\nx\n## IMPROVED PROMPT:\n```\nOpen it.\n```", "x", "Open it."),
        ('ANALYSIS: x\nIMPROVED PROMPT: "Open it."', "x", "Open it."),
        (
            "analysis : the door . improved prompt : open the door .",
            "the door .",
            "open the door .",
        ),
        ("Sure!\nANALYSIS: x\nIMPROVED PROMPT: y", "x", "y"),
        (
            "<think>ANALYSIS: a\nIMPROVED PROMPT: b</think>\nANALYSIS: x\nIMPROVED PROMPT: y",
            "x",
            "y",
        ),
        (
            "ANALYSIS: an improved prompt: should say more\nIMPROVED PROMPT: y",
            "an improved prompt: should say more",
            "y",
        ),
    ],
)
def test_replies_parse(text, analysis, prompt):
    assert parse_reply(text) == Reflection(analysis=analysis, system_prompt=prompt)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("", ParseFailure.NO_ANALYSIS),
        ("IMPROVED PROMPT: y", ParseFailure.NO_ANALYSIS),
        ("IMPROVED PROMPT: y\nANALYSIS: x", ParseFailure.NO_PROMPT),
        ("ANALYSIS: x", ParseFailure.NO_PROMPT),
        ("ANALYSIS: x\nIMPROVED PROMPT:\n \n", ParseFailure.EMPTY_PROMPT),
        ("ANALYSIS: x\nIMPROVED PROMPT: ``` \n```", ParseFailure.EMPTY_PROMPT),
    ],
)
def test_malformed_replies_have_a_type(text, failure):
    assert parse_reply(text) is failure


def test_a_cut_off_reply_is_truncated_even_when_both_sections_began():
    assert (
        parse_reply("ANALYSIS: x\nIMPROVED PROMPT: go to the", truncated=True)
        is ParseFailure.TRUNCATED
    )


@given(
    st.lists(
        st.sampled_from(
            ["ANALYSIS:", "IMPROVED PROMPT:", "**", "\n", '"', "```", " x ", ":", "analysis"]
        ),
        max_size=12,
    )
)
def test_parsing_never_raises_and_never_gives_an_empty_prompt(pieces):
    parsed = parse_reply("".join(pieces))
    if isinstance(parsed, Reflection):
        assert parsed.system_prompt.strip()


@pytest.mark.parametrize(
    "changes",
    [
        {"style": "loud"},
        {"max_reply_tokens": 0},
        {"head_turns": 2},
        {"max_context_tokens": -1},
        {"max_prompt_tokens": 0},
    ],
)
def test_bad_settings_are_refused(changes):
    with pytest.raises(ValueError, match="reflection"):
        config(**changes)


@pytest.mark.parametrize(
    "reply",
    [
        "ANALYSIS:\nx\nIMPROVED PROMPT:\ny",
        "analysis: x\nImproved prompt: y",
        "ANALYSIS：x\nIMPROVED PROMPT：y",
        "**ANALYSIS：**\nx\n**IMPROVED PROMPT**：\ny",
        "## ANALYSIS\nx\n\n## IMPROVED PROMPT\ny",
        "ANALYSIS\nx\nIMPROVED PROMPT\ny",
        "**ANALYSIS**\n\nx\n\n**IMPROVED PROMPT**\n\ny",
        "### 1. ANALYSIS ###\nx\n### 2. IMPROVED PROMPT ###\ny",
        "1. ANALYSIS:\nx\n2. IMPROVED PROMPT:\ny",
        "(1) **ANALYSIS:** x\n(2) **IMPROVED PROMPT:** y",
        "- ANALYSIS: x\n- IMPROVED PROMPT: y",
        "* **ANALYSIS:** x\n* **IMPROVED PROMPT:** y",
        "> ANALYSIS: x\n> IMPROVED PROMPT: y",
        "ANALYSIS: x\nIMPROVED_PROMPT: y",
        "ANALYSIS: x\nIMPROVED-PROMPT: y",
        "ANALYSIS:\r\nx\r\n\r\nIMPROVED PROMPT:\r\ny\r\n",
        "ANALYSIS: x\n***\n\n>\nIMPROVED PROMPT: y",
        "ANALYSIS: x\nIMPROVED PROMPT:\n```Markdown\ny\n```",
        "ANALYSIS: x\nIMPROVED PROMPT:\n```\n\ny\n\n```\n",
        'ANALYSIS: x\nIMPROVED PROMPT:\n```\n"y"\n```',
        # the heading again
        "ANALYSIS: x\nIMPROVED PROMPT:\nIMPROVED PROMPT: y",
        "ANALYSIS: x\n**IMPROVED PROMPT:**\n\n## IMPROVED PROMPT:\n\ny",
        "ANALYSIS: x\nIMPROVED PROMPT: y\n\nIMPROVED PROMPT:\ny",
        "ANALYSIS: x\nIMPROVED PROMPT: y\nIMPROVED PROMPT:",
        # one heading with a colon, the other without
        "## ANALYSIS\nx\nIMPROVED PROMPT: y",
        "ANALYSIS: x\n## IMPROVED PROMPT\ny",
        "I write ANALYSIS: and IMPROVED PROMPT: as asked.\n\nANALYSIS:\nx\nIMPROVED PROMPT:\ny",
        "The improved prompt: better.\n## Analysis\nx\n## Improved prompt\ny",
    ],
)
def test_what_models_write_for_the_two_sections(reply):
    assert parse_reply(reply) == Reflection(analysis="x", system_prompt="y")


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        ("ANALYSIS: x\nIMPROVED PROMPT: y\nIMPROVED PROMPT: z", ParseFailure.SEVERAL_PROMPTS),
        (
            "ANALYSIS: x\nIMPROVED PROMPT: y\nANALYSIS: x\nIMPROVED PROMPT: y",
            ParseFailure.SEVERAL_PROMPTS,
        ),
        ("ANALYSIS: x\nIMPROVED PROMPT:\nIMPROVED PROMPT:\n", ParseFailure.EMPTY_PROMPT),
        ("## ANALYSIS\nx\n## IMPROVED PROMPT\n", ParseFailure.EMPTY_PROMPT),
        ("ANALYSIS: x\nIMPROVED PROMPT: ```\n```", ParseFailure.EMPTY_PROMPT),
        ("An analysis of the improved prompt.", ParseFailure.NO_ANALYSIS),
        ("ANALYSIS: x\nAn improved prompt would help.", ParseFailure.NO_PROMPT),
        ("<think>\nANALYSIS: x\nIMPROVED PROMPT: y", ParseFailure.UNFINISHED_THOUGHT),
        ("<think>\nx\n</think>", ParseFailure.NO_ANALYSIS),
    ],
)
def test_what_is_not_two_sections(reply, failure):
    assert parse_reply(reply) is failure


@pytest.mark.parametrize(
    "prompt",
    [
        "Say </think> at the door.",
        "Use\n```\nThought: ...\nAction: ...\n```\nand nothing else.",
        "```\nThought: ...\n```\nin every reply.",
        "Analysis: think first.\nAction: then act.",
        "1. Look.\n2. Go.",
        'Say "hello" and "bye"',
    ],
)
def test_a_prompt_is_kept_as_it_was_written(prompt):
    assert parse_reply(f"ANALYSIS: x\nIMPROVED PROMPT:\n{prompt}").system_prompt == prompt


def test_a_thought_that_was_cut_off_is_told_from_an_answer_that_was():
    assert parse_reply("<think>\nSo", truncated=True) is ParseFailure.UNFINISHED_THOUGHT
    assert parse_reply("<think>\n</think>\nANALYSIS", truncated=True) is ParseFailure.TRUNCATED


REPEATED = [*"*_`#>-•( \n\t\r.'\"1:：[\x0b\x85\u2028\xa0", "1.\n", "1. ", " \n", "\r\n", "```\n"]
REPEATED += [
    "ANALYSIS",
    "ANALYSIS\n",
    "ANALYSIS:\n",
    "IMPROVED ",
    "IMPROVED PROMPT\n",
    "(1)",
    "***\n",
]
REPEATED += [
    "IMPROVED PROMPT:\n",
    "IMPROVED PROMPT: x\n",
    "ANALYSIS:\nIMPROVED PROMPT:\n",
    "</think>\n",
]


@pytest.mark.parametrize("before", ["", "ANALYSIS: x\nIMPROVED PROMPT:\n```\n", "ANALYSIS: x\n"])
@pytest.mark.parametrize("repeated", REPEATED, ids=ascii)
def test_the_time_of_parsing_grows_as_the_reply(before, repeated):
    reply = f"{before}{repeated * (100_000 // len(repeated))}x"
    begun = time.process_time()
    parse_reply(reply)
    assert time.process_time() - begun < 2
