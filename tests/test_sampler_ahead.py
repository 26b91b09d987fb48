"""Dispatches that are launched before the last one is read, against one at a time: equal replies,
whatever ends, is cancelled or arrives while one runs.
"""

import dataclasses

import numpy as np
import pytest

from ictjax.sampler import Sampler
from ictjax.sampler.engine import _Conversation, _fixed_rows, _Seated
from tests.test_paged_sampler import (
    MODEL,
    PAGES,
    ROWS,
    SCARCE,
    check_pools,
    play,
    request,
    same,
    weights,
)

SIZES = {"rows": ROWS, "pages": PAGES, "scarce": SCARCE}


def one_at_a_time(sizes):
    return dataclasses.replace(sizes, max_in_flight=1)


@pytest.fixture(scope="module")
def params():
    return weights(MODEL)


@pytest.fixture(scope="module")
def single(params):
    with Sampler(MODEL, params, one_at_a_time(ROWS), 0) as made:
        yield made


@pytest.fixture(params=SIZES)
def ahead(request, params):
    with Sampler(MODEL, params, SIZES[request.param], 0) as made:
        yield made


def turn(sampler, texts, **changes):
    """A reply to every text, all asked at once, as everything but its conversation's number."""
    opened = [sampler.open(text) for text in texts]
    for seed, conversation in enumerate(opened):
        sampler.generate(conversation, request(seed, **changes))
    found = {generation.conversation: generation for generation in sampler.run()}
    for conversation in opened:
        sampler.close(conversation)
    return [dataclasses.replace(found[number], conversation=0) for number in opened]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 17, "stop_ids": ()},
        {"max_new_tokens": 17, "stop_ids": (3,)},
        {"max_new_tokens": 17, "ends": lambda ids: 3 if len(ids) > 4 else None},
        {"max_new_tokens": 1},
        {"max_new_tokens": 100, "stop_ids": ()},  # until the context is full
        {"max_new_tokens": 17, "stop_ids": (), "temperature": 0.0},
    ],
)
def test_the_same_bits_by_the_same_programs(params, changes):
    texts = np.random.default_rng(1).integers(0, 23, (4, 6)).tolist()
    with Sampler(MODEL, params, one_at_a_time(ROWS), 0) as single:
        expected = turn(single, texts, **changes)
    with Sampler(MODEL, params, ROWS, 0) as sampler:
        assert turn(sampler, texts, **changes) == expected
        # what goes on behind a stop id samples nothing
        wasted = sampler.stats.decoded_tokens - sum(len(reply.ids) for reply in expected)
        assert wasted == 0 or "ends" in changes


def test_whatever_is_asked_in_whatever_order(single, ahead):
    for seed in (11, 12):
        same(play(ahead, seed), play(single, seed))
        assert ahead.idle and not ahead.step()
    if ahead.stats.suspensions or ahead.stats.evictions:
        check_pools(ahead)


def test_the_next_dispatch_is_launched_before_the_last_is_read(params):
    for in_flight, expected in ((2, "LLRLRLRR"), (1, "LRLRLRLR")):
        events = []

        def read(ids, events=events):
            events.append("R")
            return None

        sizes = dataclasses.replace(ROWS, max_in_flight=in_flight)
        with Sampler(
            MODEL, params, sizes, 0, watch=lambda *_, events=events: events.append("L")
        ) as sampler:
            sampler.generate(
                sampler.open([4, 5]), request(max_new_tokens=10, stop_ids=(), ends=read)
            )
            (reply,) = sampler.run()
        assert len(reply.ids) == 1 + 3 + 3 + 3  # an extend, and decodes of three steps
        assert "".join(events) == expected


def test_replies_that_mostly_end_are_read_before_they_go_on(params):
    """Where a dispatch mostly holds whole replies, going on unread would mostly be in vain."""
    sizes = dataclasses.replace(ROWS, extend_steps=3)
    with Sampler(MODEL, params, sizes, 0) as sampler:
        stop, counts = ask(sampler, stop_ids=()).ids[0], []
        for _ in range(10):
            before = sampler.stats.dispatches
            reply = ask(sampler, stop_ids=(stop,))
            assert (reply.ids, reply.finish) == ((stop,), "stop")
            counts.append(sampler.stats.dispatches - before)
    assert counts[0] == 2 and counts[-1] == 1


