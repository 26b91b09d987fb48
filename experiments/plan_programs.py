"""The programs of a training run that need the most memory, lowered from shapes for devices that
may be elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.stages import Lowered, Traced

from experiments.limits import local_roles
from experiments.memory import trained_shapes
from experiments.shapes import adapter_shape, model_shape
from ictjax.batch import Batch, blank
from ictjax.config import MeshConfig, SamplerConfig
from ictjax.learner import (
    LearnerState,
    make_optimizer,
    make_update,
    state_shapes,
    state_shardings,
    transformer_functions,
)
from ictjax.mesh import BATCH, RULES, TRAINED_RULES, is_alone, make_mesh, param_shardings
from ictjax.models import transformer
from ictjax.models.attention_choice import attention_of, platform_of, resolve
from ictjax.models.config import ModelConfig
from ictjax.run_config import TrainConfig
from ictjax.sampler import (
    Blueprint,
    TurnShape,
    row_programs,
    sampling_shapes,
    turn_shapes,
    unstacked,
)

PARTS = frozenset(
    {
        "base",
        "trained",
        "optimizer",
        "actor weights",
        "actor cache",
        "reflector weights",
        "reflector cache",
    }
)
_PAD_ID = 0  # which id fills unused positions changes no program's size


class Program(NamedTuple):
    """One compilation, and what else is on the devices while it runs."""

    phase: str
    what: str  # its sizes, for people
    # everything that changes it: two programs with the same key are the same
    key: tuple[Any, ...]
    lower: Callable[[], Lowered]
    # parts (of `experiments.memory.Use`) that its arguments and results hold, and those beside them
    holds: frozenset[str]
    beside: frozenset[str]


def run_programs(
    config: TrainConfig, devices: Sequence[jax.Device], hosts: int
) -> Iterator[Program]:
    """Restore, update, and each sampler's largest prefill and decode.

    Args:
      config: of the run.
      devices: all that its meshes may use, real ones or those of a topology.
      hosts: that they are of.

    Raises:
      ValueError: attention or sizes that the devices or the models do not allow; nothing has to be
        compiled for that.
    """
    yield from _learner_programs(config, devices, hosts)
    for name, role, sizes in local_roles(config):
        model = model_shape(role)
        mesh = mesh_on(devices, role.mesh, hosts)
        lora = config.reflector.lora if name == "reflector" else adapter_shape(role)
        full = name == "reflector" and not config.reflector.lora.rank
        held = frozenset({f"{name} weights", f"{name} cache"})
        blueprint = Blueprint(config=model, sizes=sizes, pad_id=_PAD_ID, mesh=mesh)
        for phase, shape in _largest(sizes):
            appended = f" x {shape.length} tokens" if shape.length > 1 else ""
            yield Program(
                phase=f"{name} {phase}",
                what=f"{shape.num_rows} rows{appended}, {shape.attended} attended",
                key=("turn", shape, model, sizes, role.mesh, lora, full),
                lower=functools.partial(_turn, blueprint, mesh, shape, lora, full),
                holds=held,
                beside=PARTS - held,
            )


def num_programs(config: TrainConfig) -> int:
    """How many a training run compiles at its start: updates, turns, and moves of cache rows."""
    updates = len(config.batch.token_buckets) * len(config.batch.response_buckets)
    return updates + sum(
        len(list(turn_shapes(sizes))) + len(row_programs(sizes))
        for _, _, sizes in local_roles(config)
    )


def mesh_on(devices: Sequence[jax.Device], sizes: MeshConfig, hosts: int = 1) -> Mesh:
    """The mesh that a run has on these devices of so many hosts (`ictjax.mesh.open_mesh`); of one
    device, that one. Raises ValueError as `ictjax.mesh.check_sizes` does.
    """
    if is_alone(sizes, hosts):
        devices = devices[:1]
    return make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices=devices, hosts=hosts)


def _largest(sizes: SamplerConfig) -> Iterator[tuple[str, TurnShape]]:
    """Of each phase the program of the most rows and positions, which works in the cache itself
    where the rows are all slots, and always over pages; and the largest one that copies rows out
    of the cache.
    """
    shapes = list(turn_shapes(sizes))
    for phase, some in (
        ("prefill", [shape for shape in shapes if shape.length > 1]),
        ("decode", [shape for shape in shapes if shape.length == 1]),
    ):
        yield phase, max(some, key=lambda shape: shape.num_rows * shape.attended * shape.length)
    whole = (sizes.num_slots, sizes.max_len)
    copying = [shape for shape in shapes if (shape.num_rows, shape.attended) != whole]
    if copying and not sizes.page_size:
        yield (
            "copied rows",
            max(
                copying,
                key=lambda shape: (shape.num_rows * shape.attended, shape.length),
            ),
        )


def _turn(blueprint: Blueprint, mesh: Mesh, shape: TurnShape, lora: Any, full: bool) -> Lowered:
    model = blueprint.config
    stored = model.with_param_dtype("float32") if full else model
    params = sampling_shapes(stored, mesh, lora)
    return blueprint.turn(params, blueprint.cache_shapes(), shape)


def learner_state(config: TrainConfig, mesh: Mesh) -> LearnerState:
    """The state of the learner on shapes alone, in its places on the mesh."""
    trained, axes = trained_shapes(config, model_shape(config.reflector))
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        trained,
        param_shardings(axes, trained, mesh, TRAINED_RULES),
    )
    return state_shapes(placed, make_optimizer(config.whole_optimizer), config.optimizer.memory)


def _learner_programs(
    config: TrainConfig, devices: Sequence[jax.Device], hosts: int
) -> Iterator[Program]:
    role = config.reflector
    model, mesh = model_shape(role), mesh_on(devices, role.mesh, hosts)
    resolve(config.learner.attention, model, platform_of(mesh))
    if _referenced(config):
        yield Program(
            phase="restore",
            what="the frozen weights, layer by layer",
            key=("restore", model, role.mesh),
            lower=lambda: _restore(model, mesh, RULES, model),
            holds=frozenset({"base"}),
            beside=frozenset({"trained", "optimizer"}),  # caches come later
        )
    if not role.lora.rank:
        wide = model.with_param_dtype("float32")
        yield Program(
            phase="hand-over",
            what="the trained weights to the sampler",
            key=("hand-over", model, role.mesh),
            lower=lambda: _restore(wide, mesh, TRAINED_RULES, wide),
            holds=frozenset({"trained", "reflector weights"}),  # the old ones are gone by then
            beside=PARTS - {"trained", "reflector weights"},
        )
    num_tokens, num_responses = config.batch.token_buckets[-1], config.batch.response_buckets[-1]
    batch = blank(config.batch, num_tokens, num_responses, _PAD_ID)

    yield Program(
        phase="update",
        what=f"{config.batch.num_rows} rows x {num_tokens} tokens in"
        f" {config.learner.num_microbatches} parts",
        key=(
            "update",
            model,
            role.mesh,
            role.lora,
            bool(role.adapter),
            config.grpo,
            dataclasses.replace(config.whole_optimizer, learning_rate=1.0),
            config.learner,
            config.batch,
            config.remat,
        ),
        lower=lambda: trace_update(config, mesh, batch).lower(),
        holds=(learned := frozenset({"trained", "optimizer", "base"})),
        beside=PARTS - learned,
    )


def trace_update(config: TrainConfig, mesh: Mesh, batch: Batch[np.ndarray]) -> Traced:
    """The update of a run as it would be compiled for a mesh.

    Args:
      config: of the run.
      mesh: instead of the reflector's own.
      batch: of the shapes that it is traced for.
    """
    role = config.reflector
    model, state = model_shape(role), learner_state(config, mesh)
    attention = resolve(config.learner.attention, model, platform_of(mesh))
    functions = transformer_functions(
        model,
        remat=config.remat,
        lora=role.lora,
        mesh=mesh,
        attention=attention_of(attention, model, mesh),
    )
    step = make_update(
        functions,
        config.grpo,
        make_optimizer(config.whole_optimizer),
        config.learner,
        shardings=state_shardings(state),
    )
    base = sampling_shapes(model, mesh, adapter_shape(role)) if _referenced(config) else None
    rows = NamedSharding(mesh, BATCH)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), batch
    )
    return step.trace(state, base, shapes)


def _referenced(config: TrainConfig) -> bool:
    """Whether an update reads weights that are not trained."""
    return config.reflector.lora.rank > 0 or config.grpo.kl != "none"


def _restore(model: ModelConfig, mesh: Mesh, rules: Any, into: ModelConfig) -> Lowered:
    """Stacked weights, as they are read or trained, into the form that samples."""
    shapes = transformer.abstract_params(model)
    places = param_shardings(transformer.param_axes(model), shapes, mesh, rules)
    stacked = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    return unstacked(into, stacked["layers"], mesh)
