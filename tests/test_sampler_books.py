"""The host side of the sampler over devices that compute nothing: who waits for whom and how long,
and that nothing is left of conversations that ended.
"""

import collections
import dataclasses
import gc
import itertools
import sys

import numpy as np
import pytest

from ictjax import keys
from ictjax.config import SamplerConfig
from ictjax.models.config import ModelConfig
from ictjax.sampler import Request, Sampler, engine
from ictjax.sampler.state import GOES_ON, blank_rows

MODEL = ModelConfig(
    vocab_size=23,
    num_layers=1,
    d_model=8,
    d_ff=8,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_positions=65_536,
)
# as `ictjax serve` has them with 32 conversations, on an accelerator and on a CPU
PAGES = SamplerConfig(
    num_slots=32,
    max_len=8192,
    extend_buckets=(64, 512),
    row_buckets=(1, 32),
    decode_steps=8,
    max_top_k=1,
    page_size=128,
)
ROWS = dataclasses.replace(PAGES, page_size=0)
FEW_ROWS = dataclasses.replace(PAGES, row_buckets=(4,))


class Samples(np.ndarray):
    def is_ready(self):
        return True


class Idle:
    """In the place of `programs.Programs`: every row gets all the tokens that it may have."""

    num_shards, row_bytes, compile_count = 1, 1, 0

    def __init__(self, config, params, sizes, pad_id, mesh, unused):
        self._sizes, self.slots_per_shard = sizes, sizes.num_slots
        self.rows_per_shard = sizes.cache_rows()[0]
        self._left = [0] * sizes.num_slots
        self._rng = np.random.default_rng(0)
        self.dispatches = []
        """What each was: tokens appended to a row at most, and the slots that took part."""

    def blank(self, num_rows, length, attended):
        return blank_rows(
            num_rows,
            length,
            num_stop_ids=self._sizes.max_stop_ids,
            num_bias=self._sizes.max_bias_ids,
            num_slots=self.slots_per_shard,
            pad_id=0,
            num_pages=self._sizes.pages_per_row if self._sizes.page_size else 0,
        )

    def turn(self, packed, length, attended):
        most = self._sizes.most_sampled(length)
        counts = np.zeros((len(packed), 1), np.int32)
        slots = set()
        for row, (slot, start, _, allowed, *_) in enumerate(packed.tolist()):
            if slot < self.slots_per_shard:
                slots.add(slot)
                left = self._left[slot] if start == GOES_ON else allowed
                counts[row] = min(left, most)
                self._left[slot] = left - min(left, most)
        self.dispatches.append((length, slots))
        ids = self._rng.integers(0, MODEL.vocab_size, (len(packed), most), np.int32)
        logprobs = np.zeros_like(ids)
        return np.concatenate([ids, logprobs, counts], axis=1).view(Samples)

    def copy_row(self, source, target):
        pass

    def take_row(self, row):
        return np.zeros(1)

    def put_row(self, row, content):
        pass

    def close(self):
        pass


@pytest.fixture(autouse=True)
def _idle(monkeypatch):
    monkeypatch.setattr(engine, "Programs", Idle)


def request(number, **changes):
    return Request(
        max_new_tokens=number,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        stop_ids=(),
        key=keys.as_array(keys.root_key(0)),
        **changes,
    )


def longest_waits(sampler, since):
    """Of every slot that took part before and after: dispatches of others in between, at most."""
    last, longest = {}, collections.Counter()
    for index, (_, slots) in enumerate(sampler._programs.dispatches[since:]):
        for slot in slots:
            longest[slot] = max(longest[slot], index - last.get(slot, index - 1) - 1)
            last[slot] = index
    return longest


@pytest.mark.parametrize("sizes", [ROWS, PAGES], ids=["rows", "pages"])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_long_prompt_and_the_replies_of_many_take_turns(sizes, platform):
    """The replies wait for one piece of it at a time, and it waits for few of their dispatches,
    however many they are.
    """
    rng = np.random.default_rng(0)
    with Sampler(MODEL, {}, sizes, 0) as sampler:
        sampler._fixed_rows = engine._fixed_rows(MODEL, platform)
        replies = [sampler.open(rng.integers(0, 23, 30).tolist()) for _ in range(31)]
        for conversation in replies:
            sampler.generate(conversation, request(2000))
        for _ in range(10):
            sampler.step()
        since = len(sampler._programs.dispatches)
        late = sampler.open(rng.integers(0, 23, 4096).tolist())
        sampler.generate(late, request(1))
        assert sampler.run()[0].conversation == late
        waits = longest_waits(sampler, since)
        pieces = [
            index
            for index, (_, slots) in enumerate(sampler._programs.dispatches)
            if sampler._slots[late] in slots
        ]
        assert len(pieces) == 4096 // 512
        assert pieces[-1] - since < (1 + engine._LATE) * len(pieces)
        assert max(waits[sampler._slots[conversation]] for conversation in replies) == 1


