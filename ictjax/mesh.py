"""The device mesh, and where the weights lie on it."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axis of a weight -> mesh axis. Batches are split over ("data", "fsdp").
RULES: Mapping[str, str | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "ff": "tensor",
}


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of all devices with axes data (copies), fsdp (weights split by width) and tensor (heads, feed-forward and vocabulary split).

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != jax.device_count():
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not use all {jax.device_count()} devices: make the product equal"
        )
    return jax.make_mesh((data, fsdp, tensor), AXES)


def param_specs(axes: Any, shapes: Any, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """PartitionSpecs of a parameter tree.

    Args:
      axes: tree of tuples of logical axis names (`transformer.param_axes`).
      shapes: the same tree of arrays or ShapeDtypeStructs (`transformer.abstract_params`).

    A dimension that its mesh axis does not divide stays whole on every device (4 kv heads on 8 tensor shards).
    """

    def spec(names: tuple[str, ...], leaf: Any) -> PartitionSpec:
        if len(names) != leaf.ndim:
            raise ValueError(f"a weight of shape {leaf.shape} has the logical axes {names}: name one axis per dimension")
        unknown = [name for name in names if name not in rules]
        if unknown:
            raise ValueError(f"logical axis {unknown[0]!r} has no rule; known are {', '.join(rules)}")
        targets = [rules[name] for name in names]
        return PartitionSpec(
            *(
                target if target is not None and size % mesh.shape[target] == 0 else None
                for target, size in zip(targets, leaf.shape, strict=True)
            )
        )

    return jax.tree.map(spec, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))


def param_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Mapping[str, str | None] = RULES) -> Any:
    """`param_specs` bound to the mesh, for `jax.device_put` and `jax.jit`."""
    specs = param_specs(axes, shapes, mesh, rules)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
