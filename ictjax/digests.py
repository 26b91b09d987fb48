"""Digests of arrays, by which a checkpoint that has changed on disk is noticed."""

import concurrent.futures
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_CRC_DIGITS = 8
_FACTORS = (0x9E3779B9, 0x85EBCA6B)  # of the weights in the two sums, arbitrary
_THREADS = 4  # each holds one array on the host


def digests(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """The CRC-32 of each array's bytes, 8 hexadecimal digits: the same however an array is split
    over devices. Of an array that several hosts hold together, 16 digits (`sums`), computed by all
    of them where it lies.

    Every flipped bit changes it, and any other damage leaves it as it was once in 2^32 times. It is
    no defence against somebody who forges a file. A core does 3 GB a second; arrays of a device are
    copied to the host for it, one per thread.
    """
    alone, shared = dict[str, jax.Array | np.ndarray](), dict[str, jax.Array]()
    for name, array in arrays.items():
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            shared[name] = array
        else:
            alone[name] = array
    found = sums(shared) if shared else {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found |= dict(zip(alone, threads.map(_crc, alone.values()), strict=True))
    return {name: found[name] for name in arrays}


def changed(expected: Mapping[str, str], arrays: Mapping[str, jax.Array | np.ndarray]) -> str:
    """The name of the first array that has another digest than before, of whichever kind; empty
    where none has. Of an array that several hosts hold now and one held before, none is known.
    """
    names = [name for name in arrays if name in expected]
    long = {name: arrays[name] for name in names if len(expected[name]) > _CRC_DIGITS}
    short = {name: arrays[name] for name in names if name not in long}
    found = digests(short) | (sums(long) if long else {})
    return next(
        (
            name
            for name in names
            if len(found[name]) == len(expected[name]) and found[name] != expected[name]
        ),
        "",
    )


def sums(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """16 hexadecimal digits of each array, the same however it is split over devices and hosts: two
    sums, modulo 2^32, of the bits of all elements times weights of their places.

    Another value of one element always changes them, and any other damage leaves them as they were
    once in 2^64 times.
    """
    found = jax.device_get(_sums(dict(arrays)))
    return {name: "".join(f"{int(part):08x}" for part in found[name]) for name in arrays}


@jax.jit
def _sums(arrays: Mapping[str, Array]) -> dict[str, list[UInt32[Array, ""]]]:
    return {name: _sums_of(array) for name, array in arrays.items()}


def _sums_of(array: Array) -> list[UInt32[Array, ""]]:
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        place = place * np.uint32(size % 2**32) + steps
    # Odd weights: a change of one element changes its term. The second sum has the high bits in low
    # places too, which low ones alone would leave out where they are zeros.
    first, second = (place * np.uint32(factor) | np.uint32(1) for factor in _FACTORS)
    total = [jnp.zeros((), jnp.uint32)] * 2
    for number, word in enumerate(_words(array)):
        odd = np.uint32(2 * number + 1)
        folded = word ^ (word >> np.uint32(16))
        terms = (word * first * odd, folded * second * odd)
        total = [old + new.sum(dtype=jnp.uint32) for old, new in zip(total, terms, strict=True)]
    return total


def _words(array: Array) -> list[Array]:
    """The bits of every element, 32 at a time."""
    if array.dtype == jnp.bool_:
        return [array.astype(jnp.uint32)]
    size = array.dtype.itemsize
    if size <= 4:
        return [jax.lax.bitcast_convert_type(array, f"uint{8 * size}").astype(jnp.uint32)]
    halves = jax.lax.bitcast_convert_type(array, jnp.uint32)
    return [halves[..., index] for index in range(size // 4)]


def _crc(array: jax.Array | np.ndarray) -> str:
    flat = np.ascontiguousarray(_on_host(array)).reshape(-1)
    return f"{zlib.crc32(flat.view(np.uint8).data):08x}"


def _on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    # anew over the same buffers: an array keeps the copy that is made of it on the host
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
