"""Hugging Face checkpoints: there and back, straight to a mesh, and clear refusals
(tests/test_parity.py compares with PyTorch).
"""

import contextlib
import dataclasses
import json
import re

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ictjax import mesh as meshes
from ictjax.models.config import ModelConfig, RopeScaling
from ictjax.models.hf import hub, load_checkpoint, reader, save_checkpoint
from ictjax.models.hf.reader import check_checkpoint
from ictjax.models.hf.translate import FAMILIES, model_from_hf, model_to_hf
from ictjax.models.transformer import param_axes

TINY = ModelConfig(
    vocab_size=67,
    num_layers=3,
    d_model=32,
    d_ff=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=10_000.0,
    max_positions=64,
)


SCALED = RopeScaling(kind="yarn", factor=4.0, original_max_positions=64, attention_factor=1.25)


def random_params(config):
    """NumPy weights in the tree of `init_params`."""
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(config.param_dtype)
    top, layers = config.weight_axes

    def weight(axes):
        return rng.standard_normal([config.axis_sizes[axis] for axis in axes]).astype(dtype)

    return {name: weight(axes) for name, axes in top.items()} | {
        "layers": {name: weight(axes) for name, axes in layers.items()}
    }


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path, TINY, random_params(TINY))
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": True},
        {"dtype": "bfloat16", "param_dtype": "bfloat16"},
        {"param_dtype": "float16", "head_dim": 6},
        {"rope_scaling": SCALED, "max_positions": 256},
        {"sliding_window": 7, "sliding_layers": (False, True, True)},
        {"family": "qwen3", "qk_norm": True, "qkv_bias": False},
        {
            "family": "llama",
            "o_bias": True,
            "mlp_bias": True,
            "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        },
        {
            "family": "llama",
            "qkv_bias": False,
            "rope_scaling": RopeScaling(
                kind="llama3", factor=8.0, original_max_positions=32, high_freq_factor=3.0
            ),
        },
        {
            "family": "gemma3_text",
            **FAMILIES["gemma3_text"].fixed,
            "qkv_bias": False,
            "activation": "gelu_tanh",
            "attention_scale": 24**-0.5,
            "sliding_window": 7,
            "sliding_layers": (True, False, True),
            "local_rope_theta": 500.0,
            "rope_scaling": RopeScaling(kind="linear", factor=8.0),
        },
    ],
    ids=str,
)
def test_round_trip(tmp_path, change):
    config = dataclasses.replace(TINY, **change)
    params = random_params(config)
    save_checkpoint(tmp_path, config, params)
    loaded_config, loaded = load_checkpoint(tmp_path)
    assert loaded_config == config
    chex.assert_trees_all_equal(loaded, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("sizes", [(1, 1, 8), (1, 2, 4), (2, 2, 2)])
def test_goes_straight_to_a_mesh(tmp_path, monkeypatch, sizes):
    """Equal to the weights that lie on one device; every shard is read once, however many devices
    hold it, and no more is read.
    """
    config = dataclasses.replace(TINY, num_heads=8, d_ff=48, vocab_size=64)
    params = random_params(config)
    save_checkpoint(tmp_path, config, params, max_shard_bytes=20_000)
    read = []
    read_shard = reader._read
    monkeypatch.setattr(reader, "_read", lambda *args: read.append(read_shard(*args)) or read[-1])
    mesh = meshes.make_mesh(*sizes)
    _, placed = load_checkpoint(tmp_path, mesh=mesh)
    chex.assert_trees_all_equal(placed, params)
    expected = meshes.param_shardings(param_axes(config), params, mesh)
    assert jax.tree.all(
        jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, placed, expected)
    )
    largest = max(
        shard.data.nbytes for leaf in jax.tree.leaves(placed) for shard in leaf.addressable_shards
    )
    assert (
        max(part.nbytes for part in read)
        == largest
        < max(leaf.nbytes for leaf in jax.tree.leaves(params))
    )
    assert sum(part.nbytes for part in read) == config.num_params * 4


