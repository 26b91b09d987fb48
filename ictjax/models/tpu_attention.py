"""Attention of whole rows as Pallas kernels for TPU: the blocks of `ictjax.models.attention`, with
a grid of no more than the pairs of blocks that a causal row can need.

JAX's own splash attention takes a mask that is known when the program is compiled; here rows are
packed anew for every update. So the pairs of blocks are sorted by what the batch holds, those with
something to see first, and their numbers are read by the kernels ahead of the data
(`PrefetchScalarGridSpec`); the rest of the grid does nothing and fetches nothing. Pairs that are
seen whole, most of a long prompt, skip the mask.

Shapes beside the package key: a block is C tokens of a row, of queries (X blocks) or of keys (Y
blocks of S tokens each); P counts the pairs of a block of queries and one of keys that is not
later. In the backward pass scores are held as [S, C], so that what belongs to a query lies along
the lanes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jaxtyping import Array

from ictjax.models.attention import MASKED, Attention, Seen, sees
from ictjax.models.kernel_attention import (
    PART,
    WHOLE,
    Kernels,
    PairPlan,
    kernel_attention,
    product,
    weights_of,
)

_BLOCK = 512  # [C, C] in float32 is 1 MiB of the 16 that a kernel may hold, for every head size
LANES = 128
_SUBLANES = 8
# A pair of blocks in one number: 14 bits each of the two blocks, and what is to be done.
_STATE, _FIRST, _LAST, _INNER, _OUTER = 3, 4, 8, 4, 18
# Rows and heads in any order; pairs, and the query heads of a kv head, one after the other.
_QUERY_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
_KEY_ORDER = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
)


class Sums(NamedTuple):
    """An online softmax in the memory of a kernel, of C queries; what belongs to a query is held in
    all lanes alike.
    """

    total: Any  # of weighted values [C, H]
    weight: Any  # [C, 128]
    top: Any  # largest of the logits [C, 128]

    def clear(self) -> None:
        """Before the first block of keys."""
        self.total[...] = jnp.zeros_like(self.total)
        self.weight[...] = jnp.zeros_like(self.weight)
        self.top[...] = jnp.full_like(self.top, MASKED)

    def add(self, logits_cs: Array, values_sh: Array, scale_1s: Array | None = None) -> None:
        """Masked logits of a block of keys, and its values; in 8 bits, with their scales."""
        top_cl = self.top[...]
        new_top_cl = jnp.maximum(top_cl, logits_cs.max(axis=1, keepdims=True))
        weights_cs = jnp.exp(logits_cs - _across(new_top_cl, logits_cs.shape[1]))
        kept_cl = jnp.exp(top_cl - new_top_cl)
        valued_cs = weights_cs if scale_1s is None else weights_cs * scale_1s
        mixed_ch = product(valued_cs.astype(values_sh.dtype), values_sh, (1, 0))
        self.total[...] = self.total[...] * _across(kept_cl, mixed_ch.shape[1]) + mixed_ch
        self.weight[...] = self.weight[...] * kept_cl + weights_cs.sum(axis=1, keepdims=True)
        self.top[...] = new_top_cl

    def mixed(self) -> tuple[Array, Array]:
        """Mixed values [C, H] and the logarithms of the sums of weights [C, 128]; zeros and -MASKED
        at what saw nothing, which is padding.
        """
        alive_cl = self.top[...] > MASKED / 2
        sum_cl = jnp.where(alive_cl, self.weight[...], 1.0)
        share_cl = jnp.where(alive_cl, 1.0 / sum_cl, 0.0)
        total_ch = self.total[...]
        norm_cl = jnp.where(alive_cl, self.top[...] + jnp.log(sum_cl), -MASKED)
        return total_ch * _across(share_cl, total_ch.shape[1]), norm_cl


def tpu_attention(
    mesh: Mesh | None = None, *, block: int = _BLOCK, interpret: bool = False
) -> Attention:
    """Attention by these kernels, see `kernel_attention`.

    Args:
      mesh: on which they run.
      block: tokens of a block, a multiple of 128.
      interpret: run the kernels on any platform, slowly.
    """
    kernels = Kernels(
        "pallas_tpu",
        block,
        _pairs_by_both,
        functools.partial(_forward, block, interpret),
        functools.partial(_backward, block, interpret),
    )
    return kernel_attention(kernels, mesh)


def _pairs_by_both(state_bxy: Array) -> tuple[Array, Array]:
    x_p, y_p = np.tril_indices(state_bxy.shape[1])
    state_bp, by_key_p = state_bxy[:, x_p, y_p], np.lexsort((x_p, y_p))
    return (
        _pairs(state_bp, x_p, y_p),
        _pairs(state_bp[:, by_key_p], y_p[by_key_p], x_p[by_key_p]),
    )


def _pairs(state_bp: Array, outer_p: np.ndarray, inner_p: np.ndarray) -> Array:
    """The numbers of all pairs: first those to be visited, in their order, then repetitions of the
    last with nothing to do. Every outer block is visited with itself at least, to be written.
    """
    kept_bp = (state_bp > 0) | (outer_p == inner_p)[None]
    order_bp = jnp.argsort(~kept_bp, axis=1, stable=True)
    count_b1 = kept_bp.sum(axis=1, keepdims=True)
    place_1p = jnp.arange(len(outer_p), dtype=jnp.int32)[None]
    order_bp = jnp.take_along_axis(order_bp, jnp.minimum(place_1p, count_b1 - 1), axis=1)
    outer_bp, inner_bp = jnp.asarray(outer_p)[order_bp], jnp.asarray(inner_p)[order_bp]
    live_bp = place_1p < count_b1
    changes_bp = outer_bp[:, 1:] != outer_bp[:, :-1]
    first_bp = live_bp & jnp.pad(changes_bp, ((0, 0), (1, 0)), constant_values=True)
    last_bp = jnp.pad(changes_bp, ((0, 0), (0, 1))) | (place_1p == count_b1 - 1)
    state_bp = jnp.where(live_bp, jnp.take_along_axis(state_bp, order_bp, axis=1), 0)
    code_bp = (outer_bp << _OUTER) | (inner_bp << _INNER) | state_bp
    flags_bp = jnp.where(first_bp, _FIRST, 0) | jnp.where(last_bp & live_bp, _LAST, 0)
    return (code_bp | flags_bp).astype(jnp.int32)


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
    num_pairs = plan.by_query.shape[1]

    def place(b: Any, n: Any, p: Any, pairs: Any, _: Any) -> _Place:
        x, y = _blocks_of(pairs[b * num_pairs + p])
        return _Place(b, n, n // groups, x, y)

    specs = _specs(place, block, head_dim)
    down, across = _fields(plan.seen)
    mixed_bnth, norm_bn1t = pl.pallas_call(
        functools.partial(_forward_kernel, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, num_pairs),
            in_specs=[specs.query, specs.key, specs.key, specs.query_down, specs.key_across],
            out_specs=[specs.query, specs.norm],
            scratch_shapes=[
                pltpu.VMEM((block, head_dim), jnp.float32),
                pltpu.VMEM((block, LANES), jnp.float32),
                pltpu.VMEM((block, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_bnth.shape, q_bnth.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, length), jnp.float32),
        ],
        compiler_params=_QUERY_ORDER,
        cost_estimate=_cost(2, q_bnth, k_bkth, plan),
        interpret=interpret,
        name="attention_forward",
    )(plan.by_query.reshape(-1), plan.window[None], q_bnth, k_bkth, v_bkth, down, across)
    return mixed_bnth, norm_bn1t[:, :, 0]


def _forward_kernel(
    scale: float,
    pairs_ref: Any,
    window_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    queries_ref: Any,
    keys_ref: Any,
    mixed_ref: Any,
    norm_ref: Any,
    *sum_refs: Any,
) -> None:
    pair = pairs_ref[pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)]

    sums = Sums(*sum_refs)
    pl.when(pair & _FIRST != 0)(sums.clear)

    def add(masked: Callable[[Array], Array]) -> None:
        logits_cs = masked(product(q_ref[...], k_ref[...], (1, 1)) * scale)
        sums.add(logits_cs, v_ref[...])

    @pl.when(pair & _STATE == PART)
    def part() -> None:
        mask_cs = sees(_in_lanes(queries_ref), _in_sublanes(keys_ref), window_ref[0])
        add(lambda logits_cs: jnp.where(mask_cs, logits_cs, MASKED))

    @pl.when(pair & _STATE == WHOLE)
    def whole() -> None:
        add(lambda logits_cs: logits_cs)

    @pl.when(pair & _LAST != 0)
    def finish() -> None:
        mixed_ch, norm_cl = sums.mixed()
        mixed_ref[...] = mixed_ch.astype(mixed_ref.dtype)
        norm_ref[...] = norm_cl.T[:1]


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
    """Gradients of the queries by one kernel, of keys and values by another: the first one walks
    over the keys of a block of queries, the second over the queries of a block of keys.
    """
    batch, num_heads, _, head_dim = q_bnth.shape
    num_kv_heads = k_bkth.shape[1]
    groups = num_heads // num_kv_heads
    num_pairs = plan.by_query.shape[1]
    down, across = _fields(plan.seen)
    of_queries = norm_bnt[:, :, None], mean_bnt[:, :, None]
    arrays = (q_bnth, k_bkth, v_bkth, grad_bnth, *of_queries, across, down)

    def by_query(b: Any, n: Any, p: Any, pairs: Any, _: Any) -> _Place:
        x, y = _blocks_of(pairs[b * num_pairs + p])
        return _Place(b, n, n // groups, x, y)

    def by_key(b: Any, k: Any, p: Any, g: Any, pairs: Any, _: Any) -> _Place:
        y, x = _blocks_of(pairs[b * num_pairs + p])
        return _Place(b, k * groups + g, k, x, y)

    def inputs(specs: _Specs) -> list[Any]:
        return [
            specs.query,
            specs.key,
            specs.key,
            specs.query,
            specs.norm,
            specs.norm,
            specs.query_across,
            specs.key_down,
        ]

    query_specs, key_specs = (_specs(place, block, head_dim) for place in (by_query, by_key))
    total = pltpu.VMEM((block, head_dim), jnp.float32)
    dq_bnth = pl.pallas_call(
        functools.partial(_query_kernel, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_heads, num_pairs),
            in_specs=inputs(query_specs),
            out_specs=query_specs.query,
            scratch_shapes=[total],
        ),
        out_shape=jax.ShapeDtypeStruct(q_bnth.shape, q_bnth.dtype),
        compiler_params=_QUERY_ORDER,
        cost_estimate=_cost(3, q_bnth, k_bkth, plan),
        interpret=interpret,
        name="attention_backward_queries",
    )(plan.by_query.reshape(-1), plan.window[None], *arrays)
    dk_bkth, dv_bkth = pl.pallas_call(
        functools.partial(_key_kernel, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, num_kv_heads, num_pairs, groups),
            in_specs=inputs(key_specs),
            out_specs=[key_specs.key, key_specs.key],
            scratch_shapes=[total, total],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k_bkth, v_bkth)],
        compiler_params=_KEY_ORDER,
        cost_estimate=_cost(4, q_bnth, k_bkth, plan),
        interpret=interpret,
        name="attention_backward_keys",
    )(plan.by_key.reshape(-1), plan.window[None], *arrays)
    return dq_bnth, dk_bkth, dv_bkth


def _query_kernel(scale: float, pairs_ref: Any, window_ref: Any, *refs: Any) -> None:
    *inputs, dq_ref, total_ref = refs
    k_ref = inputs[1]
    pair = pairs_ref[pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)]

    @pl.when(pair & _FIRST != 0)
    def start() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    def add(weights_sc: Array, dlogits_sc: Array) -> None:
        del weights_sc
        k_sh = k_ref[...]
        total_ref[...] += product(dlogits_sc.astype(k_sh.dtype), k_sh, (0, 0))

    _visit(scale, pair, window_ref[0], inputs, add)

    @pl.when(pair & _LAST != 0)
    def finish() -> None:
        dq_ref[...] = total_ref[...].astype(dq_ref.dtype)


def _key_kernel(scale: float, pairs_ref: Any, window_ref: Any, *refs: Any) -> None:
    *inputs, dk_ref, dv_ref, dk_total_ref, dv_total_ref = refs
    q_ref, grad_ref = inputs[0], inputs[3]
    pair = pairs_ref[pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)]
    head = pl.program_id(3)

    @pl.when((pair & _FIRST != 0) & (head == 0))
    def start() -> None:
        dk_total_ref[...] = jnp.zeros_like(dk_total_ref)
        dv_total_ref[...] = jnp.zeros_like(dv_total_ref)

    def add(weights_sc: Array, dlogits_sc: Array) -> None:
        q_ch, grad_ch = q_ref[...], grad_ref[...]
        dk_total_ref[...] += product(dlogits_sc.astype(q_ch.dtype), q_ch, (1, 0))
        dv_total_ref[...] += product(weights_sc.astype(grad_ch.dtype), grad_ch, (1, 0))

    _visit(scale, pair, window_ref[0], inputs, add)

    @pl.when((pair & _LAST != 0) & (head == pl.num_programs(3) - 1))
    def finish() -> None:
        dk_ref[...] = dk_total_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_total_ref[...].astype(dv_ref.dtype)


def _visit(
    scale: float, pair: Any, window: Any, refs: list[Any], add: Callable[[Array, Array], None]
) -> None:
    """Hands a pair's weights, and the gradients of its logits, to `add`, if it holds anything."""
    q_ref, k_ref, v_ref, grad_ref, norm_ref, mean_ref, queries_ref, keys_ref = refs

    def masked(mask: Callable[[Array], Array]) -> None:
        logits_sc = mask(product(k_ref[...], q_ref[...], (1, 1)) * scale)
        dweights_sc = product(v_ref[...], grad_ref[...], (1, 1))
        add(*weights_of(scale, logits_sc, dweights_sc, norm_ref[...], mean_ref[...]))

    @pl.when(pair & _STATE == PART)
    def part() -> None:
        mask_sc = sees(_in_sublanes(queries_ref), _in_lanes(keys_ref), window)
        masked(lambda logits_sc: jnp.where(mask_sc, logits_sc, MASKED))

    @pl.when(pair & _STATE == WHOLE)
    def whole() -> None:
        masked(lambda logits_sc: logits_sc)


