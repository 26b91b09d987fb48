"""What attention over pages by kernels has in common on all platforms: how the work is split over a
mesh.

Shapes as in `ictjax.models.paged_attention`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Int8

from ictjax.models.attention import EVERYTHING
from ictjax.models.int8 import Scales
from ictjax.models.paged_attention import PagedAttention


class PagedKernels(NamedTuple):
    """Those of one platform, on one device: rows are (table_bp, starts_b, lengths_b)."""

    # (k_wkhc, v_wkch, k_btkh, v_btkh, *rows) -> the pool
    write: Callable[..., tuple[Array, Array]]
    # (scale, window, q_btnh, *rows, k_wkhc, v_wkch, *scales_wkc) -> mixed values [B, T, N, H]
    attend: Callable[..., Array]
    # (k_wkc, v_wkc, k_btk, v_btk, *rows) -> the scales of the pool
    write_scales: Callable[..., tuple[Array, Array]]


def kernel_paged_attention(kernels: PagedKernels, mesh: Mesh | None) -> PagedAttention:
    """Paged attention by kernels.

    Args:
      mesh: on which they run, once for each copy of the weights (axis data) where the caller has
        split the rows by them; kv heads are split over tensor where it divides them. None: one
        device.
    """

    def write(
        k_wkhc: Float[Array, "W K H C"] | Int8[Array, "W K H C"],
        v_wkch: Float[Array, "W K C H"] | Int8[Array, "W K C H"],
        k_btkh: Float[Array, "B T K H"] | Int8[Array, "B T K H"],
        v_btkh: Float[Array, "B T K H"] | Int8[Array, "B T K H"],
        table_bp: Int[Array, "B P"],
        starts_b: Int[Array, " B"],
        lengths_b: Int[Array, " B"],
    ) -> tuple[Array, Array]:
        parts = _Parts(mesh, k_wkhc.shape[1])
        pool, new = parts.pool, parts.tokens
        return parts.split(kernels.write, (pool, pool, new, new, *parts.rows), (pool, pool))(
            k_wkhc, v_wkch, k_btkh, v_btkh, table_bp, starts_b, lengths_b
        )

    def attend(
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
    ) -> Float[Array, "B T N H"]:
        scale = q_btnh.shape[-1] ** -0.5 if scale is None else scale
        window = EVERYTHING if window is None else window
        parts = _Parts(mesh, k_wkhc.shape[1])
        pool = (k_wkhc, v_wkch, *(scales or ()))
        return parts.split(
            functools.partial(kernels.attend, scale, window),
            (parts.tokens, *parts.rows, *(parts.pool,) * len(pool)),
            parts.tokens,
        )(q_btnh, table_bp, starts_b, lengths_b, *pool)

    def write_scales(
        held: Scales,
        new: Scales,
        table_bp: Int[Array, "B P"],
        starts_b: Int[Array, " B"],
        lengths_b: Int[Array, " B"],
    ) -> Scales:
        parts = _Parts(mesh, held.k.shape[1])
        pool, tokens = parts.pool, parts.tokens
        return Scales(
            *parts.split(
                kernels.write_scales, (pool, pool, tokens, tokens, *parts.rows), (pool, pool)
            )(*held, *new, table_bp, starts_b, lengths_b)
        )

    return PagedAttention(write, attend, write_scales)


class _Parts:
    """Who works on what: a kernel cannot be split by the compiler, so it is split here.

    Args:
      mesh: the devices; None for one.
      num_kv_heads: of the pool.
    """

    rows = (PartitionSpec(),) * 3  # a table, starts and lengths

    def __init__(self, mesh: Mesh | None, num_kv_heads: int) -> None:
        self._mesh = mesh
        divided = mesh is not None and num_kv_heads % mesh.shape["tensor"] == 0
        heads = "tensor" if divided else None
        self.tokens = PartitionSpec(None, None, heads)
        self.pool = PartitionSpec(None, heads)

    def split(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """The function on every device of the mesh, over those axes that are not yet split."""
        if self._mesh is None:
            return function
        around = jax.sharding.get_abstract_mesh()
        return jax.shard_map(
            function,
            mesh=self._mesh if around.empty else around,
            in_specs=inputs,
            out_specs=outputs,
            axis_names=set(self._mesh.axis_names) - set(around.manual_axes),
            check_vma=False,
        )
