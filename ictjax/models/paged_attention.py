"""Keys and values of rows in pages of a pool, and attention over them, in place: the plain
reference.

Shapes beside the package key: W counts the pages of the pool, P those of a row's table, C the
positions of a page, Y the pages of a row that are attended to at once, and M = (N / K) * T are the
rows of a kv head's matrix product.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from ictjax.models.attention import EVERYTHING, MASKED
from ictjax.models.int8 import Scales
from ictjax.models.precision import wide

# Positions of one query that are attended to at once: a decode step takes several small pages in
# one round of its loop, an extend with its many queries one.
_AT_ONCE = 512


class PagedWriting(Protocol):
    """A way to write; all ways leave the pool that `write_pages` leaves."""

    def __call__(
        self,
        k_wkhc: Float[Array, "W K H C"] | Int8[Array, "W K H C"],
        v_wkch: Float[Array, "W K C H"] | Int8[Array, "W K C H"],
        k_btkh: Float[Array, "B T K H"] | Int8[Array, "B T K H"],
        v_btkh: Float[Array, "B T K H"] | Int8[Array, "B T K H"],
        table_bp: Int[Array, "B P"],
        starts_b: Int[Array, " B"],
        lengths_b: Int[Array, " B"],
    ) -> tuple[Array, Array]: ...


class ScaleWriting(Protocol):
    """A way to write scales; all ways leave what `write_scales` leaves."""

    def __call__(
        self,
        held: Scales,
        new: Scales,
        table_bp: Int[Array, "B P"],
        starts_b: Int[Array, " B"],
        lengths_b: Int[Array, " B"],
    ) -> Scales: ...


class PagedAttending(Protocol):
    """A way to attend; all ways give the values of `attend_pages`."""

    def __call__(
        self,
        q_btnh: Float[Array, "B T N H"],
        k_wkhc: Float[Array, "W K H C"] | Int8[Array, "W K H C"],
        v_wkch: Float[Array, "W K C H"] | Int8[Array, "W K C H"],
        table_bp: Int[Array, "B P"],
        starts_b: Int[Array, " B"],
        lengths_b: Int[Array, " B"],
        *,
        window: int | None,
        scale: float | None,
        scales: Scales | None = None,
    ) -> Float[Array, "B T N H"]: ...


class PagedAttention(NamedTuple):
    """A way to work on a pool."""

    write: PagedWriting
    attend: PagedAttending
    write_scales: ScaleWriting


def write_pages(
    k_wkhc: Float[Array, "W K H C"],
    v_wkch: Float[Array, "W K C H"],
    k_btkh: Float[Array, "B T K H"],
    v_btkh: Float[Array, "B T K H"],
    table_bp: Int[Array, "B P"],
    starts_b: Int[Array, " B"],
    lengths_b: Int[Array, " B"],
) -> tuple[Float[Array, "W K H C"], Float[Array, "W K C H"]]:
    """The pool with positions starts_b..starts_b+lengths_b-1 of every row.

    Args:
      k_wkhc: keys of the pool.
      v_wkch: its values.
      k_btkh: rotated keys of the new positions; those from `lengths_b` on are padding.
      v_btkh: their values.
      table_bp: the pages of each row in the order of its positions; no two rows write to the same.
      starts_b: positions before the first new one.
      lengths_b: new positions.
    """
    num_pages, _, size, _ = v_wkch.shape
    pages_bt, places_bt = _places(
        table_bp, starts_b, lengths_b, k_btkh.shape[1], num_pages=num_pages, size=size
    )
    spare = ((0, 0), (0, pages_bt.shape[1] - k_btkh.shape[1]))
    k_btkh, v_btkh = (jnp.pad(x, (*spare, (0, 0), (0, 0))) for x in (k_btkh, v_btkh))
    return (
        k_wkhc.at[pages_bt, :, :, places_bt].set(k_btkh, mode="drop"),
        v_wkch.at[pages_bt, :, places_bt].set(v_btkh, mode="drop"),
    )


def write_scales(
    held: Scales,
    new: Scales,
    table_bp: Int[Array, "B P"],
    starts_b: Int[Array, " B"],
    lengths_b: Int[Array, " B"],
) -> Scales:
    """`write_pages` of the scales of keys and values that are held in 8 bits.

    Args:
      held: of the pool, [W, K, C].
      new: of the new positions, [B, T, K].
      table_bp: see `write_pages`, as the others.
    """
    num_pages, _, size = held.k.shape
    pages_bt, places_bt = _places(
        table_bp, starts_b, lengths_b, new.k.shape[1], num_pages=num_pages, size=size
    )
    spare = ((0, 0), (0, pages_bt.shape[1] - new.k.shape[1]), (0, 0))
    return Scales(
        *(
            scale_wkc.at[pages_bt, :, places_bt].set(jnp.pad(scale_btk, spare), mode="drop")
            for scale_wkc, scale_btk in zip(held, new, strict=True)
        )
    )


def _places(
    table_bp: Array, starts_b: Array, lengths_b: Array, length: int, *, num_pages: int, size: int
) -> tuple[Array, Array]:
    """Page and position in it of every token of `length` of a row; padding is beyond the pages."""
    steps_1t = jnp.arange(length, dtype=jnp.int32)[None]
    positions_bt = starts_b[:, None] + steps_1t
    owned_bt = jnp.take_along_axis(
        table_bp, jnp.minimum(positions_bt // size, table_bp.shape[1] - 1), axis=1
    )
    # beyond the end: dropped
    pages_bt = jnp.where(steps_1t < lengths_b[:, None], owned_bt, num_pages)
    # A single position would be written by another program of XLA's, which copies the pool first:
    # a second one, which is dropped, goes with it.
    spare = ((0, 0), (0, int(pages_bt.size == 1)))
    return (
        jnp.pad(pages_bt, spare, constant_values=num_pages),
        jnp.pad(positions_bt % size, spare),
    )


def attend_pages(
    q_btnh: Float[Array, "B T N H"],
    k_wkhc: Float[Array, "W K H C"] | Int8[Array, "W K H C"],
    v_wkch: Float[Array, "W K C H"] | Int8[Array, "W K C H"],
    table_bp: Int[Array, "B P"],
    starts_b: Int[Array, " B"],
    lengths_b: Int[Array, " B"],
    *,
    window: int | None = None,
    scale: float | None = None,
    scales: Scales | None = None,
) -> Float[Array, "B T N H"]:
    """The mixed values of the last `lengths_b` positions of every row, by an online softmax over
    its pages (as in `attention.attend_rows`): a page of each row, or a few, exist outside the pool
    at a time, from the first that any row sees to the last that any row holds.

    Args:
      q_btnh: rotated queries; those from `lengths_b` on are padding, and so is their result.
      k_wkhc: rotated keys of the pool, those of the queries' own positions included.
      v_wkch: values of the pool.
      table_bp: the pages of each row in the order of its positions; entries behind the last
        position are any page.
      starts_b: positions before the first query.
      lengths_b: queries of each row; 0 for a row that takes no part.
      window: how many positions back a query sees, its own included (static); None: all.
      scale: of queries times keys (static); H ** -0.5 unless given.
      scales: of a pool in 8 bits, [W, K, C].
    """
    batch, length, num_heads, head_dim = q_btnh.shape
    num_kv_heads, size = v_wkch.shape[1:3]
    groups = num_heads // num_kv_heads
    # Rows of each kv head's matrix product in the order (group, token), as in `attention.attend`.
    q_bkmh = (
        q_btnh.reshape(batch, length, num_kv_heads, groups, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, num_kv_heads, groups * length, head_dim)
    )
    scale = head_dim**-0.5 if scale is None else scale
    window = EVERYTHING if window is None else window
    dtype = wide(q_btnh.dtype)
    positions_bt = starts_b[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    active_b = lengths_b > 0
    end = jnp.max(jnp.where(active_b, starts_b + lengths_b, 0))
    start = jnp.min(jnp.where(active_b, jnp.maximum(starts_b - window + 1, 0), end))
    at_once = max(1, _AT_ONCE // (size * length))
    span = at_once * size
    table_bp = jnp.pad(table_bp, ((0, 0), (0, -table_bp.shape[1] % at_once)))
    q_bykmh = jnp.broadcast_to(q_bkmh[:, None], (batch, at_once, *q_bkmh.shape[1:]))

    def add(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total_bkmh, sum_bkm, top_bkm = carry
        pages_by = jax.lax.dynamic_slice_in_dim(table_bp, index * at_once, at_once, axis=1)
        k_bykhc, v_bykch = (x.at[pages_by].get(mode="clip") for x in (k_wkhc, v_wkch))
        cached_1s = index * span + jnp.arange(span, dtype=jnp.int32)[None]
        distance_bts = positions_bt[:, :, None] - cached_1s[:, None]
        mask_bytc = (
            ((distance_bts >= 0) & (distance_bts < window))
            .reshape(batch, length, at_once, size)
            .swapaxes(1, 2)
        )
        k_bykhc, v_bykch = (x.astype(q_btnh.dtype) for x in (k_bykhc, v_bykch))
        logits_bykmc = jnp.einsum(
            "BYKMH,BYKHC->BYKMC", q_bykmh, k_bykhc, preferred_element_type=dtype
        )
        if scales is not None:
            logits_bykmc *= scales.k.at[pages_by].get(mode="clip")[:, :, :, None]
        logits_bykgtc = (logits_bykmc * scale).reshape(*logits_bykmc.shape[:3], groups, length, -1)
        logits_bykmc = jnp.where(mask_bytc[:, :, None, None], logits_bykgtc, MASKED).reshape(
            logits_bykmc.shape
        )
        # What a row adds up while it has seen nothing but masks is wiped out by its first key.
        new_top_bkm = jnp.maximum(top_bkm, logits_bykmc.max(axis=(1, 4)))
        weights_bykmc = jnp.exp(logits_bykmc - new_top_bkm[:, None, ..., None])
        kept_bkm = jnp.exp(top_bkm - new_top_bkm)
        valued_bykmc = weights_bykmc
        if scales is not None:
            valued_bykmc = weights_bykmc * scales.v.at[pages_by].get(mode="clip")[:, :, :, None]
        mixed_bykmh = jnp.einsum(
            "BYKMC,BYKCH->BYKMH",
            valued_bykmc.astype(v_bykch.dtype),
            v_bykch,
            preferred_element_type=dtype,
        )
        return (
            total_bkmh * kept_bkm[..., None] + mixed_bykmh.sum(axis=1),
            sum_bkm * kept_bkm + weights_bykmc.sum(axis=(1, 4)),
            new_top_bkm,
        )

    nothing = (
        jnp.zeros(q_bkmh.shape, dtype),
        jnp.zeros(q_bkmh.shape[:-1], dtype),
        jnp.full(q_bkmh.shape[:-1], MASKED, dtype),
    )
    total_bkmh, sum_bkm, _ = jax.lax.fori_loop(start // span, -(-end // span), add, nothing)
    mixed_bkmh = total_bkmh / jnp.where(sum_bkm > 0, sum_bkm, 1.0)[..., None]
    return (
        mixed_bkmh.astype(q_btnh.dtype)
        .reshape(batch, num_kv_heads, groups, length, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(q_btnh.shape)
    )


PAGES = PagedAttention(write_pages, attend_pages, write_scales)