def test_reads_only_its_part_of_the_file(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, num_heads=8, d_ff=48, vocab_size=64)
    save_checkpoint(tmp_path, config, random_params(config))
    parts = []

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_slice(self, name):
            stored = self.file.get_slice(name)
            return type(
                "Slice",
                (),
                {"__getitem__": lambda _, window: parts.append(stored[window]) or parts[-1]},
            )()

    plain = reader._open
    monkeypatch.setattr(reader, "_open", lambda path: Counted(plain(path)))
    shape = jax.ShapeDtypeStruct((3, 32, 48), np.float32)
    sources = [
        (tensor, name, tmp_path / "model.safetensors")
        for name, tensor in reader.layout(config).items()
        if tensor.path[-1] == "gate"
    ]
    got = reader._read(shape, [slice(1, 3), slice(8, 16), slice(0, 12)], sources)
    np.testing.assert_array_equal(got, random_params(config)["layers"]["gate"][1:3, 8:16, :12])
    assert sum(part.nbytes for part in parts) == got.nbytes


def test_converts(folder):
    config, params = load_checkpoint(folder, dtype="bfloat16")
    assert config == dataclasses.replace(TINY, param_dtype="bfloat16")
    chex.assert_trees_all_equal(
        params, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), random_params(TINY))
    )


def test_progress_ends_at_the_total(folder):
    told = []
    load_checkpoint(folder, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (TINY.num_params * 4,) * 2
    assert told == sorted(told)


def test_export_keeps_what_the_source_has(folder, tmp_path):
    """Tokenizer and generation config are copied, config.json keeps the keys that we do not read,
    and old shards go.
    """
    edit_config(folder, eos_token_id=7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "tokenizer_config.json").write_text("{}")
    config, params = load_checkpoint(folder)
    out = tmp_path / "out"
    save_checkpoint(out, config, params, source=folder, max_shard_bytes=30_000)
    assert len(list(out.glob("model-0*.safetensors"))) > 1
    save_checkpoint(out, config.with_param_dtype("bfloat16"), params, source=folder)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "config.json").read_text()) == {
        **json.loads((folder / "config.json").read_text()),
        "dtype": "bfloat16",
    }


