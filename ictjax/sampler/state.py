"""What the sampler's host side and its jitted step exchange: one integer matrix in, one out.

A dispatch uploads and downloads one small array each: separate arrays would cost more than the work
of a small model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


class Rows(NamedTuple):
    """The rows of one dispatch; everything is traced, nothing recompiles. Only the KV cache lives
    on the device between dispatches.

    A row with `lengths_b` 0 is padding: nothing is written for it, nothing sampled.
    """

    slots_b: Int[Array, " B"]  # row of a cache of slots; the number of slots for padding
    starts_b: Int[Array, " B"]  # tokens already in the cache
    lengths_b: Int[Array, " B"]  # tokens to append now, in tokens_bt
    allowed_b: Int[Array, " B"]  # tokens it may sample in this and later dispatches; 0: append only
    counts_b: Int[Array, " B"]  # tokens sampled for its request in earlier dispatches
    top_k_b: Int[Array, " B"]  # 0: off
    temperature_b: Float[Array, " B"]  # 0: greedy
    top_p_b: Float[Array, " B"]  # 1: off
    keys_b2: UInt32[Array, "B 2"]  # the request's PRNG key
    stop_bx: Int[Array, "B X"]  # ids that end the generation; -1 for none
    tokens_bt: Int[Array, "B T"]
    table_bp: Int[Array, "B P"]  # pages of the pool, where the cache is one; no columns otherwise


_COLUMNS = 10  # of the fields before stop_bx: one each, keys_b2 two


def blank_rows(
    num_rows: int,
    num_tokens: int,
    *,
    num_stop_ids: int,
    num_slots: int,
    pad_id: int,
    num_pages: int = 0,
) -> np.ndarray:
    """A packed matrix of padding rows, [B, _COLUMNS + X + T + P] int32, with P = `num_pages` pages
    of a row.
    """
    first = _COLUMNS + num_stop_ids
    packed = np.zeros((num_rows, first + num_tokens + num_pages), np.int32)
    packed[:, 0] = num_slots
    packed[:, _COLUMNS:first] = -1
    packed[:, first : first + num_tokens] = pad_id
    return packed


def pack_request(
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    stop_ids: tuple[int, ...],
    key: np.ndarray,
    num_stop_ids: int,
) -> np.ndarray:
    """The columns of one row that a request fixes, top_k to the last stop id."""
    columns = np.full(_COLUMNS - 5 + num_stop_ids, -1, np.int32)
    columns[0] = top_k
    columns[1:3] = np.asarray([temperature, top_p], np.float32).view(np.int32)
    columns[3:5] = key.view(np.int32)
    columns[5 : 5 + len(stop_ids)] = stop_ids
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
    num_tokens: int,
    pages: Sequence[int],
) -> None:
    """Fills one row of a packed matrix, given the columns of `pack_request` (None: append only)."""
    row[:5] = slot, start, len(tokens), allowed, count
    if request is not None:
        row[5 : 5 + len(request)] = request
    first = _COLUMNS + num_stop_ids
    row[first : first + len(tokens)] = tokens
    row[first + num_tokens : first + num_tokens + len(pages)] = pages


def unpack_rows(packed: Int[Array, "B X"], num_stop_ids: int, num_pages: int = 0) -> Rows:
    """The fields of a packed matrix, inside jit."""
    first, last = _COLUMNS + num_stop_ids, packed.shape[1] - num_pages
    return Rows(
        *(packed[:, column] for column in range(6)),
        temperature_b=jax.lax.bitcast_convert_type(packed[:, 6], jnp.float32),
        top_p_b=jax.lax.bitcast_convert_type(packed[:, 7], jnp.float32),
        keys_b2=jax.lax.bitcast_convert_type(packed[:, 8:_COLUMNS], jnp.uint32),
        stop_bx=packed[:, _COLUMNS:first],
        tokens_bt=packed[:, first:last],
        table_bp=packed[:, last:],
    )


def pack_samples(
    ids_bt: Int[Array, "B T"], logprobs_bt: Float[Array, "B T"], sampled_b: Int[Array, " B"]
) -> Int[Array, "B X"]:
    """Sampled ids, bits of their log-probabilities, and their number per row, as one matrix."""
    return jnp.concatenate(
        [ids_bt, jax.lax.bitcast_convert_type(logprobs_bt, jnp.int32), sampled_b[:, None]], axis=1
    )


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
