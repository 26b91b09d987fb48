import pytest
from hypothesis import given
from hypothesis import strategies as st

from ictjax.actions import React, parse_react
from ictjax.records import ParseFailure


@pytest.mark.parametrize(
    ("text", "thought", "action"),
    [
        ("Thought: I see food.\nAction: eat f", "I see food.", "eat f"),
        ("thought: a\naction: step north", "a", "step north"),
        ("Thought: first line\nsecond line\n\nAction: go", "first line second line", "go"),
        ("**Thought:** bold\n**Action:** `kick e`", "bold", "kick e"),
        ("**Thought**: bold\n**Action**: kick e.", "bold", "kick e"),
        ("- Thought: x\n- Action: open door", "x", "open door"),
        ("1. Thought: x\n2. Action: open door", "x", "open door"),
        ('Thought: x\nAction: "go to cabinet 3".', "x", "go to cabinet 3"),
        ("Thought: x\nAction: [step east]", "x", "step east"),
        ("Thought: x\nAction:\n  step east\n", "x", "step east"),
        ("Action: look", "", "look"),
        ("Thought: a\nAction: one\nAction: two", "a", "one"),
        ("Thought: a\nAction: one\nObservation: made up\nThought: b\nAction: two", "b", "two"),
        ("Action: one\nThought: afterwards", "", "one"),
        ("Thought: my action: plan is long\nAction: zap f e", "my action: plan is long", "zap f e"),
        ("thought : the food is here . action : eat f", "the food is here .", "eat f"),
        ("Thought: the apple is here Action: eat apple", "the apple is here", "eat apple"),
        ("Thought: x\nAction: Eat F", "x", "Eat F"),
        ("Thought: x\nAction: go\nObservation: You win.", "x", "go"),
        ("<think>\nAction: wait? Thought: no.\n</think>\n\nAction: go", "", "go"),
        ("Thought: why <think> of it\nAction: go", "why <think> of it", "go"),
    ],
)
def test_parses(text, thought, action):
    assert parse_react(text) == React(thought=thought, action=action)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("", ParseFailure.NO_ACTION),
        ("I would go north.", ParseFailure.NO_ACTION),
        ("Thought: only", ParseFailure.NO_ACTION),
        ("Thought: x\nAction:", ParseFailure.EMPTY_ACTION),
        ("Thought: x\nAction:  \n\n", ParseFailure.EMPTY_ACTION),
        ("Thought: x\nAction: ''.", ParseFailure.EMPTY_ACTION),
        ("Action:\nThought: x", ParseFailure.EMPTY_ACTION),
        ("<think>\nAction: go\n", ParseFailure.NO_ACTION),
    ],
)
def test_failures(text, failure):
    assert parse_react(text) is failure


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Thought: long",
        "Thought: x\nAction: go to cab",
        "Thought: x\nAction:\n go to cab",
        "<think>\nAction: go\nSo",
    ],
)
def test_a_cut_off_reply_is_truncated_unless_its_action_line_is_complete(text):
    assert parse_react(text, truncated=True) is ParseFailure.TRUNCATED


def test_a_complete_action_line_survives_truncation():
    assert parse_react("Thought: x\nAction: go east\nThought", truncated=True) == React(
        thought="x", action="go east"
    )
    assert parse_react("Thought: x\nAction: go east\nObservation: I see", truncated=True) == React(
        thought="x", action="go east"
    )


@given(
    st.text(alphabet=st.sampled_from("Thought:Aciton\n *`'\".[](){}<> 1ab"), max_size=60),
    st.booleans(),
)
def test_never_raises_and_never_gives_an_empty_or_multiline_action(text, truncated):
    parsed = parse_react(text, truncated=truncated)
    if isinstance(parsed, React):
        assert parsed.action.strip()
        assert "\n" not in parsed.action
