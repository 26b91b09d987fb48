"""experiments.generate: tokens, chat, conversations and bad input, on tiny random checkpoints."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
import transformers

from experiments import generate
from ictjax.chat import ChatTokenizer
from ictjax.config import LoraConfig
from ictjax.models.config import ModelConfig
from ictjax.models.hf import load_checkpoint, save_checkpoint
from ictjax.models.int8 import int8_weights
from ictjax.models.lora import init_adapter, merge
from ictjax.models.peft import save_adapter
from ictjax.models.transformer import abstract_params, forward, unembed
from ictjax.records import Message
from ictjax.sampler import Generation, Request
from tests.tiny import byte_tokenizer

CONFIG = ModelConfig(
    vocab_size=260,
    num_layers=1,
    d_model=16,
    d_ff=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=96,
    rope_theta=100.0,
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    rng = np.random.default_rng(0)
    save_checkpoint(
        folder,
        CONFIG,
        jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_params(CONFIG)
        ),
    )
    return folder


@pytest.fixture(scope="module")
def talking(bare, tmp_path_factory):
    """The same with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("talking")
    save_checkpoint(folder, *load_checkpoint(bare))
    byte_tokenizer().save_pretrained(folder)
    return folder


def run(capsys, folder, *flags):
    """Text and the JSON line of one call."""
    generate.main(["--model", str(folder), "--json", *flags])
    text, _, last = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    return text, json.loads(last)


def test_tokens_in_and_out_without_a_tokenizer(capsys, bare):
    prompt = [5, 250, 17]
    text, said = run(capsys, bare, "--tokens", "5,250,17", "--max-new-tokens", "13", "--greedy")
    assert list(said) == ["ids", "logprobs"]
    assert text == "".join(f"{token} " for token in said["ids"])
    assert len(said["ids"]) == len(said["logprobs"]) == 13
    # One forward pass over prompt and reply: every token is the likeliest, with that
    # log-probability.
    _, params = load_checkpoint(bare)
    logits = unembed(CONFIG, params, forward(CONFIG, params, np.array([prompt + said["ids"]])))[
        0, len(prompt) - 1 : -1
    ]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_array_equal(logprobs.argmax(-1), said["ids"])
    np.testing.assert_allclose(logprobs.max(-1), said["logprobs"], atol=1e-5)


def test_how_the_model_is_held(capsys, bare):
    prompt, flags = "5,250,17,5,250,17,5,250", ["--max-new-tokens", "16", "--greedy"]
    both = "--weights int8 --dtype mixed"
    rounding = ("--weights int8", "--cache int8", "--dtype mixed", both)
    said = {
        held: run(capsys, bare, "--tokens", prompt, *flags, *held.split())[1]
        for held in ("", "--guessed-tokens 3", *rounding)
    }
    assert said["--guessed-tokens 3"]["ids"] == said[""]["ids"]
    config, params = int8_weights(*load_checkpoint(bare))
    ids = [int(token) for token in prompt.split(",")]
    rounded = said["--weights int8"]
    logits = unembed(
        config, params, forward(config, params, np.array([ids + rounded["ids"]], np.int32))
    )[0, len(ids) - 1 : -1]
    np.testing.assert_array_equal(logits.argmax(-1), rounded["ids"])
    np.testing.assert_allclose(jax.nn.log_softmax(logits).max(-1), rounded["logprobs"], atol=1e-5)
    # the first token already sees keys and values that were rounded
    first = [said[held]["logprobs"][0] for held in ("", *rounding)]
    assert len(set(first)) == 5
    np.testing.assert_allclose(first, first[0], atol=0.5)


def test_sampling_is_keyed_by_the_seed(capsys, bare):
    drawn = [
        run(
            capsys,
            bare,
            "--tokens",
            "1,2",
            "--max-new-tokens",
            "8",
            "--temperature",
            "2",
            "--top-p",
            "0.99",
            "--seed",
            seed,
        )[1]
        for seed in "331"
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0]["ids"] != drawn[2]["ids"]


