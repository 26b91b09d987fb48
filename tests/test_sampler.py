"""The slot sampler against plain loops over full forward passes, and against itself at other sizes
and orders.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ictjax import keys
from ictjax.config import SamplerConfig
from ictjax.models import transformer
from ictjax.models.attention import WHOLE
from ictjax.models.config import ModelConfig
from ictjax.sampler import Blueprint, Generation, Request, Sampler, TurnShape, blueprint
from ictjax.sampler.state import NO_ID, Extras
from ictjax.sampler.step import _nucleus, sample

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
SIZES = SamplerConfig(
    num_slots=2,
    max_len=40,
    extend_buckets=(8,),
    row_buckets=(2,),
    decode_steps=3,
    max_top_k=8,
    attended_buckets=(40,),
    max_stop_ids=2,
    max_bias_ids=3,
    max_top_logprobs=4,
)


@pytest.fixture(scope="module")
def params():
    # Larger than initial weights: replies then depend on the whole context, and are not uniform.
    return jax.tree.map(
        lambda leaf: leaf * (12 if leaf.ndim > 1 else 1),
        transformer.init_params(MODEL, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def sampler(params):
    """One sampler for the tests that only need some: they close what they open, so nothing but time
    is shared.
    """
    with Sampler(MODEL, params, SIZES, 0) as made:
        made.warmup()
        yield made


@pytest.fixture(scope="module")
def full_logits(params):
    """Logits of a whole sequence by one forward pass, padded to one shape."""

    @jax.jit
    def padded(tokens):
        return transformer.unembed(MODEL, params, transformer.forward(MODEL, params, tokens))

    def logits(ids):
        return np.asarray(
            padded(np.pad(np.asarray(ids, np.int32), (0, SIZES.max_len - len(ids)))[None])[
                0, : len(ids)
            ]
        )

    return logits


def words(seed):
    return keys.as_array(keys.root_key(seed))


def request(seed=0, **changes):
    defaults = {
        "max_new_tokens": 7,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "stop_ids": (),
        "key": words(seed),
    }
    return Request(**defaults | changes)


def ask(sampler, ids, asked):
    conversation = sampler.open(ids)
    sampler.generate(conversation, asked)
    (generation,) = sampler.run()
    sampler.close(conversation)
    return generation


def prompts(number, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, MODEL.vocab_size, int(rng.integers(1, 20))).tolist() for _ in range(number)
    ]


def before_a_multiple_of_four(ids):
    """How many ids come before the first one of these, once there is one."""
    return next((index for index, number in enumerate(ids) if index and number % 4 == 0), None)


# Of the conversations below, which are computed together.
OPTIONS = (
    {},
    {"min_p": 0.2},
    {"bias": {4: 3.0, 5: -math.inf}},
    {"temperature": 2.0, "logprobs_of": "model"},
    {"temperature": 0.0, "bias": {6: 2.0, 7: -2.0}},
    {"top_k": 5, "min_p": 0.05, "bias": {8: 1.0}},
    {"top_p": 0.8, "temperature": 0.6},
    {"ends": before_a_multiple_of_four},
    {"top_k": 3, "ends": lambda ids: 0 if len(ids) > 4 else None},
)


def replies(sampler, order):
    """Replies to prompt i under key i and options i, two turns each, opened in some order; by
    prompt.
    """
    texts, turns, found = prompts(9), {}, {}
    for index in order:
        conversation = sampler.open(texts[index])
        sampler.generate(conversation, request(index, stop_ids=(3,), **OPTIONS[index]))
        turns[conversation] = index
    while turns:
        for generation in sampler.step():
            index = turns[generation.conversation]
            found.setdefault(index, []).append(generation.ids)
            if len(found[index]) == 1:
                sampler.extend(generation.conversation, texts[-index][:5])
                sampler.generate(generation.conversation, request(100 + index, **OPTIONS[index]))
            else:
                sampler.close(generation.conversation)
                del turns[generation.conversation]
    return found


def test_tokens_depend_on_neither_slots_nor_order(sampler, params):
    expected = replies(sampler, range(9))
    assert sorted(expected) == list(range(9))
    other = dataclasses.replace(
        SIZES,
        num_slots=8,
        row_buckets=(8,),
        decode_steps=2,
        extend_steps=4,
        extend_buckets=(5,),
        attended_buckets=(20,),
    )
    with Sampler(MODEL, params, other, 0) as wide:
        assert replies(wide, [4, 8, 1, 0, 7, 3, 2, 6, 5]) == expected


def test_equals_a_plain_loop(sampler, full_logits):
    """Gumbel-max with the stated key of each token, by full forward passes, and the stated
    log-probabilities.
    """
    prompt, asked = prompts(1)[0], request(5, temperature=0.7)
    generation = ask(sampler, prompt, asked)
    ids = list(prompt)
    for count in range(7):
        scaled = full_logits(ids)[-1] / np.float32(0.7)
        noise = jax.random.gumbel(
            jax.random.fold_in(jax.random.wrap_key_data(asked.key), count), (MODEL.vocab_size,)
        )
        ids.append(int(np.argmax(scaled + noise)))
        np.testing.assert_allclose(
            generation.logprobs[count], jax.nn.log_softmax(scaled)[ids[-1]], atol=1e-4
        )
    assert (generation.ids, generation.finish) == (tuple(ids[len(prompt) :]), "length")
    assert len(set(generation.ids)) > 1


def test_greedy_equals_top_k_of_one(sampler, full_logits):
    prompt = prompts(2)[1]
    greedy = ask(sampler, prompt, request(temperature=0.0))
    assert ask(sampler, prompt, request(1, top_k=1)).ids == greedy.ids
    assert ask(sampler, prompt, request(2, top_p=1e-6)).ids == greedy.ids
    assert ask(sampler, prompt, request(3)).ids != greedy.ids
    logits = full_logits(prompt + list(greedy.ids))[len(prompt) - 1 : -1]
    assert tuple(logits.argmax(axis=-1)) == greedy.ids
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(7), list(greedy.ids)]
    np.testing.assert_allclose(greedy.logprobs, expected, atol=1e-4)


def test_logprobs_are_before_truncation(sampler, full_logits):
    prompt = prompts(1)[0]
    generation = ask(sampler, prompt, request(4, temperature=1.5, top_k=3, top_p=0.9))
    logits = full_logits(prompt + list(generation.ids))[len(prompt) - 1 : -1] / 1.5
    np.testing.assert_allclose(
        generation.logprobs,
        np.asarray(jax.nn.log_softmax(logits))[np.arange(7), list(generation.ids)],
        atol=1e-4,
    )
    assert all(
        (row > row[chosen]).sum() < 3 for row, chosen in zip(logits, generation.ids, strict=True)
    )


def test_seeds_reproduce(sampler):
    prompt = prompts(1)[0]
    first = ask(sampler, prompt, request(11))
    assert (
        dataclasses.replace(ask(sampler, prompt, request(11)), conversation=first.conversation)
        == first
    )
    assert ask(sampler, prompt, request(12)).ids != first.ids


def test_logprobs_at_temperature_one(sampler):
    prompt = prompts(1)[0]
    options = {"temperature": 0.5, "top_k": 4, "bias": {3: 1.0, 9: -math.inf}}
    usual = ask(sampler, prompt, request(4, **options))
    asked = ask(sampler, prompt, request(4, **options, logprobs_of="model"))
    assert asked.ids == usual.ids
    bent = sampler.open(prompt)  # beside a row that does not ask for them
    straight = sampler.open(prompt)
    sampler.generate(bent, request(4, **options, logprobs_of="model"))
    sampler.generate(straight, request(4, **options))
    both = {generation.conversation: generation.logprobs for generation in sampler.run()}
    for conversation in (bent, straight):
        sampler.close(conversation)
    assert (both[bent], both[straight]) == (asked.logprobs, usual.logprobs)
    greedy = ask(sampler, prompt, request(temperature=0.0, logprobs_of="model"))
    assert greedy.logprobs == ask(sampler, prompt, request(temperature=0.0)).logprobs


def test_logprobs_at_temperature_one_are_the_models(sampler, full_logits):
    prompt = prompts(1)[0]
    reply = ask(sampler, prompt, request(4, temperature=0.5, bias={3: 2.0}, logprobs_of="model"))
    logits = full_logits(prompt + list(reply.ids))[len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(7), list(reply.ids)]
    np.testing.assert_allclose(reply.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"temperature": 0.0}, 1.0),
        ({"temperature": 0.5, "top_k": 3, "bias": {3: 2.0, 9: -math.inf}}, 0.5),
        ({"temperature": 0.5, "logprobs_of": "model"}, 1.0),
    ],
)
def test_the_likeliest_ids_and_their_logprobs(sampler, full_logits, changes, at):
    """Before bias and truncation, as those of the sampled ids; and beside a row that asks for
    none, whose reply they do not change.
    """
    prompt = prompts(1)[0]
    usual = ask(sampler, prompt, request(4, **changes))
    both = [sampler.open(prompt), sampler.open(prompt)]
    sampler.generate(both[0], request(4, **changes, top_logprobs=3))
    sampler.generate(both[1], request(4, **changes))
    replies = {generation.conversation: generation for generation in sampler.run()}
    for conversation in both:
        sampler.close(conversation)
    asked, other = (replies[conversation] for conversation in both)
    for reply in (asked, other):
        assert (reply.ids, reply.logprobs) == (usual.ids, usual.logprobs)
    assert usual.top_logprobs == other.top_logprobs == ()
    logits = full_logits(prompt + list(asked.ids))[len(prompt) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits / at))
    order = np.argsort(-expected, axis=-1, kind="stable")[:, :3]
    assert [[number for number, _ in one] for one in asked.top_logprobs] == order.tolist()
    found = [[logprob for _, logprob in one] for one in asked.top_logprobs]
    np.testing.assert_allclose(found, np.take_along_axis(expected, order, axis=1), atol=1e-4)
    for number, logprob, likeliest in zip(
        asked.ids, asked.logprobs, asked.top_logprobs, strict=True
    ):
        assert dict(likeliest).get(number, logprob) == logprob


def test_what_was_sampled_behind_an_end_never_was(sampler):
    """The reply, its conversation and its cache row are those of the tokens that are kept."""
    prompt = [4, 4, 19, 2, 2, 5]
    whole = ask(sampler, prompt, request(8, max_new_tokens=12)).ids
    for kept in (0, 1, 3, 5):
        conversation = sampler.open(prompt)
        ends = {"max_new_tokens": 12, "ends": lambda ids, k=kept: k if len(ids) > k else None}
        sampler.generate(conversation, request(8, **ends, top_logprobs=1))
        (cut,) = sampler.run()
        assert (cut.ids, cut.finish, len(cut.logprobs)) == (whole[:kept], "stop", kept)
        assert len(cut.top_logprobs) == kept
        sampler.generate(conversation, request(9))  # with nothing behind it
        (next_reply,) = sampler.run()
        sampler.extend(conversation, [1, 2])
        sampler.generate(conversation, request(10))
        (last,) = sampler.run()
        sampler.close(conversation)
        said = [*prompt, *cut.ids]
        assert next_reply.ids == ask(sampler, said, request(9)).ids
        assert last.ids == ask(sampler, [*said, *next_reply.ids, 1, 2], request(10)).ids


def test_stop_budget_and_context(sampler):
    prompt = prompts(1)[0]
    free = ask(sampler, prompt, request(6, max_new_tokens=12)).ids
    stop = free[4]
    first = free.index(stop)
    stopped = ask(
        sampler, prompt, request(6, max_new_tokens=12, stop_ids=(22 if stop != 22 else 21, stop))
    )
    assert (stopped.ids, stopped.finish) == (free[: first + 1], "stop")
    assert ask(sampler, prompt, request(6, max_new_tokens=1)).ids == free[:1]
    long = ask(sampler, prompt, request(6, max_new_tokens=100))
    assert (len(long.ids), long.finish) == (SIZES.max_len - len(prompt), "context")
    assert long.ids[:12] == free


def test_context_overflow_is_a_finish_and_frees_the_slot(sampler):
    texts = prompts(2)
    full = sampler.open(list(range(20)) * 2)
    sampler.generate(full, request())
    assert sampler.run() == [Generation(conversation=full, ids=(), logprobs=(), finish="context")]
    overflowing = sampler.open(texts[0])
    sampler.extend(overflowing, [1] * SIZES.max_len)
    sampler.generate(overflowing, request())
    never = sampler.open([1] * (SIZES.max_len + 1))  # takes no slot
    sampler.generate(never, request())
    assert {generation.finish for generation in sampler.run()} == {"context"}
    for conversation in (full, overflowing, never):
        sampler.close(conversation)
    assert ask(sampler, texts[1], request()).finish == "length"


def test_many_turns_equal_one_prompt(sampler):
    """Open, generate, extend, extend, generate: the second reply is that of a fresh conversation
    with all the tokens.
    """
    first, second = [5, 1, 9], [2, 2, 17, 4, 4, 8, 1, 0, 6, 3]
    conversation = sampler.open(first)
    sampler.generate(conversation, request(1))
    (reply,) = sampler.run()
    sampler.extend(conversation, second[:1])
    sampler.step()
    sampler.extend(conversation, second[1:])
    sampler.generate(conversation, request(2))
    (generation,) = sampler.run()
    sampler.close(conversation)
    whole = [*first, *reply.ids, *second]
    # A conversation of other tokens in every slot: nothing of the first can be reused.
    for other in [sampler.open([7] * 30), sampler.open([8] * 30)]:
        sampler.run()
        sampler.close(other)
    before = sampler.stats.reused_tokens
    again = ask(sampler, whole, request(2))
    assert sampler.stats.reused_tokens == before
    assert again.ids == generation.ids
    np.testing.assert_allclose(again.logprobs, generation.logprobs, atol=1e-5)


def test_fork_equals_separate_prefill(sampler):
    prompt = [4, 4, 19, 2, 2, 5, 11, 9, 1, 1, 20, 3, 3, 8, 0, 13, 7, 7, 12, 6, 18]
    separate = [ask(sampler, prompt, request(seed)).ids for seed in range(5)]
    for other in [sampler.open([10] * 30), sampler.open([14] * 30)]:
        sampler.run()
        sampler.close(other)
    before = sampler.stats
    source = sampler.open(prompt)
    # more than slots: the last ones wait, also past the end of the source
    forks = [source, *(sampler.fork(source) for _ in range(4))]
    for seed, conversation in enumerate(forks):
        sampler.generate(conversation, request(seed))
    found = {}
    while len(found) < 5:
        for generation in sampler.step():
            found[forks.index(generation.conversation)] = generation.ids
            sampler.close(generation.conversation)
    assert [found[index] for index in range(5)] == separate
    after = sampler.stats
    assert after.prefilled_tokens - before.prefilled_tokens <= len(prompt)
    assert after.reused_tokens - before.reused_tokens == 4 * (len(prompt) - 1)
    assert after.row_copies > before.row_copies


def test_new_conversation_starts_from_a_known_prefix(sampler):
    prompt = list(range(20))
    expected = ask(sampler, [*prompt, 1, 2], request(3)).ids
    before = sampler.stats
    assert ask(sampler, [*prompt, 1, 2], request(3)).ids == expected
    assert sampler.stats.reused_tokens - before.reused_tokens == 21
    assert ask(sampler, [*prompt, 5], request(3)).ids != expected
    assert sampler.stats.reused_tokens - before.reused_tokens == 21 + 20


def test_queue_moves_when_a_slot_closes(sampler):
    conversations = [sampler.open([index, 1]) for index in range(4)]
    for conversation in conversations:
        sampler.generate(conversation, request())
    assert {generation.conversation for generation in sampler.run()} == set(conversations[:2])
    assert sampler.idle and not sampler.step()
    sampler.close(conversations[2])  # while it waits: it must never get a slot
    sampler.close(conversations[0])
    assert not sampler.idle
    assert [generation.conversation for generation in sampler.run()] == conversations[3:]
    sampler.close(conversations[1])
    sampler.close(conversations[3])


def test_nothing_recompiles_after_warmup(params):
    sizes = dataclasses.replace(SIZES, row_buckets=(1, 2))
    with Sampler(MODEL, params, sizes, 0) as fresh:
        fresh.warmup()
        # Two row buckets x (decode, extend) x 40 attended positions, and the row copy.
        assert fresh.stats.compile_count == 2 * 2 * 1 + 1
        compilations = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: (
                compilations.append(event) if "backend_compile" in event else None
            )
        )
        jax.jit(lambda x: x + 1)(np.float32(1)).block_until_ready()
        assert len(compilations) == 1  # the listener works
        replies(fresh, range(9))
        source = fresh.open(list(range(20)))
        fresh.generate(source, request(top_k=4, top_p=0.8, temperature=0.3))
        child = fresh.fork(source) if fresh.run() else None
        fresh.generate(child, request(max_new_tokens=100))
        fresh.run()
        assert fresh.stats.compile_count == 5
        assert len(compilations) == 1


# Of a loop the compiler counts a turn: where all is one page, or one part of the slots (in parts
# they multiply the same: test_attention.py), its count holds the whole attention.
@pytest.mark.parametrize("page_size", [0, 2048])
def test_a_prefill_multiplies_what_the_model_does(page_size, monkeypatch):
    """By the compiler's count, of two layers and the vocabulary of Qwen2.5-7B and 2,048 tokens: at
    most 1.1 times the products with weights and over the pairs of tokens that see each other.
    """
    monkeypatch.setattr(blueprint, "part_bytes_of", lambda _: WHOLE)
    model = ModelConfig(
        vocab_size=152_064,
        num_layers=2,
        d_model=3584,
        d_ff=18_944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        tie_embeddings=False,
    )
    length = 2048
    sizes = dataclasses.replace(
        SIZES,
        max_len=length,
        extend_buckets=(length,),
        row_buckets=(1,),
        attended_buckets=(length,),
        page_size=page_size,
    )
    made = Blueprint(config=model, sizes=sizes, pad_id=0, mesh=None)
    params = jax.eval_shape(
        functools.partial(transformer.unstack_layers, model), transformer.abstract_params(model)
    )
    program = made.turn(params, made.cache_shapes(), TurnShape(1, length, length))
    projections = 2 * 28 * 128 * 3584 + 2 * 4 * 128 * 3584 + 3 * 3584 * 18_944
    pairs = length * (length + 1) // 2
    needed = 2 * (2 * projections * length + 4 * 28 * 128 * pairs) + 2 * 3584 * 152_064
    assert 1 <= program.cost_analysis()["flops"] / needed <= 1.1


def test_stats_account_for_every_position(sampler):
    before = dataclasses.asdict(sampler.stats)
    conversation = sampler.open([21] * 11)  # a beginning that no other test leaves in a cache row
    sampler.generate(conversation, request(max_new_tokens=6))
    sampler.run()
    sampler.close(conversation)
    used = {name: count - before[name] for name, count in dataclasses.asdict(sampler.stats).items()}
    del used["peak_bytes"]  # of all tests so far
    # keys and values of two heads of width 4 and 40 positions
    assert sampler.stats.peak_bytes in (4 * 2 * 2 * 4 * 40, 2 * 4 * 2 * 2 * 4 * 40)
    assert used == {
        "prefilled_tokens": 11,
        "reused_tokens": 0,
        "decoded_tokens": 6,
        "proposed_tokens": 0,
        "accepted_tokens": 0,
        # Two extends of 2 rows x 8 positions for 11 tokens; the second samples 1; decodes of 3 and
        # 2 steps x 2 rows for the other 5.
        "padded_tokens": (2 * 2 * 8 - 11) + (2 * 5 - 5),
        "dispatches": 4,
        "row_copies": 0,
        "compile_count": 0,
        "evictions": 0,
        "suspensions": 0,
        "held_tokens": 0,
        "held_bytes": 0,
    }


def test_new_weights_forget_the_cache(sampler, params):
    prompt = list(range(20))
    before = ask(sampler, prompt, request(temperature=0.0))
    conversation = sampler.open(prompt)
    with pytest.raises(ValueError, match="1 conversations are open"):
        sampler.set_params(params)
    sampler.close(conversation)
    with pytest.raises(ValueError, match="the config asks for"):
        sampler.set_params({**params, "norm": np.ones(3, np.float32)})
    sampler.set_params({**params, "embed": np.asarray(params["embed"])[::-1].copy()})
    reused = sampler.stats.reused_tokens
    changed = ask(sampler, prompt, request(temperature=0.0))
    assert sampler.stats.reused_tokens == reused
    sampler.set_params(params)
    again = ask(sampler, prompt, request(temperature=0.0))
    assert again.ids == before.ids != changed.ids


def test_top_p_keeps_the_smallest_sufficient_set():
    """A hand-made distribution: which ids can be drawn, and in which proportions."""
    probabilities = np.array([0.05, 0.4, 0.3, 0.15, 0.1], np.float32)
    number = 4000

    def draw(top_k, top_p):
        ids, logprobs = jax.jit(sample, static_argnums=6)(
            jnp.tile(jnp.log(probabilities), (number, 1)),
            jnp.ones(number),
            jnp.full(number, top_k, jnp.int32),
            jnp.full(number, top_p, jnp.float32),
            jnp.tile(words(0), (number, 1)),
            jnp.arange(number, dtype=jnp.int32),
            4,
        )
        np.testing.assert_allclose(logprobs, np.log(probabilities)[np.asarray(ids)], atol=1e-5)
        return np.bincount(np.asarray(ids), minlength=5) / number

    np.testing.assert_allclose(draw(0, 1.0), probabilities, atol=0.03)
    np.testing.assert_allclose(draw(0, 0.69), [0, 4 / 7, 3 / 7, 0, 0], atol=0.03)
    np.testing.assert_allclose(draw(0, 0.71), [0, 8 / 17, 6 / 17, 3 / 17, 0], atol=0.03)
    np.testing.assert_allclose(draw(0, 0.1), [0, 1, 0, 0, 0])
    np.testing.assert_allclose(draw(3, 1.0), [0, 8 / 17, 6 / 17, 3 / 17, 0], atol=0.03)
    np.testing.assert_allclose(draw(2, 0.5), [0, 1, 0, 0, 0])  # 0.4 of 0.7 is more than half


BIASES = ({}, {1: 1.5, 4: -2.0, 7: -math.inf})
COMBINATIONS = {  # temperature, top_k, top_p, min_p, bias; by max_top_k, of 12 ids
    12: tuple(itertools.product((0.5, 1.3), (0, 5), (1.0, 0.75), (0.0, 0.12), BIASES)),
    4: tuple(itertools.product((0.5, 1.3), (0, 3), (0.95, 0.75), (0.0, 0.12), BIASES)),
}
DRAWS = 10_000
FALSE_ALARMS = 1e-4
"""How often one of the tests below would fail by chance, were their keys others every time; with the
keys that they have they always pass."""
FALSE_ALARMS_EACH = FALSE_ALARMS / sum(map(len, COMBINATIONS.values()))


def probabilities_of(logits, temperature, top_k, top_p, min_p, bias):
    """In float64 and one step at a time, as Hugging Face's logits processors."""
    logits = np.array(logits, np.float64)
    for number, added in bias.items():
        logits[number] += added
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp((logits - logits.max()) / temperature)
    if top_k:
        probabilities[order[top_k:]] = 0
    probabilities /= probabilities.sum()
    above = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[above >= top_p]] = 0
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def chi_square_p(counts, probabilities):
    there = probabilities > 0
    if counts[~there].any():
        return 0.0
    if there.sum() == 1:
        return 1.0
    expected = counts.sum() * probabilities[there]
    return scipy.stats.chisquare(counts[there], expected).pvalue


