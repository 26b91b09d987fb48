"""Grouped-query attention: one reference over a mask, and one over whole rows that computes in
blocks and never holds an array of [T, T].

Shapes beside the package key: a block is C tokens of a row, X counts the blocks of queries and Y
those of keys, and M = (N / K) * C are the rows of a kv head's matrix product, in the order (query
head of the group, token).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Int8

from ictjax.models.int8 import Scales
from ictjax.models.precision import wide

# Rows of up to so many tokens are computed in blocks of so many; longer ones in blocks of the last
# size, and rows of one block in the plain way.
_BLOCKS = ((1024, 128), (4096, 256))
_LONGEST = 512
# The name of what the backward pass needs of the forward pass, for `jax.checkpoint_policies`.
MIXED = "attention"
EVERYTHING = 2**30  # a window that ends nowhere
WHOLE = 2**62  # of a part of attention: all at once
MASKED = -1e30  # finite: a row with nothing to attend to yields a mean, never NaN


class Seen(NamedTuple):
    """What the tokens of rows may attend to: those of their own context that are not later, and
    belong to its trunk or to their own branch.

    A plain sequence is one trunk. A prompt with several replies is a trunk with one branch each,
    whose positions go on from the trunk's; several of them may lie in one row. The order in a row
    is free as long as nobody looks ahead in it: every token lies after all that it sees.
    """

    positions_bt: Int[Array, "B T"]  # rotary; what a sliding window measures
    context_bt: Int[Array, "B T"]  # -1 at padding, which sees nothing
    branch_bt: Int[Array, "B T"]  # 0: the trunk


def plain_rows(valid_bt: Bool[Array, "B T"], positions_bt: Int[Array, "B T"] | None = None) -> Seen:
    """Rows of one sequence each, with False in `valid_bt` at padding. Positions are 0..T-1 unless
    given.
    """
    if positions_bt is None:
        steps_t = jnp.arange(valid_bt.shape[1], dtype=jnp.int32)
        positions_bt = jnp.broadcast_to(steps_t[None], valid_bt.shape)
    context_bt = jnp.where(valid_bt, 0, -1)
    return Seen(positions_bt, context_bt, jnp.zeros_like(context_bt))


def may_see(queries: Seen, keys: Seen, window: Int[Array, ""] | int) -> Bool[Array, "B T S"]:
    """The mask of some tokens of a row over others: `window` positions back, the own included."""
    return sees(
        jax.tree.map(lambda x_bt: x_bt[:, :, None], queries),
        jax.tree.map(lambda x_bs: x_bs[:, None, :], keys),
        window,
    )


def sees(query: Seen, key: Seen, window: Array | int) -> Array:
    """`may_see` of single tokens: the fields have any shapes that broadcast."""
    distance = query.positions_bt - key.positions_bt
    return (
        (query.context_bt == key.context_bt)
        & (key.context_bt >= 0)
        & ((key.branch_bt == 0) | (key.branch_bt == query.branch_bt))
        & (distance >= 0)
        & (distance < window)
    )


def attend(
    q_btnh: Float[Array, "B T N H"],
    k_bkhs: Float[Array, "B K H S"] | Int8[Array, "B K H S"],
    v_bksh: Float[Array, "B K S H"] | Int8[Array, "B K S H"],
    mask_bts: Bool[Array, "B T S"],
    scale: float | None = None,
    scales: Scales | None = None,
) -> Float[Array, "B T N H"]:
    """The reference, which holds [B, N, T, S]; query head n reads kv head n // (N / K), without
    repeating keys or values. `scale` is H ** -0.5 unless given. Keys and values in 8 bits come with
    their scales, by which logits and weights are multiplied.
    """
    batch, length, num_heads, head_dim = q_btnh.shape
    num_kv_heads = k_bkhs.shape[1]
    # Rows of each kv head's matrix product: (group, token). In this order both products are plain
    # batched matrix products; XLA transposes the large operand of the direct five-letter einsum,
    # which doubles the time of a decode step on CPU.
    groups = num_heads // num_kv_heads
    q_bkmh = (
        q_btnh.reshape(batch, length, num_kv_heads, groups, head_dim)
        .transpose(0, 2, 3, 1, 4)
        .reshape(batch, num_kv_heads, -1, head_dim)
    )
    scale = head_dim**-0.5 if scale is None else scale
    logits_bkms = jnp.einsum(
        "BKMH,BKHS->BKMS",
        q_bkmh,
        k_bkhs.astype(q_bkmh.dtype),
        preferred_element_type=wide(q_btnh.dtype),
    )
    if scales is not None:
        logits_bkms *= scales.k[:, :, None]
    logits_bkgts = (logits_bkms * scale).reshape(batch, num_kv_heads, groups, length, -1)
    weights_bkgts = jax.nn.softmax(
        jnp.where(mask_bts[:, None, None], logits_bkgts, MASKED), axis=-1
    )
    weights_bkms = weights_bkgts.reshape(logits_bkms.shape)
    if scales is not None:
        weights_bkms *= scales.v[:, :, None]
        v_bksh = v_bksh.astype(q_btnh.dtype)
    mixed_bkmh = jnp.einsum("BKMS,BKSH->BKMH", weights_bkms.astype(v_bksh.dtype), v_bksh)
    return (
        mixed_bkmh.reshape(batch, num_kv_heads, groups, length, head_dim)
        .transpose(0, 3, 1, 2, 4)
        .reshape(q_btnh.shape)
    )


def attend_in_parts(
    q_btnh: Float[Array, "B T N H"],
    k_bkhs: Float[Array, "B K H S"] | Int8[Array, "B K H S"],
    v_bksh: Float[Array, "B K S H"] | Int8[Array, "B K S H"],
    mask_bts: Bool[Array, "B T S"],
    scale: float | None,
    scales: Scales | None,
    part_bytes: int,
) -> Float[Array, "B T N H"]:
    """`attend`, some rows at a time, or some tokens of a row: their logits and weights, which are
    written and read several times, then stay in a processor's own cache.

    Args:
      scale: as that of `attend`, and so are the scales.
      part_bytes: of the logits of one part, at most; those of one token may be more.
    """
    batch, length, num_heads, _ = q_btnh.shape
    token_bytes = num_heads * mask_bts.shape[-1] * wide(q_btnh.dtype).itemsize
    if batch * length * token_bytes <= part_bytes:
        return attend(q_btnh, k_bkhs, v_bksh, mask_bts, scale, scales)
    rows = _divisor(batch, part_bytes // (length * token_bytes))
    tokens = _divisor(length, part_bytes // token_bytes) if rows == 1 else length

    def of_rows(part: tuple[Array, Array, Array, Array, Scales | None]) -> Array:
        q_rtnh, k_rkhs, v_rksh, mask_rts, part_scales = part

        def of_tokens(part: tuple[Array, Array]) -> Array:
            return attend(part[0], k_rkhs, v_rksh, part[1], scale, part_scales)

        if tokens == length:
            return of_tokens((q_rtnh, mask_rts))
        cut = (_parts(q_rtnh, 1, tokens), _parts(mask_rts, 1, tokens))
        mixed_xrtnh = jax.lax.map(of_tokens, cut)
        return mixed_xrtnh.swapaxes(0, 1).reshape(q_rtnh.shape)

    whole = (q_btnh, k_bkhs, v_bksh, mask_bts, scales)
    mixed_xrtnh = jax.lax.map(of_rows, jax.tree.map(lambda x: _parts(x, 0, rows), whole))
    return mixed_xrtnh.reshape(q_btnh.shape)


def _divisor(whole: int, most: int) -> int:
    """The largest part of so many that all parts can have, 1 at least."""
    return next((n for n in range(min(whole, most), 1, -1) if whole % n == 0), 1)


def _parts(x: Array, axis: int, size: int) -> Array:
    """Parts of an axis, along a new first one."""
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


class Attention(NamedTuple):
    """A way to compute the attention of whole rows. All ways give the values and the gradients of
    `attend` under `may_see`; only values at padding differ.
    """

    name: str
    plan: Callable[[Seen, int], Any]  # (seen, window): once for all layers that see the same
    # (q_btnh, k_btkh, v_btkh, plan, scale) -> mixed values [B, T, N, H]
    rows: Callable[[Array, Array, Array, Any, float], Array]


def in_whole_blocks(seen: Seen, block: int) -> Seen:
    """With padding behind the rows [B, T], to a multiple of `block` tokens."""
    padding = ((0, 0), (0, -seen.positions_bt.shape[1] % block))
    return Seen(
        jnp.pad(seen.positions_bt, padding),
        jnp.pad(seen.context_bt, padding, constant_values=-1),
        jnp.pad(seen.branch_bt, padding),
    )


class Plan(NamedTuple):
    """How rows are attended to, computed once for all layers that see the same."""

    seen: Seen  # padded to whole blocks
    window: Int[Array, ""]
    needed_xy: Bool[Array, "X Y"]  # some query of block x sees some key of block y, in any row


def plan(seen: Seen, window: int = EVERYTHING, block: int | None = None) -> Plan:
    """Which blocks of a batch hold anything to be seen; the others are never computed.

    Args:
      seen: of all rows.
      window: how many positions back a token sees, its own included.
      block: tokens of a block; by default one that suits the length of the rows.
    """
    if block is None:
        length = seen.positions_bt.shape[1]
        block = next((size for longest, size in _BLOCKS if length <= longest), _LONGEST)
    seen = in_whole_blocks(seen, block)
    rows, length = seen.positions_bt.shape
    count = length // block

    def row_of_blocks(queries: Seen) -> Array:
        return may_see(queries, seen, window).reshape(rows, -1, count, block).any(axis=(0, 1, 3))

    needed_xy = jax.lax.map(row_of_blocks, _blocks(seen, block))
    return Plan(seen, jnp.asarray(window, jnp.int32), needed_xy)


def attend_rows(
    q_btnh: Float[Array, "B T N H"],
    k_btkh: Float[Array, "B T K H"],
    v_btkh: Float[Array, "B T K H"],
    plan: Plan,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attention of whole rows, block by block in the way of FlashAttention
    (https://arxiv.org/abs/2205.14135 and 2307.08691): [B, N, C, C] exists at a time, and in the
    backward pass again. Blocks that `plan` calls needless are skipped. Outputs at padding are
    zeros; with rows of a single block, which are computed in the plain way, they are arbitrary.
    """
    rows, length, num_heads, head_dim = q_btnh.shape
    block = plan.seen.positions_bt.shape[1] // plan.needed_xy.shape[0]
    if length <= block:
        seen = jax.tree.map(lambda x: x[:, :length], plan.seen)
        mask_bts = may_see(seen, seen, plan.window)
        k_bkhs, v_bksh = k_btkh.transpose(0, 2, 3, 1), v_btkh.swapaxes(1, 2)
        return checkpoint_name(attend(q_btnh, k_bkhs, v_bksh, mask_bts, scale), MIXED)
    num_kv_heads = k_btkh.shape[2]
    padding = ((0, 0), (0, plan.seen.positions_bt.shape[1] - length), (0, 0), (0, 0))
    groups = num_heads // num_kv_heads
    q_xbkmh = (
        jnp.pad(q_btnh, padding)
        .reshape(rows, -1, block, num_kv_heads, groups, head_dim)
        .transpose(1, 0, 3, 4, 2, 5)
        .reshape(-1, rows, num_kv_heads, groups * block, head_dim)
    )
    k_ybksh, v_ybksh = (
        jnp.pad(x, padding)
        .reshape(rows, -1, block, num_kv_heads, head_dim)
        .transpose(1, 0, 3, 2, 4)
        for x in (k_btkh, v_btkh)
    )
    mixed_xbkmh = _blockwise(scale, q_xbkmh, k_ybksh, v_ybksh, plan)
    return (
        mixed_xbkmh.reshape(-1, rows, num_kv_heads, groups, block, head_dim)
        .transpose(1, 0, 4, 2, 3, 5)
        .reshape(rows, -1, num_heads, head_dim)[:, :length]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(scale: float, q_xbkmh: Array, k_ybksh: Array, v_ybksh: Array, plan: Plan) -> Array:
    return _forward(scale, q_xbkmh, k_ybksh, v_ybksh, plan)[0]


def _forward(
    scale: float, q_xbkmh: Array, k_ybksh: Array, v_ybksh: Array, plan: Plan
) -> tuple[Array, tuple[Any, ...]]:
    """Mixed values, and what the backward pass needs besides."""
    block = k_ybksh.shape[3]
    seen_x = _blocks(plan.seen, block)

    def queries(inputs: tuple[Array, Array, Seen, Array]) -> tuple[Array, Array]:
        index, q_bkmh, seen_q, needed_y = inputs

        def keys(y: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            def add(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                total_bkmh, sum_bkm, top_bkm = carry
                k_bksh, v_bksh, seen_k = _at(y, (k_ybksh, v_ybksh, seen_x))
                logits_bkms = _logits(scale, q_bkmh, k_bksh, seen_q, seen_k, plan.window)
                new_top_bkm = jnp.maximum(top_bkm, logits_bkms.max(axis=-1))
                weights_bkms = jnp.exp(logits_bkms - new_top_bkm[..., None])
                kept_bkm = jnp.exp(top_bkm - new_top_bkm)
                mixed_bkmh = _product("BKMS,BKSH->BKMH", weights_bkms.astype(v_bksh.dtype), v_bksh)
                return (
                    total_bkmh * kept_bkm[..., None] + mixed_bkmh,
                    sum_bkm * kept_bkm + weights_bkms.sum(axis=-1),
                    new_top_bkm,
                )

            return jax.lax.cond(needed_y[y], add, lambda carry: carry, carry)

        dtype = wide(q_bkmh.dtype)
        start = (
            jnp.zeros(q_bkmh.shape, dtype),
            jnp.zeros(q_bkmh.shape[:-1], dtype),
            jnp.full(q_bkmh.shape[:-1], MASKED, dtype),
        )
        total_bkmh, sum_bkm, top_bkm = jax.lax.fori_loop(0, index + 1, keys, start)
        # What saw nothing is padding: zeros.
        alive_bkm = top_bkm > MASKED / 2
        sum_bkm = jnp.where(alive_bkm, sum_bkm, 1.0)
        mixed_bkmh = jnp.where(alive_bkm[..., None], total_bkmh / sum_bkm[..., None], 0.0)
        return mixed_bkmh.astype(q_bkmh.dtype), jnp.where(
            alive_bkm, top_bkm + jnp.log(sum_bkm), -MASKED
        )

    index_x = jnp.arange(q_xbkmh.shape[0], dtype=jnp.int32)
    mixed_xbkmh, norm_xbkm = checkpoint_name(
        jax.lax.map(queries, (index_x, q_xbkmh, seen_x, plan.needed_xy)), MIXED
    )
    return mixed_xbkmh, (q_xbkmh, k_ybksh, v_ybksh, plan, mixed_xbkmh, norm_xbkm)


def _backward(scale: float, kept: tuple[Any, ...], grad_xbkmh: Array) -> tuple[Any, ...]:
    """Over the blocks of keys, and for each over the queries that may see it."""
    q_xbkmh, k_ybksh, v_ybksh, plan, mixed_xbkmh, norm_xbkm = kept
    block = k_ybksh.shape[3]
    seen_x = _blocks(plan.seen, block)
    dtype = wide(q_xbkmh.dtype)
    # FlashAttention's D: the weights' gradients sum to it in every row.
    mean_xbkm = (grad_xbkmh.astype(dtype) * mixed_xbkmh.astype(dtype)).sum(axis=-1)
    count = q_xbkmh.shape[0]

    def keys(
        dq_xbkmh: Array, inputs: tuple[Array, Array, Array, Seen, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        index, k_bksh, v_bksh, seen_k, needed_x = inputs

        def queries(x: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            def add(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                dq_xbkmh, dk_bksh, dv_bksh = carry
                q_bkmh, grad_bkmh, norm_bkm, mean_bkm, seen_q = _at(
                    x, (q_xbkmh, grad_xbkmh, norm_xbkm, mean_xbkm, seen_x)
                )
                logits_bkms = _logits(scale, q_bkmh, k_bksh, seen_q, seen_k, plan.window)
                weights_bkms = jnp.exp(logits_bkms - norm_bkm[..., None])
                dv_bksh += _product(
                    "BKMS,BKMH->BKSH", weights_bkms.astype(grad_bkmh.dtype), grad_bkmh
                )
                dweights_bkms = _product("BKMH,BKSH->BKMS", grad_bkmh, v_bksh)
                dlogits_bkms = (
                    weights_bkms * (dweights_bkms - mean_bkm[..., None]) * scale
                ).astype(q_bkmh.dtype)
                dk_bksh += _product("BKMS,BKMH->BKSH", dlogits_bkms, q_bkmh)
                dq_bkmh = dq_xbkmh[x] + _product("BKMS,BKSH->BKMH", dlogits_bkms, k_bksh)
                return dq_xbkmh.at[x].set(dq_bkmh), dk_bksh, dv_bksh

            return jax.lax.cond(needed_x[x], add, lambda carry: carry, carry)

        zeros_bksh = jnp.zeros(k_bksh.shape, dtype)
        dq_xbkmh, dk_bksh, dv_bksh = jax.lax.fori_loop(
            index, count, queries, (dq_xbkmh, zeros_bksh, zeros_bksh)
        )
        return dq_xbkmh, (dk_bksh.astype(k_bksh.dtype), dv_bksh.astype(v_bksh.dtype))

    index_y = jnp.arange(count, dtype=jnp.int32)
    dq_xbkmh, (dk_ybksh, dv_ybksh) = jax.lax.scan(
        keys,
        jnp.zeros(q_xbkmh.shape, dtype),
        (index_y, k_ybksh, v_ybksh, seen_x, plan.needed_xy.T),
    )
    return dq_xbkmh.astype(q_xbkmh.dtype), dk_ybksh, dv_ybksh, None


_blockwise.defvjp(_forward, _backward)


def _whole_rows(seen: Seen, window: int) -> Plan:
    return plan(seen, window, seen.positions_bt.shape[1])


BLOCKS = Attention("blocks", plan, attend_rows)
PLAIN = Attention("plain", _whole_rows, attend_rows)  # rows are single blocks: [B, N, T, T]


def _logits(
    scale: float, q_bkmh: Array, k_bksh: Array, queries: Seen, keys: Seen, window: Array
) -> Array:
    mask_bts = may_see(queries, keys, window)
    logits_bkms = _product("BKMH,BKSH->BKMS", q_bkmh, k_bksh) * scale
    rows, heads, _, size = logits_bkms.shape
    logits_bkgts = logits_bkms.reshape(rows, heads, -1, *mask_bts.shape[1:])
    masked_bkgts = jnp.where(mask_bts[:, None, None], logits_bkgts, MASKED)
    return masked_bkgts.reshape(rows, heads, -1, size)


def _product(letters: str, x: Array, y: Array) -> Array:
    return jnp.einsum(letters, x, y, preferred_element_type=wide(x.dtype))


def _at(index: Array, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _blocks(seen: Seen, block: int) -> Seen:
    """Every field as [X, B, C]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, block).swapaxes(0, 1), seen)
