"""Builds a configuration's models, cache and update on shapes alone: what would fail, and what
memory it needs.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from experiments.limits import check_limits, local_roles
from experiments.shapes import model_shape
from ictjax.batch import pack
from ictjax.config import AXES, MeshConfig, SamplerConfig
from ictjax.learner import init_state, make_optimizer, make_update, transformer_functions
from ictjax.mesh import RULES, TRAINED_RULES, cache_sharding, kv_copies, param_specs
from ictjax.models import lora, transformer
from ictjax.models.cache import make_cache
from ictjax.models.config import ModelConfig
from ictjax.run_config import TrainConfig


def check(config: TrainConfig, console: Console) -> None:
    """Prints parameters and memory of actor, reflector and update. Raises ValueError for what does
    not fit together.
    """
    check_limits(config)
    reflector = model_shape(config.reflector)
    mesh, adapter = config.reflector.mesh, config.reflector.lora
    frozen, axes = transformer.abstract_params(reflector), transformer.param_axes(reflector)
    if adapter.rank:
        trained = jax.eval_shape(lambda: lora.init_adapter(reflector, adapter, jax.random.key(0)))
        trained_axes = lora.adapter_axes(adapter)
    else:
        trained, trained_axes = (
            transformer.abstract_params(reflector.with_param_dtype("float32")),
            axes,
        )
    optimizer = make_optimizer(config.whole_optimizer)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), trained)
    _trace_update(config, reflector, state, frozen)

    table = Table(title="Memory, GiB (activations and gradients come on top)", title_justify="left")
    for column in ("what", "parameters", "in all", "per device"):
        table.add_column(column, justify="left" if column == "what" else "right")
    local = not config.actor.endpoint.url
    shared = local and config.actor.frozen_key == config.reflector.frozen_key
    referenced = adapter.rank > 0 or config.grpo.kl != "none"
    uses = [
        name
        for name, is_there in (
            ("reference", config.grpo.kl != "none"),
            ("trunk of the adapter", adapter.rank > 0),
        )
        if is_there
    ]
    if local:
        actor = model_shape(config.actor)
        _row(
            table,
            ", ".join(["actor", *(uses if shared else [])]),
            transformer.abstract_params(actor),
            transformer.param_axes(actor),
            config.actor.mesh,
            RULES,
        )
    if referenced and not shared:
        _row(table, ", ".join(uses), frozen, axes, mesh, RULES)
    _row(table, "trained weights", trained, trained_axes, mesh, TRAINED_RULES)
    for name in ("first moments", "second moments"):
        _row(table, name, trained, trained_axes, mesh, TRAINED_RULES)
    if not adapter.rank and reflector.dtype != "float32":
        _row(table, f"trained weights as they sample, {reflector.dtype}", frozen, axes, mesh, RULES)
    for name, role, sizes in local_roles(config):
        _cache_row(table, name, model_shape(role), sizes, role.mesh)
    console.print(table)
    console.print("Model, cache and update build on shapes.", highlight=False)


def _trace_update(config: TrainConfig, model: ModelConfig, state: Any, frozen: Any) -> None:
    functions = transformer_functions(model, remat=config.remat, lora=config.reflector.lora)
    update = make_update(
        functions, config.grpo, make_optimizer(config.whole_optimizer), config.learner
    )
    rows, reply = config.batch.num_rows, config.batch.response_buckets[-1]
    prompt = config.batch.token_buckets[-1] - reply
    batch = pack(
        config.batch, [[0] * prompt] * rows, [[0] * reply] * rows, advantages=[0.0] * rows, pad_id=0
    )
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    base = jax.eval_shape(lambda tree: transformer.unstack_layers(model, tree), frozen)
    jax.eval_shape(update, state, base, shapes)


def _row(table: Table, what: str, shapes: Any, axes: Any, mesh: MeshConfig, rules: Any) -> None:
    devices = _abstract(mesh)
    specs = param_specs(axes, shapes, devices, rules)
    leaves = jax.tree.leaves(shapes)
    parts = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
    held = sum(
        _bytes(leaf, NamedSharding(devices, spec)) for leaf, spec in zip(leaves, parts, strict=True)
    )
    table.add_row(
        what, f"{sum(leaf.size for leaf in leaves):,}", _gib(sum(map(_bytes, leaves))), _gib(held)
    )


def _cache_row(
    table: Table, name: str, model: ModelConfig, sizes: SamplerConfig, mesh: MeshConfig
) -> None:
    devices = _abstract(mesh)
    copies = kv_copies(model.num_heads, model.num_kv_heads, devices)
    arrays = jax.tree.leaves(
        jax.eval_shape(lambda: make_cache(model, sizes.num_slots, sizes.max_len, copies=copies))
    )
    sharding = cache_sharding(model.num_kv_heads * copies, devices)
    held = sum(_bytes(leaf, sharding) for leaf in arrays)
    table.add_row(
        f"{name} cache, {sizes.num_slots} slots x {sizes.max_len} tokens",
        "",
        _gib(sum(map(_bytes, arrays))),
        _gib(held),
    )


def _abstract(mesh: MeshConfig) -> AbstractMesh:
    return AbstractMesh((mesh.data, mesh.fsdp, mesh.tensor), AXES)


def _bytes(leaf: Any, sharding: NamedSharding | None = None) -> int:
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return int(np.prod(shape)) * leaf.dtype.itemsize


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
