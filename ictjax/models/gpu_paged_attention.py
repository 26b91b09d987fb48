"""`attend_pages` as a Pallas kernel for NVIDIA GPUs, which Triton compiles.

A program has the queries of one kv head and of a few tokens of a row in registers, and walks over
tiles of the row's positions, from the first that one of its tokens sees to the last, in the pages
where they lie. Which tiles these are is worked out on the device: rows that hold little, or take no
part, cost little. Where there are too few programs to fill a GPU (a decode step of few rows), the
tiles of a row are shared by several of them, and what they add up is joined afterwards (split-K, as
in https://pytorch.org/blog/flash-decoding).

Shapes beside the package key: W counts the pages of the pool, P those of a row's table, C the
positions of a page; X the blocks of tokens of a row, U the programs that share a block's tiles, M
the rows of a kv head's matrix product, in the order (token, query head of the group), and S the
positions of a tile. The width of a head is padded to a power of two where it is none: of queries in
memory, of keys and values while they are read.

Keys and values in 8 bits are widened a tile at a time. XLA's scatter writes to a pool in place on
GPUs, so writing is done in the plain way.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.sharding import Mesh
from jaxtyping import Array

from ictjax.models.attention import MASKED
from ictjax.models.int8 import Scales
from ictjax.models.kernel_attention import product
from ictjax.models.kernel_paged_attention import PagedKernels, kernel_paged_attention
from ictjax.models.paged_attention import PagedAttention, attend_pages, write_pages, write_scales

_LEAST = 16  # of a side of a matrix that tensor cores multiply, and so of a page
_LARGEST = 64  # positions of a tile, and rows of a product
# Of the keys of a tile, and of the queries of a block: they fit the 99 KiB of an L4.
_BYTES = 16_384
_PROGRAMS = 512  # a few for each of the 58 to 132 multiprocessors
_SHARE = 2  # tiles that are worth a program of their own


def gpu_paged_attention(
    mesh: Mesh | None = None,
    *,
    tile: int | None = None,
    queries: int | None = None,
    programs: int = _PROGRAMS,
    share: int = _SHARE,
    interpret: bool = False,
) -> PagedAttention:
    """Paged attention by this kernel, over pages whose positions are a power of 2 of at least 16.

    Args:
      mesh: on which it runs, see `kernel_paged_attention`.
      tile: positions of a tile, a power of 2 of at least 16; at most a page is taken; by default
        the largest that fits.
      queries: query heads of a kv head x tokens of a block at most, a power of 2 of at least 16; a
        token's query heads are never in two blocks; by default as many as positions of a tile.
      programs: the tiles of rows are shared where there would be fewer.
      share: tiles that a program has at least, where they are shared.
      interpret: run the kernel on any platform, slowly.
    """
    kernels = PagedKernels(
        write_pages,
        functools.partial(_attend, tile, queries, programs, share, interpret),
        _write_scales,
    )
    return kernel_paged_attention(kernels, mesh)


def _write_scales(
    k_wkc: Array, v_wkc: Array, k_btk: Array, v_btk: Array, *rows: Array
) -> tuple[Array, Array]:
    held = write_scales(Scales(k_wkc, v_wkc), Scales(k_btk, v_btk), *rows)
    return held.k, held.v


def _attend(
    tile: int | None,
    queries: int | None,
    programs: int,
    share: int,
    interpret: bool,
    scale: float,
    window: int,
    q_btnh: Array,
    table_bp: Array,
    starts_b: Array,
    lengths_b: Array,
    *pool: Array,
) -> Array:
    if 2**31 < pool[0].nbytes <= 2**32 and pool[0].dtype.itemsize == 1:
        # Pallas takes offsets of 32 bits, with a sign, where an array has at most 2^32 bytes.
        k_wkhc, v_wkch, *held = pool
        return attend_pages(
            q_btnh,
            k_wkhc,
            v_wkch,
            table_bp,
            starts_b,
            lengths_b,
            window=window,
            scale=scale,
            scales=Scales(*held),
        )
    batch, length, num_heads, head_dim = q_btnh.shape
    num_kv_heads, size = pool[1].shape[1:3]
    groups = num_heads // num_kv_heads
    width = max(pl.next_power_of_2(head_dim), _LEAST)
    fitting = max(min(_BYTES // (width * q_btnh.dtype.itemsize), _LARGEST), _LEAST)
    tile = min(tile or fitting, size)
    rows = min(pl.next_power_of_2(length * groups), queries or fitting)
    rows = max(rows, pl.next_power_of_2(groups), _LEAST)
    block = rows // groups
    count = pl.cdiv(length, block)
    most = pl.cdiv(table_bp.shape[1] * size, tile * share)
    shares = min(pl.cdiv(programs, batch * count * num_kv_heads), most)
    q_bxkmh = (
        jnp.pad(q_btnh, ((0, 0), (0, count * block - length), (0, 0), (0, width - head_dim)))
        .reshape(batch, count, block, num_kv_heads, groups, width)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(batch, count, num_kv_heads, block * groups, width)
    )
    q_bxkmh = jnp.pad(q_bxkmh, ((0, 0),) * 3 + ((0, rows - block * groups), (0, 0)))
    mixed_ubxkmh, norm_ubxkm = pl.pallas_call(
        functools.partial(_kernel, scale, window, groups, block, tile, share),
        grid=(shares, count, num_kv_heads, batch),
        in_specs=[
            pl.BlockSpec((None, table_bp.shape[1]), lambda u, x, k, b: (b, 0)),
            *[pl.BlockSpec((1,), lambda u, x, k, b: (b,))] * 2,
            pl.BlockSpec((None, None, None, rows, width), lambda u, x, k, b: (b, x, k, 0, 0)),
            *(
                pl.BlockSpec(
                    (held.shape[0], None, *held.shape[2:]),
                    lambda u, x, k, b, zeros=(0,) * (held.ndim - 2): (0, k, *zeros),
                )
                for held in pool
            ),
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, None, rows, width), lambda u, x, k, b: (u, b, x, k, 0, 0)
            ),
            pl.BlockSpec((None, None, None, None, rows), lambda u, x, k, b: (u, b, x, k, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(
                (shares, *q_bxkmh.shape), q_btnh.dtype if shares == 1 else jnp.float32
            ),
            jax.ShapeDtypeStruct((shares, *q_bxkmh.shape[:-1]), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(table_bp, starts_b, lengths_b, q_bxkmh, *pool)
    if shares == 1:
        mixed_bxkmh = mixed_ubxkmh[0]
    else:
        of_all_ubxkm = jax.nn.softmax(norm_ubxkm, axis=0)
        mixed_bxkmh = (mixed_ubxkmh * of_all_ubxkm[..., None]).sum(axis=0).astype(q_btnh.dtype)
    return (
        mixed_bxkmh[..., : block * groups, :head_dim]
        .reshape(batch, count, num_kv_heads, block, groups, head_dim)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(batch, count * block, num_heads, head_dim)[:, :length]
    )


def _kernel(
    scale: float, window: int, groups: int, block: int, tile: int, share: int, *refs: Any
) -> None:
    table_ref, start_ref, length_ref, q_ref, k_ref, v_ref, *scale_refs, mixed_ref, norm_ref = refs
    num_pages, head_dim, size = k_ref.shape
    of_page = size // tile
    rows, width = q_ref.shape
    q_mh = q_ref[...]
    skipped = pl.program_id(1) * block
    start = start_ref[0] + skipped
    tokens = jnp.clip(length_ref[0] - skipped, 0, block)
    first = jnp.maximum(start - window + 1, 0) // tile
    tiles = jnp.where(tokens > 0, pl.cdiv(start + tokens, tile) - first, 0)
    own = jnp.maximum(pl.cdiv(tiles, pl.num_programs(0)), share)
    low = pl.program_id(0) * own
    query_m = start + jax.lax.iota(jnp.int32, rows) // groups
    place_s = jax.lax.iota(jnp.int32, tile)
    part_h = jax.lax.iota(jnp.int32, width)
    whole = width == head_dim

    def add(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total_mh, sum_m, top_m = carry
        page = jnp.clip(table_ref[index // of_page], 0, num_pages - 1)
        # a product with `tile`, so that Triton knows that the positions begin at a multiple of it
        begin = index % of_page * tile
        of_page_s = begin + place_s
        k_hs = pltriton.load(
            k_ref.at[page, part_h[:, None], of_page_s[None]],
            mask=None if whole else jnp.broadcast_to(part_h[:, None] < head_dim, (width, tile)),
            other=None if whole else 0,
        )
        v_sh = pltriton.load(
            v_ref.at[page, of_page_s[:, None], part_h[None]],
            mask=None if whole else jnp.broadcast_to(part_h[None] < head_dim, (tile, width)),
            other=None if whole else 0,
        )
        # of keys and values in 8 bits
        scales_s = [ref[page, pl.ds(begin, tile)] for ref in scale_refs]
        logits_ms = product(q_mh, k_hs.astype(q_mh.dtype), (1, 0)) * scale
        if scales_s:
            logits_ms *= scales_s[0][None]
        distance_ms = query_m[:, None] - (index * tile + place_s)[None]
        seen_ms = (distance_ms >= 0) & (distance_ms < window)
        logits_ms = jnp.where(seen_ms, logits_ms, MASKED)
        new_top_m = jnp.maximum(top_m, logits_ms.max(axis=1))
        weights_ms = jnp.exp(logits_ms - new_top_m[:, None])
        kept_m = jnp.exp(top_m - new_top_m)
        valued_ms = weights_ms * scales_s[1][None] if scales_s else weights_ms
        mixed_mh = product(valued_ms.astype(q_mh.dtype), v_sh.astype(q_mh.dtype), (1, 0))
        return (
            total_mh * kept_m[:, None] + mixed_mh,
            sum_m * kept_m + weights_ms.sum(axis=1),
            new_top_m,
        )

    zeros_m = jnp.zeros((rows,), jnp.float32)
    total_mh, sum_m, top_m = jax.lax.fori_loop(
        first + jnp.minimum(low, tiles),
        first + jnp.minimum(low + own, tiles),
        add,
        (jnp.zeros((rows, width), jnp.float32), zeros_m, zeros_m + MASKED),
    )
    alive_m = top_m > MASKED / 2  # what saw nothing here has no part in the whole
    sum_m = jnp.where(alive_m, sum_m, 1.0)
    share_m = jnp.where(alive_m, 1.0 / sum_m, 0.0)
    mixed_ref[...] = (total_mh * share_m[:, None]).astype(mixed_ref.dtype)
    norm_ref[...] = jnp.where(alive_m, top_m + jnp.log(sum_m), MASKED)
