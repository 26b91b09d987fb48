"""Attention of whole rows as Pallas kernels for NVIDIA GPUs, which Triton compiles.

A program has one block of queries (or of keys, for the gradients of keys and values) in registers
and walks over the blocks of the other side that hold something for it: first those that are seen
whole, then those that need the mask, so that neither loop has a branch and both can be pipelined.

Shapes as in `ictjax.models.kernel_attention`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ictjax.models.attention import MASKED, Attention, Seen, sees
from ictjax.models.kernel_attention import (
    NONE,
    WHOLE,
    Kernels,
    PairPlan,
    kernel_attention,
    product,
    weights_of,
)

_LARGEST = 64  # tokens of a block
_BLOCK_BYTES = 16_384  # of a block of keys, with which all kernels fit the 99 KiB of an L4
_LEAST = 16  # of a side of a matrix that tensor cores multiply


class Visits(NamedTuple):
    """Which blocks every block walks over, in this order."""

    inner_bxy: Int[Array, "B X Y"]  # seen whole, then in part, then what is not visited
    whole_bx: Int[Array, "B X"]  # so many seen whole
    some_bx: Int[Array, "B X"]  # so many visited


def gpu_attention(
    head_dim: int,
    dtype: str,
    mesh: Mesh | None = None,
    *,
    block: int | None = None,
    interpret: bool = False,
) -> Attention:
    """Attention by these kernels, see `kernel_attention`.

    Args:
      head_dim: of the model.
      dtype: that it computes in.
      mesh: on which they run.
      block: tokens of a block, a power of 2 of at least 16; by default the largest that fits.
      interpret: run the kernels on any platform, slowly.
    """
    if block is None:
        fitting = _BLOCK_BYTES // (_width(head_dim) * jnp.dtype(dtype).itemsize)
        block = max(min(fitting, _LARGEST), _LEAST)
    kernels = Kernels(
        "pallas_gpu",
        block,
        _visits_by_both,
        functools.partial(_forward, block, interpret),
        functools.partial(_backward, block, interpret),
    )
    return kernel_attention(kernels, mesh)


def _visits_by_both(state_bxy: Array) -> tuple[Visits, Visits]:
    return _visits(state_bxy), _visits(state_bxy.swapaxes(1, 2))


def _visits(state_bxy: Array) -> Visits:
    return Visits(
        jnp.argsort(-state_bxy, axis=-1).astype(jnp.int32),
        (state_bxy == WHOLE).sum(axis=-1, dtype=jnp.int32),
        (state_bxy != NONE).sum(axis=-1, dtype=jnp.int32),
    )


def _forward(
    block: int,
    interpret: bool,
    scale: float,
    q_bnth: Array,
    k_bkth: Array,
    v_bkth: Array,
    plan: PairPlan,
) -> tuple[Array, Array]:
    batch, num_heads, length, head_dim = q_bnth.shape
    groups = num_heads // k_bkth.shape[1]
    q_bnth, k_bkth, v_bkth = _widened(q_bnth, k_bkth, v_bkth)
    of = _specs(block, length, q_bnth.shape[3], groups)
    mixed_bnth, norm_bnt = pl.pallas_call(
        functools.partial(_forward_kernel, scale, block),
        grid=(length // block, num_heads, batch),
        in_specs=[*of.plan, of.block, of.kv_row, of.kv_row],
        out_specs=[of.block, of.numbers],
        out_shape=[
            jax.ShapeDtypeStruct(q_bnth.shape, q_bnth.dtype),
            jax.ShapeDtypeStruct(q_bnth.shape[:3], jnp.float32),
        ],
        compiler_params=_parameters(q_bnth),
        interpret=interpret,
        name="attention_forward",
    )(*_numbers(plan, plan.by_query), q_bnth, k_bkth, v_bkth)
    return mixed_bnth[..., :head_dim], norm_bnt


def _forward_kernel(scale: float, block: int, *refs: Any) -> None:
    *plan, q_ref, k_ref, v_ref, mixed_ref, norm_ref = refs
    q_ch = q_ref[...]

    def add(
        y: Array, masked: Callable[[Array], Array], carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        total_ch, sum_c, top_c = carry
        at = pl.ds(y * block, block)
        logits_cs = masked(product(q_ch, k_ref[at, :], (1, 1)) * scale)
        new_top_c = jnp.maximum(top_c, logits_cs.max(axis=1))
        weights_cs = jnp.exp(logits_cs - new_top_c[:, None])
        kept_c = jnp.exp(top_c - new_top_c)
        v_sh = v_ref[at, :]
        mixed_ch = product(weights_cs.astype(v_sh.dtype), v_sh, (1, 0))
        return (
            total_ch * kept_c[:, None] + mixed_ch,
            sum_c * kept_c + weights_cs.sum(axis=1),
            new_top_c,
        )

    zeros_c = jnp.zeros((block,), jnp.float32)
    start = (jnp.zeros(q_ch.shape, jnp.float32), zeros_c, zeros_c + MASKED)
    total_ch, sum_c, top_c = _walk(block, plan, _queries_down, add, start)
    alive_c = top_c > MASKED / 2  # what saw nothing is padding: zeros
    sum_c = jnp.where(alive_c, sum_c, 1.0)
    share_c = jnp.where(alive_c, 1.0 / sum_c, 0.0)
    mixed_ref[...] = (total_ch * share_c[:, None]).astype(mixed_ref.dtype)
    norm_ref[...] = jnp.where(alive_c, top_c + jnp.log(sum_c), -MASKED)


def _backward(
    block: int,
    interpret: bool,
    scale: float,
    q_bnth: Array,
    k_bkth: Array,
    v_bkth: Array,
    plan: PairPlan,
    grad_bnth: Array,
    norm_bnt: Array,
    mean_bnt: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of the queries by one kernel, of keys and values by another."""
    batch, num_heads, length, head_dim = q_bnth.shape
    num_kv_heads = k_bkth.shape[1]
    groups = num_heads // num_kv_heads
    q_bnth, k_bkth, v_bkth, grad_bnth = _widened(q_bnth, k_bkth, v_bkth, grad_bnth)
    of = _specs(block, length, q_bnth.shape[3], groups)
    arrays = (q_bnth, k_bkth, v_bkth, grad_bnth, norm_bnt, mean_bnt)
    dq_bnth = pl.pallas_call(
        functools.partial(_query_kernel, scale, block),
        grid=(length // block, num_heads, batch),
        in_specs=[
            *of.plan,
            *(of.block, of.kv_row, of.kv_row, of.block, of.numbers, of.numbers),
        ],
        out_specs=of.block,
        out_shape=jax.ShapeDtypeStruct(q_bnth.shape, q_bnth.dtype),
        compiler_params=_parameters(q_bnth),
        interpret=interpret,
        name="attention_backward_queries",
    )(*_numbers(plan, plan.by_query), *arrays)
    dk_bkth, dv_bkth = pl.pallas_call(
        functools.partial(_key_kernel, scale, block),
        grid=(length // block, num_kv_heads, batch),
        in_specs=[
            *of.plan,
            *(of.query_rows, of.block, of.block, of.query_rows, of.row_numbers, of.row_numbers),
        ],
        out_specs=[of.block, of.block],
        out_shape=[jax.ShapeDtypeStruct(k_bkth.shape, k_bkth.dtype)] * 2,
        compiler_params=_parameters(q_bnth),
        interpret=interpret,
        name="attention_backward_keys",
    )(*_numbers(plan, plan.by_key), *arrays)
    return dq_bnth[..., :head_dim], dk_bkth[..., :head_dim], dv_bkth[..., :head_dim]


def _query_kernel(scale: float, block: int, *refs: Any) -> None:
    *plan, q_ref, k_ref, v_ref, grad_ref, norm_ref, mean_ref, dq_ref = refs
    q_ch, grad_ch, norm_c, mean_c = q_ref[...], grad_ref[...], norm_ref[...], mean_ref[...]

    def add(y: Array, masked: Callable[[Array], Array], total_ch: Array) -> Array:
        at = pl.ds(y * block, block)
        k_sh = k_ref[at, :]
        logits_cs = masked(product(q_ch, k_sh, (1, 1)) * scale)
        dweights_cs = product(grad_ch, v_ref[at, :], (1, 1))
        of_queries = norm_c[:, None], mean_c[:, None]
        _, dlogits_cs = weights_of(scale, logits_cs, dweights_cs, *of_queries)
        return total_ch + product(dlogits_cs.astype(k_sh.dtype), k_sh, (1, 0))

    total_ch = _walk(block, plan, _queries_down, add, jnp.zeros(q_ch.shape, jnp.float32))
    dq_ref[...] = total_ch.astype(dq_ref.dtype)


def _key_kernel(scale: float, block: int, *refs: Any) -> None:
    *plan, q_ref, k_ref, v_ref, grad_ref, norm_ref, mean_ref, dk_ref, dv_ref = refs
    k_sh, v_sh = k_ref[...], v_ref[...]

    def head(group: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        def add(
            x: Array, masked: Callable[[Array], Array], totals: tuple[Array, Array]
        ) -> tuple[Array, Array]:
            dk_sh, dv_sh = totals
            at = pl.ds(x * block, block)
            q_ch, grad_ch = q_ref[group, at, :], grad_ref[group, at, :]
            logits_sc = masked(product(k_sh, q_ch, (1, 1)) * scale)
            dweights_sc = product(v_sh, grad_ch, (1, 1))
            of_queries = norm_ref[group, at][None, :], mean_ref[group, at][None, :]
            weights_sc, dlogits_sc = weights_of(scale, logits_sc, dweights_sc, *of_queries)
            return (
                dk_sh + product(dlogits_sc.astype(q_ch.dtype), q_ch, (1, 0)),
                dv_sh + product(weights_sc.astype(grad_ch.dtype), grad_ch, (1, 0)),
            )

        return _walk(block, plan, _keys_down, add, totals)

    zeros_sh = jnp.zeros(k_sh.shape, jnp.float32)
    dk_sh, dv_sh = jax.lax.fori_loop(0, q_ref.shape[0], head, (zeros_sh, zeros_sh))
    dk_ref[...] = dk_sh.astype(dk_ref.dtype)
    dv_ref[...] = dv_sh.astype(dv_ref.dtype)


def _walk(
    block: int,
    refs: list[Any],
    mask: Callable[[Seen, Seen, Any], Array],
    add: Callable[[Array, Callable[[Array], Array], Any], Any],
    start: Any,
) -> Any:
    """Adds up what a program visits.

    Args:
      refs: of `_numbers`.
      mask: of its own tokens and those of another block, within a window.
      add: (block, what masks its logits, sum) -> sum.
      start: of the sum.
    """
    window_ref, inner_ref, whole_ref, some_ref, *fields = refs
    own = Seen(*(ref[...] for ref in fields[:3]))

    def whole(index: Array, total: Any) -> Any:
        return add(inner_ref[index], lambda logits: logits, total)

    def part(index: Array, total: Any) -> Any:
        other = inner_ref[index]
        there = Seen(*(ref[pl.ds(other * block, block)] for ref in fields[3:]))
        seen = mask(own, there, window_ref[0])
        return add(other, lambda logits: jnp.where(seen, logits, MASKED), total)

    total = jax.lax.fori_loop(0, whole_ref[0], whole, start)
    return jax.lax.fori_loop(whole_ref[0], some_ref[0], part, total)


def _queries_down(own: Seen, other: Seen, window: Any) -> Array:
    return sees(_down(own), _across(other), window)


def _keys_down(own: Seen, other: Seen, window: Any) -> Array:
    return sees(_across(other), _down(own), window)


def _down(seen: Seen) -> Seen:
    return Seen(*(x[:, None] for x in seen))


def _across(seen: Seen) -> Seen:
    return Seen(*(x[None, :] for x in seen))


class _Specs(NamedTuple):
    """Which part of an array a program works on: one of a grid (block, head, row), whose head is of
    queries or, for their gradients, of keys and values.
    """

    plan: list[Any]  # of `_numbers`
    block: Any  # its own tokens, of [B, N, T, H]
    numbers: Any  # the same of [B, N, T]
    kv_row: Any  # all that its queries may read, of [B, K, T, H]
    query_rows: Any  # all that may read its keys, of [B, N, T, H]: [N / K, T, H]
    row_numbers: Any  # the same of [B, N, T]


def _specs(block: int, length: int, head_dim: int, groups: int) -> _Specs:
    return _Specs(
        plan=[
            pl.BlockSpec((1,), lambda x, n, b: (0,)),
            pl.BlockSpec((None, None, length // block), lambda x, n, b: (b, x, 0)),
            *[pl.BlockSpec((None, 1), lambda x, n, b: (b, x))] * 2,
            *[pl.BlockSpec((None, block), lambda x, n, b: (b, x))] * 3,
            *[pl.BlockSpec((None, length), lambda x, n, b: (b, 0))] * 3,
        ],
        block=pl.BlockSpec((None, None, block, head_dim), lambda x, n, b: (b, n, x, 0)),
        numbers=pl.BlockSpec((None, None, block), lambda x, n, b: (b, n, x)),
        kv_row=pl.BlockSpec((None, None, length, head_dim), lambda x, n, b: (b, n // groups, 0, 0)),
        query_rows=pl.BlockSpec((None, groups, length, head_dim), lambda x, k, b: (b, k, 0, 0)),
        row_numbers=pl.BlockSpec((None, groups, length), lambda x, k, b: (b, k, 0)),
    )


def _numbers(plan: PairPlan, visits: Visits) -> tuple[Array, ...]:
    """What kernels read of a plan: the window, the visits, what their own block sees, and what all
    of the row do.
    """
    return plan.window[None], *visits, *plan.seen, *plan.seen


def _widened(*arrays: Array) -> Iterator[Array]:
    """With zeros behind heads whose size Triton does not take."""
    for x in arrays:
        more = _width(x.shape[-1]) - x.shape[-1]
        yield jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))


def _width(head_dim: int) -> int:
    return max(pl.next_power_of_2(head_dim), _LEAST)


def _parameters(q_bnth: Array) -> Any:
    # With these no kernel for bfloat16 spills more than a few bytes out of its registers.
    return pltriton.CompilerParams(num_warps=4 if q_bnth.shape[-1] <= 64 else 8, num_stages=2)