@pytest.mark.parametrize("max_top_k", COMBINATIONS)
def test_draws_follow_the_truncated_distribution(max_top_k):
    """Temperature, top-k, top-p, min-p and bias in every combination, all in one batch, by a
    chi-square test that finds a temperature which is a quarter too high in most of them.
    """
    combinations = COMBINATIONS[max_top_k]
    logits = np.array([1.2, 0.1, 2.0, -0.7, 1.9, 0.4, -1.5, 2.2, 0.9, -0.2, 0.6, 1.5], np.float32)
    rows = [
        (row, bias)
        for *row, bias in combinations
        for bias in [[*bias.items(), *[(NO_ID, 0.0)] * (3 - len(bias))]]
    ]
    temperature, top_k, top_p, min_p = (
        np.repeat(np.array(column), DRAWS) for column in zip(*(row for row, _ in rows), strict=True)
    )
    number = len(rows) * DRAWS
    ids, _ = jax.jit(sample, static_argnums=6)(
        jnp.tile(jnp.asarray(logits), (number, 1)),
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.tile(words(0), (number, 1)),
        jnp.arange(number, dtype=jnp.int32),
        max_top_k,
        (),
        Extras(
            min_p_b=jnp.asarray(min_p, jnp.float32),
            unit_b=jnp.zeros(number, jnp.int32),
            bias_ids_bx=jnp.repeat(jnp.array([[i for i, _ in bias] for _, bias in rows]), DRAWS, 0),
            bias_bx=jnp.repeat(jnp.array([[b for _, b in bias] for _, bias in rows]), DRAWS, 0),
        ),
    )
    detected, wide = 0, 0
    for drawn, settings in zip(np.asarray(ids).reshape(-1, DRAWS), combinations, strict=True):
        counts = np.bincount(drawn, minlength=len(logits))
        right = probabilities_of(logits, *settings)
        assert chi_square_p(counts, right) > FALSE_ALARMS_EACH, settings
        warmer = probabilities_of(logits, 1.25 * settings[0], *settings[1:])
        detected += chi_square_p(counts, warmer) < FALSE_ALARMS_EACH
        wide += settings[2] < 1 and (right > 0).sum() > max_top_k
    assert detected >= len(combinations) / 2
    assert wide >= 4 or max_top_k == len(logits)


