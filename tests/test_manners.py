"""How a model expects to be spoken to: the file beside it, and what is refused by it."""

import json
import types

import pytest

from ictjax.manners import (
    FILE_NAME,
    Manners,
    check_style,
    check_words,
    manners_for,
    read_manners,
    write_manners,
)

COMPACT = Manners(
    options={"text": "compact"}, initial_prompt="play « now » .", max_steps=10, max_turn_tokens=16
)
FULL = Manners(
    options=types.MappingProxyType({}),
    initial_prompt="",
    max_steps=1,
    max_turn_tokens=1,
    show_actions=True,
)
ENTRY = {"options": {}, "initial_prompt": "p", "max_steps": 1, "max_turn_tokens": 1}


def write(folder, content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / FILE_NAME).write_bytes(text)


def without(name):
    return {key: value for key, value in ENTRY.items() if key != name}


def test_what_is_written_is_read(tmp_path):
    write_manners(tmp_path, {"minihack": COMPACT, "alfworld": FULL})
    assert read_manners(tmp_path) == {"minihack": COMPACT, "alfworld": FULL}
    assert read_manners(str(tmp_path)) == read_manners(tmp_path)
    assert manners_for(tmp_path, "minihack") == COMPACT
    text = (tmp_path / FILE_NAME).read_text(encoding="utf-8")
    assert "play « now » ." in text and text.endswith("}\n")


def test_the_file_is_the_one_that_the_page_shows(tmp_path):
    shown = {
        "environments": {
            "minihack": {
                "options": {"text": "compact"},
                "initial_prompt": "play .",
                "max_steps": 10,
                "max_turn_tokens": 16,
                "show_actions": False,
            }
        }
    }
    write(tmp_path, shown)
    write_manners(tmp_path, read_manners(tmp_path))
    assert json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8")) == shown


def test_a_model_that_says_nothing_is_spoken_to_anyhow(tmp_path):
    assert read_manners(tmp_path) == {}
    assert manners_for(tmp_path, "minihack") is None
    assert read_manners(tmp_path / "nowhere") == {}
    write_manners(tmp_path, {})
    assert manners_for(tmp_path, "minihack") is None


def test_actions_are_not_listed_unless_it_says_so(tmp_path):
    write(tmp_path, {"environments": {"fake": ENTRY}})
    assert not read_manners(tmp_path)["fake"].show_actions


def test_an_environment_that_a_model_does_not_know_is_refused(tmp_path):
    write_manners(tmp_path, {"minihack": COMPACT, "alfworld": FULL})
    with pytest.raises(ValueError) as caught:
        manners_for(tmp_path, "fake")
    assert str(caught.value) == (
        f"The model in {tmp_path} knows alfworld and minihack only, not fake: it has no words for"
        " that."
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[" * 100_000, "recursion"),
        (b'{"environments": {"minihack": {"opt', "Unterminated string"),
        (b"\xff\xfe", "can't decode"),
        ([], "no object 'environments'"),
        ({}, "'environments'"),
        ({"environments": []}, "no object 'environments'"),
        ({"environments": {"fake": []}}, "its entry 'fake' is no object"),
        ({"environments": {"fake": without("options")}}, "options"),
        ({"environments": {"fake": without("max_steps")}}, "max_steps"),
        ({"environments": {"fake": {**ENTRY, "colour": "red"}}}, "colour"),
        ({"environments": {"fake": {**ENTRY, "options": "text"}}}, "options must be texts by name"),
        (
            {"environments": {"fake": {**ENTRY, "options": {"text": 1}}}},
            "options must be texts by name, got {'text': 1}",
        ),
        (
            {"environments": {"fake": {**ENTRY, "max_steps": "ten"}}},
            "max_steps must be a whole number of at least 1, got 'ten'",
        ),
        ({"environments": {"fake": {**ENTRY, "max_steps": True}}}, "got True"),
        ({"environments": {"fake": {**ENTRY, "max_turn_tokens": 0}}}, "max_turn_tokens must be"),
        ({"environments": {"fake": {**ENTRY, "max_turn_tokens": 1.5}}}, "got 1.5"),
        ({"environments": {"fake": {**ENTRY, "initial_prompt": None}}}, "must be a text, got None"),
        ({"environments": {"fake": {**ENTRY, "show_actions": "no"}}}, "true or false, got 'no'"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(tmp_path, content, reason):
    write(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        manners_for(tmp_path, "fake")
    message = str(caught.value)
    start = f"{tmp_path / FILE_NAME} does not say how its model is spoken to ("
    assert message.startswith(start) and message.endswith("): restore it, or remove it.")
    assert reason in message.removeprefix(start)
    assert "\n" not in message


def test_text_that_a_model_does_not_read_is_refused(tmp_path):
    check_style(tmp_path, COMPACT, {"text": "compact", "other": "x"})
    check_style(tmp_path, FULL, {"text": "full"})
    for options in ({}, {"text": "full"}):
        with pytest.raises(ValueError) as caught:
            check_style(tmp_path, COMPACT, options)
        assert str(caught.value) == (
            f"The model in {tmp_path} reads compact text only: set the environment's option"
            " text=compact."
        )


def test_a_prompt_without_known_words_is_refused(tmp_path):
    for unknown in (0.0, 0.2):
        check_words(tmp_path, "p", unknown)
    with pytest.raises(ValueError) as caught:
        check_words(tmp_path, "Find\nthe " + "x" * 100, 0.21)
    assert str(caught.value) == (
        f"The model in {tmp_path} has no words for 21% of the prompt 'Find\\nthe {'x' * 51}': actor"
        " and task do not speak the same language."
    )
    with pytest.raises(ValueError, match="no words for 100% of"):
        check_words(tmp_path, "p", 1.0)
