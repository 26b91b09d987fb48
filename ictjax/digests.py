"""Digests of arrays, by which a checkpoint that has changed on disk is noticed."""

import concurrent.futures
import zlib
from collections.abc import Mapping

import jax
import numpy as np

_THREADS = 4  # each holds one array on the host


def digests(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, str]:
    """The CRC-32 of each array's bytes, 8 hexadecimal digits: the same however an array is split
    over devices.

    Every flipped bit changes it, and any other damage leaves it as it was once in 2^32 times. It is
    no defence against somebody who forges a file. A core does 3 GB a second; arrays of a device are
    copied to the host for it, one per thread.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(arrays, threads.map(_digest, arrays.values()), strict=True))


def _digest(array: jax.Array | np.ndarray) -> str:
    flat = np.ascontiguousarray(_on_host(array)).reshape(-1)
    return f"{zlib.crc32(flat.view(np.uint8).data):08x}"


def _on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    # anew over the same buffers: an array keeps the copy that is made of it on the host
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
