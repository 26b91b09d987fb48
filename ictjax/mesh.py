"""The device mesh, and where weights, batches and caches lie on it.

Weights that are only read (a frozen base, a sampler's copy) follow `RULES`; weights that are
trained follow `TRAINED_RULES`, and so do their optimizer moments: every device of a mesh then keeps
a different part. Batches are split over data and fsdp; the rows of a sampler's cache over data, its
kv heads over tensor.

With several hosts the update runs on one mesh of all devices, whose data axis is split over the
hosts, and each host's samplers on the part of that mesh that is its own (`own_part`): no dispatch
waits for another host, and weights that are whole there are not copied.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ictjax.config import AXES, MeshConfig

# Logical axis of a weight -> mesh axes.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ff": "tensor",
    "rank": None,
}
TRAINED_RULES = {**RULES, "embed": ("data", "fsdp")}
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    *,
    devices: Sequence[jax.Device] | None = None,
    hosts: int = 1,
) -> Mesh:
    """A mesh with axes data (copies), fsdp (weights split by width) and tensor (heads, feed-forward
    and vocabulary split). Its data axis goes over the hosts one after the other.

    Args:
      devices: of the mesh; all there are, unless given.
      hosts: that given devices are of.

    Raises:
      ValueError: as `check_sizes`.
    """
    if devices is None:
        devices, hosts = jax.devices(), jax.process_count()
    check_sizes(data, fsdp, tensor, len(devices), hosts)
    auto = (AxisType.Auto,) * 3
    if hosts == 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, auto, devices=devices)
    # not each host's in a ring, as jax.make_mesh has them: with such parts of 16 hosts the compiler
    # for v5e finds no way to send anything along data
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.reshape(ordered, (data, fsdp, tensor)), AXES, axis_types=auto)


def check_sizes(data: int, fsdp: int, tensor: int, devices: int, hosts: int) -> None:
    """Raises ValueError for a mesh that does not use all devices, or of which a copy of the weights
    would lie on several hosts.
    """
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != devices:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not use all {devices} devices:"
            " make the product equal"
        )
    if data % hosts:
        raise ValueError(
            f"mesh data={data} is not a multiple of the {hosts} hosts, each of which samples with"
            " copies of its own: make it one, and fsdp x tensor at most the devices of a host"
        )


def own_part(mesh: Mesh | None) -> Mesh | None:
    """The part of a mesh that is of this host's devices; all of it where there is one host."""
    if mesh is None or jax.process_count() == 1:
        return mesh
    rows = mesh.shape["data"] // jax.process_count()
    first = jax.process_index() * rows
    return Mesh(mesh.devices[first : first + rows], mesh.axis_names, axis_types=mesh.axis_types)


