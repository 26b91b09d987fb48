"""What a run keeps in the memory of its devices, from shapes alone, and whether that is there."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from experiments.limits import local_roles
from experiments.shapes import adapter_shape, model_shape
from ictjax.config import AXES, LoraConfig, MeshConfig, SamplerConfig
from ictjax.mesh import RULES, TRAINED_RULES, cache_sharding, kv_copies, param_specs, without_data
from ictjax.models import cpu_kernels, lora, transformer
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig
from ictjax.run_config import RoleConfig, TrainConfig

# Of a checkpoint in the host's memory: the copy, and beside it what TensorStore has packed and not
# written yet; measured with 1,000 MiB of float32 noise: 1.94 (0.92 of it is what the file takes).
_WRITING = 2

Kind = Literal["weights", "optimizer", "cache", "suspended", "checkpoint"]


class Use(NamedTuple):
    """One thing that is kept."""

    what: str
    kind: Kind
    parts: frozenset[str]  # of a run: roles whose weights, and whose cache, these are
    parameters: int | None  # None: it has none
    whole_bytes: int
    device_bytes: int  # of each device of its mesh
    devices: int
    host_bytes: int = 0  # of its host's memory, for each device


def uses(config: TrainConfig) -> Iterator[Use]:
    """Weights, optimizer and caches of a training run; activations and gradients come on top."""
    return _uses(config, ("trained weights", "first moments", "second moments"))


def _uses(config: TrainConfig, trained_parts: Sequence[str]) -> Iterator[Use]:
    """What players keep, and whatever has the shapes of what is trained."""
    reflector = model_shape(config.reflector)
    mesh, adapter = config.reflector.mesh, config.reflector.lora
    frozen, axes = transformer.abstract_params(reflector), transformer.param_axes(reflector)
    trained, trained_axes = trained_shapes(config, reflector)
    local = not config.actor.endpoint.url
    shared = local and config.actor.frozen_key == config.reflector.frozen_key
    referenced = adapter.rank > 0 or config.grpo.kl != "none"
    roles = [
        name
        for name, is_there in (
            ("reference", config.grpo.kl != "none"),
            ("trunk of the adapter", adapter.rank > 0),
        )
        if is_there
    ]
    frozen_parts = {"base", *(["reflector weights"] if adapter.rank else [])}
    if local:
        actor = model_shape(config.actor)
        yield _weights(
            ", ".join(["actor", *(roles if shared else [])]),
            "weights",
            {"actor weights", *(frozen_parts if shared else ())},
            transformer.abstract_params(actor),
            transformer.param_axes(actor),
            config.actor.mesh,
            RULES,
        )
        yield from _adapter("adapter of the actor", config.actor, "actor weights")
    if referenced and not shared:
        yield _weights(", ".join(roles), "weights", frozen_parts, frozen, axes, mesh, RULES)
    yield from _adapter("adapter that the reflector starts from", config.reflector, "base")
    moments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.optimizer.moments), trained
    )
    for name in trained_parts:
        if name.endswith("moments"):
            use = _weights(
                name, "optimizer", {"optimizer"}, moments, trained_axes, mesh, TRAINED_RULES
            )
        else:
            use = _weights(name, "weights", {"trained"}, trained, trained_axes, mesh, TRAINED_RULES)
        if use.kind == "optimizer" and config.optimizer.memory == "host":
            what = f"{name}, in the host's memory"
            use = use._replace(what=what, device_bytes=0, host_bytes=use.device_bytes)
        yield use
    if not adapter.rank:
        what = f"trained weights as they sample, {reflector.products or reflector.dtype}"
        yield _weights(what, "weights", {"reflector weights"}, frozen, axes, mesh, RULES)
    for name, role, sizes in local_roles(config):
        cache = _cache(name, model_shape(role), sizes, role.mesh)
        yield cache
        yield from _suspended(name, cache, sizes, role.mesh)


def packed_of_roles(config: TrainConfig) -> Iterator[Use]:
    """What `packed_uses` says of the weights that roles sample with; shared ones count once."""
    counted = set()
    for name, role, _ in local_roles(config):
        trained = name == "reflector" and not config.reflector.lora.rank
        key = name if trained else role.frozen_key
        if key not in counted:
            counted.add(key)
            yield from packed_uses(f"{name} weights", model_shape(role), role.mesh.num_devices)


def written_checkpoint(config: TrainConfig) -> Use:
    """What a save takes of the host's memory: of what its devices hold of weights and moments one
    copy, which is written while the run goes on, and what the writer packs of it meanwhile. An
    array that several devices hold is written once.
    """
    state = [use for use in uses(config) if use.parts & {"trained", "optimizer"}]
    whole, devices = sum(use.whole_bytes for use in state), config.reflector.mesh.num_devices
    return Use(
        "a checkpoint being written",
        "checkpoint",
        frozenset({"checkpoint"}),
        None,
        whole,
        0,
        devices,
        host_bytes=-(-_WRITING * whole // devices),
    )


def gathered_checkpoint(config: TrainConfig, num_hosts: int) -> Use:
    """`written_checkpoint` where each of several hosts has a copy of the run: the first one holds
    all of it, and the devices of each hold one array at a time as `mesh.gathered` makes it, split
    by fsdp and tensor alone.

    Args:
      num_hosts: that train together; the mesh has devices of all of them.
    """
    trained, axes = trained_shapes(config, model_shape(config.reflector))
    devices = _abstract(config.reflector.mesh)
    wide = max(np.dtype(config.optimizer.moments).itemsize, 4)  # weights are float32
    specs = param_specs(axes, trained, devices, TRAINED_RULES)
    places = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    saved = written_checkpoint(config)
    return saved._replace(
        what="a checkpoint on the first host, an array on each device",
        parts=saved.parts | {"gathered"},
        device_bytes=max(
            _bytes(leaf, NamedSharding(devices, without_data(spec))) // leaf.dtype.itemsize * wide
            for leaf, spec in zip(jax.tree.leaves(trained), places, strict=True)
        ),
        host_bytes=_WRITING * saved.whole_bytes * num_hosts // saved.devices,
    )


def trained_shapes(config: TrainConfig, reflector: ModelConfig) -> tuple[Any, Any]:
    """Shapes of what is trained, and their axes."""
    adapter = config.reflector.lora
    if adapter.rank:
        return _factors(reflector, adapter), lora.adapter_axes(adapter)
    float32 = transformer.abstract_params(reflector.with_param_dtype("float32"))
    return float32, transformer.param_axes(reflector)


def _factors(model: ModelConfig, adapter: LoraConfig) -> Any:
    return jax.eval_shape(lambda: lora.init_adapter(model, adapter, jax.random.key(0)))


def _adapter(what: str, role: RoleConfig, part: str) -> Iterator[Use]:
    """The adapter that a role has, as it samples; nothing where it has none."""
    if (adapter := adapter_shape(role)) is not None:
        model = model_shape(role)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype),
            _factors(model, adapter),
        )
        yield _weights(
            what, "weights", {part}, shapes, lora.adapter_axes(adapter), role.mesh, RULES
        )


def check_memory(config: TrainConfig) -> None:
    """Raises ValueError, before anything is allocated, where what a run keeps exceeds what a device
    has, with the largest part of it.
    """
    check_fits(
        "Weights, optimizer and caches",
        [*uses(config), *packed_of_roles(config)],
        "Give fewer --actor-sampler.num-slots and --reflector-sampler.num-slots, train an adapter"
        " (--reflector.lora.rank 16), or split the models over more devices (--mesh); --check"
        " lists what takes how much.",
    )


def check_evaluation_memory(config: TrainConfig) -> None:
    """As `check_memory`, for an evaluation: it keeps no optimizer, but what is trained as it was
    before and after.
    """
    check_fits(
        "Weights and caches",
        [
            *_uses(config, ("trained weights", "weights before training")),
            *packed_of_roles(config),
        ],
        "Free memory, or split the models over more devices (--mesh).",
    )


def sampler_uses(name: str, model: ModelConfig, sizes: SamplerConfig) -> tuple[Use, ...]:
    """Weights and cache of one model on one device, then the packed weights if there are any.

    Args:
      name: of the model, in messages.
    """
    weights = f"{name} weights"
    cache = _cache(name, model, sizes, MeshConfig())
    return weights_use(weights, model), cache, *packed_uses(weights, model)


def packed_uses(what: str, model: ModelConfig, num_devices: int = 1) -> Iterator[Use]:
    """The copy of a model's matrices in the order in which this machine multiplies them, where it
    does (`cpu_kernels`).
    """
    if jax.local_devices()[0].platform == "cpu" and not cpu_kernels.why_not(model, num_devices):
        use = weights_use(f"{what}, packed for this CPU", model)
        size = model.num_params * np.dtype(model.products or model.dtype).itemsize
        yield use._replace(whole_bytes=size, device_bytes=size)


def weights_use(what: str, model: ModelConfig) -> Use:
    """All weights of a model on one device."""
    shapes, axes = transformer.abstract_params(model), transformer.param_axes(model)
    return _weights(what, "weights", (), shapes, axes, MeshConfig(), RULES)


def check_fits(what: str, uses: Iterable[Use], remedy: str) -> None:
    """Raises ValueError where what is to be kept exceeds what a device has.

    Args:
      what: all of it, in words.
      uses: its parts, of which the largest is named.
      remedy: a sentence on what to do.
    """
    kept = list(uses)
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # all devices are parts of the same memory
        sizes = [max(use.device_bytes * use.devices, use.whole_bytes) for use in kept]
        where = "this machine has free"
    else:
        sizes, where = [use.device_bytes for use in kept], "each device has"
    there = device_bytes(device)
    if there is None or sum(sizes) <= there:
        return
    largest = kept[max(range(len(kept)), key=sizes.__getitem__)]
    raise ValueError(
        f"{what} take {_gib(sum(sizes))} GiB and {where} {_gib(there)}; the largest part is:"
        f" {largest.what}, {_gib(max(sizes))}. {remedy}"
    )


def free_bytes(meminfo: str, limit: str, used: str, stat: str) -> int | None:
    """Memory that this process can still have; None where nothing says it.

    Args:
      meminfo: /proc/meminfo.
      limit: of the control group, memory.max.
      used: by the control group, memory.current.
      stat: of the control group, memory.stat; what only caches files can be had back.
    """
    bounds = [1024 * kib for kib in _numbers(meminfo, "MemAvailable:")]
    if limit.strip().isdigit() and used.strip().isdigit():
        bounds.append(int(limit) - int(used) + sum(_numbers(stat, "inactive_file")))
    return min(bounds, default=None)


def device_bytes(device: jax.Device) -> int | None:
    """Memory that programs on a device can have; None where nothing says it."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return host_bytes()


