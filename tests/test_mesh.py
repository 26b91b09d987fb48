"""Where things lie on eight virtual devices, and that a model split over them computes the same."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from ictjax import mesh
from ictjax.batch import pack
from ictjax.config import (
    MESHES,
    PAPER,
    BatchConfig,
    LearnerConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
)
from ictjax.learner import (
    init_state,
    make_optimizer,
    make_update,
    state_shardings,
    transformer_functions,
)
from ictjax.models import lora, transformer
from ictjax.models.config import ModelConfig
from ictjax.sampler import sampling_weights

MODEL = ModelConfig(
    vocab_size=32, num_layers=1, d_model=16, d_ff=32, num_heads=8, num_kv_heads=4, head_dim=4
)
RANK_2 = LoraConfig(rank=2, alpha=4.0)


def test_rules_split_what_they_divide():
    abstract = AbstractMesh((1, 2, 4), mesh.AXES)
    shapes = {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}
    assert mesh.param_specs({"w": ("embed", "heads")}, shapes, abstract) == {
        "w": PartitionSpec("fsdp", "tensor")
    }
    # 4 does not divide 6
    assert mesh.param_specs({"w": ("heads", "embed")}, shapes, abstract) == {
        "w": PartitionSpec(None, "fsdp")
    }
    everywhere = AbstractMesh((2, 2, 2), mesh.AXES)
    shape = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    assert mesh.param_specs({"w": ("embed", "ff")}, shape, everywhere, mesh.TRAINED_RULES) == {
        "w": PartitionSpec(("data", "fsdp"), "tensor")
    }


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "tensor", "copies", "split"),
    [
        (28, 4, 4, 1, True),
        (8, 4, 8, 2, True),
        (8, 2, 8, 4, True),
        (8, 8, 4, 1, True),
        (28, 4, 8, 1, False),
        (4, 2, 8, 1, False),
    ],
)
def test_kv_heads_on_more_devices_than_there_are(num_heads, num_kv_heads, tensor, copies, split):
    abstract = AbstractMesh((1, 1, tensor), mesh.AXES)
    assert mesh.kv_copies(num_heads, num_kv_heads, abstract) == copies
    spec = mesh.cache_sharding(num_kv_heads * copies, abstract).spec
    assert spec == PartitionSpec("data", "tensor" if split else None)


def test_named_meshes_have_the_devices_of_their_names():
    single = ("v5e-1", "v6e-1", "l4", "a100", "h100", "h200")
    chips = {"v5e-4": 4, "v5e-8": 8, "v5e-16": 16, "v5e-64": 64, "v6e-4": 4, "v6e-8": 8, "v5p-8": 4}
    chips |= dict.fromkeys(single, 1) | dict.fromkeys(("a100-8", "h100-8", "h200-8"), 8)
    assert {name: roles.reflector.num_devices for name, roles in MESHES.items()} == chips
    # one base serves both
    assert all(roles.actor == roles.reflector for roles in MESHES.values())
    assert mesh.open_mesh(MESHES["h200"].actor) is None
    with pytest.raises(ValueError, match="mesh.tensor must be .*, got 0"):
        MeshConfig(tensor=0)
    with pytest.raises(ValueError, match="does not use all 8 devices"):
        mesh.open_mesh(MeshConfig(tensor=3))


def batch():
    rng = np.random.default_rng(0)
    # Two replies to each of eight prompts, which they share.
    prompts, replies = (
        [rng.integers(0, 32, int(n)).tolist() for n in rng.integers(2, 7, count)]
        for count in (8, 16)
    )
    shapes = BatchConfig(num_rows=8, replies_per_row=2, token_buckets=(16,), response_buckets=(8,))
    return pack(
        shapes,
        [prompt for prompt in prompts for _ in range(2)],
        replies,
        advantages=rng.normal(size=16).tolist(),
        pad_id=0,
    )


def updated(config, lora_config, devices):
    """State, metrics and the program of one update of the model, on devices or on one."""
    base = sampling_weights(config, transformer.init_params(config, jax.random.key(0)), devices)
    if lora_config.rank:
        trained, axes = (
            lora.init_adapter(config, lora_config, jax.random.key(1)),
            lora.adapter_axes(lora_config),
        )
        trained = jax.tree.map(lambda leaf: leaf + 0.1, trained)  # B is not zero
    else:
        trained, axes = (
            transformer.init_params(config, jax.random.key(2)),
            transformer.param_axes(config),
        )
    if devices is not None:
        trained = jax.device_put(
            trained, mesh.param_shardings(axes, trained, devices, mesh.TRAINED_RULES)
        )
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2))
    state = init_state(trained, optimizer)
    functions = transformer_functions(config, remat="full", lora=lora_config, mesh=devices)
    learner_config = LearnerConfig(num_microbatches=2, positions_per_chunk=4)
    update = make_update(
        functions,
        dataclasses.replace(PAPER, kl_coefficient=0.1),
        optimizer,
        learner_config,
        shardings=state_shardings(state),
    )
    before = state_shardings(state)
    state, metrics = update(state, base, mesh.split_rows(batch(), devices))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))
    return before, state, metrics


@pytest.mark.parametrize(
    ("lora_config", "sizes"),
    [(RANK_2, (2, 1, 4)), (LoraConfig(), (2, 2, 2))],
    ids=["lora_data2_tensor4", "all_data2_fsdp2_tensor2"],
)
def test_an_update_on_a_mesh_equals_the_one_on_one_device(lora_config, sizes):
    devices = mesh.make_mesh(*sizes)
    _, expected, expected_metrics = updated(MODEL, lora_config, None)
    before, state, metrics = updated(MODEL, lora_config, devices)
    chex.assert_trees_all_close(
        jax.device_get(metrics), jax.device_get(expected_metrics), rtol=1e-4, atol=1e-5
    )
    # Adam divides by the root of the squared gradient: where that is about 0, rounding decides the
    # sign of a step of 1e-2.
    for mine, theirs in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(expected.opt_state), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-6)
    after = state_shardings(state)
    assert jax.tree.all(
        jax.tree.map(
            lambda old, new, leaf: old.is_equivalent_to(new, leaf.ndim), before, after, state
        )
    )
    moments = state.opt_state[1][0]
    for name, leaf in (state.params if lora_config.rank else state.params["layers"]).items():
        first = (moments.mu if lora_config.rank else moments.mu["layers"])[name]
        assert first.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
    split = state.params["gate_lora_a"] if lora_config.rank else state.params["layers"]["gate"]
    parts = sizes[0] * sizes[1] * (1 if lora_config.rank else sizes[2])
    assert split.addressable_shards[0].data.size * parts == split.size


@pytest.mark.parametrize(("num_kv_heads", "sizes"), [(2, (1, 1, 8)), (4, (1, 2, 4))])
def test_logits_on_a_mesh_equal_those_on_one_device(num_kv_heads, sizes):
    config = dataclasses.replace(MODEL, num_kv_heads=num_kv_heads)
    params = jax.tree.map(
        lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf,
        transformer.init_params(config, jax.random.key(0)),
    )
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 32)
    devices = mesh.make_mesh(*sizes)
    activations = jax.NamedSharding(devices, PartitionSpec(*mesh.BATCH, None, None))
    placed = jax.device_put(
        params, mesh.param_shardings(transformer.param_axes(config), params, devices)
    )

    @functools.partial(jax.jit, static_argnums=2)
    def logits(params, tokens, activations):
        return transformer.unembed(
            config, params, transformer.forward(config, params, tokens, activations=activations)
        )

    chex.assert_trees_all_close(
        logits(placed, mesh.split_rows(tokens, devices), activations),
        jax.device_get(logits(params, tokens, None)),
        atol=1e-5,
    )