def ask(sampler, **changes):
    conversation = sampler.open([4, 5, 6])
    sampler.generate(conversation, request(5, **changes))
    (reply,) = sampler.run()
    sampler.close(conversation)
    return reply


@pytest.mark.parametrize("in_flight", [1, 2])
def test_replies_go_on_beside_the_prompts_of_others(single, params, in_flight):
    """In the rows that these leave empty, so that nobody waits for anybody."""
    short, long = [4, 5], list(range(20))  # the latter in three dispatches
    asked = {"max_new_tokens": 12, "stop_ids": ()}
    expected = [*turn(single, [short], **asked), *turn(single, [long], **asked)]
    rows = []
    sizes = dataclasses.replace(ROWS, max_in_flight=in_flight)
    with Sampler(
        MODEL, params, sizes, 0, watch=lambda _start, num_rows, _result: rows.append(num_rows)
    ) as sampler:
        opened = [sampler.open(short)]
        sampler.generate(opened[0], request(0, **asked))
        sampler.step()
        opened.append(sampler.open(long))
        sampler.generate(opened[1], request(0, **asked))
        while sampler.stats.prefilled_tokens < len(short) + len(long):
            sampler.step()
        assert rows.count(2) >= 3
        replies = {generation.conversation: generation for generation in sampler.run()}
        assert [replies[number].ids for number in opened] == [reply.ids for reply in expected]
        assert sampler.stats.prefilled_tokens == len(short) + len(long)


def test_shorter_prompts_share_the_dispatch_of_a_longer_one(single, params):
    texts = [[4, 5], [6, 7], [8, 9], list(range(12))]
    asked = {"max_new_tokens": 6, "stop_ids": ()}
    expected = turn(single, texts, **asked)
    rows = []
    sizes = dataclasses.replace(ROWS, extend_buckets=(4, 16))
    with Sampler(
        MODEL, params, sizes, 0, watch=lambda _start, num_rows, _result: rows.append(num_rows)
    ) as sampler:
        replies = turn(sampler, texts, **asked)
    assert [reply.ids for reply in replies] == [reply.ids for reply in expected]
    assert set(rows) == {4}


@pytest.mark.parametrize(("num_slots", "first"), [(5, 2), (4, 2), (3, 1)])
def test_who_waits_behind_a_fork_takes_no_slot_of_it(params, num_slots, first):
    """A fork waits for the prefix of its parent; whoever is behind it need not, if there is room
    for both.
    """
    rows, places = [], []
    sizes = dataclasses.replace(ROWS, num_slots=num_slots, row_buckets=(num_slots,))
    with Sampler(
        MODEL, params, sizes, 0, watch=lambda _start, num_rows, _result: rows.append(num_rows)
    ) as sampler:
        for text, forks in (([4, 5, 6, 7], 2), ([7, 8, 9], 0)):
            parent = sampler.open(text)
            places += [parent, *(sampler.fork(parent) for _ in range(forks))]
        places.append(sampler.fork(places[1]))  # whose parent is not even in a slot
        for place in places:
            sampler.generate(place, request(place, stop_ids=()))
        replies = {}
        while len(replies) < len(places):
            for reply in sampler.step():
                replies[reply.conversation] = reply
                sampler.close(reply.conversation)
    assert rows[0] == first