def test_a_nucleus_is_that_of_the_sorted_vocabulary():
    """Among ids of which many are equally likely, some impossible."""
    rng = np.random.default_rng(0)
    logits_bv = rng.integers(-3, 4, (500, 40)).astype(np.float32)
    logits_bv[rng.random(logits_bv.shape) < 0.2] = -np.inf
    top_p_b = rng.random(500).astype(np.float32)
    expected_bv = [
        probabilities_of(logits, 1.0, 0, top_p, 0.0, {}) > 0
        for logits, top_p in zip(logits_bv, top_p_b, strict=True)
    ]
    np.testing.assert_array_equal(jax.jit(_nucleus)(logits_bv, top_p_b), expected_bv)


@pytest.mark.parametrize("length", [1, 8])
def test_temporaries_follow_the_rows_of_a_dispatch_and_what_they_attend_to(params, length):
    """Neither the slots nor the positions of one."""
    unstacked = transformer.unstack_layers(MODEL, params)

    def temporaries(*, num_slots=64, max_len=1024, num_rows=4, attended=256):
        buckets = {"row_buckets": (num_rows,), "attended_buckets": (attended, max_len)}
        sizes = dataclasses.replace(SIZES, num_slots=num_slots, max_len=max_len, **buckets)
        made = Blueprint(config=MODEL, sizes=sizes, pad_id=0, mesh=None)
        lowered = made.turn(unstacked, made.cache_shapes(), TurnShape(num_rows, length, attended))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    usual = temporaries()
    part = 4 * 256 * 2 * 2 * 4 * 4  # rows, positions, keys and values, heads, width, float32
    scores = 4 * 4 * length * 256 * 4  # rows, query heads, tokens, positions
    assert part <= usual < 2 * (part + scores)
    assert temporaries(num_slots=4096, max_len=4096) == usual
    assert temporaries(num_rows=8, attended=512) == pytest.approx(4 * usual, rel=0.1)


