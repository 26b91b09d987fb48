"""One dispatch of the sampler, pure: append tokens to some rows of the cache, then sample until
every row has what it wants.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from ictjax.models import transformer
from ictjax.models.cache import KVCache, put_positions, take_rows
from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params
from ictjax.sampler.state import pack_samples, unpack_rows

_DROPPED = -jnp.inf


def sample(
    logits_bv: Float[Array, "B V"],
    temperature_b: Float[Array, " B"],
    top_k_b: Int[Array, " B"],
    top_p_b: Float[Array, " B"],
    keys_b2: UInt32[Array, "B 2"],
    counts_b: Int[Array, " B"],
    max_top_k: int,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one id per row, and its log-probability under softmax(logits / temperature) BEFORE any
    truncation.

    The noise of a row is Gumbel noise over the whole vocabulary from fold_in(key, count), so a
    row's draw depends on nothing else in the batch; without truncation the draw is exact.
    Truncation looks at the `max_top_k` likeliest ids only: top-k first, then the smallest set of
    ids whose mass (renormalised after top-k, as Hugging Face does) reaches top-p, its first id
    always kept. Ties go to the lower id.
    """
    greedy_b = temperature_b <= 0
    scaled_bv = logits_bv / jnp.where(greedy_b, 1.0, temperature_b)[:, None]
    normaliser_b = jax.nn.logsumexp(scaled_bv, axis=-1)

    def noise() -> Array:
        keys_b = jax.vmap(jax.random.fold_in)(
            jax.random.wrap_key_data(keys_b2, impl="threefry2x32"), counts_b
        )
        noise_bv = jax.vmap(
            functools.partial(jax.random.gumbel, shape=scaled_bv.shape[1:], dtype=jnp.float32)
        )(keys_b)
        return jnp.where(greedy_b[:, None], 0.0, noise_bv)

    noise_bv = jax.lax.cond(jnp.all(greedy_b), lambda: jnp.zeros_like(scaled_bv), noise)
    ids_b = jnp.argmax(scaled_bv + noise_bv, axis=-1).astype(jnp.int32)
    truncated_b = ((top_k_b > 0) | (top_p_b < 1)) & ~greedy_b

    def truncate() -> Array:
        top_bx, ids_bx = jax.lax.top_k(scaled_bv, min(max_top_k, scaled_bv.shape[1]))
        rank_1x = jnp.arange(top_bx.shape[1], dtype=jnp.int32)[None]
        in_top_k_bx = (top_k_b[:, None] == 0) | (rank_1x < top_k_b[:, None])
        top_normaliser_b = jax.nn.logsumexp(jnp.where(in_top_k_bx, top_bx, _DROPPED), axis=-1)
        mass_bx = jnp.exp(top_bx - jnp.where(top_k_b > 0, top_normaliser_b, normaliser_b)[:, None])
        above_bx = jnp.cumsum(mass_bx, axis=-1) - mass_bx
        kept_bx = in_top_k_bx & ((above_bx < top_p_b[:, None]) | (rank_1x == 0))
        drawn_b1 = jnp.argmax(
            jnp.where(kept_bx, top_bx + jnp.take_along_axis(noise_bv, ids_bx, axis=1), _DROPPED),
            axis=-1,
            keepdims=True,
        )
        return jnp.where(truncated_b, jnp.take_along_axis(ids_bx, drawn_b1, axis=1)[:, 0], ids_b)

    ids_b = jax.lax.cond(jnp.any(truncated_b), truncate, lambda: ids_b)
    return ids_b, jnp.take_along_axis(scaled_bv, ids_b[:, None], axis=1)[:, 0] - normaliser_b