def host_bytes() -> int | None:
    """Memory that this machine has free; None where nothing says it."""
    return free_bytes(
        _read("/proc/meminfo"),
        _read("/sys/fs/cgroup/memory.max"),
        _read("/sys/fs/cgroup/memory.current"),
        _read("/sys/fs/cgroup/memory.stat"),
    )


def _numbers(table: str, name: str) -> list[int]:
    rows = (line.split() for line in table.splitlines())
    return [int(row[1]) for row in rows if row[:1] == [name] and row[1:2] and row[1].isdigit()]


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(path).read_text(encoding="ascii")
    return ""


def _weights(
    what: str,
    kind: Kind,
    parts: Iterable[str],
    shapes: Any,
    axes: Any,
    mesh: MeshConfig,
    rules: Any,
) -> Use:
    devices = _abstract(mesh)
    specs = param_specs(axes, shapes, devices, rules)
    leaves = jax.tree.leaves(shapes)
    places = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    held = sum(
        _bytes(leaf, NamedSharding(devices, spec))
        for leaf, spec in zip(leaves, places, strict=True)
    )
    return Use(
        what,
        kind,
        frozenset(parts),
        sum(leaf.size for leaf in leaves),
        sum(map(_bytes, leaves)),
        held,
        mesh.num_devices,
    )