UNUSED = (range(2), range(20, 23))


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 8, "top_p": 0.5}]
)
def test_ids_without_text_are_never_drawn(changes):
    """The draw is that of a model to which they are impossible; log-probabilities stay the
    model's own.
    """
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes
    logits_bv = jax.random.normal(jax.random.key(3), (64, 23)) * 2
    logits_bv = logits_bv.at[:, 20:].add(4.0)
    keys_b2 = jax.random.key_data(jax.random.split(jax.random.key(4), 64))
    rows = (
        jnp.full(64, options["temperature"]),
        jnp.full(64, options["top_k"]),
        jnp.full(64, options["top_p"]),
        keys_b2,
        jnp.zeros(64, jnp.int32),
        8,
    )
    ids_b, logprobs_b = sample(logits_bv, *rows, UNUSED)
    assert not set(np.asarray(ids_b)) & {number for part in UNUSED for number in part}
    everything_b, _ = sample(logits_bv, *rows)
    assert set(np.asarray(everything_b)) & set(UNUSED[1])
    scaled_bv = logits_bv / (options["temperature"] or 1.0)
    expected_b = jnp.take_along_axis(jax.nn.log_softmax(scaled_bv), ids_b[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(logprobs_b, expected_b, rtol=1e-5, atol=1e-5)
    if options["top_p"] == 1:
        hopeless_bv = logits_bv.at[:, :2].set(-1e9).at[:, 20:].set(-1e9)
        np.testing.assert_array_equal(ids_b, sample(hopeless_bv, *rows)[0])


def test_a_sampler_without_some_ids(params):
    with Sampler(MODEL, params, SIZES, 0, unused=(range(1, 22),)) as sampler:
        assert set(ask(sampler, [1, 2, 3], request(max_new_tokens=20)).ids) == {0, 22}
        banned = {0: -math.inf}
        assert set(ask(sampler, [1, 2, 3], request(bias=banned)).ids) == {22}
        # of two that are left, however many are asked for
        (reported,) = ask(
            sampler, [1, 2, 3], request(max_new_tokens=1, top_logprobs=4)
        ).top_logprobs
        assert {number for number, _ in reported} == {0, 22}
        with pytest.raises(ValueError, match="bias bans all ids"):
            ask(sampler, [1, 2, 3], request(bias={**banned, 22: -math.inf}))
    with pytest.raises(ValueError, match="unused holds all 23 ids"):
        Sampler(MODEL, params, SIZES, 0, unused=(range(23),))


def test_truncation_sorts_no_vocabulary():
    """To XLA on CPUs a top-k whose result is sliced is a sort, of 150,000 ids in 10 to 50 ms a row."""
    rows = jnp.zeros((2, 40)), jnp.ones(2), jnp.full(2, 5), jnp.full(2, 0.9)
    drawn = jax.jit(sample, static_argnums=6).lower(
        *rows, jnp.zeros((2, 2), jnp.uint32), jnp.zeros(2, jnp.int32), 8
    )
    program = drawn.compile().as_text()
    assert 'custom_call_target="TopK"' in program and " sort(" not in program


@pytest.mark.parametrize("rest", [1.0, 0.3])
def test_truncation_of_one_row_leaves_the_others_alone(rest):
    """Of one id, and of more than max_top_k."""
    logits = jax.random.normal(jax.random.key(0), (3, 40))
    keys_b2 = jnp.stack([jnp.asarray(words(row)) for row in range(3)])
    draw = functools.partial(sample, logits, jnp.array([1.0, 0.0, 2.0]), jnp.zeros(3, jnp.int32))
    plain, few, wide = (
        draw(jnp.array([top_p, rest, rest]), keys_b2, jnp.zeros(3, jnp.int32), 8)[0]
        for top_p in (1.0, 1e-3, 0.99)
    )
    assert int(few[0]) == int(logits[0].argmax())
    assert (few[1:] == plain[1:]).all() and (wide[1:] == plain[1:]).all()


def test_what_one_row_asks_for_leaves_the_others_alone():
    """Bit by bit, ids and log-probabilities."""
    nothing = Extras(
        min_p_b=jnp.zeros(3),
        unit_b=jnp.zeros(3, jnp.int32),
        bias_ids_bx=jnp.full((3, 1), NO_ID),
        bias_bx=jnp.full((3, 1), 50.0),
    )
    keys_b2 = jnp.stack([jnp.asarray(words(row)) for row in range(3)])
    none = jnp.zeros(3, jnp.int32)
    rows = (jax.random.normal(jax.random.key(0), (3, 40)), jnp.array([2.0, 0.0, 2.0]), none)
    rows = (*rows, jnp.ones(3), keys_b2, none, 8)
    draw = jax.jit(sample, static_argnums=6)
    plain = draw(*rows)
    for special in (
        {},
        {"min_p_b": jnp.array([0.9, 0.0, 0.0])},
        {"unit_b": jnp.array([1, 0, 0])},
        {"bias_ids_bx": jnp.array([[5], [NO_ID], [NO_ID]])},
    ):
        mixed = draw(*rows, (), nothing._replace(**special))
        changed = [np.asarray(one != other) for one, other in zip(mixed, plain, strict=True)]
        assert not np.any(changed, axis=0)[1:].any()
        assert np.any(changed) == bool(special)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.open([]), "open was given no ids"),
        (lambda s: s.open([23]), "the vocabulary from 0 to 22"),
        (lambda s: s.extend(10_000, [1]), "conversation 10000 is not open"),
        (lambda s: s.generate(s.open([1]), request(top_k=9)), "top_k 9 exceeds"),
        (lambda s: s.generate(s.open([1]), request(stop_ids=(1, 2, 3))), "3 stop ids exceed"),
        (
            lambda s: s.generate(s.open([1]), request(bias=dict.fromkeys(range(4), 1.0))),
            "4 biased ids exceed the sampler's max_bias_ids 3",
        ),
        (lambda s: s.generate(s.open([1]), request(bias={23: 1.0})), "bias names the id 23"),
        (lambda s: request(bias={2: math.nan}), "bias of id 2 is nan"),
        (lambda s: request(top_logprobs=-1), "top_logprobs is -1"),
        (
            lambda s: s.generate(s.open([1]), request(top_logprobs=5)),
            "top_logprobs 5 exceeds the sampler's max_top_logprobs 4",
        ),
        (lambda s: request(bias={2: math.inf}), "bias of id 2 is inf"),
        (lambda s: request(min_p=1.1), "min_p is 1.1"),
        (
            lambda s: s.generate(s.open([1]), request(key=np.zeros(4, np.uint32))),
            r"key has words of shape \(4,\)",
        ),
        (
            lambda s: s.generate(s.open([1]), request(key=jax.random.key(0))),
            r"key has words of shape \(\) .* give the uint32\[2\] of keys.as_array",
        ),
        (lambda s: [s.generate(c, request()) for c in [s.open([1])] * 2], "is still generating"),
    ],
)
def test_refuses_bad_calls(sampler, call, message):
    opened = set(sampler._conversations)
    with pytest.raises(ValueError, match=message):
        call(sampler)
    for conversation in set(sampler._conversations) - opened:
        sampler.close(conversation)
    assert sampler.idle


@pytest.mark.parametrize(
    "changes",
    [
        {"num_slots": 0},
        {"max_len": 1},
        {"extend_buckets": ()},
        {"extend_buckets": (8, 4)},
        {"extend_buckets": (64,)},
        {"row_buckets": (1, 4)},
    ],
)
def test_sizes_refuse(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(SIZES, **changes)


def test_closed_sampler_refuses(params):
    with Sampler(MODEL, params, SIZES, 0) as closed:
        pass
    with pytest.raises(ValueError, match="the sampler is closed"):
        closed.open([1])
    with pytest.raises(ValueError, match="max_top_logprobs is 24: give at most .* 23 ids"):
        Sampler(MODEL, params, dataclasses.replace(SIZES, max_top_logprobs=24), 0)
    with pytest.raises(ValueError, match="max_len 128 exceeds"):
        Sampler(MODEL, params, dataclasses.replace(SIZES, max_len=128), 0)
