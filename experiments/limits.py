"""Whether the numbers of a configuration fit its models and meshes, from small files alone."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from experiments.shapes import config_folder, model_shape
from ictjax.config import MeshConfig, SamplerConfig
from ictjax.mesh import check_sizes, is_alone, open_mesh
from ictjax.models import cpu_kernels
from ictjax.models.attention_choice import platform_of, resolve_paged
from ictjax.models.config import ModelConfig
from ictjax.models.hf.reader import check_vocabulary
from ictjax.players import in_role
from ictjax.run_config import RoleConfig, TrainConfig

SMALL = 50_000_000  # weights; models with fewer fit wherever they run, whole on every device too


class LocalRole(NamedTuple):
    """A model that is computed here, in its role."""

    name: str
    role: RoleConfig
    sampler: SamplerConfig


def local_roles(config: TrainConfig) -> tuple[LocalRole, ...]:
    """Actor and reflector; the reflector alone where the actor is called at an endpoint."""
    actor = LocalRole("actor", config.actor, config.actor_sampler)
    reflector = LocalRole("reflector", config.reflector, config.reflector_sampler)
    return (reflector,) if config.actor.endpoint.url else (actor, reflector)


def check_limits(config: TrainConfig) -> None:
    """Reads each model's config.json and tokenizer, no weights, and compares.

    Raises:
      ValueError: a model that is not there, a conversation longer than its positions, an adapter
        of a higher rank than the model is wide, a tokenizer
        with more ids than it has embeddings, or a sampler or a model that its mesh does not divide.
    """
    for name, role, sampler in local_roles(config):
        with in_role(name):
            model, folder = model_shape(role), config_folder(role.model)
            if folder is not None:
                check_vocabulary(folder, model)
        if sampler.max_len > model.max_positions:
            raise ValueError(
                f"{name}_sampler.max_len = {sampler.max_len} exceeds the {model.max_positions}"
                f" positions of {role.model}: lower --{name}-sampler.max-len, and what has to fit"
                " into it."
            )
        rank = config.reflector.lora.rank if name == "reflector" else 0
        if rank > model.d_model:
            raise ValueError(
                f"reflector.lora.rank = {rank} exceeds the width of {role.model}, {model.d_model}:"
                " lower it, or give 0 to train all weights."
            )
        check_split(role.model, model, role.mesh, f"{name}.mesh.")
        copies = role.mesh.data  # a multiple of the hosts (`mesh.check_sizes`)
        for field, sizes in (
            ("num_slots", (sampler.num_slots,)),
            ("row_buckets", sampler.row_buckets),
        ):
            if any(size % copies for size in sizes):
                raise ValueError(
                    f"{name}_sampler.{field} = {', '.join(map(str, sizes))} does not divide by the"
                    f" {copies} copies of the weights on all hosts ({name}.mesh.data = {copies}):"
                    f" each has the same share; give multiples of {copies}."
                )
        try:
            sampler.cache_rows(copies)
        except ValueError as error:
            raise ValueError(f"{name}_sampler.{error}") from error


def check_split(called: str, model: ModelConfig, mesh: MeshConfig, flags: str = "") -> None:
    """Raises ValueError for a mesh that does not divide a model: what it does not divide would lie
    whole on every device, and be computed by each of them (`ictjax.mesh.param_specs`). Small models
    may.

    Args:
      called: the model, as people know it.
      flags: what flags of the mesh begin with, "actor.mesh.".
    """
    if model.num_params < SMALL:
        return
    for axis, size, sizes in (
        ("tensor", mesh.tensor, {"num_heads": model.num_heads, "d_ff": model.d_ff}),
        ("fsdp", mesh.fsdp, {"d_model": model.d_model}),
    ):
        wrong = [f"{field} = {value}" for field, value in sizes.items() if value % size]
        if wrong:
            whole = math.gcd(*sizes.values())
            fitting = [number for number in range(1, whole + 1) if whole % number == 0]
            nearest = [
                *[number for number in fitting if number < size][-1:],
                *[number for number in fitting if number > size][:1],
            ]
            raise ValueError(
                f"{flags}{axis} = {size} does not divide {' and '.join(wrong)} of {called},"
                f" and every device would hold and compute all of it: give --{flags}{axis}"
                f" {' or '.join(map(str, nearest))}."
            )


def check_meshes(config: TrainConfig, devices: int | None = None, hosts: int = 1) -> None:
    """Raises ValueError, by its flags, for a mesh that cannot be made of so many devices of so many
    hosts; of those here, unless given.
    """
    if devices is None:
        devices, hosts = jax.device_count(), jax.process_count()
    for name, role, _ in local_roles(config):
        mesh = role.mesh
        try:
            if not is_alone(mesh, hosts):
                check_sizes(mesh.data, mesh.fsdp, mesh.tensor, devices, hosts)
        except ValueError as error:
            raise ValueError(f"{error} (--{name}.mesh.*, or --mesh NAME).") from error


def sampling_attention(config: TrainConfig) -> dict[str, str]:
    """The way that the sampler of each role attends, on the devices of its mesh, which are here; on
    a CPU also whether it uses kernels of our own (`cpu_kernels`), and if not, why.
    Raises ValueError, by its flag, for one that cannot work there.
    """
    ways: dict[str, str] = {}
    for name, role, sampler in local_roles(config):
        try:
            platform = platform_of(open_mesh(role.mesh))
            model = model_shape(role)
            ways[name] = resolve_paged(sampler, model, platform)
            if platform == "cpu":
                reason = cpu_kernels.why_not(model, role.mesh.num_devices)
                ways[name] += f", XLA alone: {reason}" if reason else ", kernels for this CPU"
        except ValueError as error:
            complaint = str(error).removesuffix(".")
            raise ValueError(f"{complaint} (--{name}-sampler.attention).") from error
    return ways


def check_idle(config: TrainConfig, devices: Sequence[jax.Device], *, even_so: bool) -> None:
    """Raises ValueError for a run that would leave some of the devices without work, unless told to
    go on even so.
    """
    used = max(role.mesh.num_devices for _, role, _ in local_roles(config))
    if used < len(devices) and not even_so:
        # a mesh of several devices uses all (`mesh.check_sizes`)
        instead = ", or say --even-so" if used == 1 else ""
        raise ValueError(
            f"The mesh uses {used} of the {len(devices)} devices, and the others would do nothing:"
            " name one for all of them (--mesh, or --reflector.mesh.* and --actor.mesh.*)"
            f"{instead}."
        )