def test_hub_ids_are_looked_up_in_the_local_cache(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "cache/models--tiny--qwen/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "cache/models--tiny--qwen/refs").mkdir()
    (tmp_path / "cache/models--tiny--qwen/refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ValueError,
        match=(
            "'tiny/qwen' is no folder, not in the local Hugging Face cache, and the hub cannot be"
            " reached: .*hf download"
        ),
    ):
        load_checkpoint("tiny/qwen")
    snapshot.symlink_to(folder)
    assert hub.local_folder("tiny/qwen") == snapshot
    assert load_checkpoint("tiny/qwen")[0] == TINY


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
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in data.items() if value is not None})
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"missing tensors: model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.extra": np.zeros(2, np.float32)}),
            r"unknown tensors: model\.extra",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(5, np.float32)}),
            r"model\.norm\.weight is \[5\], expected \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}),
            r"not float32, bfloat16, float16 .*model\.norm\.weight is I8",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(32, ml_dtypes.float8_e4m3fn)}),
            r"model\.norm\.weight is F8_E4M3",
        ),
    ],
)
def test_names_bad_tensors(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
            "model_type 'mixtral' .* supported are Qwen2ForCausalLM",
        ),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "supported are Qwen2ForCausalLM"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}},
            "rope_type to 'dynamic'",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor to 0.5",
        ),
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
    whole = (folder / "model.safetensors").read_bytes()
    for broken in (whole[: len(whole) // 2], b"\0" * 20, b""):
        (folder / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read .*: download it again"):
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
    with pytest.raises(ValueError, match="qkv_bias is False, which a qwen2 checkpoint cannot hold"):
        save_checkpoint(tmp_path, unbiased, random_params(unbiased))
    with pytest.raises(ValueError, match="save a model with its own config"):
        save_checkpoint(tmp_path, TINY, random_params(unbiased))
    assert not list(tmp_path.iterdir())


def test_older_config_fields():
    data = model_to_hf(TINY)
    for name in ("rope_parameters", "head_dim", "dtype"):
        del data[name]
    data |= {"torch_dtype": "float16", "rope_theta": 500.0}
    assert model_from_hf(data) == dataclasses.replace(TINY, rope_theta=500.0, param_dtype="float16")


def test_refuses_a_tokenizer_with_more_ids_than_embeddings(folder):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{index}": index for index in range(67)}, unk_token="w0")
    )
    backend.save(str(folder / "tokenizer.json"))
    load_checkpoint(folder)
    backend.add_special_tokens(["<new>"])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"tokenizer.json has the id 67, but the model has embeddings of 67 ids"
    ):
        load_checkpoint(folder)


def shards_of(folder, names=("a.safetensors", "b.safetensors")):
    """Splits the weights in two, with an index; the single file stays."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: names[order % 2] for order, name in enumerate(tensors)}
    for shard in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "../../a", "..", ".", "", "sub/a.safetensors", "a\\b", "a\0b"]
)
def test_an_index_names_files_of_its_folder_only(folder, name):
    weight_map = shards_of(folder)
    (folder / "model.safetensors").unlink()
    outside = folder.parent / "a.safetensors"
    (folder / "a.safetensors").rename(outside)
    for wrong in (name, str(outside)):
        index = {"weight_map": {n: wrong if s[0] == "a" else s for n, s in weight_map.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"index\.json names '.*', which is no file of this"):
            load_checkpoint(folder)


def test_files_of_an_index_may_be_links(folder):
    shards_of(folder)
    (folder / "model.safetensors").unlink()
    blob = folder.parent / "blob"
    (folder / "a.safetensors").rename(blob)
    (folder / "a.safetensors").symlink_to(blob)
    load_checkpoint(folder)
    blob.unlink()
    with pytest.raises(ValueError, match=r"lacks a\.safetensors, which .*index\.json names: downl"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["c" * 300, "c.safetensors"])
def test_a_file_that_an_index_names_is_missing(folder, name):
    shards_of(folder, names=("a.safetensors", "b.safetensors"))
    (folder / "model.safetensors").unlink()
    text = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").write_text(text.replace("b.safetensors", name))
    with pytest.raises(ValueError, match=f"lacks {name[:200]}, which"):
        load_checkpoint(folder)


def test_old_shards_beside_new_weights_are_refused(folder):
    shards_of(folder)
    with pytest.raises(
        ValueError,
        match=r"weights twice, model\.safetensors and those of .*\(a\.safetensors\): remove",
    ):
        load_checkpoint(folder)
    names = shards_of(folder)
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    chex.assert_trees_all_equal(load_checkpoint(folder)[1], random_params(TINY))


def test_a_tensor_in_two_files_is_refused(folder):
    shards_of(folder)
    (folder / "model.safetensors").unlink()
    shards = [load_file(folder / name) for name in ("a.safetensors", "b.safetensors")]
    save_file(shards[0] | dict([shards[1].popitem()]), folder / "a.safetensors")
    with pytest.raises(ValueError, match=r"two files: .* in a\.safetensors and b\.safetensors:"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}]
)
def test_an_index_without_map_is_named(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load_checkpoint(folder)


def test_what_is_left_of_a_download_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"has neither .*, only model-00001-of-00002\.safetensors: finish its"
    ):
        load_checkpoint(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(ValueError, match="pointer of Git LFS"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "no JSON object"),
        (b"", "is not JSON"),
    ],
)
def test_small_files_that_cannot_be_read_are_named(folder, text, message):
    for name in ("config.json", "model.safetensors.index.json"):
        before = (folder / name).read_bytes() if (folder / name).is_file() else None
        (folder / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            load_checkpoint(folder)
        if before is not None:
            (folder / name).write_bytes(before)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [NAN, INF, 0, 0.0, -1, -1e-6, None, "1", [], True])
def test_numbers_that_would_make_nan_are_refused(name, value):
    data = model_to_hf(TINY)
    data.pop("rope_parameters")
    with pytest.raises(ValueError, match=f"it sets {name} to .*, which is no positive number"):
        model_from_hf(data | {name: value})
    if name == "rope_theta":
        rope = {"rope_type": "default", name: value}
        with pytest.raises(ValueError, match=f"it sets {name} to .*, which is no positive number"):
            model_from_hf(data | {"rope_parameters": rope})


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"num_hidden_layers": 1_000_000, "layer_types": None}),
        ("qwen2", {"num_hidden_layers": 10**30}),
        ("qwen2", {"num_hidden_layers": 0, "layer_types": None}),
        ("qwen2", {"num_attention_heads": 0}),
        ("qwen2", {"head_dim": 0}),
        ("qwen2", {"head_dim": 10**30}),
        ("qwen2", {"vocab_size": -1}),
        ("qwen2", {"vocab_size": True}),
        ("qwen2", {"max_position_embeddings": 10**30}),
        ("qwen2", {"model_type": ["qwen2"]}),
        ("qwen2", {"model_type": {}}),
        ("qwen2", {"architectures": 5}),
        ("qwen2", {"architectures": "Qwen2ForCausalLM"}),
        ("qwen2", {"dtype": 0}),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0}}),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": NAN}}),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": INF}}),
        ("qwen2", {"rope_parameters": {"rope_type": [], "rope_theta": 1e4}}),
        ("gemma3_text", {"sliding_window": 0}),
        ("gemma3_text", {"sliding_window": 10**30}),
        ("gemma3_text", {"query_pre_attn_scalar": 0}),
        ("gemma3_text", {"query_pre_attn_scalar": -1}),
    ],
    ids=str,
)
def test_sizes_that_no_model_has_are_refused(family, changes):
    config = TINY
    if family == "gemma3_text":
        config = dataclasses.replace(
            TINY,
            family=family,
            **FAMILIES[family].fixed,
            qkv_bias=False,
            activation="gelu_tanh",
            attention_scale=24**-0.5,
            sliding_window=7,
            sliding_layers=(True, False, True),
            local_rope_theta=500.0,
        )
    data = model_to_hf(config)
    with pytest.raises(ValueError, match="^it "):
        model_from_hf(data | changes)


def test_a_refused_config_names_its_file(folder):
    edit_config(folder, rms_norm_eps=0.0)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(folder / 'config.json'))}: it sets rms_"
    ):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps", "local_rope_theta", "attention_scale"])
@pytest.mark.parametrize("value", [NAN, INF, 0.0, -1.0])
def test_a_model_has_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*: give a positive number"):
        dataclasses.replace(TINY, **{name: value})


def test_a_folder_is_checked_without_reading_weights(folder, monkeypatch):
    monkeypatch.setattr(reader, "_read", None)
    check_checkpoint(folder)
    edit_tensors(folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"missing tensors: model\.norm\.weight"):
        check_checkpoint(folder)


def refused(call):
    """What a call that may succeed is refused with; "" where it is not."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
CONFIG_KEYS = sorted({*model_to_hf(TINY), "torch_dtype", "rope_scaling", "quantization_config"})


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON, min_size=1, max_size=3))
def test_any_config_is_read_or_refused(changes):
    refusal = refused(lambda: model_from_hf(model_to_hf(TINY) | changes))
    assert refusal == "" or (refusal.startswith("it ") and "\n" not in refusal)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 400), bytes_=st.binary(min_size=1, max_size=9), cut=st.integers(0, 500))
def test_any_weights_are_read_or_refused(folder, at, bytes_, cut):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes((whole[:at] + bytes_ + whole[at + len(bytes_) :])[: len(whole) - cut])
        with contextlib.suppress(ValueError):
            check_checkpoint(folder)
    finally:
        path.write_bytes(whole)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_any_index_is_read_or_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        check_checkpoint(folder)
