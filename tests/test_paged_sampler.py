"""Conversations in pages against the same conversations in rows of their own: equal tokens whatever
is shared, evicted or suspended, and nothing left behind.
"""

import dataclasses

import jax
import numpy as np
import pytest

from ictjax import keys
from ictjax.config import SamplerConfig
from ictjax.models import transformer
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig
from ictjax.sampler import Blueprint, Request, Sampler, turn_shapes

MODEL = ModelConfig(
    vocab_size=23,
    num_layers=1,
    d_model=16,
    d_ff=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
    tie_embeddings=True,
)
ROWS = SamplerConfig(
    num_slots=4,
    max_len=40,
    extend_buckets=(8,),
    row_buckets=(4,),
    decode_steps=3,
    max_top_k=1,
    attended_buckets=(40,),
    max_stop_ids=1,
)
PAGES = dataclasses.replace(ROWS, page_size=18, num_pages=12)
# Sixteen conversations in the pages of one of full length, and two more.
SCARCE = dataclasses.replace(ROWS, num_slots=16, row_buckets=(16,), page_size=4, num_pages=12)


def weights(model):
    """Large ones: replies then depend on the whole context, and are not uniform."""
    rng = np.random.default_rng(0)

    def weight(path, leaf):
        if "norm" in path[-1].key:
            return np.full(leaf.shape, float(not model.norm_offset), np.float32)
        return rng.normal(0, 0.3, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(weight, transformer.abstract_params(model))


@pytest.fixture(scope="module")
def samplers():
    """By name; tests close what they open."""
    with (
        Sampler(MODEL, params := weights(MODEL), ROWS, 0) as rows,
        Sampler(MODEL, params, PAGES, 0) as pages,
        Sampler(MODEL, params, SCARCE, 0) as scarce,
    ):
        yield {"rows": rows, "pages": pages, "scarce": scarce}


def request(seed=0, **changes):
    defaults = {
        "max_new_tokens": 7,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "stop_ids": (3,),
        "key": keys.as_array(keys.root_key(seed)),
    }
    return Request(**defaults | changes)


def before_five(ids):
    """The reply ends two ids before the first 5, which another dispatch may have sampled."""
    return max(ids.index(5) - 2, 0) if 5 in ids else None


def check_pools(sampler):
    """Every page is free, kept or used, and used as often as the tables say."""
    store = sampler._store
    users = [np.zeros(len(pool._users), int) for pool in store._pools]
    for seat in store._seats.values():
        for page in seat.pages:
            users[seat.shard][page] += 1
    for pool, expected in zip(store._pools, users, strict=True):
        np.testing.assert_array_equal(pool._users, expected)
        free, kept = set(pool._free), set(pool._kept)
        used = set(np.flatnonzero(expected).tolist())
        assert free | kept | used == set(range(len(expected)))
        assert len(pool._free) + len(kept) + len(used) == len(expected)
        assert all(pool._by_name[name] not in free for name in pool._by_name)
    if not store._seats:
        assert not store._host and not store._awaited


def play(sampler, seed, *, count=7, temperatures=(1.0,)):
    """A random sequence of everything that can be asked for; replies by conversation, in the order
    in which these were opened, up to the turn that was cancelled. Conversations take turns with the
    temperatures.
    """
    rng = np.random.default_rng(seed)
    prefixes = [rng.integers(0, 23, 17).tolist() for _ in range(2)]
    opened, found, plans = {}, {}, {}
    for number in range(count):
        text = [*prefixes[number % 2][: rng.integers(0, 18)], *rng.integers(0, 23, 3).tolist()]
        plans[number] = {
            "text": text,
            "parent": int(rng.integers(number)) if number and rng.random() < 0.3 else None,
            "turns": [rng.integers(0, 23, rng.integers(1, 6)).tolist() for _ in range(3)],
            "new": rng.integers(1, 8, 4).tolist(),
            "cancelled": bool(rng.random() < 0.15),
            "ends": before_five if rng.random() < 0.5 else None,
        }

    def start(number, conversation):
        opened[conversation] = number
        found[number] = []
        ask(number, conversation)

    def ask(number, conversation):
        turn, plan = len(found[number]), plans[number]
        sampler.generate(
            conversation,
            request(
                100 * number + turn,
                max_new_tokens=plan["new"][turn],
                ends=plan["ends"],
                temperature=temperatures[number % len(temperatures)],
            ),
        )
        if plan["cancelled"] and turn == 1:
            sampler.close(conversation)
            del opened[conversation]

    for number, plan in plans.items():
        if plan["parent"] is None:
            start(number, sampler.open(plan["text"]))
    for _ in range(300):
        for generation in sampler.step():
            conversation = generation.conversation
            number = opened[conversation]
            found[number].append(generation)
            for child, plan in plans.items():
                if plan["parent"] == number and child not in found:
                    start(child, sampler.fork(conversation))
            if len(found[number]) == 4 or generation.finish == "context":
                sampler.close(conversation)
                del opened[conversation]
            else:
                sampler.extend(conversation, plans[number]["turns"][len(found[number]) - 1])
                ask(number, conversation)
        if not opened:
            break
    assert not opened and sampler.idle
    return found


def same(found, expected):
    assert found.keys() == expected.keys()
    for number, generations in expected.items():
        for ours, theirs in zip(found[number], generations, strict=True):
            assert (ours.ids, ours.finish) == (theirs.ids, theirs.finish)
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_random_sequences_equal_those_in_rows(samplers, seed):
    expected = play(samplers["rows"], seed)
    assert len({id for replies in expected.values() for one in replies for id in one.ids}) > 10
    for name in ("pages", "scarce"):
        same(play(samplers[name], seed), expected)
        check_pools(samplers[name])
        assert samplers[name].stats.held_bytes == 0
    assert seed or samplers["scarce"].stats.suspensions > 0


def test_a_device_that_fails_leaves_everything_as_it_was(samplers, monkeypatch):
    """Whatever fails, the next step does."""
    expected = play(samplers["rows"], 2)
    failed, rng = set(), np.random.default_rng(0)

    def fallible(name, call):
        def attempt(*values):
            if name not in failed or rng.random() < 0.2:
                failed.add(name)
                raise MemoryError
            return call(*values)

        return attempt

    for sampler in samplers.values():
        programs, step = sampler._programs, sampler.step
        for name in ("copy_row", "take_row", "put_row", "turn"):
            monkeypatch.setattr(programs, name, fallible(name, getattr(programs, name)))

        def again(sampler=sampler, step=step):
            while True:
                try:
                    return step()
                except MemoryError:
                    if sampler is not samplers["rows"]:
                        check_pools(sampler)

        monkeypatch.setattr(sampler, "step", again)
        same(play(sampler, 2), expected)
    assert failed == {"copy_row", "take_row", "put_row", "turn"}


def run_all(sampler, texts, **changes):
    """One reply to each text, all open until the last is there."""
    opened = [sampler.open(text) for text in texts]
    for seed, conversation in enumerate(opened):
        sampler.generate(conversation, request(seed, **changes))
    found = {opened.index(generation.conversation): generation for generation in sampler.run()}
    for conversation in opened:
        sampler.close(conversation)
    return found


def two_turns(sampler, texts, *, first=0):
    """Ids of the replies to each text, turn by turn; all are open until the last is there."""
    opened = [sampler.open(text) for text in texts]
    said = []
    for turn in range(2):
        for number, conversation in enumerate(opened, first):
            if turn:
                sampler.extend(conversation, [5, 6])
            sampler.generate(conversation, request(2 * number + turn))
        replies = {generation.conversation: generation.ids for generation in sampler.run()}
        assert sorted(replies) == opened
        said.append([replies[conversation] for conversation in opened])
        if sampler._sampler_config.page_size:
            check_pools(sampler)
    for conversation in opened:
        sampler.close(conversation)
    return list(zip(*said, strict=True))


def test_conversations_that_wait_for_all_others_come_to_their_end(samplers):
    """Nothing is closed until every reply is there: who has one gives up its pages to the others,
    and gets them back for the next turn.
    """
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 23, 20).tolist() for _ in range(16)]
    expected = []
    for first in range(0, 16, 4):
        expected += two_turns(samplers["rows"], texts[first : first + 4], first=first)
    sampler = samplers["scarce"]
    before = sampler.stats.suspensions
    assert two_turns(sampler, texts) == expected
    assert sampler.stats.suspensions > before
    # 12 pages: keys and values of 2 heads of width 4, 4 positions
    assert sampler.stats.peak_bytes == 12 * (4 * 2 * 2 * 4 * 4)
    check_pools(sampler)


