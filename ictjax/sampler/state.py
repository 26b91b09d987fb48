"""What the sampler's host side and its jitted step exchange: one integer matrix in, one out.

A dispatch uploads and downloads one small array each: separate arrays would cost more than the work
of a small model.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


class Extras(NamedTuple):
    """What few requests ask for, per row."""

    min_p_b: Float[Array, " B"]  # 0: off
    unit_b: Int[Array, " B"]  # 1: log-probabilities at temperature 1; 0: at that of the row
    bias_ids_bx: Int[Array, "B X"]  # NO_ID for none
    bias_bx: Float[Array, "B X"]  # added to the logits of bias_ids_bx; -inf for banned ids


class Rows(NamedTuple):
    """The rows of one dispatch; everything is traced, nothing recompiles. The KV cache and `Left`
    live on the device between dispatches.

    A row with `lengths_b` 0 is padding: nothing is written for it, nothing sampled.
    """

    slots_b: Int[Array, " B"]  # row of a cache of slots; the number of slots for padding
    starts_b: Int[Array, " B"]  # tokens already in the cache; GOES_ON: what `Left` says
    lengths_b: Int[Array, " B"]  # tokens to append now, in tokens_bt
    allowed_b: Int[Array, " B"]  # tokens it may sample in this and later dispatches; 0: append only
    counts_b: Int[Array, " B"]  # tokens sampled for its request in earlier dispatches
    top_k_b: Int[Array, " B"]  # 0: off
    temperature_b: Float[Array, " B"]  # 0: greedy
    top_p_b: Float[Array, " B"]  # 1: off
    keys_b2: UInt32[Array, "B 2"]  # the request's PRNG key
    reported_b: Int[Array, " B"]  # likeliest ids to report beside every sampled one; 0: none
    extras: Extras
    stop_bx: Int[Array, "B X"]  # ids that end the generation; -1 for none
    tokens_bt: Int[Array, "B T"]
    table_bp: Int[Array, "B P"]  # pages of the pool, where the cache is one; no columns otherwise
    # all tokens, those to append included, where replies are guessed; no columns otherwise
    history_bs: Int[Array, "B S"]


class Left(NamedTuple):
    """How the last dispatch left the reply of every slot (of one copy of the weights), for one that
    goes on before the host has read what was sampled.
    """

    ids_b: Int[Array, " B"]  # the last sampled one, which has no cache position yet
    ends_b: Int[Array, " B"]  # tokens in the cache
    counts_b: Int[Array, " B"]  # sampled for the request so far
    allowed_b: Int[Array, " B"]  # tokens it may still sample; 0: it is finished


GOES_ON = -1
"""In the place of a row's start."""

NO_ID = 2**31 - 1
"""In the place of a biased id: beyond every vocabulary, so that it is dropped."""

_COLUMNS = 13  # in front of the stop ids; behind those the biased ids, their biases, the tokens


def blank_rows(
    num_rows: int,
    num_tokens: int,
    *,
    num_stop_ids: int,
    num_bias: int,
    num_slots: int,
    pad_id: int,
    num_pages: int = 0,
    num_history: int = 0,
) -> np.ndarray:
    """A packed matrix of padding rows, [B, _COLUMNS + stop ids + 2 * biases + T + P + S] int32;
    P is `num_pages`, of a row, and S `num_history`.
    """
    stops, bias = _COLUMNS + num_stop_ids, _COLUMNS + num_stop_ids + num_bias
    first = bias + num_bias
    packed = np.zeros((num_rows, first + num_tokens + num_pages + num_history), np.int32)
    packed[:, 0] = num_slots
    packed[:, _COLUMNS:stops] = -1
    packed[:, stops:bias] = NO_ID
    packed[:, first : first + num_tokens] = pad_id
    return packed


def pack_request(
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    unit: bool,
    stop_ids: tuple[int, ...],
    bias: Mapping[int, float],
    key: np.ndarray,
    num_stop_ids: int,
    num_bias: int,
    reported: int = 0,
) -> np.ndarray:
    """The columns of one row that a request fixes, top_k to the last bias."""
    columns = np.zeros(_COLUMNS - 5 + num_stop_ids + 2 * num_bias, np.int32)
    columns[0] = top_k
    columns[1:4] = np.asarray([temperature, top_p, min_p], np.float32).view(np.int32)
    columns[4] = unit
    columns[5:7] = key.view(np.int32)
    columns[7] = reported
    stops, ids, biases = np.split(columns[8:], [num_stop_ids, num_stop_ids + num_bias])
    stops[:] = -1
    stops[: len(stop_ids)] = stop_ids
    ids[:] = NO_ID
    ids[: len(bias)] = list(bias)
    biases[: len(bias)] = np.asarray(list(bias.values()), np.float32).view(np.int32)
    return columns


def pack_row(
    row: np.ndarray,
    *,
    slot: int,
    start: int,
    tokens: np.ndarray,
    allowed: int,
    count: int,
    request: np.ndarray | None,
    num_stop_ids: int,
    num_bias: int,
    num_tokens: int,
    pages: Sequence[int],
    history: Sequence[int] | np.ndarray = (),
    num_history: int = 0,
) -> None:
    """Fills one row of a packed matrix, given the columns of `pack_request` (None: append only)."""
    row[:5] = slot, start, len(tokens), allowed, count
    if request is not None:
        row[5 : 5 + len(request)] = request
    first = _COLUMNS + num_stop_ids + 2 * num_bias
    row[first : first + len(tokens)] = tokens
    row[first + num_tokens : first + num_tokens + len(pages)] = pages
    last = len(row) - num_history
    row[last : last + len(history)] = history