def on_own_part(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that no axis over the hosts splits, as arrays of this host alone, of the same memory.

    Args:
      tree: of arrays on `mesh`.
      mesh: that of all hosts.
    """
    own = own_part(mesh)
    if own is None or own is mesh:
        return tree

    def part(leaf: jax.Array) -> jax.Array:
        if not isinstance(leaf.sharding, NamedSharding):
            raise TypeError(f"{leaf.sharding} is on no mesh")
        return jax.make_array_from_single_device_arrays(
            leaf.shape,
            NamedSharding(own, leaf.sharding.spec),
            [shard.data for shard in leaf.addressable_shards],
        )

    return jax.tree.map(part, tree)


def gathered(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """An array of which each host may hold a part, ready on this host's own devices: all of it,
    split by fsdp and tensor as it was. All hosts call it.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    if not isinstance(array.sharding, NamedSharding):
        raise TypeError(f"{array.sharding} is on no mesh")
    mesh = array.sharding.mesh
    assert isinstance(mesh, Mesh), mesh
    sharding = NamedSharding(mesh, without_data(array.sharding.spec))
    whole = jax.jit(_on_device, out_shardings=sharding)(array)
    return jax.block_until_ready(on_own_part(whole, mesh))


def whole_on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """`gathered`, copied to this host's memory. All hosts call it, or `gathered`; for a moment the
    devices of each hold all of the array together.
    """
    return np.array(gathered(array))


def _on_device(array: jax.Array) -> jax.Array:
    """Moments may lie in the host's memory, where programs compute nothing."""
    return jax.device_put(array, jax.memory.Space.Device)


def without_data(spec: PartitionSpec) -> PartitionSpec:
    """What splits an array within a host, of what splits it over all."""
    return PartitionSpec(
        *(tuple(axis for axis in _axes(target) if axis != "data") or None for target in spec)
    )


def open_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh of all devices that a configuration asks for; None for one device of one host.
    Raises ValueError as `check_sizes` does.
    """
    if is_alone(config, jax.process_count()):
        return None
    return make_mesh(config.data, config.fsdp, config.tensor)


def is_alone(config: MeshConfig, hosts: int) -> bool:
    """Whether a model is on one device of one host, beside which others may be."""
    return config.num_devices == 1 and hosts == 1


def param_specs(
    axes: Any, shapes: Any, mesh: Mesh, rules: Mapping[str, str | tuple[str, ...] | None] = RULES
) -> Any:
    """PartitionSpecs of a parameter tree.

    Args:
      axes: tree of tuples of logical axis names (`transformer.param_axes`).
      shapes: the same tree of arrays or ShapeDtypeStructs (`transformer.abstract_params`).

    A dimension that its mesh axes do not divide stays whole on every device (4 kv heads on 8 tensor
    shards).
    """

    def spec(names: tuple[str, ...], leaf: Any) -> PartitionSpec:
        if len(names) != leaf.ndim:
            raise ValueError(
                f"a weight of shape {leaf.shape} has the logical axes {names}: name one axis per"
                " dimension"
            )
        unknown = [name for name in names if name not in rules]
        if unknown:
            raise ValueError(
                f"logical axis {unknown[0]!r} has no rule; known are {', '.join(rules)}"
            )
        targets = [rules[name] for name in names]
        return PartitionSpec(
            *(
                target if target is not None and size % _size(mesh, target) == 0 else None
                for target, size in zip(targets, leaf.shape, strict=True)
            )
        )

    return jax.tree.map(spec, axes, shapes, is_leaf=_is_axes)


def param_shardings(
    axes: Any, shapes: Any, mesh: Mesh, rules: Mapping[str, str | tuple[str, ...] | None] = RULES
) -> Any:
    """`param_specs` bound to the mesh, for `jax.device_put` and `jax.jit`."""
    specs = param_specs(axes, shapes, mesh, rules)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def split_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Puts a batch on the mesh, its rows (the first axis of every leaf) split over data and fsdp;
    without a mesh, as it is. Every host has the whole batch, and puts the rows of its devices.
    """
    return tree if mesh is None else place(tree, NamedSharding(mesh, BATCH))


def place(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` of what every host has whole, without a word between the hosts.

    Args:
      tree: of arrays.
      shardings: the same tree of shardings, or one for all.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def table_sharding(num_rows: int, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of an embedding table where rows of it are looked up: split by rows only, where tensor
    divides them.

    Looked up in a table that is split by width too, [B, T, D] would be split by width, and held
    whole once to be split by rows.
    """
    return NamedSharding(
        mesh, PartitionSpec("tensor" if num_rows % mesh.shape["tensor"] == 0 else None)
    )


def hidden_sharding(mesh: Mesh, num_positions: int) -> NamedSharding:
    """Of hidden states [B, T, D] between two layers: rows over data and fsdp, positions over tensor
    where it divides them.

    They are what a backward pass keeps of every layer: split, each device keeps its part only
    ("sequence parallelism", https://arxiv.org/abs/2205.05198). What the layers send between devices
    stays the same: where partial sums were added up for all, each device is sent its part of them.
    """
    return NamedSharding(
        mesh,
        PartitionSpec(
            *BATCH, "tensor" if num_positions % mesh.shape["tensor"] == 0 else None, None
        ),
    )


def kv_copies(num_heads: int, num_kv_heads: int, mesh: Mesh | None) -> int:
    """How often a cache holds every kv head, so that the tensor axis can split it.

    1 where it divides the kv heads. Where it is a multiple of them, every device holds the one head
    that its query heads read. Where it fits neither them nor the query heads, 1: every device holds
    all heads.
    """
    shards = 1 if mesh is None else mesh.shape["tensor"]
    return shards // num_kv_heads if shards % num_kv_heads == 0 and num_heads % shards == 0 else 1


def cache_sharding(num_cached_heads: int, mesh: Mesh) -> NamedSharding:
    """Of the arrays of a `KVCache`: rows over data, heads over tensor where it divides them."""
    return NamedSharding(
        mesh,
        PartitionSpec("data", "tensor" if num_cached_heads % mesh.shape["tensor"] == 0 else None),
    )


def _size(mesh: Mesh, target: str | tuple[str, ...]) -> int:
    size = 1
    for axis in _axes(target):
        size *= mesh.shape[axis]
    return size


def _axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target or ()


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)