class _Place(NamedTuple):
    """What a step of a grid works on."""

    row: Any
    head: Any
    kv_head: Any
    x: Any  # block of queries
    y: Any  # block of keys


class _Specs(NamedTuple):
    """Which part of an array a step of a grid works on."""

    query: Any  # of [B, N, T, H]
    key: Any  # of [B, K, T, H]
    norm: Any  # of [B, N, 1, T]
    query_down: Any  # of `_fields`
    query_across: Any
    key_down: Any
    key_across: Any


def _specs(place: Callable[..., _Place], block: int, head_dim: int) -> _Specs:
    """For a grid whose indices, with the numbers read ahead of it, say the place."""

    def spec(shape: tuple[int | None, ...], index: Callable[[_Place], tuple[Any, ...]]) -> Any:
        return pl.BlockSpec(shape, lambda *ids: index(place(*ids)))

    wide, down, across = (
        (None, None, block, head_dim),
        (None, block, LANES),
        (None, _SUBLANES, block),
    )
    return _Specs(
        query=spec(wide, lambda at: (at.row, at.head, at.x, 0)),
        key=spec(wide, lambda at: (at.row, at.kv_head, at.y, 0)),
        norm=spec((None, None, 1, block), lambda at: (at.row, at.head, 0, at.x)),
        query_down=spec(down, lambda at: (at.row, at.x, 0)),
        query_across=spec(across, lambda at: (at.row, 0, at.x)),
        key_down=spec(down, lambda at: (at.row, at.y, 0)),
        key_across=spec(across, lambda at: (at.row, 0, at.y)),
    )