def _cache(name: str, model: ModelConfig, sizes: SamplerConfig, mesh: MeshConfig) -> Use:
    devices = _abstract(mesh)
    copies = kv_copies(model.num_heads, model.num_kv_heads, devices)
    rows, positions = sizes.cache_rows(mesh.data)
    arrays = jax.tree.leaves(
        jax.eval_shape(lambda: make_cache(model, rows, positions, copies=copies, kind=sizes.cache))
    )
    sharding = cache_sharding(model.num_kv_heads * copies, devices)
    unit = "pages" if sizes.page_size else "slots"
    what = f"{name} cache, {rows} {unit} x {positions} tokens"
    held = sum(_bytes(leaf, sharding) for leaf in arrays)
    return Use(
        what,
        "cache",
        frozenset({f"{name} cache"}),
        None,
        sum(map(_bytes, arrays)),
        held,
        mesh.num_devices,
    )


def _suspended(name: str, cache: Use, sizes: SamplerConfig, mesh: MeshConfig) -> Iterator[Use]:
    """Pages that the host holds of conversations which wait for others, at most: what all of them
    at their full length have beyond the pool. Nothing where it has them all.
    """
    pages = sizes.cache_rows(mesh.data)[0]
    beyond = sizes.num_slots * sizes.pages_per_row - pages
    if sizes.page_size and beyond > 0:
        size = cache.whole_bytes // pages * beyond
        yield Use(
            f"{name} pages of suspended conversations, at most {beyond}",
            "suspended",
            frozenset(),
            None,
            size,
            0,
            mesh.num_devices,
            host_bytes=-(-size // mesh.num_devices),
        )


def _abstract(mesh: MeshConfig) -> AbstractMesh:
    return AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), AXES)


def _bytes(leaf: Any, sharding: NamedSharding | None = None) -> int:
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return int(np.prod(shape, dtype=object)) * leaf.dtype.itemsize


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f}"
