"""Builds a configuration's models, cache and update on shapes alone: what would fail, and what memory it needs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.presets import model_folder
from ictjax.batch import pack
from ictjax.config import TrainConfig
from ictjax.learner import init_state, make_optimizer, make_update, transformer_policy
from ictjax.models import transformer
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig


def check(config: TrainConfig, console: Console) -> None:
    """Prints parameters and memory of actor, reflector and update. Raises ValueError for what does not fit together."""
    actor, reflector = (model_shape(config, folder) for folder in (config.actor, config.reflector))
    for name, model, sampler in (("actor", actor, config.actor_sampler), ("reflector", reflector, config.reflector_sampler)):
        if sampler.max_len > model.max_positions:
            raise ValueError(f"{name}_sampler.max_len = {sampler.max_len} exceeds the model's {model.max_positions} positions: lower it.")
    trained = dataclasses.replace(reflector, param_dtype="float32")
    optimizer = make_optimizer(config.optimizer)
    params = transformer.abstract_params(trained)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), params)
    rows = config.batch.num_rows
    update = make_update(transformer_policy(trained, remat=config.remat), config.grpo, optimizer, config.learner)
    reply = config.batch.response_buckets[-1]
    prompt = config.batch.token_buckets[-1] - reply
    batch = pack(config.batch, [[0] * prompt] * rows, [[0] * reply] * rows, advantages=[0.0] * rows, pad_id=0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    jax.eval_shape(update, state, None if config.grpo.kl == "none" else params, shapes)
    table = Table(title="Memory, GiB (activations and gradients come on top)", title_justify="left")
    table.add_column("what")
    table.add_column("parameters", justify="right")
    table.add_column("GiB", justify="right")
    weights = transformer.abstract_params(actor)
    table.add_row("actor weights", f"{_count(weights):,}", _gib(weights))
    table.add_row("reflector weights and optimizer", f"{_count(state.params):,}", _gib(state))
    if config.grpo.kl != "none":
        table.add_row("reference weights", f"{_count(params):,}", _gib(params))
    for name, model, sizes in (("actor", actor, config.actor_sampler), ("reflector", trained, config.reflector_sampler)):
        cache = jax.eval_shape(lambda model=model, sizes=sizes: make_cache(model, sizes.num_slots, sizes.max_len))
        table.add_row(f"{name} cache, {sizes.num_slots} slots x {sizes.max_len} tokens", "", _gib(cache))
    console.print(table)
    console.print("Model, cache and update build on shapes.", highlight=False)


def model_shape(config: TrainConfig, folder: str) -> ModelConfig:
    """The shape of the checkpoint, or the one that the preset gives where there is no checkpoint."""
    try:
        path = pathlib.Path(model_folder(folder)) / "config.json"
    except ValueError:
        if config.shape is None:
            raise
        return config.shape
    return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))


def _count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _gib(tree) -> str:
    return f"{sum(int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)) / 2**30:.2f}"
