"""LoRA adapters in PEFT's format: there and back, and the weights that the format stands for."""

import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ictjax.config import LoraConfig
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.models.hf.layout import layout
from ictjax.models.lora import init_adapter, merge
from ictjax.models.peft import load_adapter, save_adapter

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora to True"),
        ({"bias": "all"}, "bias to 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ],
)
def test_refuses_other_adapters(folder, changes, message):
    data = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(data | changes))
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, MODEL)


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