def test_a_fork_copies_no_more_than_the_last_page(samplers):
    sampler = samplers["pages"]
    prompt = np.random.default_rng(2).integers(0, 23, 35).tolist()  # 18 + 17
    before = sampler.stats
    source = sampler.open(prompt)
    sampler.generate(source, request(0, stop_ids=()))
    (first,) = sampler.run()
    assert (sampler.stats.held_tokens, len(first.ids)) == (39, 5)  # the last one is in no page yet
    forks = [sampler.fork(source) for _ in range(3)]
    sampler.close(source)
    for seed, fork in enumerate(forks):
        sampler.generate(fork, request(seed, stop_ids=()))
    assert {generation.finish for generation in sampler.run()} == {"context"}
    for fork in forks:
        sampler.close(fork)
    forks = [sampler.open(prompt)]
    forks += [sampler.fork(forks[0]) for _ in range(3)]
    for seed, fork in enumerate(forks):
        sampler.generate(fork, request(seed, stop_ids=(), max_new_tokens=2))
    found = {generation.conversation: generation.ids for generation in sampler.run()}
    used = sampler.stats
    assert used.row_copies - before.row_copies >= 3  # of a page that the others write on
    page = used.held_bytes // sum(pool.num_used for pool in sampler._store._pools)
    # One page shared, one for each; at most two tokens of each differ.
    assert used.held_bytes == 5 * page and used.held_tokens == 18 + 4 * 18
    for fork in forks:
        sampler.close(fork)
    expected = run_all(samplers["rows"], [prompt] * 4, stop_ids=(), max_new_tokens=2)
    assert [found[fork] for fork in forks] == [expected[index].ids for index in range(4)]


