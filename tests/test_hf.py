"""Hugging Face checkpoints: round trip, clear refusals, and equal logits to the PyTorch model."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.models.hf import load_checkpoint, save_checkpoint

TINY = ModelConfig(
    vocab_size=67, num_layers=3, d_model=32, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=10_000.0, max_positions=64
)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path, TINY, transformer.init_params(TINY, jax.random.key(0)))
    return tmp_path


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": True}, {"dtype": "bfloat16", "param_dtype": "bfloat16"}, {"head_dim": 6}])
def test_round_trip(tmp_path, change):
    config = dataclasses.replace(TINY, **change)
    params = transformer.init_params(config, jax.random.key(0))
    save_checkpoint(tmp_path, config, params)
    loaded_config, loaded = load_checkpoint(tmp_path)
    assert loaded_config == config
    chex.assert_trees_all_equal(loaded, jax.tree.map(np.asarray, params))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_reads_shards(folder):
    _, expected = load_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for order, (name, tensor) in enumerate(tensors.items()):
        shards["ab"[order % 2] + ".safetensors"][name] = tensor
    weight_map = {name: shard for shard, content in shards.items() for name in content}
    for shard, content in shards.items():
        save_file(content, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    chex.assert_trees_all_equal(load_checkpoint(folder)[1], expected)
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks b\.safetensors"):
        load_checkpoint(folder)


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    data.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"model.extra": np.zeros(2, np.float32)}), r"unknown tensors: model\.extra"),
        (lambda t: t.update({"model.norm.weight": np.zeros(5, np.float32)}), r"model\.norm\.weight is \[5\], expected \[32\]"),
    ],
)
def test_names_bad_tensors(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "model_type 'mixtral' .* supported are Qwen2ForCausalLM"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "supported are Qwen2ForCausalLM"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}, "rope_type to 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor to 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types to 'chunked_attention'"),
        ({"dtype": "float64"}, "dtype to 'float64'"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ({"hidden_size": "wide"}, "cannot be read as qwen2 .*hidden_size"),
    ],
)
def test_refuses_other_architectures(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_refuses_incomplete_folders(folder):
    with pytest.raises(ValueError, match="neither a folder nor a Hugging Face id"):
        load_checkpoint(folder / "nowhere")
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has neither"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_checkpoint(folder)


def test_save_refuses_what_the_layout_cannot_hold(tmp_path):
    unbiased = dataclasses.replace(TINY, qkv_bias=False)
    with pytest.raises(ValueError, match="qkv_bias is False"):
        save_checkpoint(tmp_path, unbiased, transformer.init_params(unbiased, jax.random.key(0)))
    with pytest.raises(ValueError, match="save a model with its own config"):
        save_checkpoint(tmp_path, TINY, transformer.init_params(unbiased, jax.random.key(0)))
    assert not list(tmp_path.iterdir())


def test_older_config_fields():
    data = TINY.to_hf()
    for name in ("rope_parameters", "head_dim", "dtype"):
        del data[name]
    data |= {"torch_dtype": "float16", "rope_theta": 500.0}
    assert ModelConfig.from_hf(data) == dataclasses.replace(TINY, rope_theta=500.0, param_dtype="float16")


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(tmp_path, tied):
    """Both ways: our random weights read by transformers, and a folder that transformers wrote read by us."""
    torch = pytest.importorskip(
        "torch", reason="torch is not installed; it is needed only to compare with the PyTorch model (extra: parity)"
    )
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tied,
    )
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases start at zero and norms at one: move them, and make attention sharp
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    ours_config, ours = load_checkpoint(tmp_path / "theirs")
    assert ours_config.tie_embeddings is tied
    save_checkpoint(tmp_path / "ours", ours_config, ours)
    again = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = np.random.default_rng(0).integers(0, 67, (2, 21))
    logits = np.asarray(jax.jit(transformer.unembed, static_argnums=0)(ours_config, ours, transformer.forward(ours_config, ours, tokens)))
    for model in (theirs, again):
        with torch.no_grad():
            expected = model(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
