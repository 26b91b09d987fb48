"""The books of the pages against a memory that is only numbers: whatever is opened, written,
suspended, evicted and closed, every conversation finds its own tokens.
"""

import numpy as np
import pytest

from ictjax.sampler.page_pool import ROOT, PagePool, chained
from ictjax.sampler.page_store import PageStore

MAX_LEN, SLOTS = 40, 6  # tokens of a conversation, slots of each copy of the weights


class Memory:
    """Pages of tokens; what moves them is what moves keys and values."""

    row_bytes = 1
    slots_per_shard = SLOTS

    def __init__(self, num_shards, pages, size):
        self.num_shards, self.rows_per_shard = num_shards, pages
        self.rows = np.full((num_shards * pages, size), -1)

    def copy_row(self, source, target):
        self.rows[target] = self.rows[source]

    def take_row(self, row):
        return self.rows[row].copy()

    def put_row(self, row, content):
        self.rows[row] = content

    def tokens(self, store, slot):
        first = slot // SLOTS * self.rows_per_shard
        return self.rows[[first + page for page in store.pages(slot)]].ravel()


def grow(memory, store, slot, tokens, upto):
    """What a dispatch does: new tokens into pages that are there, then into the books."""
    first = slot // SLOTS * memory.rows_per_shard
    size = memory.rows.shape[1]
    for position in range(store.cached(slot), upto):
        page = store.pages(slot)[position // size]
        memory.rows[first + page, position % size] = tokens[position]
    store.write(slot, upto)


@pytest.mark.parametrize(
    ("seed", "shards", "pages", "size"),
    [(0, 1, 12, 4), (1, 2, 11, 4), (2, 2, 2, 40), (3, 3, 40, 1), (4, 1, 5, 18), (5, 2, 3, 18)],
)
def test_everybody_finds_their_own_tokens(seed, shards, pages, size):
    rng = np.random.default_rng(seed)
    memory = Memory(shards, pages, size)
    store = PageStore(memory, size)
    free = list(range(shards * SLOTS))
    tokens, lengths, texts = {}, {}, [rng.integers(0, 9, MAX_LEN, np.int32) for _ in range(3)]
    finished = 0
    for _ in range(1500):
        if free and rng.random() < 0.5:
            text = texts[rng.integers(3)].copy()
            shared = rng.integers(MAX_LEN)
            text[shared:] = rng.integers(0, 9, MAX_LEN - shared)
            length = int(rng.integers(1, MAX_LEN))
            slot = store.place(free, text, length)
            free.remove(slot)
            tokens[slot], lengths[slot] = text, length
        working = {
            slot: length
            for slot, length in lengths.items()
            if length - 1 > store.cached(slot) or rng.random() < 0.3
        }
        admitted = list(store.admit(working))
        assert set(admitted) <= set(working) and (admitted or not working)
        ends = {slot: min(store.cached(slot) + 5, working[slot]) for slot in admitted}
        ready = list(store.reserve(ends, working))
        assert ready or not ends  # somebody always goes on
        for slot in ready:
            grow(memory, store, slot, tokens[slot], ends[slot])
        for slot in list(lengths):
            if store.pages(slot):
                cached = store.cached(slot)
                np.testing.assert_array_equal(
                    memory.tokens(store, slot)[:cached], tokens[slot][:cached]
                )
            if store.cached(slot) == lengths[slot] or rng.random() < 0.02:
                if lengths[slot] < MAX_LEN and rng.random() < 0.5:
                    lengths[slot] = int(rng.integers(lengths[slot], MAX_LEN)) + 1
                else:
                    store.release(slot)
                    del tokens[slot], lengths[slot]
                    free.append(slot)
                    finished += 1
    assert finished > 200 and store.counts["evictions"] > 100
    assert pages * size >= SLOTS * MAX_LEN or store.counts["suspensions"] > 10
    for slot in lengths:
        store.release(slot)
    assert store.held == (0, 0) and not store._host and not store._awaited


def test_the_oldest_unused_page_is_given_up_first():
    told = []
    pool = PagePool(3, 2, lambda page, name: told.append((page, name)))
    texts = np.arange(6, dtype=np.int32).reshape(3, 2)
    names = [chained(ROOT, text) for text in texts]
    pages = [pool.allocate() for _ in range(3)]
    for page, text, name in zip(pages, texts, names, strict=True):
        pool.fill(page, ROOT, 0, text, name)
    assert pool.available == 0 and (pool.num_used, pool.num_tokens) == (3, 6)
    for page in (pages[1], pages[0], pages[2]):
        pool.release(page)
    assert pool.available == 3 and not pool.num_used
    pool.take(pool.find(names[1]))  # used again, and last
    pool.release(pages[1])
    assert pool.allocate() == pages[0] and told == [(pages[0], names[0])]
    assert pool.find(names[0]) is None and pool.find(names[1]) == pages[1]
    assert pool.allocate() == pages[2] and pool.evictions == 2


def test_equal_pages_are_kept_once():
    pool = PagePool(3, 2, lambda page, name: None)
    text = np.arange(2, dtype=np.int32)
    name = chained(ROOT, text)
    first, second = pool.allocate(), pool.allocate()
    for page in (first, second):
        pool.fill(page, ROOT, 0, text, name)
    pool.release(first)
    pool.release(second)
    assert pool.find(name) == first and len(pool._free) == 2
    assert pool.nearest(ROOT, np.array([0, 5], np.int32)) == (first, 1)
    assert pool.nearest(name, text) == (0, 0)
