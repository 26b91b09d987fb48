"""Keys of host-side randomness: two 32-bit words, folded like jax.random keys and usable as such,
without touching a device.
"""

import hashlib

import numpy as np

Key = tuple[int, int]


def root_key(seed: int) -> Key:
    """The key of a whole run."""
    return fold((0, 0), "root", seed)


def fold(key: Key, *data: int | str) -> Key:
    """A new key that depends on `key` and on every item of `data`, in order: the same on every
    machine and in every process.

    Host code folds thousands of keys per iteration (iteration, context, candidate, game, turn); a
    hash does it in a microsecond where `jax.random.fold_in` costs a dispatch. The two words are a
    valid raw threefry key for the sampler.
    """
    digest = hashlib.blake2b(repr((tuple(key), data)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def as_array(key: Key) -> np.ndarray:
    """The raw uint32[2] form that `jax.random` and the sampler take."""
    return np.asarray(key, np.uint32)


def generator(key: Key) -> np.random.Generator:
    """A numpy generator for shuffles and draws."""
    return np.random.Generator(np.random.PCG64(list(key)))
