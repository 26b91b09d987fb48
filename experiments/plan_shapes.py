"""Builds a configuration's models, cache and update on shapes alone: what would fail, and what
memory it needs.
"""

from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments.limits import check_limits
from experiments.memory import trained_shapes, uses
from experiments.shapes import config_folder, model_shape
from ictjax.batch import pack
from ictjax.learner import init_state, make_optimizer, make_update, transformer_functions
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.players import check_language
from ictjax.run_config import TrainConfig


def check(config: TrainConfig, console: Console) -> None:
    """Prints parameters and memory of actor, reflector and update. Raises ValueError for what does
    not fit together.
    """
    check_limits(config)
    folders = [config_folder(role.model) for role in (config.actor, config.reflector)]
    if None not in folders:  # their small files are here
        check_language(config.with_models(*map(str, folders)))
    reflector = model_shape(config.reflector)
    optimizer = make_optimizer(config.whole_optimizer)
    trained, _ = trained_shapes(config, reflector)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), trained)
    _trace_update(config, reflector, state, transformer.abstract_params(reflector))

    table = Table(title="Memory, GiB (activations and gradients come on top)", title_justify="left")
    for column in ("what", "parameters", "in all", "per device"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for use in uses(config):
        count = "" if use.parameters is None else f"{use.parameters:,}"
        table.add_row(use.what, count, _gib(use.whole_bytes), _gib(use.device_bytes))
    console.print(table)
    console.print("Model, cache and update build on shapes.")


def _trace_update(config: TrainConfig, model: ModelConfig, state: Any, frozen: Any) -> None:
    functions = transformer_functions(model, remat=config.remat, lora=config.reflector.lora)
    update = make_update(
        functions, config.grpo, make_optimizer(config.whole_optimizer), config.learner
    )
    count, prompt = config.batch.num_replies, config.reflection.max_context_tokens
    reply = config.reflection.max_reply_tokens
    batch = pack(
        config.batch,
        [[0] * prompt] * count,
        [[0] * reply] * count,
        advantages=[0.0] * count,
        pad_id=0,
    )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    base = jax.eval_shape(lambda tree: transformer.unstack_layers(model, tree), frozen)
    jax.eval_shape(update, state, base, shapes)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
