"""`write_pages` and `attend_pages` as Pallas kernels for TPU, with grids of no more than the pages
that get a position, or that the rows see.

Queries come in blocks of a row, and every block visits the pages from the first that it sees to
the last, several at a time. Which pages these are is read by the kernel ahead of the data
(`PrefetchScalarGridSpec`), and so is their number, which ends the grid: rows that hold little, or
take no part, cost little. Where a visit needs fewer pages than it could take, the one of the
visit before stays, and nothing is fetched.

Shapes beside the package key: W counts the pages of the pool, P those of a row's table, C the
positions of a page, Y the pages of a visit, X the blocks of queries of a row, Z = B * X those of
all rows, I the visits that there could be, and M = (N / K) * the queries of a block are the rows
of a kv head's matrix product, in the order (query head of the group, token).

Keys and values in 8 bits are widened in a page at a time, after they were read; their scales lie in
pages of their own, [W, K, C].
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ictjax.models.attention import MASKED
from ictjax.models.kernel_attention import product
from ictjax.models.kernel_paged_attention import PagedKernels, kernel_paged_attention
from ictjax.models.paged_attention import PagedAttention
from ictjax.models.tpu_attention import LANES, Sums

# Positions of a visit: enough for the time of a step of the grid not to matter beside the fetch.
_AT_ONCE = 512
# Query heads x tokens of a block: a third of what a kernel may hold, with a kv head's scores.
_QUERIES = 1024
_PAGES_BYTES = 4 * 2**20  # of a visit at most; the next one's are fetched meanwhile


class _Visits(NamedTuple):
    """What the steps of the grid do: read ahead of the data, in this order."""

    block_i: Int[Array, " I"]  # of queries
    pages_iy: Int[Array, " I*Y"]
    first_z: Int[Array, " Z"]  # visit of each block
    step_z: Int[Array, " Z"]  # of the first visit: so many times Y pages of the table are skipped
    start_z: Int[Array, " Z"]  # position of the first query


def tpu_paged_attention(
    mesh: Mesh | None = None,
    *,
    at_once: int = _AT_ONCE,
    queries: int = _QUERIES,
    interpret: bool = False,
) -> PagedAttention:
    """Paged attention by these kernels, over pages of a multiple of 128 positions.

    Args:
      mesh: on which they run, see `kernel_paged_attention`.
      at_once: positions of a visit.
      queries: query heads x tokens of a block, at most.
      interpret: run the kernels on any platform, slowly.
    """

    kernels = PagedKernels(
        functools.partial(_write, interpret),
        functools.partial(_attend, at_once, queries, interpret),
        functools.partial(_write_scales, interpret),
    )
    return kernel_paged_attention(kernels, mesh)


def _in_place(interpret: bool, pool: Array) -> Array:
    """A pool that stays where it is. XLA would fetch a small one whole, for the few pages that a
    kernel reads.
    """
    return pool if interpret else pltpu.with_memory_space_constraint(pool, pltpu.HBM)


def _shape_of(interpret: bool, pool: Array) -> Any:
    """Of a result that is the same pool."""
    made = jax.ShapeDtypeStruct if interpret else pltpu.HBM
    return made(pool.shape, pool.dtype)


class _Writes(NamedTuple):
    """Pages that get positions: read ahead of the data, in this order."""

    order_i: Int[Array, " I"]  # row and page of it, as an index of all pages that rows may write to
    pages_i: Int[Array, " I"]
    low_i: Int[Array, " I"]  # where the new positions begin in the page
    high_i: Int[Array, " I"]  # and end


def _writes(
    table_bp: Array, starts_b: Array, lengths_b: Array, count: int, pages: tuple[int, int]
) -> tuple[_Writes, Array]:
    """All of them, and how many there are; one at least, which may write nothing.

    Args:
      count: of the pages that a row may write to.
      pages: of the pool, and positions of each.
    """
    num_pages, size = pages
    page_bx = (starts_b // size)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    begin_bx = page_bx * size
    end_b1 = (starts_b + lengths_b)[:, None]
    live_z = ((lengths_b[:, None] > 0) & (begin_bx < end_b1)).reshape(-1)
    order_i = jnp.argsort(~live_z, stable=True).astype(jnp.int32)
    pages_bx = jnp.take_along_axis(table_bp, jnp.minimum(page_bx, table_bp.shape[1] - 1), axis=1)
    low_bx = jnp.maximum(starts_b[:, None] - begin_bx, 0)
    high_bx = jnp.where(live_z.reshape(page_bx.shape), end_b1 - begin_bx, 0)
    writes = _Writes(
        order_i,
        jnp.clip(pages_bx.reshape(-1)[order_i], 0, num_pages - 1),
        low_bx.reshape(-1)[order_i],
        high_bx.reshape(-1)[order_i],
    )
    return writes, jnp.maximum(live_z.sum(dtype=jnp.int32), 1)


def _by_pages(x_btkx: Array, starts_b: Array, count: int, size: int) -> Array:
    """[B, T, K, ...] -> [B * count, K, C, ...]: of every page that a row may write to the tokens in
    their places; a single one is spread over it by the kernel.
    """
    batch, length = x_btkx.shape[:2]
    if length > 1:
        place_1s = jnp.arange(count * size, dtype=jnp.int32)[None]
        token_bs = jnp.clip(place_1s - (starts_b % size)[:, None], 0, length - 1)
        axes = tuple(range(2, x_btkx.ndim))
        x_btkx = jnp.take_along_axis(x_btkx, jnp.expand_dims(token_bs, axes), axis=1)
    return x_btkx.reshape(batch * count, -1, *x_btkx.shape[2:]).swapaxes(1, 2)


def _written(
    kernel: Callable[..., None],
    name: str,
    interpret: bool,
    pools: tuple[Array, Array],
    news: tuple[Array, Array],
    rows: tuple[Array, Array, Array],
) -> tuple[Array, Array]:
    """Reads, fills and writes every page that gets a position. XLA's scatter changes the layout of
    the pool, which copies all of it twice in every layer.

    Args:
      kernel: fills a page.
      name: of it.
      pools: of pages.
      news: what is to be written, by rows.
      rows: table, starts and lengths.
    """
    _, starts_b, _ = rows
    batch, length = news[0].shape[:2]
    size = pools[1].shape[2]
    count = (length + size - 2) // size + 1
    writes, num_writes = _writes(*rows, count, (len(pools[0]), size))
    placed = [_by_pages(new, starts_b, count, size) for new in news]

    def blocks(arrays: Sequence[Array], of: Callable[..., Array]) -> list[pl.BlockSpec]:
        return [
            pl.BlockSpec(
                (None, *x.shape[1:]),
                lambda i, *ahead, zeros=(0,) * (x.ndim - 1): (of(*ahead)[i], *zeros),
            )
            for x in arrays
        ]

    of_rows = blocks(placed, lambda order_i, *_: order_i)
    of_pools = blocks(pools, lambda _, pages_i, *__: pages_i)
    page_bytes = sum(pool[0].size * pool.dtype.itemsize for pool in pools)
    first = len(writes) + len(placed)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(writes),
            grid=(num_writes,),
            in_specs=[*of_rows, *of_pools],
            out_specs=of_pools,
        ),
        out_shape=[_shape_of(interpret, pool) for pool in pools],
        input_output_aliases={first: 0, first + 1: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * batch * count * page_bytes
        ),
        interpret=interpret,
        name=name,
    )(*writes, *placed, *(_in_place(interpret, pool) for pool in pools))


def _write(
    interpret: bool,
    k_wkhc: Array,
    v_wkch: Array,
    k_btkh: Array,
    v_btkh: Array,
    table_bp: Array,
    starts_b: Array,
    lengths_b: Array,
) -> tuple[Array, Array]:
    rows = table_bp, starts_b, lengths_b
    return _written(
        _write_kernel, "paged_writing", interpret, (k_wkhc, v_wkch), (k_btkh, v_btkh), rows
    )


def _write_scales(
    interpret: bool,
    k_wkc: Array,
    v_wkc: Array,
    k_btk: Array,
    v_btk: Array,
    table_bp: Array,
    starts_b: Array,
    lengths_b: Array,
) -> tuple[Array, Array]:
    rows = table_bp, starts_b, lengths_b
    return _written(
        _write_scales_kernel, "paged_scales", interpret, (k_wkc, v_wkc), (k_btk, v_btk), rows
    )


def _is_new(writes: _Writes, shape: tuple[int, ...], axis: int) -> Array:
    """Which numbers of a page are new, whose positions are along `axis`."""
    visit = pl.program_id(0)
    place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return (place >= writes.low_i[visit]) & (place < writes.high_i[visit])


def _write_kernel(*refs: Any) -> None:
    writes = _Writes(*refs[:4])
    new_k_ref, new_v_ref, k_ref, v_ref, k_out_ref, v_out_ref = refs[4:]
    heads, size, head_dim = v_ref.shape
    new_k_hc = _is_new(writes, (head_dim, size), 1)
    new_v_ch = _is_new(writes, (size, head_dim), 0)
    for head in range(heads):
        k_ch, v_ch = (
            jnp.broadcast_to(ref[head].astype(jnp.float32), (size, head_dim))
            for ref in (new_k_ref, new_v_ref)
        )
        k_out_ref[head] = jnp.where(new_k_hc, k_ch.T.astype(k_ref.dtype), k_ref[head])
        v_out_ref[head] = jnp.where(new_v_ch, v_ch.astype(v_ref.dtype), v_ref[head])


def _write_scales_kernel(*refs: Any) -> None:
    writes = _Writes(*refs[:4])
    *new_refs, k_ref, v_ref, k_out_ref, v_out_ref = refs[4:]
    new_kc = _is_new(writes, k_ref.shape, 1)
    for new_ref, ref, out_ref in zip(new_refs, (k_ref, v_ref), (k_out_ref, v_out_ref), strict=True):
        out_ref[...] = jnp.where(new_kc, jnp.broadcast_to(new_ref[...], ref.shape), ref[...])


def _attend(
    at_once: int,
    queries: int,
    interpret: bool,
    scale: float,
    window: int,
    q_btnh: Array,
    table_bp: Array,
    starts_b: Array,
    lengths_b: Array,
    k_wkhc: Array,
    v_wkch: Array,
    *scales_wkc: Array,
) -> Array:
    batch, length, num_heads, head_dim = q_btnh.shape
    num_kv_heads, size = v_wkch.shape[1:3]
    groups = num_heads // num_kv_heads
    pools = (k_wkhc, v_wkch, *scales_wkc)
    page_bytes = sum(pool[0].size * pool.dtype.itemsize for pool in pools)
    at_once = max(1, min(at_once // size, _PAGES_BYTES // page_bytes))
    # a power of two, so that the kernel tells a row's token by its last bits
    most = 1 << max(queries // num_heads, 1).bit_length() - 1
    block = min(pl.next_power_of_2(length), most)
    count = pl.cdiv(length, block)
    q_btnh = jnp.pad(q_btnh, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
    q_zkmh = (
        q_btnh.reshape(batch, count, block, num_kv_heads, groups, head_dim)
        .transpose(0, 1, 3, 4, 2, 5)
        .reshape(batch * count, num_kv_heads, groups * block, head_dim)
    )
    visits, num_visits = _visits(
        table_bp, starts_b, lengths_b, (count, block), (size, at_once), len(k_wkhc), window
    )
    in_block = pl.BlockSpec((None, *q_zkmh.shape[1:]), lambda i, block_i, *_: (block_i[i], 0, 0, 0))

    def page(y: int, array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, *array.shape[1:]),
            lambda i, _, pages_iy, *__: (pages_iy[i * at_once + y], *(0,) * (array.ndim - 1)),
        )

    num_rows = groups * block
    scores = len(visits.block_i) * num_heads * block * at_once * size
    mixed_zkmh = pl.pallas_call(
        functools.partial(_kernel, scale, window, block, at_once, len(pools)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(num_visits,),
            in_specs=[
                in_block,
                *(page(y, pool) for pool in pools for y in range(at_once)),
            ],
            out_specs=in_block,
            scratch_shapes=[
                pltpu.VMEM((num_kv_heads, num_rows, width), jnp.float32)
                for width in (head_dim, LANES, LANES)
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_zkmh.shape, q_zkmh.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        # as of full rows: how much less there is to do is not known to the compiler
        cost_estimate=pl.CostEstimate(
            flops=4 * scores * head_dim,
            transcendentals=scores,
            bytes_accessed=2 * q_zkmh.size * q_zkmh.dtype.itemsize
            + len(visits.pages_iy) * page_bytes,
        ),
        interpret=interpret,
        name="paged_attention",
    )(
        *visits,
        q_zkmh,
        *(placed for pool in pools for placed in (_in_place(interpret, pool),) * at_once),
    )
    return (
        mixed_zkmh.reshape(batch, count, num_kv_heads, groups, block, head_dim)
        .transpose(0, 1, 4, 2, 3, 5)
        .reshape(batch, count * block, num_heads, head_dim)[:, :length]
    )


def _visits(
    table_bp: Array,
    starts_b: Array,
    lengths_b: Array,
    queries: tuple[int, int],
    pages: tuple[int, int],
    num_pages: int,
    window: int,
) -> tuple[_Visits, Array]:
    """All visits, and how many of them there are: one at least of every block, to be written.

    Args:
      queries: blocks of a row, and queries of a block.
      pages: positions of a page, and pages of a visit.
      num_pages: of the pool.
    """
    (count, block), (size, at_once) = queries, pages
    steps = pl.cdiv(table_bp.shape[1], at_once)
    begin_bx = jnp.arange(count, dtype=jnp.int32)[None] * block
    start_bx = starts_b[:, None] + begin_bx
    end_bx = starts_b[:, None] + jnp.minimum(lengths_b[:, None], begin_bx + block)
    live_bx = begin_bx < lengths_b[:, None]
    first_page_bx = jnp.maximum(start_bx - window + 1, 0) // size
    num_pages_z = jnp.where(live_bx, pl.cdiv(end_bx, size), 0).reshape(-1)
    step_z = jnp.where(live_bx, first_page_bx // at_once, 0).reshape(-1)
    visits_z = jnp.maximum(pl.cdiv(num_pages_z, at_once) - step_z, 1)
    start_z = jnp.where(live_bx, start_bx, -block).reshape(-1)  # see nothing: zeros
    ends_z = jnp.cumsum(visits_z)
    first_z = ends_z - visits_z
    visit_i = jnp.arange(len(visits_z) * steps, dtype=jnp.int32)
    block_i = jnp.minimum(
        jnp.searchsorted(ends_z, visit_i, side="right").astype(jnp.int32), len(visits_z) - 1
    )
    index_iy = (step_z[block_i] + visit_i - first_z[block_i])[:, None] * at_once + jnp.arange(
        at_once, dtype=jnp.int32
    )[None]
    needed_iy = (index_iy >= first_page_bx.reshape(-1)[block_i][:, None]) & (
        index_iy < num_pages_z[block_i][:, None]
    )
    pages_iy = table_bp.at[(block_i // count)[:, None], index_iy].get(mode="clip")
    # The latest visit that needed a page in this place; before the first one any page.
    latest_iy = jax.lax.cummax(jnp.where(needed_iy, visit_i[:, None], 0))
    pages_iy = jnp.clip(jnp.take_along_axis(pages_iy, latest_iy, axis=0), 0, num_pages - 1)
    visits = _Visits(block_i, pages_iy.reshape(-1), first_z, step_z, start_z)
    return _Visits(*(x.astype(jnp.int32) for x in visits)), ends_z[-1]


def _kernel(
    scale: float,
    window: int,
    block: int,
    at_once: int,
    num_pools: int,
    block_i: Any,
    pages_iy: Any,
    first_z: Any,
    step_z: Any,
    start_z: Any,
    q_ref: Any,
    *refs: Any,
) -> None:
    del pages_iy
    (k_refs, v_refs, *scale_refs), (mixed_ref, *sum_refs) = (
        [refs[pool * at_once : (pool + 1) * at_once] for pool in range(num_pools)],
        refs[num_pools * at_once :],
    )
    visit = pl.program_id(0)
    z = block_i[visit]
    heads, rows = q_ref.shape[:2]
    span = at_once * k_refs[0].shape[-1]

    @pl.when(visit == first_z[z])
    def start() -> None:
        Sums(*sum_refs).clear()

    shape = (rows, span)
    # rows are in the order (query head, token), and a block has a power of two of tokens
    query_ms = start_z[z] + (jax.lax.broadcasted_iota(jnp.int32, shape, 0) & (block - 1))
    first = (step_z[z] + visit - first_z[z]) * span
    distance_ms = query_ms - first - jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mask_ms = (distance_ms >= 0) & (distance_ms < window)
    for head in range(heads):
        k_hs = jnp.concatenate([k_ref[head].astype(q_ref.dtype) for k_ref in k_refs], axis=1)
        v_sh = jnp.concatenate([v_ref[head].astype(q_ref.dtype) for v_ref in v_refs], axis=0)
        # of keys and values in 8 bits
        scales_1s = [
            jnp.concatenate([ref[head : head + 1] for ref in refs_y], axis=1)
            for refs_y in scale_refs
        ]
        logits_ms = product(q_ref[head], k_hs, (1, 0)) * scale
        if scales_1s:
            logits_ms *= scales_1s[0]
        sums = Sums(*(ref.at[head] for ref in sum_refs))
        sums.add(jnp.where(mask_ms, logits_ms, MASKED), v_sh, *scales_1s[1:])

    is_last = (visit == pl.num_programs(0) - 1) | (
        block_i[jnp.minimum(visit + 1, pl.num_programs(0) - 1)] != z
    )

    @pl.when(is_last)
    def finish() -> None:
        for head in range(heads):
            sums = Sums(*(ref.at[head] for ref in sum_refs))
            mixed_ref[head] = sums.mixed()[0].astype(mixed_ref.dtype)
