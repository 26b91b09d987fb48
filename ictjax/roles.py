"""The models of a run on their devices: each checkpoint is read once, and frozen weights that
several roles use are the same arrays.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ictjax.config import LoraConfig
from ictjax.mesh import TRAINED_RULES, open_mesh, param_shardings
from ictjax.models.config import ModelConfig
from ictjax.models.hf import load_checkpoint
from ictjax.models.hf.reader import read_config
from ictjax.models.lora import adapter_axes, init_adapter, with_adapter
from ictjax.models.transformer import Params, param_axes
from ictjax.run_config import RoleConfig, TrainConfig
from ictjax.sampler import sampling_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
    """Actor, reflector and reference policy. Nothing here is ever trained or donated; what is
    trained begins as `initial_weights`.
    """

    actor: ModelConfig
    actor_params: Params
    actor_mesh: Mesh | None
    reflector: ModelConfig
    # the reflector before training: the reference policy and an adapter's trunk; None where neither
    # is used
    base: Params | None
    mesh: Mesh | None  # of the reflector, and of the update
    lora: LoraConfig

    def reflecting(self, trained: Params) -> Params:
        """The weights that the reflector samples with, for `Sampler.set_params`: no copy of the
        base.
        """
        return (
            trained
            if self.base is None or not self.lora.rank
            else with_adapter(self.lora, self.base, trained)
        )


def load_roles(config: TrainConfig, progress: Callable[[int, int], None] | None = None) -> Roles:
    """Reads the frozen weights. Actor and reflector share them if model, dtype and mesh are the
    same: then they are read and held once.

    Args:
      progress: is told the bytes of a checkpoint that are read and to be read.

    Raises:
      ValueError: a folder that does not hold a model, or a mesh that does not fit the devices.
    """
    actor_mesh, mesh = open_mesh(config.actor.mesh), open_mesh(config.reflector.mesh)
    actor, actor_params = _frozen(config.actor, actor_mesh, progress)
    lora, same = config.reflector.lora, config.actor.frozen_key == config.reflector.frozen_key
    reflector, base = actor, actor_params if same else None
    if not same:
        needed = lora.rank > 0 or config.grpo.kl != "none"
        reflector, base = (
            _frozen(config.reflector, mesh, progress)
            if needed
            else (_shape(config.reflector), None)
        )
    return Roles(
        actor=actor,
        actor_params=actor_params,
        actor_mesh=actor_mesh,
        reflector=reflector,
        base=base,
        mesh=mesh,
        lora=config.reflector.lora,
    )


def initial_weights(config: TrainConfig, roles: Roles) -> Params:
    """What is trained, before training: a new adapter, or all weights; float32, split over all
    devices of the mesh.

    At small learning rates bfloat16 would round updates away.
    """
    if roles.lora.rank:
        params, axes = (
            init_adapter(roles.reflector, roles.lora, jax.random.key(config.seed)),
            adapter_axes(roles.lora),
        )
    else:
        _, params = load_checkpoint(config.reflector.model, mesh=roles.mesh, dtype="float32")
        axes = param_axes(roles.reflector)
    if roles.mesh is None:
        return jax.tree.map(jnp.asarray, params)
    return jax.device_put(params, param_shardings(axes, params, roles.mesh, TRAINED_RULES))


def _frozen(
    role: RoleConfig, mesh: Mesh | None, progress: Callable[[int, int], None] | None
) -> tuple[ModelConfig, Params]:
    model, params = load_checkpoint(role.model, mesh=mesh, dtype=role.dtype, progress=progress)
    model = dataclasses.replace(model, dtype=role.dtype)
    return model, sampling_weights(model, params, mesh, consume=True)


def _shape(role: RoleConfig) -> ModelConfig:
    return dataclasses.replace(read_config(pathlib.Path(role.model)), dtype=role.dtype)