def test_a_closed_conversation_leaves_no_page(samplers):
    """In the middle of a reply, while suspended, and while it waits."""
    sampler = samplers["scarce"]
    opened = [sampler.open([index, *range(17)]) for index in range(5)]
    for conversation in opened:
        sampler.generate(conversation, request(stop_ids=(), max_new_tokens=20))
    suspended = sampler.stats.suspensions
    while sampler.stats.suspensions == suspended:
        sampler.step()
    check_pools(sampler)
    for conversation in opened:
        sampler.close(conversation)
        check_pools(sampler)
    assert sampler.idle and not sampler.stats.held_tokens


def test_ten_thousand_conversations_leave_nothing(samplers):
    sampler = samplers["scarce"]
    rng = np.random.default_rng(3)
    texts = rng.integers(0, 23, (10_000, 3)).tolist()
    asked = request(max_new_tokens=1)
    opened, done = 0, 0
    while done < len(texts):
        while opened < len(texts) and opened - done < 16:
            sampler.generate(sampler.open(texts[opened]), asked)
            opened += 1
        for generation in sampler.step():
            assert len(generation.ids) == 1
            sampler.close(generation.conversation)
            done += 1
    check_pools(sampler)
    (pool,) = sampler._store._pools
    assert len(pool._by_name) <= 12 and sum(map(len, pool._by_parent.values())) <= 12
    held = (sampler._conversations, sampler._queue, sampler._slots, sampler._finished)
    assert not any(held) and len(sampler._free) == 16


def test_edges(samplers):
    sampler, rows = samplers["scarce"], samplers["rows"]
    with pytest.raises(ValueError, match="open was given no ids"):
        sampler.open([])
    free = run_all(rows, [[4]], stop_ids=(), max_new_tokens=100)[0]
    assert run_all(sampler, [[4]], stop_ids=(), max_new_tokens=100)[0].ids == free.ids
    assert (len(free.ids), free.finish) == (39, "context")
    stopped = run_all(sampler, [[4]], stop_ids=free.ids[:1])[0]
    assert (stopped.ids, stopped.finish) == (free.ids[:1], "stop")
    assert run_all(sampler, [[4]], stop_ids=(), max_new_tokens=1)[0].ids == free.ids[:1]
    assert run_all(sampler, [[4] * 41])[0].finish == "context"
    check_pools(sampler)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pages": 9}, "num_pages must be at least 10, one conversation"),
        ({"page_size": 0}, "num_pages must be 0 without page_size, got 12"),
        ({"page_size": 41}, "page_size must be at most max_len = 40, got 41"),
    ],
)
def test_pools_that_hold_no_conversation_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SCARCE, **changes)


