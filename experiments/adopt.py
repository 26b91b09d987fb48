"""A run whose reflector was trained elsewhere: its directory, with an adapter as the checkpoint."""

import pathlib

import jax

from envs.api import Environment
from experiments.contents import content_hashes
from experiments.limits import check_limits, check_meshes, sampling_attention
from experiments.manifest import make_manifest
from experiments.presets import in_folders
from experiments.run_dir import new_run
from experiments.shapes import model_shape
from ictjax.checkpoint import Checkpointer
from ictjax.learner import init_state, make_optimizer
from ictjax.mesh import open_mesh
from ictjax.models.attention_choice import platform_of, resolve
from ictjax.models.hf import content_hash
from ictjax.models.peft import load_adapter
from ictjax.players import check_language
from ictjax.run_config import TrainConfig


def adopt(
    preset: str | None,
    config: TrainConfig,
    adapter: pathlib.Path,
    run_dir: pathlib.Path,
    environment: Environment,
) -> None:
    """Makes the directory: configuration, manifest, and a checkpoint of the last iteration, with
    the optimizer as it is before its first step.

    Args:
      preset: what the configuration started from, where known.
      config: the run that the adapter is taken for.
      adapter: folder of the trained adapter.
      run_dir: does not hold a run.
      environment: what is played.

    Raises:
      ValueError: an adapter of another model, or of another rank, alpha or targets than
        `config.reflector.lora`; what does not fit together. Nothing is made then.
    """
    check_limits(config)
    check_meshes(config)
    folders = in_folders(config)
    check_language(folders)
    role = config.reflector
    model = model_shape(folders.reflector)
    lora, factors = load_adapter(adapter, model)
    if lora != role.lora:
        raise ValueError(
            f"The adapter in {adapter} has rank {lora.rank}, alpha {lora.alpha:g} and targets"
            f" {' '.join(lora.targets)}: give --reflector.lora.rank {lora.rank}"
            f" --reflector.lora.alpha {lora.alpha:g} --reflector.lora.targets"
            f" {' '.join(lora.targets)}."
        )
    manifest = make_manifest(
        preset,
        config,
        environment,
        [str(device) for device in jax.devices()],
        content_hashes(folders),
        resolve(config.learner.attention, model, platform_of(open_mesh(role.mesh))),
        sampling_attention(config),
    )
    with (
        new_run(run_dir, config, manifest | {"adopted": content_hash(adapter)}),
        Checkpointer(run_dir / "checkpoints") as checkpointer,
    ):
        state = init_state(factors, make_optimizer(config.whole_optimizer))
        checkpointer.save(config.iterations, state, {"iteration": config.iterations})
