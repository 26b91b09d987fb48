"""What a machine can do at best, and what sampling needs of it at least."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_peers import Workload
from experiments.bench_run import Stopwatch
from experiments.estimate import matrix_weights
from ictjax.models.config import ModelConfig

PRODUCT_SIZE, _PRODUCTS = 2048, 4
_FLOAT = 4  # bytes


class Rates(NamedTuple):
    """What a machine can do."""

    flops: float  # per second, by products of large matrices of one type
    bandwidth: float  # bytes read per second


class _Sizes(NamedTuple):
    """Of what rates are measured with."""

    matrix: int
    read_bytes: int


def _sizes() -> _Sizes:
    """On accelerators so large that launching a program takes next to nothing of its time."""
    if jax.default_backend() == "cpu":
        return _Sizes(PRODUCT_SIZE, 256 * 2**20)
    return _Sizes(8192, 2 * 2**30)


def product_flops(size: int = PRODUCT_SIZE) -> float:
    """Of `time_products`, by matrices of this size."""
    return _PRODUCTS * 2.0 * size**3


def product_matrix(size: int = PRODUCT_SIZE) -> np.ndarray:
    """What large products are measured with, float32 [size, size]."""
    return np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)


def time_products(product: Callable[[], object]) -> float:
    """Seconds of `product_flops`, by a call that multiplies the matrix with itself and waits."""
    stopwatch = Stopwatch()
    with stopwatch.running():
        for _ in range(_PRODUCTS):
            product()
    return stopwatch.seconds


def jax_product(size: int = PRODUCT_SIZE, dtype: str = "float32") -> Callable[[], object]:
    """The call of JAX."""
    square, matrix = jax.jit(lambda x: x @ x), jnp.asarray(product_matrix(size), dtype)
    return lambda: square(matrix).block_until_ready()


def probes(dtype: str) -> dict[str, Callable[[], float]]:
    """What measures them: seconds of a run of each. See `rates`.

    Args:
      dtype: of the products; what is read is float32, which every machine reads as fast as it can.
    """
    sizes = _sizes()
    product = jax_product(sizes.matrix, dtype)
    columns = sizes.read_bytes // _FLOAT // sizes.matrix
    matrix, vector = jnp.ones((sizes.matrix, columns)), jnp.ones(columns)
    read = jax.jit(lambda x, v: x @ v)

    def time_reading() -> float:
        stopwatch = Stopwatch()
        with stopwatch.running():
            read(matrix, vector).block_until_ready()
        return stopwatch.seconds

    return {"products": lambda: time_products(product), "reading": time_reading}


def rates(products_s: float, reading_s: float) -> Rates:
    """From the fastest run of each."""
    sizes = _sizes()
    return Rates(product_flops(sizes.matrix) / products_s, sizes.read_bytes / reading_s)


def least_seconds(
    config: ModelConfig, work: Workload, shared: int, machine: Rates
) -> tuple[float, float]:
    """Until the first tokens are there, and of all the rest, at the rates of the machine: each
    step takes what its products need, or what reading weights and cache needs, whichever is more.

    Args:
      config: of the model, whose weights are of the type of its activations.
      work: what is sampled; every reply's last token is only predicted.
      shared: tokens at the start of all conversations, computed once.
      machine: its rates, of that type.
    """
    steps = [
        max(flops / machine.flops, read / machine.bandwidth)
        for flops, read in _steps(config, work, shared)
    ]
    return steps[0], sum(steps[1:])


def _steps(config: ModelConfig, work: Workload, shared: int) -> Iterator[tuple[float, float]]:
    """FLOPs and bytes read of every step, the first one up to the first tokens."""
    rows = len(work.openings)
    head = config.vocab_size * config.d_model
    weights = matrix_weights(config)
    number = jnp.dtype(config.dtype).itemsize
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * number

    def step(length: int, count: int, once: int) -> tuple[float, float]:
        """`count` tokens more of every row after `length`; the first `once` for all together."""

        def flops(start: int, tokens: int) -> float:
            pairs = tokens * (start + (tokens + 1) / 2)
            return (
                2.0 * (weights - head) * tokens
                + 4.0 * config.num_layers * config.num_heads * config.head_dim * pairs
            )

        products = flops(length, once) + rows * (flops(length + once, count - once) + 2.0 * head)
        return products, weights * number + rows * length * position

    length = 0
    for turn, count in enumerate([len(work.openings[0]), *(len(t[0]) for t in work.observations)]):
        # the last token of the reply before is computed with what is observed after it
        yield step(length, count + bool(turn), shared if not turn else 0)
        length += count + bool(turn)
        for _ in range(work.reply - 1):
            yield step(length, 1, 0)
            length += 1