def unpack_rows(
    packed: Int[Array, "B X"],
    num_stop_ids: int,
    num_bias: int,
    num_pages: int = 0,
    num_history: int = 0,
) -> Rows:
    """The fields of a packed matrix, inside jit."""
    stops, bias = _COLUMNS + num_stop_ids, _COLUMNS + num_stop_ids + num_bias
    end = packed.shape[1] - num_history
    last = end - num_pages

    def floats(columns: Int[Array, "*B"]) -> Float[Array, "*B"]:
        return jax.lax.bitcast_convert_type(columns, jnp.float32)

    return Rows(
        *(packed[:, column] for column in range(6)),
        temperature_b=floats(packed[:, 6]),
        top_p_b=floats(packed[:, 7]),
        keys_b2=jax.lax.bitcast_convert_type(packed[:, 10:12], jnp.uint32),
        reported_b=packed[:, 12],
        extras=Extras(
            min_p_b=floats(packed[:, 8]),
            unit_b=packed[:, 9],
            bias_ids_bx=packed[:, stops:bias],
            bias_bx=floats(packed[:, bias : bias + num_bias]),
        ),
        stop_bx=packed[:, _COLUMNS:stops],
        tokens_bt=packed[:, bias + num_bias : last],
        table_bp=packed[:, last:end],
        history_bs=packed[:, end:],
    )


def nothing_left(num_slots: int) -> Left:
    """Before the first dispatch."""
    return Left(*(jnp.zeros((num_slots,), jnp.int32) for _ in Left._fields))


def resumed(rows: Rows, left: Left) -> Rows:
    """Rows that go on, with what the last dispatch left of them: their last id is appended, and
    nothing at all where they are finished.
    """
    goes_on_b = rows.starts_b == GOES_ON
    own = Left(*(array_b.at[rows.slots_b].get(mode="clip") for array_b in left))
    first_b = jnp.where(goes_on_b, own.ids_b, rows.tokens_bt[:, 0])
    return rows._replace(
        starts_b=jnp.where(goes_on_b, own.ends_b, rows.starts_b),
        lengths_b=jnp.where(goes_on_b, (own.allowed_b > 0).astype(jnp.int32), rows.lengths_b),
        allowed_b=jnp.where(goes_on_b, own.allowed_b, rows.allowed_b),
        counts_b=jnp.where(goes_on_b, own.counts_b, rows.counts_b),
        tokens_bt=rows.tokens_bt.at[:, 0].set(first_b),
    )


class Likeliest(NamedTuple):
    """The likeliest ids (X of them) in the place of every sampled one, the likeliest first, and
    their log-probabilities; -inf for those that are never sampled.
    """

    ids_btx: Int[Array, "B T X"]
    logprobs_btx: Float[Array, "B T X"]


def pack_samples(
    ids_bt: Int[Array, "B T"],
    logprobs_bt: Float[Array, "B T"],
    sampled_b: Int[Array, " B"],
    guesses: Sequence[Int[Array, " B"]] = (),
    likeliest: Likeliest | None = None,
) -> Int[Array, "B X"]:
    """Sampled ids, bits of their log-probabilities, and their number per row, as one matrix; in
    front of them the columns of `Guessed`, where a dispatch guesses, and then of `Likeliest`, where
    these are reported.
    """

    def bits(array: Float[Array, "*B"]) -> Int[Array, "*B"]:
        return jax.lax.bitcast_convert_type(array, jnp.int32)

    columns = [counts_b[:, None] for counts_b in guesses]
    if likeliest is not None:
        parts = (likeliest.ids_btx, bits(likeliest.logprobs_btx))
        columns += [part.reshape(len(part), -1) for part in parts]
    return jnp.concatenate([*columns, ids_bt, bits(logprobs_bt), sampled_b[:, None]], axis=1)


class Guessed(NamedTuple):
    """What guessing came to, per row."""

    proposed: np.ndarray  # tokens
    accepted: np.ndarray  # of them, that were sampled
    computed: np.ndarray  # positions, the same for all rows of one copy of the weights


def unpack_guesses(packed: np.ndarray) -> tuple[Guessed, np.ndarray]:
    """The counts in front of what a dispatch that guesses has packed, and the rest."""
    first = len(Guessed._fields)
    return Guessed(*packed[:, :first].T), packed[:, first:]


def unpack_likeliest(packed: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids [B, N, X] and float32 log-probabilities [B, N, X] in front of what a dispatch that
    reports `number` likeliest ids has packed, and the rest.
    """
    rows = len(packed)
    size = (packed.shape[1] - 1) // (2 * number + 2) * number
    ids, bits, rest = np.split(packed, [size, 2 * size], axis=1)
    logprobs = np.ascontiguousarray(bits).view(np.float32)
    return ids.reshape(rows, -1, number), logprobs.reshape(rows, -1, number), rest


def unpack_samples(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `pack_samples` packed, on the host: ids [B, N], float32 log-probabilities [B, N], counts
    [B].
    """
    steps = (packed.shape[1] - 1) // 2
    return (
        packed[:, :steps],
        np.ascontiguousarray(packed[:, steps : 2 * steps]).view(np.float32),
        packed[:, -1],
    )