def test_chat_equals_transformers_and_ends_with_the_stop_ids_of_the_generation_config(
    capsys, tmp_path
):
    torch = pytest.importorskip(
        "torch",
        reason="torch is not installed; it is needed only to compare with the PyTorch models",
    )
    from experiments import parity  # needs torch

    tokenizer = byte_tokenizer()
    case = parity.Case(
        family="qwen3", option="", changes={"vocab_size": len(tokenizer), "eos_token_id": 0}
    )
    theirs = parity.random_checkpoint(tmp_path, case)
    tokenizer.save_pretrained(tmp_path)
    plain = [{"role": "system", "content": "play"}, {"role": "user", "content": "door"}]
    prompt = tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    free = theirs.generate(
        prompt,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        attention_mask=torch.ones_like(prompt),
    )
    expected = free[0, prompt.shape[1] :].tolist()
    stop = next(index for index in range(3, 12) if expected[index] not in expected[:index])
    transformers.GenerationConfig(eos_token_id=[expected[stop], 1]).save_pretrained(tmp_path)
    flags = ["--prompt", "door", "--system", "play", "--greedy", "--max-new-tokens", "12"]
    text, said = run(capsys, tmp_path, *flags)
    assert said["ids"] == expected[: stop + 1]
    assert text == tokenizer.decode(said["ids"], skip_special_tokens=True)
    assert run(capsys, tmp_path, *flags, "--ignore-stop")[1]["ids"] == expected


def test_a_conversation_is_one_growing_sequence(capsys, talking):
    said, prompts = [], iter(["one", "  ", "two", None])
    args = generate.GenerateArgs(model=str(talking), greedy=True, max_new_tokens=5, json=True)
    generate.generate(args, said.append, lambda: next(prompts))
    first, second = (json.loads(piece)["ids"] for piece in said if piece.startswith('{"ids"'))
    chat = ChatTokenizer(talking)
    stopped = first[-1] in chat.stop_ids
    grown = chat.encode_start([Message(role="user", content="one")])
    grown += (*first, *chat.encode_turn(Message(role="user", content="two"), stopped=stopped))
    tokens = ",".join(map(str, grown))
    assert len(grown) > 64
    assert (
        run(capsys, talking, "--tokens", tokens, "--greedy", "--max-new-tokens", "5")[1]["ids"]
        == second
    )


def test_an_adapter_is_put_on_the_model(capsys, bare, tmp_path):
    lora = LoraConfig(rank=2, targets=("q", "down"))
    adapter = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1, init_adapter(CONFIG, lora, jax.random.key(0))
    )
    save_adapter(tmp_path / "adapter", CONFIG, lora, adapter, base=str(bare))
    save_checkpoint(tmp_path / "merged", CONFIG, merge(lora, load_checkpoint(bare)[1], adapter))
    flags = ["--tokens", "9,8,7", "--max-new-tokens", "6", "--greedy"]
    adapted, merged = (
        run(capsys, bare, *flags, "--adapter", str(tmp_path / "adapter"))[1],
        run(capsys, tmp_path / "merged", *flags)[1],
    )
    assert adapted["ids"] == merged["ids"]
    np.testing.assert_allclose(adapted["logprobs"], merged["logprobs"], atol=1e-5)


def test_raw_text_is_continued_as_it_stands(capsys, talking):
    flags = ["--greedy", "--max-new-tokens", "4"]
    ids = byte_tokenizer()("<|im_start|>hi")["input_ids"]
    raw = run(capsys, talking, "--prompt", "<|im_start|>hi", "--raw", *flags)
    assert raw == run(capsys, talking, "--tokens", ",".join(map(str, ids)), *flags)


class SlowSampler:
    """Samples the bytes of a text one by one."""

    def __init__(self, ids):
        self._ids, self._count = ids, 0

    def generate(self, conversation, request):
        assert conversation == 7
        self._ends = request.ends

    def step(self):
        self._count += 1
        ids = self._ids[: self._count]
        kept = self._ends(ids)
        if kept is None and self._count < len(self._ids):
            return []
        ids = ids[:kept]
        return [Generation(conversation=7, ids=ids, logprobs=(0.0,) * len(ids), finish="length")]


