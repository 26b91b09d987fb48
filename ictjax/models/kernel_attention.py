"""What attention by kernels has in common on all platforms: which pairs of blocks hold anything to
be seen, and the rows, the heads and the gradients around the kernels.

Shapes beside the package key: a block is C tokens of a row, of queries (X blocks) or of keys (Y
blocks of S tokens each).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from ictjax.mesh import BATCH, kv_copies
from ictjax.models.attention import MIXED, Attention, Seen, attend, in_whole_blocks, may_see

# The states of a pair of blocks: it holds nothing to be seen, something, nothing that is not.
NONE, PART, WHOLE = 0, 1, 2


class PairPlan(NamedTuple):
    """What the rows of a batch see, computed once for all layers that see the same."""

    seen: Seen  # padded to whole blocks
    window: Int[Array, ""]
    by_query: Any  # arrays [B, ...] of the kernels' own: pairs by their blocks of queries
    by_key: Any  # the same by their blocks of keys


class Kernels(NamedTuple):
    """Those of one platform."""

    name: str
    block: int  # tokens
    # states of all pairs [B, X, Y] -> `by_query` and `by_key` of a plan
    pairs: Callable[[Array], tuple[Any, Any]]
    # (scale, q_bnth, k_bkth, v_bkth, plan) -> mixed values [B, N, T, H] and the logarithms of their
    # sums of weights [B, N, T]; at what sees nothing zeros and -MASKED
    forward: Callable[..., tuple[Array, Array]]
    # (scale, q_bnth, k_bkth, v_bkth, plan, gradient of the mixed values, these logarithms, the mean
    # of the weights' gradients [B, N, T]) -> gradients of queries, keys and values
    backward: Callable[..., tuple[Array, Array, Array]]


def kernel_attention(kernels: Kernels, mesh: Mesh | None) -> Attention:
    """Attention by kernels; rows of at most one block are computed in the plain way.

    Args:
      mesh: rows are split over data and fsdp on it, and kv heads over tensor where it divides them,
        or is a multiple of them and divides the query heads.
    """
    return Attention(
        kernels.name,
        functools.partial(_plan, kernels),
        functools.partial(_attend_rows, kernels, mesh),
    )


def _plan(kernels: Kernels, seen: Seen, window: int) -> PairPlan:
    seen = in_whole_blocks(seen, kernels.block)
    rows, length = seen.positions_bt.shape
    count = length // kernels.block

    def row_of_blocks(queries: Seen) -> Array:
        mask_bcyc = may_see(queries, seen, window).reshape(rows, -1, count, kernels.block)
        some, whole = mask_bcyc.any(axis=(1, 3)), mask_bcyc.all(axis=(1, 3))
        return jnp.where(whole, WHOLE, jnp.where(some, PART, NONE))

    blocks = jax.tree.map(lambda x: x.reshape(rows, count, -1).swapaxes(0, 1), seen)
    state_bxy = jax.lax.map(row_of_blocks, blocks).swapaxes(0, 1)
    return PairPlan(seen, jnp.asarray(window, jnp.int32), *kernels.pairs(state_bxy))


def _attend_rows(
    kernels: Kernels,
    mesh: Mesh | None,
    q_btnh: Float[Array, "B T N H"],
    k_btkh: Float[Array, "B T K H"],
    v_btkh: Float[Array, "B T K H"],
    plan: PairPlan,
    scale: float,
) -> Float[Array, "B T N H"]:
    length, num_heads = q_btnh.shape[1:3]
    if length <= kernels.block:
        seen = jax.tree.map(lambda x: x[:, :length], plan.seen)
        mask_bts = may_see(seen, seen, plan.window)
        k_bkhs, v_bksh = k_btkh.transpose(0, 2, 3, 1), v_btkh.swapaxes(1, 2)
        return checkpoint_name(attend(q_btnh, k_bkhs, v_bksh, mask_bts, scale), MIXED)
    copies = kv_copies(num_heads, k_btkh.shape[2], mesh)
    padding = ((0, 0), (0, plan.seen.positions_bt.shape[1] - length), (0, 0), (0, 0))
    q_bnth, k_bkth, v_bkth = (
        jnp.pad(x, padding).swapaxes(1, 2)
        for x in (q_btnh, *(jnp.repeat(x, copies, axis=2) for x in (k_btkh, v_btkh)))
    )
    attention: Callable[..., Array] = functools.partial(_attention, kernels, scale)
    if mesh is not None:
        divided = k_bkth.shape[1] % mesh.shape["tensor"] == 0
        heads = PartitionSpec(*BATCH, "tensor" if divided else None)
        of_plan = jax.tree.map(lambda x: BATCH if x.ndim else PartitionSpec(), plan)
        attention = jax.shard_map(
            attention,
            mesh=mesh,
            in_specs=(heads, heads, heads, of_plan),
            out_specs=heads,
            check_vma=False,
        )
    return attention(q_bnth, k_bkth, v_bkth, plan).swapaxes(1, 2)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    kernels: Kernels, scale: float, q_bnth: Array, k_bkth: Array, v_bkth: Array, plan: PairPlan
) -> Array:
    return _forward(kernels, scale, q_bnth, k_bkth, v_bkth, plan)[0]


def _forward(
    kernels: Kernels, scale: float, q_bnth: Array, k_bkth: Array, v_bkth: Array, plan: PairPlan
) -> tuple[Array, tuple[Any, ...]]:
    """Mixed values, and what the backward pass needs besides."""
    mixed_bnth, norm_bnt = checkpoint_name(
        kernels.forward(scale, q_bnth, k_bkth, v_bkth, plan), MIXED
    )
    return mixed_bnth, (q_bnth, k_bkth, v_bkth, plan, mixed_bnth, norm_bnt)


def _backward(
    kernels: Kernels, scale: float, kept: tuple[Any, ...], grad_bnth: Array
) -> tuple[Any, ...]:
    q_bnth, k_bkth, v_bkth, plan, mixed_bnth, norm_bnt = kept
    # FlashAttention's D: the weights' gradients sum to it in every row.
    mean_bnt = (grad_bnth.astype(jnp.float32) * mixed_bnth.astype(jnp.float32)).sum(axis=-1)
    gradients = kernels.backward(scale, q_bnth, k_bkth, v_bkth, plan, grad_bnth, norm_bnt, mean_bnt)
    return *gradients, None


_attention.defvjp(_forward, _backward)


def weights_of(
    scale: float, logits: Array, dweights: Array, norm: Array, mean: Array
) -> tuple[Array, Array]:
    """The weights of a pair of blocks, and the gradients of its products of queries and keys.

    Args:
      scale: that the logits were multiplied by.
      logits: masked, in the orientation of the other arrays, which may broadcast to it.
      dweights: gradients of the weights.
      norm: logarithms of the sums of weights.
      mean: of the weights' gradients.
    """
    weights = jnp.exp(logits - norm)
    return weights, weights * (dweights - mean) * scale


def product(x: Array, y: Array, contracted: tuple[int, int]) -> Array:
    """The product of two matrices over one axis of each, accumulated in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((contracted[0],), (contracted[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )
