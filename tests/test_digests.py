import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ictjax.digests import digests


@pytest.mark.parametrize("spec", [(), ("a",), ("a", "b"), (None, "a"), ("b",)])
def test_a_digest_does_not_depend_on_where_the_array_lies(spec):
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    expected = {"x": f"{zlib.crc32(values.tobytes()):08x}"}
    assert digests({"x": jax.device_put(values, sharding)}) == expected
    assert digests({"x": values}) == digests({"x": values.T.copy().T}) == expected


@pytest.mark.parametrize(
    "array",
    [
        jnp.ones((3, 2), jnp.bfloat16),
        jnp.int32(5),
        jnp.asarray([True, False]),
        jnp.zeros((0, 4)),
        np.uint8(3),
    ],
)
def test_any_array_has_one(array):
    assert digests({"x": array}) == {"x": f"{zlib.crc32(np.asarray(array).tobytes()):08x}"}


def test_every_bit_counts():
    values = np.zeros(5, np.float32)
    seen = {digests({"x": values})["x"]}
    for bit in range(5 * 32):
        flipped = values.copy()
        flipped.view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        seen.add(digests({"x": flipped})["x"])
    assert len(seen) == 1 + 5 * 32
