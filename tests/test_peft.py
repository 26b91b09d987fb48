"""LoRA adapters in PEFT's format: there and back, and the weights that the format stands for."""

import json
import re

import chex
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ictjax.config import LoraConfig
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.models.hf.layout import layout
from ictjax.models.lora import init_adapter, merge
from ictjax.models.peft import load_adapter, read_lora, save_adapter
from tests.test_hf import JSON, refused

MODEL = ModelConfig(
    vocab_size=19,
    num_layers=2,
    d_model=12,
    d_ff=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_positions=64,
)
LORA = LoraConfig(rank=3, alpha=6.0)


def random_adapter(lora):
    shapes = init_adapter(MODEL, lora, jax.random.key(0))
    keys = dict(zip(shapes, jax.random.split(jax.random.key(1), len(shapes)), strict=True))
    return {name: jax.random.normal(keys[name], leaf.shape) for name, leaf in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path, MODEL, LORA, random_adapter(LORA), base="organisation/base")
    return tmp_path


@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=2, alpha=1.0, targets=("q", "v", "down"))])
def test_round_trip(tmp_path, lora):
    adapter = random_adapter(lora)
    save_adapter(tmp_path, MODEL, lora, adapter, base="organisation/base")
    again, loaded = load_adapter(tmp_path, MODEL)
    assert again == lora
    chex.assert_trees_all_equal(loaded, adapter)


def test_an_adapter_in_bfloat16_is_read_as_it_was_rounded(tmp_path):
    adapter = random_adapter(LORA)
    save_adapter(tmp_path, MODEL, LORA, adapter, base="organisation/base", dtype="bfloat16")
    with safe_open(tmp_path / "adapter_model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert read_lora(tmp_path) == LORA
    again, loaded = load_adapter(tmp_path, MODEL)
    assert again == LORA
    assert {leaf.dtype for leaf in loaded.values()} == {np.dtype("float32")}
    chex.assert_trees_all_equal(
        loaded, {name: leaf.astype("bfloat16").astype("float32") for name, leaf in adapter.items()}
    )


def test_files_are_what_peft_reads(folder):
    """The names of https://huggingface.co/docs/peft/developer_guides/checkpoint, and W + alpha / r
    B A = the weights that we merge.
    """
    data = json.loads((folder / "adapter_config.json").read_text())
    assert {
        name: data[name]
        for name in ("peft_type", "task_type", "r", "lora_alpha", "base_model_name_or_path")
    } == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 6.0,
        "base_model_name_or_path": "organisation/base",
    }
    assert sorted(data["target_modules"]) == sorted(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (
        3,
        12,
    )
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (12, 3)
    base = transformer.init_params(MODEL, jax.random.key(2))
    merged = merge(LORA, base, random_adapter(LORA))
    for name, tensor in layout(MODEL).items():
        if tensor.layer is None or not name.endswith("proj.weight"):
            continue
        before, after = (
            tensor.file_view(np.asarray(tree["layers"][tensor.path[1]][tensor.layer]))
            for tree in (base, merged)
        )
        a, b = (
            tensors[f"base_model.model.{name.removesuffix('weight')}lora_{letter}.weight"]
            for letter in "AB"
        )
        np.testing.assert_allclose(after, before + 6.0 / 3 * b @ a, rtol=1e-5, atol=1e-5)


def test_rank_stabilised_adapters_keep_their_scale(folder):
    data = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(data | {"use_rslora": True}))
    assert load_adapter(folder, MODEL)[0].scale == pytest.approx(6.0 / 3**0.5)


# What PEFT 0.18 writes for a plain adapter, beside what we write.
PLAIN = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_qalora": False,
}


def edit_config(folder, changes):
    data = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(data | changes))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_reads_what_peft_writes(folder, start):
    edit_config(folder, PLAIN | {"init_lora_weights": start})
    again, loaded = load_adapter(folder, MODEL)
    assert again == LORA
    chex.assert_trees_all_equal(loaded, random_adapter(LORA))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_dora": 1},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_pattern": ["layers"]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"alora_invocation_tokens": [1, 2]},
        {"arrow_config": {"top_k": 3}},
        {"corda_config": {"x": 1}},
        {"eva_config": {"rho": 2.0}},
        {"loftq_config": {"loftq_bits": 4}},
        {"use_qalora": True},
        {"megatron_config": {"x": 1}},
        {"use_bdlora": {"nblocks": 2}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": 1},
        {"a_variant_of_next_year": True},
    ],
    ids=str,
)
def test_refuses_variants_by_name(folder, changes):
    edit_config(folder, PLAIN | changes)
    (name,) = changes
    with pytest.raises(ValueError, match=rf"adapter_config\.json sets {name} to .*plain LoRA"):
        load_adapter(folder, MODEL)


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "LOHA", "TRAINABLE_TOKENS", None, 5, ["LORA"]])
def test_refuses_other_kinds(folder, kind):
    edit_config(folder, {"peft_type": kind})
    with pytest.raises(ValueError, match=f"has peft_type {re.escape(repr(kind))}: only LORA"):
        load_adapter(folder, MODEL)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("lora_alpha", value) for value in (None, 0, -1, float("nan"), float("inf"), "8", True)],
        *[("r", value) for value in (None, 0, -1, 10**30, 8.0, "8", True)],
        ("use_rslora", "yes"),
    ],
)
def test_refuses_sizes_that_make_no_sense(folder, name, value):
    edit_config(folder, {name: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json sets {name} to "):
        load_adapter(folder, MODEL)


@pytest.mark.parametrize("named", [["q_proj", "lm_head"], ["embed_tokens"], [5], ["x.y_proj"]])
def test_refuses_targets_without_factors(folder, named):
    edit_config(folder, {"target_modules": named})
    with pytest.raises(ValueError, match=r"names .* in target_modules, but"):
        load_adapter(folder, MODEL)


def test_refuses_a_target_whose_factors_are_missing(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".up_proj." not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="names 'up_proj' in target_modules"):
        load_adapter(folder, MODEL)
    edit_config(folder, {"target_modules": "all-linear"})
    assert "up" not in load_adapter(folder, MODEL)[0].targets


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
            "up_proj.lora_B.weight is missing",
        ),
        (
            lambda t: t.update(
                {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 12), np.float32)}
            ),
            "lm_head.lora_A.weight",
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.zeros(
                        (3, 5), np.float32
                    )
                }
            ),
            r"is \[3, 5\], expected \[3, 12\]",
        ),
        (lambda t: t.update({"x": np.zeros(3, np.int8)}), "holds x, which is not float32"),
        (lambda t: t.update({"x": np.full(3, np.nan, np.float32)}), "holds x, which is not finite"),
        (
            lambda t: t.update(
                {
                    "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector": np.ones(
                        20, np.float32
                    )
                }
            ),
            "lora_magnitude_vector, which is no projection",
        ),
    ],
)
def test_refuses_tensors_that_do_not_fit(folder, edit, message):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, MODEL)


def test_refuses_incomplete_folders(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(folder, MODEL)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_adapter(folder, MODEL)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [*PLAIN, "r", "lora_alpha", "target_modules", "use_rslora", "peft_type", "x"]
        ),
        JSON,
        min_size=1,
        max_size=3,
    )
)
def test_any_adapter_config_is_read_as_the_plain_one_or_refused(folder, changes):
    before = (folder / "adapter_config.json").read_text()
    edit_config(folder, changes)
    refusal = refused(lambda: load_adapter(folder, MODEL))
    (folder / "adapter_config.json").write_text(before)
    assert refusal == "" or (str(folder) in refusal and "\n" not in refusal)
