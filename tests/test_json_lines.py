import dataclasses
import json
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs import wire
from envs.api import GameId, Observation, Outcome, Step
from experiments.evaluation_games import hashes_of_training
from experiments.report_data import load_run
from ictjax.json_lines import read_records, to_json_line, to_json_text
from ictjax.manners import Manners, read_manners, write_manners
from ictjax.metrics import MetricsWriter, read_metrics
from ictjax.records import (
    Candidate,
    Context,
    Trajectory,
    Turn,
    context_from_json,
    to_json,
    trajectory_from_json,
)
from ictjax.run_files import write_iteration, write_lines
from tests.evaluations import FOLDER, evaluation

SEPARATORS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
SURROGATES = "\ud800 \udcff \udfff"
NASTY = [*SEPARATORS, *SURROGATES.split(), "\x00", "\x1b", "\x7f", "\x9b", '"\\', "naïve 東京 🙂"]


def episode(text):
    turn = Turn(
        observation=text, actions=(text,), reply=text, thought=text, action=text, reward=0.5
    )
    return Trajectory(
        game=GameId(env="fake", family="door", key="1"),
        system_prompt=text,
        turns=(turn,),
        outcome=Outcome.SUCCESS,
        final_observation=text,
        state_hash="h",
        error=text,
    )


def context(text):
    return Context(
        loop=0, meta_turn=0, family="door", system_prompt=text, trajectories=(episode(text),)
    )


def candidate(text):
    return Candidate(
        prompt_ids=(1,), reply_ids=(2,), logprobs=(-0.5,), reply=text, analysis=text,
        system_prompt=text,
    )  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_a_line_stays_one_line_for_every_reader_and_comes_back_as_it_was(text):
    line = to_json_line({"a": f"x{text}y", text: [text]})
    assert line.encode().decode().splitlines() == [line]
    assert json.loads(line) == {"a": f"x{text}y", text: [text]}
    assert trajectory_from_json(to_json(episode(text))) == episode(text)
    assert context_from_json(to_json(context(text))) == context(text)


@given(st.text(st.characters()))
def test_any_text_comes_back(text):
    line = to_json_line(text)
    assert len(line.splitlines()) == 1
    # two halves of one character, side by side, come back as that character
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert json.loads(line.encode().decode()) == whole


def test_ordinary_text_is_written_as_it_is():
    assert (
        to_json_line({"a": "naïve 東京 🙂", "b": [1, 0.5]}) == '{"a":"naïve 東京 🙂","b":[1,0.5]}'
    )
    assert to_json_text({"a": 1}, indent=1) == '{\n "a": 1\n}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_null(number):
    assert to_json_line({"a": number, "b": [(number, 1.5)]}) == '{"a":null,"b":[[null,1.5]]}'


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_every_writer_takes_every_text_and_every_reader_reads_it(tmp_path, text):
    write_iteration(tmp_path, 1, [context(text)], [[candidate(text)]], [episode(text)])
    for folder, key in (("contexts", "system_prompt"), ("episodes", "error"), ("prompts", "reply")):
        path = tmp_path / folder / "iteration_00001.jsonl"
        assert [record[key] for record in read_records(path).values] == [text]
        assert len(path.read_text(encoding="utf-8").splitlines()) == 1
    assert hashes_of_training(tmp_path, 0) == {"h"}
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"said": text})
    assert read_metrics(tmp_path)[0]["said"] == text
    with MetricsWriter(tmp_path, last_iteration=1) as writer:  # which writes the lines again
        writer.write(2, {"said": text})
    assert [record["said"] for record in read_metrics(tmp_path)] == [text, text]
    manners = Manners(options={}, initial_prompt=text or "Play.", max_steps=1, max_turn_tokens=1)
    write_manners(tmp_path, {"fake": manners})
    assert read_manners(tmp_path)["fake"] == manners
    (frame,) = wire.unpack(bytearray(wire.pack([[text]])))
    assert frame == [text]
    step = Step(observation=Observation(text=text, actions=(text,)), error=text)
    decoded, _ = wire.decode_step(json.loads(wire.encode_step(step)))
    assert decoded.observation.text == ("?" if text in SURROGATES.split() else text)


def lines(path, *pieces):
    path.write_bytes(b"".join(pieces))
    return path


WHOLE = b'{"a":1}\n'


@pytest.mark.parametrize(
    "tail", [b"{", b'{"a":2', b'{"a":"\xe6\x9d', b"[1]", b"null", b"\0\0\0", b"[" * 100_000]
)
def test_a_torn_last_line_is_left_out_and_said(tmp_path, caplog, tail):
    path = lines(tmp_path / "x.jsonl", WHOLE, WHOLE, tail)
    with caplog.at_level(logging.WARNING):
        found = read_records(path)
    assert found == ([{"a": 1}, {"a": 1}], True)
    (said,) = caplog.messages
    assert (
        said == f"Line 3 of {path} is cut off: it is left out, and the 2 lines before it are read."
    )


@pytest.mark.parametrize("content", [(), (WHOLE,), (WHOLE, b'{"a":1}'), (WHOLE, b" \t")])
def test_whole_files_are_read_without_a_word(tmp_path, caplog, content):
    found = read_records(lines(tmp_path / "x.jsonl", *content))
    assert not found.torn and all(value == {"a": 1} for value in found.values)
    assert len(found.values) == sum(piece.count(b"{") for piece in content)
    assert caplog.messages == []
    assert read_records(tmp_path / "missing.jsonl") == ([], False)


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"null", b"[1]", b"1", b'"a"', b'{"a":"\xff"}', b"\0", b"[" * 100_000]
)
def test_a_damaged_line_before_the_last_names_file_and_number(tmp_path, damaged):
    path = lines(tmp_path / "x.jsonl", WHOLE, damaged, b"\n", WHOLE)
    with pytest.raises(ValueError, match=f"^Line 2 of {path} is no JSON object.*restore") as caught:
        read_records(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


PROMPT = b'{"arm":"initial","family":"door","system_prompt":"Play."}\n'


def test_a_run_with_a_torn_file_is_read_and_a_damaged_one_is_named(tmp_path, caplog):
    write_lines(tmp_path / "evaluation.json", [json.dumps(evaluation({"door": "train"}))])
    prompts = tmp_path / FOLDER / "prompts.jsonl"
    prompts.parent.mkdir(parents=True)
    lines(prompts, PROMPT, b'{"arm":"tr')
    (read,) = load_run(tmp_path).evaluations
    assert [line["arm"] for line in read.prompts] == ["initial"]
    assert f"Line 2 of {prompts} is cut off" in caplog.text
    lines(prompts, b"{\n", b"{}\n")
    with pytest.raises(ValueError, match=f"Line 1 of {prompts}"):
        load_run(tmp_path)


def test_records_of_older_runs_are_read():
    """As written before separators were escaped."""
    old = json.dumps(dataclasses.asdict(episode("a\u2028b")), ensure_ascii=False)
    assert trajectory_from_json(old) == episode("a\u2028b")
