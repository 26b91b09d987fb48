"""Single changes of a run that may make it fit a machine."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ictjax.config import MeshConfig, RoleMeshes
from ictjax.run_config import TrainConfig


class Change(NamedTuple):
    """One field, or one group of fields that go together, set otherwise."""

    field: str
    flags: str  # what to type
    config: TrainConfig


def single_changes(config: TrainConfig, devices: int, hosts: int) -> Iterator[Change]:
    """Every change that `plan` tries, of each field the smaller one first.

    Args:
      config: what does not fit.
      devices: of the machine, for other meshes of it.
      hosts: that they are of.
    """
    meshes = _meshes(devices, hosts)
    for field, changes in _CHANGES:
        for flags, change in changes(config, meshes):
            try:
                changed = change()
            except ValueError:  # does not fit together with the other fields
                continue
            if changed != config:
                yield Change(field, flags, changed)


_Made = Iterator[tuple[str, Callable[[], TrainConfig]]]


def _slots(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    del meshes
    for divisor in (2, 4, 8):
        actor, reflector = (
            max(sizes.num_slots // divisor, 1)
            for sizes in (config.actor_sampler, config.reflector_sampler)
        )
        yield (
            f"--actor-sampler.num-slots {actor} --reflector-sampler.num-slots {reflector} (row"
            " buckets to match)",
            lambda actor=actor, reflector=reflector: config.with_slots(actor, reflector),
        )


def _pages(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    """Fewer pages for the same conversations, but for what the longest one needs; each copy of the
    weights has the same share.
    """
    del meshes
    paged = [
        (name, sizes, role.mesh.data)
        for name, sizes, role in (
            ("actor", config.actor_sampler, config.actor),
            ("reflector", config.reflector_sampler, config.reflector),
        )
        if sizes.page_size
    ]
    now = [sizes.cache_rows(copies)[0] for _, sizes, copies in paged]
    tried = [now]
    for divisor in (2, 4):
        pages = [
            copies * max(rows // copies // divisor, sizes.pages_per_row)
            for rows, (_, sizes, copies) in zip(now, paged, strict=True)
        ]
        if pages not in tried:
            tried.append(pages)
            yield (
                " ".join(
                    f"--{name}-sampler.num-pages {number}"
                    for number, (name, _, _) in zip(pages, paged, strict=True)
                ),
                lambda pages=pages: dataclasses.replace(
                    config,
                    **{
                        f"{name}_sampler": dataclasses.replace(sizes, num_pages=number)
                        for number, (name, sizes, _) in zip(pages, paged, strict=True)
                    },
                ),
            )


def _context(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    del meshes
    length = config.reflector_sampler.max_len
    for divisor in (2, 4):
        yield (
            f"--context {length // divisor}",
            lambda divisor=divisor: config.with_context(length // divisor),
        )


def _microbatches(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    del meshes
    parts = config.learner.num_microbatches
    for factor in (2, 4, 8):
        yield (
            f"--learner.num-microbatches {parts * factor}",
            lambda factor=factor: dataclasses.replace(
                config,
                learner=dataclasses.replace(config.learner, num_microbatches=parts * factor),
            ),
        )


def _rank(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    del meshes
    now = config.reflector.lora.rank
    # what is trained from an adapter has its rank
    for rank in () if config.reflector.adapter else (64, 16, 8):
        if now == 0 or rank < now:
            yield (
                f"--reflector.lora.rank {rank}",
                lambda rank=rank: dataclasses.replace(
                    config,
                    reflector=dataclasses.replace(
                        config.reflector,
                        lora=dataclasses.replace(config.reflector.lora, rank=rank),
                    ),
                ),
            )


def _remat(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    del meshes
    yield "--remat full", lambda: dataclasses.replace(config, remat="full")


def _moments(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    del meshes
    for flag, optimizer in (
        ("--optimizer.moments bfloat16", {"moments": "bfloat16"}),
        ("--optimizer.memory host", {"memory": "host"}),
    ):
        yield (
            flag,
            lambda optimizer=optimizer: dataclasses.replace(
                config, optimizer=dataclasses.replace(config.optimizer, **optimizer)
            ),
        )


def _extend(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    """Fewer tokens of a row in one prefill."""
    del meshes
    for divisor in (2, 4):
        actor, reflector = (
            tuple(sorted({max(size // divisor, 2) for size in sizes.extend_buckets}))
            for sizes in (config.actor_sampler, config.reflector_sampler)
        )
        yield (
            f"--actor-sampler.extend-buckets {' '.join(map(str, actor))}"
            f" --reflector-sampler.extend-buckets {' '.join(map(str, reflector))}",
            lambda actor=actor, reflector=reflector: dataclasses.replace(
                config,
                actor_sampler=dataclasses.replace(config.actor_sampler, extend_buckets=actor),
                reflector_sampler=dataclasses.replace(
                    config.reflector_sampler, extend_buckets=reflector
                ),
            ),
        )


def _int8(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    """The frozen actor's cache, or weights, in 8 bits."""
    del meshes
    yield (
        "--actor-sampler.cache int8",
        lambda: dataclasses.replace(
            config, actor_sampler=dataclasses.replace(config.actor_sampler, cache="int8")
        ),
    )
    yield (
        "--actor.weights int8",
        lambda: dataclasses.replace(
            config, actor=dataclasses.replace(config.actor, weights="int8")
        ),
    )


def _mesh(config: TrainConfig, meshes: Sequence[MeshConfig]) -> _Made:
    """Other meshes of all devices, fsdp before more copies, for both roles alike; with the rows and
    parts of an update that go with them.
    """
    now = config.reflector.mesh
    nearest = sorted(
        (mesh for mesh in meshes if mesh != now),
        key=lambda mesh: (abs(mesh.tensor - now.tensor), mesh.data, mesh.fsdp),
    )
    for mesh in nearest[:4]:
        try:
            changed = config.on_mesh(RoleMeshes(actor=mesh, reflector=mesh))
        except ValueError:  # does not fit together with the other fields
            continue
        given = [
            f"--{role}.mesh.{axis} {getattr(mesh, axis)}"
            for role in ("actor", "reflector")
            for axis in ("data", "fsdp", "tensor")
            if getattr(mesh, axis) != getattr(getattr(config, role).mesh, axis)
        ]
        if changed.batch.num_rows != config.batch.num_rows:
            given.append(f"--batch.num-rows {changed.batch.num_rows}")
        if changed.learner.num_microbatches != config.learner.num_microbatches:
            given.append(f"--learner.num-microbatches {changed.learner.num_microbatches}")
        yield " ".join(given), lambda changed=changed: changed


def _meshes(devices: int, hosts: int) -> list[MeshConfig]:
    """That can be made of so many devices of so many hosts."""
    return [
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
        for tensor in _divisors(devices // hosts)
        for fsdp in _divisors(devices // hosts // tensor)
        if tensor <= 8
        for data in [devices // fsdp // tensor]
    ]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


# What is tried, the least costly for the result first.
_CHANGES = (
    ("remat", _remat),
    ("mesh", _mesh),
    ("moments", _moments),
    ("slots", _slots),
    ("pages", _pages),
    ("prefill", _extend),
    ("microbatches", _microbatches),
    ("int8", _int8),
    ("LoRA", _rank),
    ("context", _context),
)
