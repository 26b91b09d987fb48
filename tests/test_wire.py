"""What may come through a worker's pipe, and what may not."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs import wire
from envs.api import Observation, Outcome, Step

STEP = Step(
    observation=Observation(text="a \u2603", actions=("go", "stay")),
    reward=-0.5,
    outcome=Outcome.DEATH,
    error="",
)
ENCODED = wire.encode_step(STEP, "00")


def framed(body):
    return bytearray(len(body).to_bytes(4, "little") + body)


@pytest.mark.parametrize(
    "answer",
    [
        [wire.NO_TICKET, wire.READY],
        [wire.NO_TICKET, wire.UNUSABLE, "no such module"],
        [7, wire.RAISED, "ValueError: no"],
        [7, wire.REPLAYED, ["0" * 16, "1" * 16]],
        [7, wire.PLAYED, json.loads(ENCODED), wire.digest(ENCODED)],
        [7, wire.PLAYED, json.loads(wire.encode_step(Step(observation=STEP.observation))), "0"],
    ],
)
def test_answers_of_every_kind_are_taken_also_in_parts(answer):
    data = framed(json.dumps([answer, answer]).encode())
    buffer = data[:9]
    assert wire.unpack_answers(buffer) == []
    buffer += data[9:] + b"\x05"
    assert wire.unpack_answers(buffer) == [answer, answer]
    assert buffer == b"\x05"


def test_a_step_comes_back_as_it_was():
    assert wire.decode_step(json.loads(ENCODED)) == (STEP, "00")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"junk",
        b"\xff\xfe",
        b"7",
        b"null",
        b"{}",
        b'"played"',
        b"[" * 100_000,
        b"[" + b"9" * 5000 + b"]",
        b"[1]",
        b"[[]]",
        b"[[1]]",
        b"[{}]",
        b'[["1","raised","x"]]',
        b'[[true,"raised","x"]]',
        b'[[1.0,"raised","x"]]',
        b'[[1,"ready"]]',
        b'[[1,"gone"]]',
        b'[[1,"raised"]]',
        b'[[1,"raised",7]]',
        b'[[1,"raised","x","y"]]',
        b'[[1,["raised"],"x"]]',
        b'[[1,"replayed","0"]]',
        b'[[1,"replayed",[0]]]',
        b'[[1,"played",{},"0"]]',
        b'[[1,"played",[],"0"]]',
        b'[[1,"played",["a",[],0.0,null,"","",""],"0"]]',
        b'[[1,"played",["a",[],0.0,null,"",""],0]]',
        b'[[1,"played",[7,[],0.0,null,"",""],"0"]]',
        b'[[1,"played",["a","go",0.0,null,"",""],"0"]]',
        b'[[1,"played",["a",[1],0.0,null,"",""],"0"]]',
        b'[[1,"played",["a",[],"0",null,"",""],"0"]]',
        b'[[1,"played",["a",[],NaN,null,"",""],"0"]]',
        b'[[1,"played",["a",[],-Infinity,null,"",""],"0"]]',
        b'[[1,"played",["a",[],1e999,null,"",""],"0"]]',
        b'[[1,"played",["a",[],0.0,"won","",""],"0"]]',
        b'[[1,"played",["a",[],0.0,["success"],"",""],"0"]]',
        b'[[1,"played",["a",[],0.0,null,null,""],"0"]]',
    ],
    ids=range(38),
)
def test_anything_else_is_refused(body):
    with pytest.raises(ValueError):
        wire.unpack_answers(framed(body))


@pytest.mark.parametrize("length", [wire.MAX_FRAME_BYTES + 1, 2_000_000_000, 2**32 - 1])
def test_a_frame_that_is_too_long_is_refused_before_it_comes(length):
    with pytest.raises(ValueError, match=f"at most {wire.MAX_FRAME_BYTES} bytes, got {length}"):
        wire.unpack(bytearray(length.to_bytes(4, "little")))


def test_the_largest_step_fits_into_a_frame():
    step = Step(observation=Observation(text="\U0001f9ca" * 1000))
    per_char = len(wire.encode_step(step)) / 1000
    assert per_char * wire.MAX_STEP_CHARS + wire.FLUSH_BYTES < wire.MAX_FRAME_BYTES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=6) | st.dictionaries(st.text(max_size=3), parts),
    max_leaves=20,
)
KINDS = st.sampled_from([wire.READY, wire.PLAYED, wire.REPLAYED, wire.RAISED, wire.UNUSABLE])


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=50)
    | st.binary(max_size=50).map(framed).map(bytes)
    | JSON.map(lambda value: bytes(framed(json.dumps(value).encode())))
    | st.tuples(st.integers(), KINDS, JSON, st.text(max_size=3)).map(
        lambda answer: bytes(framed(json.dumps([answer]).encode()))
    )
)
def test_whatever_a_pipe_holds_is_an_answer_or_refused(data):
    with contextlib.suppress(ValueError):
        for answer in wire.unpack_answers(bytearray(data)):
            if answer[1] == wire.PLAYED:
                wire.decode_step(answer[2])