def test_what_is_closed_while_it_runs_disturbs_nobody(single, ahead):
    """Its place is taken at once, by one that has longer to go than what still runs there."""
    texts = np.random.default_rng(2).integers(0, 23, (8, 9)).tolist()
    asked = {"max_new_tokens": 12, "stop_ids": ()}
    expected = turn(single, texts[:4], **asked) + turn(single, texts[4:], **asked)
    opened = [ahead.open(text) for text in texts[:4]]
    for seed, conversation in enumerate(opened):
        ahead.generate(conversation, request(seed, **asked))
    before = ahead.stats.dispatches
    while ahead.stats.dispatches < before + 3:
        ahead.step()
    assert ahead._flights
    for conversation in opened[:2]:
        ahead.close(conversation)
    late = [ahead.open(text) for text in texts[4:6]]
    for seed, conversation in enumerate(late):
        ahead.generate(conversation, request(seed, **asked))
    replies = {generation.conversation: generation for generation in ahead.run()}
    assert sorted(replies) == [*opened[2:], *late]
    for number, wanted in zip([*opened[2:], *late], [*expected[2:4], *expected[4:6]], strict=True):
        assert replies[number].ids == wanted.ids
        np.testing.assert_allclose(replies[number].logprobs, wanted.logprobs, atol=1e-4)
        ahead.close(number)
    assert ahead.idle and not ahead.stats.held_tokens


def test_rows_of_a_dispatch(params):
    """The fewest that get a group through soonest: by rows on a CPU, all at once elsewhere."""
    sizes = dataclasses.replace(ROWS, num_slots=32, row_buckets=(8, 32))
    with Sampler(MODEL, params, sizes, 0) as sampler:
        seats = [_Seated(_Conversation(id=0, tokens=np.empty(0)), slot) for slot in range(32)]
        found = [sampler._num_rows(seats[:count]) for count in (1, 8, 9, 20, 30, 32)]
        assert found == [8, 8, 8, 8, 32, 32]
        sampler._fixed_rows = _fixed_rows(MODEL, "tpu")
        assert [sampler._num_rows(seats[:count]) for count in (1, 8, 9)] == [8, 8, 32]


class Running:
    """The result of a dispatch that runs until it is told that it is over."""

    def __init__(self, result):
        self.result, self.over = result, False

    def is_ready(self):
        return self.over

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.result)


@pytest.mark.parametrize(("num_rows", "ahead"), [(2, True), (4, False)])
def test_a_dispatch_waits_for_those_who_may_join_it(params, monkeypatch, num_rows, ahead):
    """While another one runs, and no longer; until that was read, if it would be mostly empty."""
    sizes = dataclasses.replace(ROWS, row_buckets=(num_rows,))
    with Sampler(MODEL, params, sizes, 0) as sampler:
        first, second, third = (sampler.open([number, 1]) for number in range(3))
        sampler.run()  # all but the last token of each
        running, program = [], sampler._programs.turn

        def turn(*values):
            running.append(Running(program(*values)))
            return running[-1]

        monkeypatch.setattr(sampler._programs, "turn", turn)
        asked = request(max_new_tokens=1)
        sampler.generate(first, asked)
        assert sampler.step() == [] and len(running) == 1
        sampler.generate(second, asked)
        assert sampler.step() == [] and len(running) == 1  # the third may come
        running[0].over = True
        (reply,) = sampler.step()
        assert reply.conversation == first and len(running) == 1 + ahead
        sampler.close(first)
        if not ahead:
            assert sampler.step() == [] and len(running) == 2
        sampler.generate(third, asked)  # nobody else may come
        (reply,) = sampler.step()
        assert reply.conversation == second and len(running) == 3
        sampler.close(second)
        (reply,) = sampler.run()
        assert reply.conversation == third


def test_new_weights_wait_for_what_runs(params):
    with Sampler(MODEL, params, ROWS, 0) as sampler:
        expected = ask(sampler, stop_ids=()).ids
        conversation = sampler.open([4, 5, 6])
        sampler.generate(conversation, request(5, max_new_tokens=20, stop_ids=()))
        sampler.step()
        assert sampler._flights
        sampler.close(conversation)
        sampler.set_params({**params, "embed": np.asarray(params["embed"])[::-1].copy()})
        changed = ask(sampler, stop_ids=()).ids
        sampler.set_params(params)
        assert ask(sampler, stop_ids=()).ids == expected != changed
