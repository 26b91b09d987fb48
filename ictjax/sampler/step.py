"""One dispatch of the sampler, pure: append tokens to some rows of the cache, then sample until
every row has what it wants.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from ictjax.models import transformer
from ictjax.models.attention import WHOLE
from ictjax.models.cache import KVCache, put_positions, take_rows
from ictjax.models.config import ModelConfig
from ictjax.models.cpu_kernels import Kernels, summarise
from ictjax.models.paged_attention import PAGES, PagedAttention
from ictjax.models.transformer import Params
from ictjax.sampler.speculation import Guesses, propose, verify
from ictjax.sampler.state import (
    NO_ID,
    Extras,
    Left,
    Likeliest,
    pack_samples,
    resumed,
    unpack_rows,
)

_DROPPED = -jnp.inf


class _Loop(NamedTuple):
    """What changes from one sampled token to the next (T: the most that a dispatch samples)."""

    step: Int[Array, ""]  # the next column of ids_bt
    active_b: Bool[Array, " B"]  # may sample on
    last_b: Int[Array, " B"]  # last id, which has no cache position yet
    ends_b: Int[Array, " B"]  # tokens in the cache
    ids_bt: Int[Array, "B T"]  # sampled in this dispatch; the pad id where a row was not active
    logprobs_bt: Float[Array, "B T"]  # of ids_bt; 0 where a row was not active
    sampled_b: Int[Array, " B"]  # of ids_bt
    part: KVCache  # the rows' positions, on which the steps work
    guesses: Guesses | None = None
    likeliest: Likeliest | None = None  # beside ids_bt


def sample(
    logits_bv: Float[Array, "B V"],
    temperature_b: Float[Array, " B"],
    top_k_b: Int[Array, " B"],
    top_p_b: Float[Array, " B"],
    keys_b2: UInt32[Array, "B 2"],
    counts_b: Int[Array, " B"],
    max_top_k: int,
    unused: Sequence[range] = (),
    extras: Extras | None = None,
    kernels: Kernels | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one id per row, and its log-probability under softmax(logits / temperature) BEFORE any
    bias and truncation; under softmax(logits) where `extras.unit_b` asks for it.

    The noise of a row is Gumbel noise over the whole vocabulary from fold_in(key, count), so a
    row's draw depends on nothing else in the batch; without truncation the draw is exact. The bias
    is added to the logits, of greedy rows too. Truncation is that of Hugging Face, in its order,
    and looks at ids that may be drawn: top-k; the smallest set of ids whose mass among those left
    reaches top-p, its first id always kept; ids at least min-p times as likely as the likeliest.
    Ties go to the lower id. Top-k sees the `max_top_k` (static) likeliest ids; top-p without top-k
    is exact beyond them too, and slower in steps in which it takes more ids. The ids of `unused`
    (static) are never drawn; log-probabilities count them, as the learner's do.

    What only few requests ask for is computed in dispatches that hold one of these. `kernels`
    (static) are of this CPU; without them all is XLA's.
    """
    greedy_b = temperature_b <= 0
    scaled_bv = logits_bv / jnp.where(greedy_b, 1.0, temperature_b)[:, None]
    likeliest_b, normaliser_b = _summarise(scaled_bv, kernels)

    def noise() -> Array:
        keys_b = jax.vmap(jax.random.fold_in)(
            jax.random.wrap_key_data(keys_b2, impl="threefry2x32"), counts_b
        )
        noise_bv = jax.vmap(
            functools.partial(jax.random.gumbel, shape=scaled_bv.shape[1:], dtype=jnp.float32)
        )(keys_b)
        return jnp.where(greedy_b[:, None], 0.0, noise_bv)

    if unused:
        scaled_bv = jnp.where(_is_in(unused, scaled_bv.shape[1]), _DROPPED, scaled_bv)

    def logprobs(ids_b: Array) -> Array:
        return jnp.take_along_axis(scaled_bv, ids_b[:, None], axis=1)[:, 0] - normaliser_b

    restricted_b, unit_b = (top_k_b > 0) | (top_p_b < 1), jnp.zeros_like(greedy_b)
    if extras is not None:
        restricted_b |= extras.min_p_b > 0
        unit_b = (extras.unit_b > 0) & ~greedy_b & (temperature_b != 1)
    restricted_b &= ~greedy_b
    if extras is not None:
        restricted_b |= jnp.any(extras.bias_ids_bx != NO_ID, axis=-1)

    def specially(ids_b: Array, noise_bv: Array) -> tuple[Array, Array]:
        allowed_bv, min_p_b = scaled_bv, jnp.zeros_like(top_p_b)
        if extras is not None:
            rows_b1 = jnp.arange(len(greedy_b), dtype=jnp.int32)[:, None]
            bias_bx = extras.bias_bx / jnp.where(greedy_b, 1.0, temperature_b)[:, None]
            allowed_bv = scaled_bv.at[rows_b1, extras.bias_ids_bx].add(bias_bx, mode="drop")
            min_p_b = extras.min_p_b
        cut_top_p_b = jnp.where(greedy_b, 1.0, top_p_b)
        drawn_b = _draw(allowed_bv, noise_bv, top_k_b, cut_top_p_b, min_p_b, max_top_k)
        drawn_b = jnp.where(restricted_b, drawn_b, ids_b)
        at_one_b = jnp.take_along_axis(logits_bv, drawn_b[:, None], axis=1)[:, 0]
        at_one_b -= _summarise(logits_bv, kernels)[1]
        return drawn_b, jnp.where(unit_b, at_one_b, logprobs(drawn_b))

    special = jnp.any(restricted_b | unit_b)

    def greedy() -> tuple[Array, Array]:
        ids_b = likeliest_b
        if unused or kernels is None:  # XLA finds them apart: here, and not where nobody asks
            ids_b, _ = _summarise(scaled_bv, kernels)
        return ids_b, logprobs(ids_b)

    def drawn() -> tuple[Array, Array]:
        noise_bv = jax.lax.cond(jnp.all(greedy_b), lambda: jnp.zeros_like(scaled_bv), noise)
        ids_b, _ = _summarise(scaled_bv + noise_bv, kernels)
        return jax.lax.cond(
            special, lambda: specially(ids_b, noise_bv), lambda: (ids_b, logprobs(ids_b))
        )

    return jax.lax.cond(jnp.all(greedy_b) & ~special, greedy, drawn)