def _cost(num_products: int, q_bnth: Array, k_bkth: Array, plan: PairPlan) -> pl.CostEstimate:
    """For the compiler, as of causal rows: what else is skipped is not known to it."""
    rows, heads, length, head_dim = q_bnth.shape
    count = int((2 * plan.by_query.shape[1]) ** 0.5)  # blocks, of count * (count + 1) / 2 pairs
    scores = rows * heads * plan.by_query.shape[1] * (length // count) ** 2
    return pl.CostEstimate(
        flops=2 * num_products * scores * head_dim,
        transcendentals=scores,
        bytes_accessed=num_products * (q_bnth.size + k_bkth.size) * q_bnth.dtype.itemsize,
    )


def _fields(seen: Seen) -> tuple[Array, Array]:
    """What every token sees and is seen by, down the rows [B, T, 128] and across them [B, 8, T]."""
    stacked_b3t = jnp.stack(seen, axis=1)
    return (
        jnp.pad(stacked_b3t.swapaxes(1, 2), ((0, 0), (0, 0), (0, LANES - len(seen)))),
        jnp.pad(stacked_b3t, ((0, 0), (0, _SUBLANES - len(seen)), (0, 0))),
    )


def _in_lanes(ref: Any) -> Seen:
    """[C, 1] each."""
    return Seen(ref[:, 0:1], ref[:, 1:2], ref[:, 2:3])


def _in_sublanes(ref: Any) -> Seen:
    """[1, C] each."""
    return Seen(ref[0:1, :], ref[1:2, :], ref[2:3, :])


def _blocks_of(pair: Any) -> tuple[Any, Any]:
    """The outer block of a pair and the inner one."""
    return pair >> _OUTER, (pair >> _INNER) & (2 ** (_OUTER - _INNER) - 1)


def _across(x_cl: Array, width: int) -> Array:
    """What is the same in all lanes, in so many columns."""
    return jnp.tile(x_cl, (1, -(-width // LANES)))[:, :width]