def turn(
    config: ModelConfig,
    params: Params,
    cache: KVCache,
    packed: Int[Array, "B X"],
    *,
    attended: int,
    max_steps: int,
    num_stop_ids: int,
    max_top_k: int,
    pad_id: int,
) -> tuple[Int[Array, "B X"], KVCache]:
    """Appends the tokens of `packed` (see state.Rows) to their rows, then samples up to `max_steps`
    tokens for each row that may.

    The rows and the first `attended` positions are copied out of the cache once, and only new
    positions are written back: a step then costs what its rows and their length cost, not what the
    cache could hold. If `packed` has as many rows as the cache (they must then be in the order of
    the slots) and all positions are attended, the cache is updated in place instead.

    Args:
      cache: donate it.
      max_steps: static; the loop ends early when no row is active.

    Returns: Packed samples (state.unpack_samples) and the new cache. The last sampled id of a row
      has no cache position yet.
    """
    rows = unpack_rows(packed, num_stop_ids)
    batch, length = rows.tokens_bt.shape
    num_slots, _, num_positions, _ = cache.v[0].shape
    in_order = batch == num_slots
    in_place = in_order and attended == num_positions
    part = cache if in_place else take_rows(cache, None if in_order else rows.slots_b, attended)

    def draw(hidden_bd: Array, counts_b: Array) -> tuple[Array, Array]:
        logits_bv = transformer.unembed(config, params, hidden_bd)
        return sample(
            logits_bv,
            rows.temperature_b,
            rows.top_k_b,
            rows.top_p_b,
            rows.keys_b2,
            counts_b,
            max_top_k,
        )

    def record(
        step: Array,
        active_b: Bool[Array, " B"],
        hidden_bd: Array,
        ids_bn: Array,
        logprobs_bn: Array,
        sampled_b: Array,
    ) -> tuple:
        ids_b, logprob_b = draw(hidden_bd, rows.counts_b + sampled_b)
        ids_bn = ids_bn.at[:, step].set(jnp.where(active_b, ids_b, pad_id))
        logprobs_bn = logprobs_bn.at[:, step].set(jnp.where(active_b, logprob_b, 0.0))
        sampled_b = sampled_b + active_b
        stopped_b = jnp.any(ids_b[:, None] == rows.stop_bx, axis=-1)
        return (
            active_b & ~stopped_b & (sampled_b < rows.allowed_b),
            ids_b,
            ids_bn,
            logprobs_bn,
            sampled_b,
        )

    active_b = rows.allowed_b > 0
    ids_bn = jnp.full((batch, max_steps), pad_id, jnp.int32)
    logprobs_bn = jnp.zeros((batch, max_steps), jnp.float32)
    sampled_b = jnp.zeros((batch,), jnp.int32)
    if length == 1:
        first, last_b, ends_b = 0, rows.tokens_bt[:, 0], rows.starts_b
    else:
        hidden_btd, part = transformer.extend(
            config, params, part, rows.tokens_bt, rows.starts_b, rows.lengths_b
        )
        hidden_bd = jnp.take_along_axis(
            hidden_btd, jnp.maximum(rows.lengths_b - 1, 0)[:, None, None], axis=1
        )[:, 0]
        active_b, last_b, ids_bn, logprobs_bn, sampled_b = record(
            jnp.int32(0), active_b, hidden_bd, ids_bn, logprobs_bn, sampled_b
        )
        first, ends_b = 1, rows.starts_b + rows.lengths_b

    def unfinished(loop: tuple) -> Array:
        return (loop[0] < max_steps) & jnp.any(loop[1])

    def body(loop: tuple) -> tuple:
        step, active_b, last_b, ends_b, ids_bn, logprobs_bn, sampled_b, part = loop
        hidden_btd, part = transformer.extend(
            config, params, part, last_b[:, None], ends_b, active_b.astype(jnp.int32)
        )
        ends_b = ends_b + active_b
        active_b, last_b, ids_bn, logprobs_bn, sampled_b = record(
            step, active_b, hidden_btd[:, 0], ids_bn, logprobs_bn, sampled_b
        )
        return step + 1, active_b, last_b, ends_b, ids_bn, logprobs_bn, sampled_b, part

    if first < max_steps:
        loop = (jnp.int32(first), active_b, last_b, ends_b, ids_bn, logprobs_bn, sampled_b, part)
        _, _, _, ends_b, ids_bn, logprobs_bn, sampled_b, part = jax.lax.while_loop(
            unfinished, body, loop
        )
    max_new = max_steps if length == 1 else length + max_steps - 1
    cache = (
        part
        if in_place
        else put_positions(cache, part, rows.slots_b, rows.starts_b, ends_b, max_new)
    )
    return pack_samples(ids_bn, logprobs_bn, sampled_b), cache