def likeliest_ids(
    logits_bv: Float[Array, "B V"],
    temperature_b: Float[Array, " B"],
    unit_b: Int[Array, " B"],
    wanted_b: Int[Array, " B"],
    number: int,
    unused: Sequence[range] = (),
    kernels: Kernels | None = None,
) -> tuple[Int[Array, "B X"], Float[Array, "B X"]]:
    """The `number` (static) likeliest ids of each row, the likeliest first and the lower one of
    equals, with the log-probabilities that `sample` gives them: before bias and truncation.

    Ids of `unused` come last, with -inf. All is 0 where no row wants any (`wanted_b` above 0).
    """

    def found() -> tuple[Array, Array]:
        at_one_b = (temperature_b <= 0) | (unit_b > 0)
        scaled_bv = logits_bv / jnp.where(at_one_b, 1.0, temperature_b)[:, None]
        _, normaliser_b = _summarise(scaled_bv, kernels)
        if unused:
            scaled_bv = jnp.where(_is_in(unused, scaled_bv.shape[1]), _DROPPED, scaled_bv)
        top_bx, ids_bx = jax.lax.top_k(scaled_bv, number)
        return ids_bx.astype(jnp.int32), top_bx - normaliser_b[:, None]

    def nothing() -> tuple[Array, Array]:
        shape = (len(logits_bv), number)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logits_bv.dtype)

    return jax.lax.cond(jnp.any(wanted_b > 0), found, nothing)