def test_nobody_waits_for_long_where_a_dispatch_has_room_for_few():
    """Long prompts, short ones and replies, three kinds of dispatches with four rows each."""
    rng = np.random.default_rng(0)
    with Sampler(MODEL, {}, FEW_ROWS, 0) as sampler:
        for count, length in ((4, 30), (24, 2000), (4, 40)):
            for _ in range(count):
                conversation = sampler.open(rng.integers(0, 23, length).tolist())
                sampler.generate(conversation, request(100))
        replies = sampler.run()
        assert len(replies) == 32
        # 8 dispatches of four rows before everybody has had one, in all three kinds
        assert max(longest_waits(sampler, 0).values()) <= 8 + engine._LATE + 3


@pytest.mark.parametrize("row_buckets", [(8, 32), (1, 32), (4,)])
def test_turns_that_fit_in_a_dispatch_wait_for_full_ones(row_buckets, monkeypatch):
    """Games that answer when they like: a few late ones get no dispatch of their own."""
    sizes = dataclasses.replace(ROWS, row_buckets=row_buckets, extend_buckets=(32, 64))

    def played():
        rng = np.random.default_rng(1)
        with Sampler(MODEL, {}, sizes, 0) as sampler:
            sampler._fixed_rows = engine._fixed_rows(MODEL, "cpu")
            games = {sampler.open([game]): 6 for game in range(23)}
            answers = [(int(rng.integers(0, 8)), game) for game in games]
            for step in itertools.count():
                for game in [game for due, game in answers if due <= step]:
                    sampler.extend(game, rng.integers(0, 23, rng.integers(10, 60)).tolist())
                    sampler.generate(game, request(int(rng.integers(10, 26))))
                answers = [answer for answer in answers if answer[0] > step]
                for generation in sampler.step():
                    games[generation.conversation] -= 1
                    if games[generation.conversation]:
                        due = step + int(rng.integers(1, 6))
                        answers.append((due, generation.conversation))
                if not any(games.values()):
                    return sampler._programs.dispatches

    usual = played()
    assert len({length for length, _ in usual}) == 3
    monkeypatch.setattr(engine, "_LATE", 10**9)
    assert played() == usual


@pytest.mark.parametrize(
    "sizes",
    [
        dataclasses.replace(ROWS, num_slots=16, max_len=64, extend_buckets=(16,), row_buckets=(16,))
        if not page_size
        else SamplerConfig(
            num_slots=16,
            max_len=64,
            extend_buckets=(16,),
            row_buckets=(16,),
            decode_steps=8,
            max_top_k=1,
            page_size=page_size,
            num_pages=24,
        )
        for page_size in (0, 8)
    ],
    ids=["rows", "pages"],
)
def test_ten_thousand_conversations_take_no_more_memory_than_a_thousand(sizes):
    """Through 16 slots; some are cancelled, some forked, some too long, some end in their text."""
    rng = np.random.default_rng(0)

    with Sampler(MODEL, {}, sizes, 0) as sampler:

        def blocks():
            sampler._programs.dispatches.clear()
            gc.collect()
            return sys.getallocatedblocks()

        begun, ended, before = 0, 0, 0
        live = {}  # conversations by number, with what becomes of them
        while ended < 10_000:
            while begun < 10_000 and len(live) < 24:
                length = 65 if begun % 50 == 7 else int(rng.integers(1, 30))
                text = rng.integers(0, 23, length).tolist()
                conversation = sampler.open(text)
                live[conversation] = begun
                ends = (lambda ids: 1 if len(ids) > 2 else None) if begun % 5 == 0 else None
                sampler.generate(conversation, request(int(rng.integers(1, 20)), ends=ends))
                begun += 1
            for generation in sampler.step():
                number = live.pop(generation.conversation)
                if number % 7 == 3 and begun < 10_000 and generation.finish != "context":
                    fork = sampler.fork(generation.conversation)
                    live[fork] = begun
                    sampler.generate(fork, request(3))
                    begun += 1
                sampler.close(generation.conversation)
                ended += 1
            for conversation in [one for one, number in live.items() if number % 11 == 5][:1]:
                del live[conversation]
                sampler.close(conversation)
                ended += 1
            if not before and ended >= 1_000:
                before = blocks()
        assert sampler.idle and not sampler.num_open and not sampler.stats.held_bytes
        assert sampler.stats.evictions > 1_000 or not sizes.page_size
        assert blocks() < before