def test_pages_by_default():
    """A quarter of full slots, but at least 4,096 positions of each, and on every copy of the
    weights at least one conversation.
    """
    sizes = dataclasses.replace(SCARCE, num_pages=0)
    assert sizes.cache_rows() == (16 * 10, 4)
    assert sizes.with_slots(1).cache_rows() == (10, 4)
    assert dataclasses.replace(sizes, max_len=32_768).cache_rows() == (16 * 8192 // 4, 4)
    assert dataclasses.replace(sizes, max_len=8192).cache_rows() == (16 * 4096 // 4, 4)
    assert dataclasses.replace(sizes, max_len=32_768).cache_rows(8) == (8 * 32_768 // 4, 4)
    assert sizes.with_max_len(3) == dataclasses.replace(
        sizes, max_len=3, page_size=3, extend_buckets=(3,), attended_buckets=(3,)
    )
    with pytest.raises(ValueError, match="num_pages = 12 on 2 copies .* multiple of 2, at least"):
        SCARCE.cache_rows(2)


def test_temporaries_do_not_grow_with_the_pool():
    """One row, an extend and a decode loop in one program: where XLA would copy first."""
    model = dataclasses.replace(MODEL, sliding_window=9, sliding_layers=(True,))
    sizes = dataclasses.replace(SCARCE, row_buckets=(1,), num_pages=100_000, extend_steps=2)
    made = Blueprint(config=model, sizes=sizes, pad_id=0, mesh=None)
    (shape,) = (shape for shape in turn_shapes(sizes) if shape.length > 1)
    params = transformer.unstack_layers(model, weights(model))
    memory = made.turn(params, made.cache_shapes(), shape).compile().memory_analysis()
    pool = 100_000 * 4 * 2 * 2 * 4 * 4  # pages, positions, keys and values, heads, width, float32
    left = 16 * 4 * 4  # of every slot: four numbers
    assert memory.alias_size_in_bytes == pool + left
    assert pool > 100 * memory.temp_size_in_bytes


FAMILIES = {
    "qwen2": {},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "llama": {"qkv_bias": False, "num_kv_heads": 4, "tie_embeddings": False},
    "gemma3_text": {
        "qkv_bias": False,
        "qk_norm": True,
        "sandwich_norms": True,
        "norm_offset": True,
        "scale_embeddings": True,
        "activation": "gelu_tanh",
        "local_rope_theta": 1000.0,
        "attention_scale": 0.3,
        "num_layers": 2,
        "sliding_window": 5,
        "sliding_layers": (True, False),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_in_pages(family):
    """Rows of unequal length, in pages without order; an extend, and a step of some of the rows."""
    model = dataclasses.replace(MODEL, family=family, **FAMILIES[family])
    params = transformer.unstack_layers(model, weights(model))
    rng = np.random.default_rng(0)
    table = rng.permutation(20)[:15].reshape(3, 5).astype(np.int32)
    rows, pool = make_cache(model, 3, 20), make_cache(model, 20, 4)
    extend, extend_pages = (
        jax.jit(function, static_argnums=0)
        for function in (transformer.extend, transformer.extend_pages)
    )
    starts = np.zeros(3, np.int32)
    for lengths in ([7, 1, 3], [6, 0, 7], [1, 1, 1], [0, 0, 1]):
        lengths = np.asarray(lengths, np.int32)
        tokens = rng.integers(0, 23, (3, 7)).astype(np.int32)
        ours, pool = extend_pages(model, params, pool, table, tokens, starts, lengths)
        theirs, rows = extend(model, params, rows, tokens, starts, lengths)
        real = np.arange(7)[None] < lengths[:, None]
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours[real], theirs[real], atol=2e-5)
        logits = [transformer.unembed(model, params, x[real]) for x in (ours, theirs)]
        np.testing.assert_array_equal(*(x.argmax(axis=-1) for x in logits))
        starts += lengths
    unused = sorted(set(range(20)) - set(table.ravel().tolist()))
    assert not any(np.asarray(array)[unused].any() for array in (*pool.k, *pool.v))