def _draw(
    allowed_bv: Float[Array, "B V"],
    noise_bv: Float[Array, "B V"],
    top_k_b: Int[Array, " B"],
    top_p_b: Float[Array, " B"],
    min_p_b: Float[Array, " B"],
    max_top_k: int,
) -> Int[Array, " B"]:
    """The likeliest id after truncation, noise added. A row without noise is not changed by
    truncation, which never drops its likeliest id.
    """
    least_b1 = (jnp.max(allowed_bv, axis=-1) + jnp.log(min_p_b))[:, None]
    likely_bv = allowed_bv >= least_b1

    def drawn_of(kept_bv: Array) -> Array:
        return _summarise(jnp.where(kept_bv, allowed_bv + noise_bv, _DROPPED), None)[0]

    whole_b = drawn_of(likely_bv)
    cut_b = (top_k_b > 0) | (top_p_b < 1)

    def cut() -> Array:
        top_bx, ids_bx = jax.lax.top_k(allowed_bv, min(max_top_k, allowed_bv.shape[1]))
        rank_1x = jnp.arange(top_bx.shape[1], dtype=jnp.int32)[None]
        in_top_k_bx = (top_k_b[:, None] == 0) | (rank_1x < top_k_b[:, None])
        normaliser_b = jnp.where(
            top_k_b > 0,
            jax.nn.logsumexp(jnp.where(in_top_k_bx, top_bx, _DROPPED), axis=-1),
            jax.nn.logsumexp(allowed_bv, axis=-1),
        )
        mass_bx = jnp.exp(top_bx - normaliser_b[:, None])
        up_to_bx = jnp.cumsum(mass_bx, axis=-1)
        above_bx = up_to_bx - mass_bx
        kept_bx = in_top_k_bx & ((above_bx < top_p_b[:, None]) | (rank_1x == 0))
        noisy_bx = top_bx + jnp.take_along_axis(noise_bv, ids_bx, axis=1)
        drawn_b1 = jnp.argmax(
            jnp.where(kept_bx & (top_bx >= least_b1), noisy_bx, _DROPPED), axis=-1, keepdims=True
        )
        few_b = jnp.where(cut_b, jnp.take_along_axis(ids_bx, drawn_b1, axis=1)[:, 0], whole_b)
        # of what is kept, something may be less likely than all of top_bx
        wide_b = cut_b & (top_k_b == 0) & (up_to_bx[:, -1] < top_p_b)
        # (the minimum, not the last: to XLA on CPUs a top-k that is sliced is a sort of everything)
        wide_b &= jnp.min(top_bx, axis=-1) >= least_b1[:, 0]

        def widely() -> Array:
            return jnp.where(wide_b, drawn_of(likely_bv & _nucleus(allowed_bv, top_p_b)), few_b)

        return jax.lax.cond(jnp.any(wide_b), widely, lambda: few_b)

    return jax.lax.cond(jnp.any(cut_b), cut, lambda: whole_b)


def _nucleus(logits_bv: Float[Array, "B V"], top_p_b: Float[Array, " B"]) -> Bool[Array, "B V"]:
    """The fewest likeliest ids whose mass reaches top-p, the lower ones of those that are equally
    likely.

    The probability that the last of them has is found by bisection: with 152,000 ids on a CPU a
    tenth of the time of sorting them.
    """
    mass_bv = jax.nn.softmax(logits_bv, axis=-1)
    bits_bv = jax.lax.bitcast_convert_type(mass_bv, jnp.int32)  # in the same order: none below 0

    def likelier(bits_b: Array) -> Array:
        """The mass of the ids above a probability."""
        return jnp.sum(jnp.where(bits_bv > bits_b[:, None], mass_bv, 0.0), axis=-1)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low_b, high_b = ends
        middle_b = (low_b + high_b) // 2
        enough_b = likelier(middle_b) >= top_p_b
        return jnp.where(enough_b, middle_b + 1, low_b), jnp.where(enough_b, high_b, middle_b)

    low_b = jnp.zeros(len(top_p_b), jnp.int32)
    high_b = jax.lax.bitcast_convert_type(jnp.ones_like(top_p_b), jnp.int32)  # less than 2**30
    _, last_b = jax.lax.fori_loop(0, 30, halve, (low_b, high_b))
    equal_bv = bits_bv == last_b[:, None]
    before_bv = jnp.cumsum(equal_bv, axis=-1, dtype=jnp.int32) - equal_bv
    above_bv = likelier(last_b)[:, None] + before_bv * mass_bv
    return (bits_bv > last_b[:, None]) | (equal_bv & (above_bv < top_p_b[:, None]))


