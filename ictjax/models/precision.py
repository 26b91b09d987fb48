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


def project(
    x: Array, weight: Array, axes: tuple[str, str], operands: Any, stored: str = ""
) -> Array:
    """A linear map of hidden states whose operands are rounded to a type, with sums in float32 at
    least; so are both products of its gradient.

    Args:
      x: hidden states [B, T, ...].
      weight: of any type.
      axes: letters of what it takes and of what it gives.
      operands: the type. That of `x` rounds nothing but the weight.
      stored: letters of the weight; unless given, of what it takes and then of what it gives. The
        gradient of a weight that is transposed instead becomes a product that XLA refuses to run
        on CPUs that multiply bfloat16.

    Returns:
      What it gives, [B, T, ...], in the type of `x`.
    """
    letters = (*axes, stored or "".join(axes))
    rows = x.shape[0] * x.shape[1]
    if rows >= _FEWEST_ROWS:
        return _rounded(letters, operands, x, weight)
    x_rows = x.reshape(1, rows, *x.shape[2:])
    padding = ((0, 0), (0, _FEWEST_ROWS - rows), *((0, 0),) * (x.ndim - 2))
    y_rows = _rounded(letters, operands, jnp.pad(x_rows, padding), weight)
    return y_rows[:, :rows].reshape(*x.shape[:2], *y_rows.shape[2:])


def product(letters: str, x: Array, y: Array, operands: Any) -> Array:
    """`contract` of operands that are rounded to a type, with sums in float32 at least."""
    return contract(letters, x.astype(operands), y.astype(operands), wide(operands))


def contract(letters: str, x: Array, y: Array, dtype: Any = None) -> Array:
    """`jnp.einsum` of two arrays that sums over every axis that both have, as they lie. Of several
    axes einsum takes the last one first, for which XLA on CPUs copies both arrays: in float32
    attention's output weights in every step of decoding, in dtype mixed once a dispatch.

    Args:
      letters: as those of einsum. The axes of the result are those that one array alone has, in
        their order, and then those of the other.
      dtype: of sums and result; that of the arrays unless given.

    Returns:
      An array of these axes.
    """
    of_x, of_y, result = letters.replace("->", ",").split(",")
    summed = [letter for letter in of_x if letter in of_y]
    axes = [*map(of_x.index, summed)], [*map(of_y.index, summed)]
    kept = [letter for letter in of_x + of_y if letter not in summed]
    if kept != list(result):
        return contract(f"{of_y},{of_x}->{result}", y, x, dtype)
    return jax.lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(letters: tuple[str, str, str], operands: Any, x: Array, weight: Array) -> Array:
    inputs, outputs, stored = letters
    y = product(f"BT{inputs},{stored}->BT{outputs}", x, weight, operands)
    return y.astype(x.dtype)


def _rounded_forward(
    letters: tuple[str, str, str], operands: Any, x: Array, weight: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _rounded(letters, operands, x, weight), (x, weight)


def _rounded_backward(
    letters: tuple[str, str, str], operands: Any, kept: tuple[Array, Array], grad: Array
) -> tuple[Array, Array]:
    inputs, outputs, stored = letters
    x, weight = kept
    by_x = product(f"BT{outputs},{stored}->BT{inputs}", grad, weight, operands)
    by_weight = product(f"BT{inputs},BT{outputs}->{stored}", x, grad, operands)
    return by_x.astype(x.dtype), by_weight.astype(weight.dtype)


_rounded.defvjp(_rounded_forward, _rounded_backward)
