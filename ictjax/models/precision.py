"""The types that numbers are computed in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

_FEWEST_ROWS = 8  # a single row of bfloat16 takes XLA on CPU longer than these


def wide(dtype: Any) -> Any:
    """What sums of this type are accumulated in: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def project(x: Array, weight: Array, axes: tuple[str, str], operands: Any) -> Array:
    """A linear map of hidden states whose operands are rounded to a type, with sums in float32 at
    least; so are both products of its gradient.

    Args:
      x: hidden states [B, T, ...].
      weight: of any type.
      axes: letters of what it takes and of what it gives.
      operands: the type. That of `x` rounds nothing but the weight.

    Returns:
      What it gives, [B, T, ...], in the type of `x`.
    """
    rows = x.shape[0] * x.shape[1]
    if rows >= _FEWEST_ROWS:
        return _rounded(axes, operands, x, weight)
    x_rows = x.reshape(1, rows, *x.shape[2:])
    padding = ((0, 0), (0, _FEWEST_ROWS - rows), *((0, 0),) * (x.ndim - 2))
    y_rows = _rounded(axes, operands, jnp.pad(x_rows, padding), weight)
    return y_rows[:, :rows].reshape(*x.shape[:2], *y_rows.shape[2:])


def product(letters: str, x: Array, y: Array, operands: Any) -> Array:
    """A product whose operands are rounded to a type, with sums in float32 at least."""
    return jnp.einsum(
        letters, x.astype(operands), y.astype(operands), preferred_element_type=wide(operands)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(axes: tuple[str, str], operands: Any, x: Array, weight: Array) -> Array:
    inputs, outputs = axes
    y = product(f"BT{inputs},{inputs}{outputs}->BT{outputs}", x, weight, operands)
    return y.astype(x.dtype)


def _rounded_forward(
    axes: tuple[str, str], operands: Any, x: Array, weight: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _rounded(axes, operands, x, weight), (x, weight)


def _rounded_backward(
    axes: tuple[str, str], operands: Any, kept: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    inputs, outputs = axes
    x, weight = kept
    by_x = product(f"BT{outputs},{inputs}{outputs}->BT{inputs}", grad, weight, operands)
    by_weight = product(f"BT{inputs},BT{outputs}->{inputs}{outputs}", x, grad, operands)
    return by_x.astype(x.dtype), by_weight.astype(weight.dtype)


_rounded.defvjp(_rounded_forward, _rounded_backward)
