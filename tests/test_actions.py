import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ictjax.actions import React, after_thinking, parse_react
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


MARKERS = [
    "Action:",
    "ACTION :",
    "Action 1:",
    "Action：",
    "**Action：**",
    "**Action**：",
    "### Action:",
    "1. **Action:**",
    "2) Action:",
    "(2) Action:",
    "• Action:",
    "+ Action:",
    "\ufeffAction:",
    "\xa0Action:",
    "> Action:",
    "_Action:_",
]
FENCED = "```\ngo north\n```"


@pytest.mark.parametrize(
    "written",
    [
        "go north",
        "go north.",
        "go north。",
        "`go north`.",
        "“go north.”",
        "「go north」",
        "**go north**",
        "_go north_",
        "<go north>",
        "- go north",
        "* go north",
        "• go north",
        "> go north",
        "1. go north",
        "1) `go north`",
        "go north\r\n",
        "go north.\r\nObservation: You win.",
        "go\u2028north",
        "\n\n  go north",
        "```go north```",
        FENCED,
        f"\n{FENCED}",
        "\n```text\ngo north\n```",
        "\n\n~~~\n\ngo north\n~~~\n",
        "\n```\ngo north",
        "Action: go north",
        "**Action:** go north",
        "\nAction: go north",
        "go north Observation: You win.",
        "go north Thought: next I open it. Action: open door",
    ],
)
def test_what_models_write_for_one_action(written):
    for marker in MARKERS:
        assert parse_react(f"Thought: x\n{marker} {written}") == React("x", "go north"), marker


@pytest.mark.parametrize(
    "reply",
    [
        "Thought\nx\nAction\ngo north",
        "## Thought\nx\n\n## Action\ngo north",
        "## Thought ##\nx\n## Action ##\n\ngo north",
        "**Thought**\nx\n\n**Action**\n`go north`",
        "**Thought** x\n**Action** go north",
        "Thought: x\n**Action**\n" + FENCED,
        "Thought: x\n```action\ngo north\n```",
        "Thought - x\nAction - go north",
        "Thought – x\nAction – go north.",
        "Thought: x\nAction -> go north",
        "Thought = x\nAction = go north",
        "1. Thought\nx\n2. Action\n- go north",
        "```\nThought: x\nAction: go north\n```",
    ],
)
def test_headings_without_a_colon(reply):
    assert parse_react(reply) == React(thought="x", action="go north")


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (FENCED, ParseFailure.NO_ACTION),
        (f"Thought: x\n{FENCED}", ParseFailure.NO_ACTION),
        ("Action-packed rooms.", ParseFailure.NO_ACTION),
        ("The next action is go north.", ParseFailure.NO_ACTION),
        ("Reaction: go north", ParseFailure.NO_ACTION),
        ("action", ParseFailure.NO_ACTION),
        ("Thought: x\n## Action\n", ParseFailure.NO_ACTION),
        ("Action:\n```\n```", ParseFailure.EMPTY_ACTION),
        ("Action: Action:", ParseFailure.EMPTY_ACTION),
        ("Action: **", ParseFailure.EMPTY_ACTION),
        ("Action: ...", ParseFailure.EMPTY_ACTION),
    ],
)
def test_what_is_no_action(reply, failure):
    assert parse_react(reply) is failure


def test_a_word_behind_a_fence_is_its_language_only_before_an_action():
    assert parse_react("Action:\n```north\n```") == React(thought="", action="north")


THOUGHTS = "I could wait.\nAction: wait\nThought: no."


@pytest.mark.parametrize(
    "reply",
    [
        f"<think>\n{THOUGHTS}\n</think>\n\nAction: go",
        f"<think>{THOUGHTS}</think>Action: go",
        f"\n <think>\n{THOUGHTS} It says </think> there.\nAction: wait\n</think>\n\nAction: go",
        "<think>\n</think>\nAction: go",
        "<think></think>Action: go",
        # begun for the model by a server
        f"{THOUGHTS}\n</think>\n\nAction: go",
        f"{THOUGHTS}</think>\n\nAction: go",
    ],
)
def test_thoughts_before_a_reply_are_not_read(reply):
    assert parse_react(reply) == React(thought="", action="go")


@pytest.mark.parametrize(
    ("reply", "thought", "action"),
    [
        ("Thought: the sign says </think> here.\nAction: go", "the sign says </think> here.", "go"),
        ("Thought: x\nAction: say </think>", "x", "say </think>"),
        ("Thought: x\nAction: say </think>\n", "x", "say </think>"),
        ("Thought: x\nAction: go\n</think>", "x", "go"),
        ("thought : a </think> b . action : go", "a </think> b .", "go"),
        ("<think>a</think>Thought: x </think>\nAction: go", "x </think>", "go"),
    ],
)
def test_the_end_of_a_thought_within_a_text_is_text(reply, thought, action):
    assert parse_react(reply) == React(thought=thought, action=action)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    "reply", ["<think>", "<think>\nAction: go\n", " \n<think>Action: go\nSo", "<think>\n</thin"]
)
def test_an_unfinished_thought_is_no_answer(reply, truncated):
    assert parse_react(reply, truncated=truncated) is ParseFailure.UNFINISHED_THOUGHT
    assert after_thinking(reply) is None


# What a repetition of the grammar takes, or begins with.
REPEATED = [*"*_`#>-•( \n\t\r.'\"1:：[\x0b\x85\u2028\xa0", "1.\n", "1. ", " \n", "\r\n", "- "]
REPEATED += [
    "```\n",
    "~~~\n",
    "Action",
    "Action ",
    "Action\n",
    "Action:",
    "Action:\n",
    "Thought:\n",
]
REPEATED += ["action*", "(1)", "<think>", "</think>", "</think>\n", "</think> ", "'.", "[(", "—"]


@pytest.mark.parametrize("before", ["", "Thought: x\nAction:", "<think>\n"])
@pytest.mark.parametrize("repeated", REPEATED, ids=ascii)
def test_the_time_of_parsing_grows_as_the_reply(before, repeated):
    """Squared, the shortest of them took seconds at a tenth of this length."""
    reply = f"{before}{repeated * (100_000 // len(repeated))}x"
    begun = time.process_time()
    parse_react(reply)
    assert time.process_time() - begun < 2