def _summarise(
    logits_bv: Float[Array, "B V"], kernels: Kernels | None
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The likeliest id of each row, the lowest of equals, and the logarithm of what the
    probabilities are divided by; XLA leaves out what nobody uses.
    """
    if kernels is not None:
        return summarise(logits_bv)
    likeliest_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    return likeliest_b, jax.nn.logsumexp(logits_bv, axis=-1)


def _is_in(ranges: Sequence[range], num_ids: int) -> Bool[Array, " V"]:
    ids_v = jnp.arange(num_ids, dtype=jnp.int32)
    return functools.reduce(
        operator.or_, ((ids_v >= part.start) & (ids_v < part.stop) for part in ranges)
    )


def turn(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    left: Left,
    packed: Int[Array, "B X"],
    *,
    attended: int,
    max_steps: int,
    num_stop_ids: int,
    num_bias: int,
    max_top_k: int,
    pad_id: int,
    num_pages: int = 0,
    attention: PagedAttention = PAGES,
    part_bytes: int = WHOLE,
    kernels: Kernels | None = None,
    unused: Sequence[range] = (),
    guessed: int = 0,
    num_likeliest: int = 0,
) -> tuple[Int[Array, "B X"], KVCache, Left]:
    """Appends the tokens of `packed` (see state.Rows) to their rows, then samples up to `max_steps`
    tokens for each row that may.

    Of a cache of slots, the rows and the first `attended` positions are copied out once, and only
    new positions are written back: a step then costs what its rows and their length cost, not what
    the cache could hold. If `packed` has as many rows as the cache (they must then be in the order
    of the slots) and all positions are attended, the cache is updated in place instead. A pool of
    pages always is.

    Args:
      cache: donate it.
      left: of all slots; donate it too.
      num_pages: static; of a row's table in `packed`. 0: the cache is one of slots.
      attention: over pages.
      part_bytes: static; of attention over slots (see `attention.attend_in_parts`).
      kernels: static; of this CPU, for attention over slots and what is sampled from.
      unused: static; ids that are never sampled.
      max_steps: static; the loop ends early when no row is active.
      guessed: static; tokens of greedy rows that a step guesses (`speculation`). The cache then has
        positions behind those that are counted, as if they were never written: nobody sees them
        before they are.
      num_likeliest: static; ids that are reported beside every sampled one of rows that ask.

    Returns: Packed samples (state.unpack_samples; before that, where it guesses, unpack_guesses,
      and, where likeliest ids are reported, unpack_likeliest), the new cache, and what is left of
      all slots. The last sampled id of a row has no cache position yet.
    """
    num_history = attended if guessed else 0
    rows = resumed(unpack_rows(packed, num_stop_ids, num_bias, num_pages, num_history), left)
    batch, length = rows.tokens_bt.shape
    first = 0 if length == 1 else 1  # sampled before the loop
    most = first + (max_steps - first) * (1 + guessed)
    num_slots, _, num_positions, _ = cache.v[0].shape
    in_order = batch == num_slots
    in_place = num_pages > 0 or (in_order and attended == num_positions)

    def extend(
        part: KVCache, tokens_bt: Array, starts_b: Array, lengths_b: Array
    ) -> tuple[Array, KVCache]:
        appended = (tokens_bt, starts_b, lengths_b)
        if num_pages:
            return transformer.extend_pages(
                config, params, part, rows.table_bp, *appended, attention=attention
            )
        return transformer.extend(config, params, part, *appended, part_bytes, kernels)

    def record(loop: _Loop, hidden_bd: Float[Array, "B D"]) -> _Loop:
        logits_bv = transformer.unembed(config, params, hidden_bd)
        ids_b, logprobs_b = sample(
            logits_bv,
            rows.temperature_b,
            rows.top_k_b,
            rows.top_p_b,
            rows.keys_b2,
            rows.counts_b + loop.sampled_b,
            max_top_k,
            unused,
            rows.extras,
            kernels,
        )
        likeliest = loop.likeliest
        if likeliest is not None:
            beside = likeliest_ids(
                logits_bv,
                rows.temperature_b,
                rows.extras.unit_b,
                rows.reported_b,
                num_likeliest,
                unused,
                kernels,
            )
            likeliest = Likeliest(
                *(
                    all_btx.at[:, loop.step].set(new_bx)
                    for all_btx, new_bx in zip(likeliest, beside, strict=True)
                )
            )
        active_b = loop.active_b
        sampled_b = loop.sampled_b + active_b
        stopped_b = jnp.any(ids_b[:, None] == rows.stop_bx, axis=-1)
        return loop._replace(
            step=loop.step + 1,
            active_b=active_b & ~stopped_b & (sampled_b < rows.allowed_b),
            last_b=ids_b,
            ids_bt=loop.ids_bt.at[:, loop.step].set(jnp.where(active_b, ids_b, pad_id)),
            logprobs_bt=loop.logprobs_bt.at[:, loop.step].set(jnp.where(active_b, logprobs_b, 0.0)),
            sampled_b=sampled_b,
            likeliest=likeliest,
        )

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.step < max_steps) & jnp.any(loop.active_b)

    def body(loop: _Loop) -> _Loop:
        hidden_btd, part = extend(
            loop.part, loop.last_b[:, None], loop.ends_b, loop.active_b.astype(jnp.int32)
        )
        loop = loop._replace(ends_b=loop.ends_b + loop.active_b, part=part)
        return record(loop, hidden_btd[:, 0])

    def guessing(loop: _Loop, guesses: Guesses) -> _Loop:
        """With proposals for the next step."""
        proposed_bt, found_b = propose(guesses.history_bs, loop.ends_b + 1, guessed)
        wanted_b = found_b & loop.active_b & (rows.temperature_b <= 0)
        counts_b = jnp.minimum(rows.allowed_b - loop.sampled_b - 1, guessed)
        counts_b = jnp.where(wanted_b, counts_b, 0)
        return loop._replace(guesses=guesses._replace(next_bt=proposed_bt, counts_b=counts_b))

    def several(loop: _Loop, width: int) -> _Loop:
        """A step over each row's last token and `width` - 1 proposals behind it."""
        guesses = loop.guesses
        assert guesses is not None
        proposed_bt = guesses.next_bt[:, : width - 1]
        lengths_b = jnp.where(loop.active_b, 1 + guesses.counts_b, 0)
        tokens_bx = jnp.concatenate([loop.last_b[:, None], proposed_bt], axis=1)
        hidden_bxd, part = extend(loop.part, tokens_bx, loop.ends_b, lengths_b)
        steps_1x = jnp.arange(width, dtype=jnp.int32)[None]
        # only greedy rows look at what is sampled behind a proposal
        temperature_bx = jnp.where(steps_1x == 0, rows.temperature_b[:, None], 0.0)
        flat = functools.partial(jnp.repeat, repeats=width, axis=0)
        logits_bv = transformer.unembed(config, params, hidden_bxd.reshape(batch * width, -1))
        ids, logprobs = sample(
            logits_bv,
            temperature_bx.reshape(-1),
            flat(rows.top_k_b),
            flat(rows.top_p_b),
            flat(rows.keys_b2),
            flat(rows.counts_b + loop.sampled_b),
            max_top_k,
            unused,
            jax.tree.map(flat, rows.extras),
            kernels,
        )
        ids_bx, logprobs_bx = ids.reshape(batch, width), logprobs.reshape(batch, width)
        count_b, stopped_b = verify(
            ids_bx, proposed_bt, guesses.counts_b, loop.active_b, rows.stop_bx
        )
        last_b = jnp.take_along_axis(ids_bx, jnp.maximum(count_b - 1, 0)[:, None], axis=1)[:, 0]

        def put(array_bt: Array, starts_b: Array, new_bx: Array) -> Array:
            # beyond the end: dropped
            places_bx = jnp.where(
                steps_1x < count_b[:, None], starts_b[:, None] + steps_1x, array_bt.shape[1]
            )
            rows_b1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
            return array_bt.at[rows_b1, places_bx].set(new_bx, mode="drop")

        likeliest = loop.likeliest
        if likeliest is not None:
            beside = likeliest_ids(
                logits_bv,
                temperature_bx.reshape(-1),
                flat(rows.extras.unit_b),
                flat(rows.reported_b),
                num_likeliest,
                unused,
                kernels,
            )
            likeliest = Likeliest(
                *(
                    put(all_btx, loop.sampled_b, new.reshape(batch, width, -1))
                    for all_btx, new in zip(likeliest, beside, strict=True)
                )
            )
        sampled_b = loop.sampled_b + count_b
        loop = loop._replace(
            step=loop.step + 1,
            active_b=loop.active_b & ~stopped_b & (sampled_b < rows.allowed_b),
            last_b=jnp.where(loop.active_b, last_b, loop.last_b),
            ends_b=loop.ends_b + count_b,
            ids_bt=put(loop.ids_bt, loop.sampled_b, ids_bx),
            logprobs_bt=put(loop.logprobs_bt, loop.sampled_b, logprobs_bx),
            sampled_b=sampled_b,
            part=part,
            likeliest=likeliest,
        )
        guesses = guesses._replace(
            history_bs=put(guesses.history_bs, loop.ends_b - count_b + 1, ids_bx),
            proposed_b=guesses.proposed_b + guesses.counts_b,
            accepted_b=guesses.accepted_b + jnp.maximum(count_b - 1, 0),
            computed=guesses.computed + width,
        )
        return guessing(loop, guesses)

    def proposed(loop: _Loop) -> Bool[Array, ""]:
        assert loop.guesses is not None
        return jnp.any(loop.guesses.counts_b > 0)

    def alternate(loop: _Loop) -> _Loop:
        """Wide steps as long as anything is proposed, then narrow ones until something is. Loops,
        not branches of one step: XLA copies what branches change, which is the cache.
        """
        loop = jax.lax.while_loop(
            lambda loop: unfinished(loop) & proposed(loop),
            functools.partial(several, width=1 + guessed),
            loop,
        )
        return jax.lax.while_loop(
            lambda loop: unfinished(loop) & ~proposed(loop),
            functools.partial(several, width=1),
            loop,
        )

    loop = _Loop(
        step=jnp.int32(0),
        active_b=rows.allowed_b > 0,
        last_b=rows.tokens_bt[:, 0],
        ends_b=rows.starts_b,
        ids_bt=jnp.full((batch, most), pad_id, jnp.int32),
        logprobs_bt=jnp.zeros((batch, most), jnp.float32),
        sampled_b=jnp.zeros((batch,), jnp.int32),
        part=cache if in_place else take_rows(cache, None if in_order else rows.slots_b, attended),
        likeliest=Likeliest(
            jnp.zeros((batch, most, num_likeliest), jnp.int32),
            jnp.zeros((batch, most, num_likeliest), jnp.float32),
        )
        if num_likeliest
        else None,
    )
    if length > 1:
        hidden_btd, part = extend(loop.part, rows.tokens_bt, rows.starts_b, rows.lengths_b)
        hidden_bd = jnp.take_along_axis(
            hidden_btd, jnp.maximum(rows.lengths_b - 1, 0)[:, None, None], axis=1
        )[:, 0]
        loop = record(loop._replace(ends_b=rows.starts_b + rows.lengths_b, part=part), hidden_bd)
    if guessed:
        none_b = jnp.zeros((batch,), jnp.int32)
        history_bs = rows.history_bs
        if length > 1:
            rows_b = jnp.arange(batch, dtype=jnp.int32)
            history_bs = history_bs.at[rows_b, loop.ends_b].set(loop.last_b, mode="drop")
        guesses = Guesses(
            history_bs=history_bs,
            proposed_b=none_b,
            accepted_b=none_b,
            computed=jnp.int32(length if first else 0),
            next_bt=jnp.zeros((batch, guessed), jnp.int32),
            counts_b=none_b,
        )
        loop = guessing(loop, guesses)
    if length == 1 or max_steps > 1:
        loop = jax.lax.while_loop(unfinished, alternate if guessed else body, loop)
    max_new = most if length == 1 else length + most - 1
    cache = (
        loop.part
        if in_place
        else put_positions(cache, loop.part, rows.slots_b, rows.starts_b, loop.ends_b, max_new)
    )
    after = Left(
        ids_b=loop.last_b,
        ends_b=loop.ends_b,
        counts_b=rows.counts_b + loop.sampled_b,
        allowed_b=jnp.where(loop.active_b, rows.allowed_b - loop.sampled_b, 0),
    )
    left = Left(
        *(
            of_slots.at[rows.slots_b].set(of_rows, mode="drop")
            for of_slots, of_rows in zip(left, after, strict=True)
        )
    )
    counted = []
    if loop.guesses is not None:
        computed_b = jnp.full((batch,), loop.guesses.computed)
        counted = [loop.guesses.proposed_b, loop.guesses.accepted_b, computed_b]
    samples = pack_samples(loop.ids_bt, loop.logprobs_bt, loop.sampled_b, counted, loop.likeliest)
    return samples, cache, left