def typed(text, *, num_ids=None, stop=()):
    """What is shown of a reply of these bytes, piece by piece."""
    tokenizer, pieces = byte_tokenizer(), []
    sampler = SlowSampler(tuple(tokenizer(text)["input_ids"][:num_ids]))
    request = Request(
        max_new_tokens=9,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        stop_ids=(),
        key=np.zeros(2, np.uint32),
    )
    typist = generate.Typist(sampler, tokenizer.decode, pieces.append, stop=stop, with_json=False)
    typist.reply(7, request)
    return [piece for piece in pieces if piece]


def test_text_comes_as_it_is_sampled_whole_characters_at_a_time():
    assert typed("né🙂!") == ["n", "é", "🙂", "!", "\n"]
    assert typed("é", num_ids=1) == ["\ufffd", "\n"]
    assert typed("né🙂!", stop=("🙂?", "🙂!")) == ["n", "é", "\n"]


def refused(capsys, *argv):
    """Asserts exit code 2 and gives the one sentence."""
    with pytest.raises(SystemExit) as ended:
        generate.main([str(argument) for argument in argv])
    out, errors = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert errors.startswith("ictjax: ")
    assert errors.count("\n") == 1
    return errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "", "--raw"], "--raw continues a prompt"),
        (["--prompt", "x", "--tokens", "1"], "Both --prompt and --tokens"),
        (["--prompt", "x" * 96], "tokens, the model 96 positions"),
        (["--prompt", "x", "--thinking", "False"], "no thinking switch"),
        (["--prompt", "x", "--raw", "--system", "y"], "--system is for the chat template"),
        (["--tokens", "1,two"], "give ids as 1,2,3"),
        (["--tokens", ""], "give ids as 1,2,3"),
        (
            ["--tokens", "1,260"],
            "--tokens holds 260, which is not in the model's vocabulary, 0 to 259",
        ),
        (["--tokens=-1"], "--tokens holds -1"),
        (
            ["--tokens", "1", "--max-new-tokens", "0"],
            "--max-new-tokens must be a whole number from 1 to 16,777,216, got 0",
        ),
        (["--tokens", "1", "--top-p", "0"], "--top-p must be from 1e-06 to 1, got 0"),
        (
            ["--tokens", "1", "--temperature", "-1"],
            "--temperature must be 0, or from 0.001 to 100, got -1",
        ),
        (["--tokens", "1", "--adapter", "nowhere"], "adapter_config.json"),
        (["--tokens", "1", "--dtype", "int8"], "int8"),
        ([], "--prompt is missing"),
    ],
)
def test_bad_flags_are_one_sentence(capsys, monkeypatch, talking, flags, words):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert words in refused(capsys, "--model", talking, *flags)


def test_bad_models_are_one_sentence(capsys, bare, talking, tmp_path):
    assert "--model" in refused(capsys, "--model", tmp_path, "--tokens", "1")
    assert "tokenizer_config.json is missing" in refused(capsys, "--model", bare, "--prompt", "x")
    for folder in (bare, talking):
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 7)
    assert "model.safetensors cannot be read" in refused(
        capsys, "--model", tmp_path, "--tokens", "1"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    assert "has the id 258, but the model has embeddings of 200 ids" in refused(
        capsys, "--model", tmp_path, "--tokens", "1"
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "int8"}))
    assert "int8" in refused(capsys, "--model", tmp_path, "--tokens", "1")


def test_help_names_the_flags(capsys):
    with contextlib.suppress(SystemExit):
        generate.main(["--help"])
    text = capsys.readouterr().out
    assert all(
        flag in text
        for flag in (
            "--prompt",
            "--tokens",
            "--max-new-tokens",
            "--greedy",
            "--json",
            "--adapter",
            "--system",
        )
    )
