"""Supervised training: what is learned from, that packing changes nothing, that a run goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from experiments import limits
from experiments import sft as training
from experiments.commands import sft as command
from ictjax.chat import ChatTokenizer
from ictjax.config import BatchConfig, LearnerConfig, OptimizerConfig
from ictjax.json_lines import read_records
from ictjax.learner import init_state, make_optimizer, make_update, transformer_functions
from ictjax.models.attention import plain_rows
from ictjax.models.config import ModelConfig
from ictjax.models.hf import load_checkpoint, save_checkpoint
from ictjax.models.peft import load_adapter
from ictjax.models.transformer import forward, init_params, unembed
from ictjax.records import Message
from ictjax.sft import LIKELIHOOD, LOSS, cut, encode_chat, in_rows, pack_chats
from tests.test_cli import refused
from tests.tiny import byte_tokenizer


def talk(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": role, "content": text} for role, text in zip(roles, texts, strict=False)
    ]


TALKS = [
    talk("hi", "ok go", system="be kind"),
    talk("look", "I see", "and?", "no more"),
    talk("a", "b"),
    talk("where to?", "north", "now?", "east", "then?", "stop"),
] * 3


def messages(chat):
    return [Message(role=message["role"], content=message["content"]) for message in chat]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "model"
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        vocab_size=len(tokenizer),
        num_layers=2,
        d_model=32,
        d_ff=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_positions=512,
    )
    save_checkpoint(folder, config, init_params(config, jax.random.key(0)))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in TALKS))
    return path


def stop_after_some_steps(monkeypatch):
    """The sixth look at whether to stop ends the training, as a machine that goes away does."""
    looks = iter(range(5))

    def stop():
        if next(looks, None) is None:
            raise RuntimeError("the machine went away")

    monkeypatch.setattr(training, "check", stop)


def test_a_chat_is_what_a_model_would_have_lived(model):
    tokenizer = ChatTokenizer(model)
    chat = encode_chat(tokenizer, messages(TALKS[1]))
    texts = [tokenizer.decode(chat.ids[start:end]) for start, end in chat.replies]
    assert texts == ["I see", "no more"]
    assert {chat.ids[end - 1] for _, end in chat.replies} <= set(tokenizer.stop_ids)
    first, second = chat.replies
    assert chat.ids[: first[0]] == tokenizer.encode_start(messages(TALKS[1])[:1])
    between = tokenizer.encode_turn(Message(role="user", content="and?"), stopped=True)
    assert chat.ids[first[1] : second[0]] == between
    assert chat.num_targets == sum(end - start for start, end in chat.replies)
    short = cut(chat, second[0] + 2)
    assert (len(short.ids), short.replies[-1]) == (second[0] + 2, (second[0], second[0] + 2))
    for roles in (["user"], ["assistant"], ["user", "user", "assistant"], ["system"], []):
        with pytest.raises(ValueError, match="a chat is an optional system message"):
            encode_chat(tokenizer, [Message(role=role, content="x") for role in roles])


def test_every_chat_is_in_one_row_that_holds_it():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 200).tolist()
    order = rng.permutation(200).tolist()
    batches = list(in_rows(lengths, order, num_rows=3, row_tokens=40))
    rows = [row for batch in batches for row in batch]
    assert sorted(number for row in rows for number in row) == list(range(200))
    assert max(sum(lengths[number] for number in row) for row in rows) <= 40
    assert all(len(batch) == 3 for batch in batches)
    assert sum(lengths) / (40 * len(rows)) > 0.7  # little is padding


def test_the_loss_is_that_of_the_replies_each_chat_alone(model):
    tokenizer = ChatTokenizer(model)
    config, params = load_checkpoint(model, dtype="float32")
    chats = [encode_chat(tokenizer, messages(chat)) for chat in TALKS[:4]]
    count = sum(chat.num_targets for chat in chats)

    @jax.jit
    @jax.value_and_grad
    def alone(weights):
        total = 0.0
        for chat in chats:
            ids = jnp.array([chat.ids])
            hidden = forward(config, weights, ids, seen=plain_rows(jnp.ones(ids.shape, bool)))
            logp = jax.nn.log_softmax(unembed(config, weights, hidden), axis=-1)
            for start, end in chat.replies:
                places = jnp.arange(start, end)
                total -= logp[0, places - 1, ids[0, places]].sum()
        return total / count

    loss, gradients = alone(params)
    norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradients)))
    size = sum(len(chat.ids) for chat in chats)
    functions = transformer_functions(config, remat="none")
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0))
    for rows, num_rows, parts in (
        ([chats], 1, 1),
        ([[c] for c in chats], 6, 2),  # two rows are padding
        ([chats[:1], chats[1:]], 6, 3),  # two microbatches of nothing else
    ):
        sizes = BatchConfig(num_rows=num_rows, token_buckets=(size,), response_buckets=(size,))
        batch = pack_chats(sizes, rows, tokenizer.pad_id)
        update = make_update(
            functions, LIKELIHOOD, optimizer, LearnerConfig(num_microbatches=parts)
        )
        _, metrics = update(init_state(params, optimizer), None, batch)
        assert float(metrics["tokens"]) == count
        np.testing.assert_allclose(float(metrics[LOSS]), loss, rtol=1e-5)
        np.testing.assert_allclose(float(metrics["grad_norm"]), norm, rtol=1e-4)


def flags(model, data, out, *more):
    return [
        *("--model", str(model), "--data", str(data), "--out", str(out), "--dtype", "float32"),
        *("--rank", "4", "--rows", "2", "--row-tokens", "192", "--learning-rate", "0.02"),
        *("--epochs", "10", "--every", "3", "--warmup-steps", "2", *more),
    ]


def adapter(model, out):
    config = load_checkpoint(model, dtype="float32")[0]
    return load_adapter(out, config)[1]


def test_training_learns_and_goes_on_where_it_was_stopped(
    model, data, tmp_path, monkeypatch, capsys
):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command.main(flags(model, data, whole))
    lines = read_records(whole / "metrics.jsonl").values
    losses = [line["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.1  # of a random model whose head stays as it is
    measured = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert measured[-1] < measured[0]
    record = json.loads((whole / "sft.json").read_text())
    assert record["result"] == {
        "steps": len(lines),
        "held_out_loss": pytest.approx(measured[-1]),
        "dtype": "float32",
    }
    assert record["counts"] == {"chats": 12, "overlong": 0, "trained_on": 11, "held_out": 1}
    assert f"--adapter {whole}" in capsys.readouterr().out.replace("\n", "")

    stop_after_some_steps(monkeypatch)
    with pytest.raises(RuntimeError, match="went away"):
        command.main(flags(model, data, stopped))
    assert not (stopped / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    command.main(flags(model, data, stopped))
    assert "Going on after step 3" in capsys.readouterr().out
    again = read_records(stopped / "metrics.jsonl").values
    assert [line["loss"] for line in again] == losses
    jax.tree.map(np.testing.assert_array_equal, adapter(model, whole), adapter(model, stopped))
    command.main(flags(model, data, stopped))
    assert "is finished" in capsys.readouterr().out


def test_training_goes_on_on_another_mesh_and_with_files_that_moved(
    model, data, tmp_path, monkeypatch, capsys
):
    """Two rows a step on eight devices, or in three microbatches: the rest is padding, and the same
    is learned.
    """
    whole, out, few = tmp_path / "whole", tmp_path / "out", ("--epochs", "2")
    command.main(flags(model, data, whole, *few))
    stop_after_some_steps(monkeypatch)
    with pytest.raises(RuntimeError, match="went away"):
        command.main(flags(model, data, out, *few))
    monkeypatch.undo()
    moved = data.rename(tmp_path / "moved.jsonl")
    elsewhere = flags(model, moved, out, *few, "--fsdp", "8", "--remat", "full")
    command.main(elsewhere)
    said = capsys.readouterr().out
    assert "Going on after step 3" in said and "steps of 2 x 192 tokens and 6 rows" in said
    parts = tmp_path / "parts"
    command.main(flags(model, moved, parts, *few, "--microbatches", "3"))
    assert "2 x 192 tokens and 1 row of padding" in capsys.readouterr().out
    losses, *others = (
        [line["loss"] for line in read_records(folder / "metrics.jsonl").values]
        for folder in (whole, out, parts)
    )
    for other in others:
        np.testing.assert_allclose(other, losses, rtol=1e-3)
    results, *others = (
        json.loads((folder / "sft.json").read_text())["result"] for folder in (whole, out, parts)
    )
    for other in others:
        assert other["held_out_loss"] == pytest.approx(results["held_out_loss"], rel=1e-3)
    command.main(flags(model, moved, out, *few, "--microbatches", "2"))
    assert "is finished" in capsys.readouterr().out
    apart = flags(model, moved, out, *few, "--held-out", str(moved))
    refused(capsys, command.main, apart, "another value of the held_out (None, now")


def test_training_starts_from_an_adapter(model, data, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    command.main(flags(model, data, first))
    command.main(flags(model, data, second, f"--adapter={first}", "--epochs=1"))
    losses = [
        [line["loss"] for line in read_records(out / "metrics.jsonl").values]
        for out in (first, second)
    ]
    assert losses[1][0] < losses[0][0] - 0.1
    assert "adapter" in json.loads((second / "sft.json").read_text())["sha256"]
    third = flags(model, data, tmp_path / "third", f"--adapter={first}")
    assert "give --rank 4" in refused(capsys, command.main, [*third, "--rank=2"], "--rank 4")
    assert "leave one out" in refused(capsys, command.main, [*third, "--rank=0"], "--adapter")
    nowhere = flags(model, data, tmp_path / "third", f"--adapter={tmp_path}")
    assert "No adapter in" in refused(capsys, command.main, nowhere, "--adapter")


def test_what_was_trained_is_written_though_it_ended_just_before(
    model, data, tmp_path, monkeypatch, capsys
):
    out, short = tmp_path / "out", ("--epochs", "1")

    def refuse(*_args, **_options):
        raise RuntimeError("the disk went away")

    monkeypatch.setattr(training, "save_adapter", refuse)
    with pytest.raises(RuntimeError, match="went away"):
        command.main(flags(model, data, out, *short))
    monkeypatch.undo()
    monkeypatch.setattr(training, "save_adapter", lambda folder, *_, **__: written.append(folder))
    written = []
    command.main(flags(model, data, out, *short))
    assert written == [out]
    record = json.loads((out / "sft.json").read_text())
    last = read_records(out / "metrics.jsonl").values[-1]
    assert record["result"]["held_out_loss"] == pytest.approx(last["held_out_loss"])
    monkeypatch.undo()
    capsys.readouterr()
    command.main(flags(model, data, out, *short))
    assert "is finished" in capsys.readouterr().out
    # in another dtype it is written again, and nothing is trained
    command.main(flags(model, data, out, *short, "--save-dtype", "bfloat16"))
    assert len(read_records(out / "metrics.jsonl").values) == last["iteration"]
    with safe_open(out / "adapter_model.safetensors", framework="numpy") as file:
        name = next(iter(file.keys()))
        assert file.get_slice(name).get_dtype() == "BF16"
    command.main(flags(model, data, out, *short, "--save-dtype", "bfloat16"))
    assert "is finished" in capsys.readouterr().out


def test_all_weights_on_a_mesh(model, data, tmp_path):
    more = ("--rank", "0", "--rows", "8", "--epochs", "10")
    command.main(flags(model, data, tmp_path / "one", *more))
    command.main(flags(model, data, tmp_path / "many", *more, "--data-parallel", "8"))
    one, many = (
        [line["loss"] for line in read_records(tmp_path / name / "metrics.jsonl").values]
        for name in ("one", "many")
    )
    np.testing.assert_allclose(one, many, rtol=1e-3)
    assert one[-1] < 0.7 * one[0]
    before, after = (load_checkpoint(folder)[1] for folder in (model, tmp_path / "one"))
    assert not np.array_equal(before["embed"], after["embed"])
    assert ChatTokenizer(tmp_path / "one").pad_id == ChatTokenizer(model).pad_id


@pytest.mark.parametrize("rank", ["4", "0"])
def test_products_of_bfloat16_learn_what_float32_learns(model, data, tmp_path, rank):
    losses = []
    for dtype in ("float32", "mixed"):
        out = tmp_path / dtype
        command.main(flags(model, data, out, "--epochs", "2", "--rank", rank, "--dtype", dtype))
        losses.append([line["loss"] for line in read_records(out / "metrics.jsonl").values])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(*losses, rtol=0.02)
    # an adapter is written as it is trained, a model as its frozen weights are held
    written = json.loads((tmp_path / "mixed" / "sft.json").read_text())["result"]["dtype"]
    assert written == ("float32" if rank == "4" else "bfloat16")


def test_what_cannot_be_learned_from(model, data, tmp_path, capsys):
    out = tmp_path / "out"

    def refuse(*parts, more=(), of=data):
        refused(capsys, command.main, flags(model, of, out, *more), *parts)
        assert not (out / "sft.json").exists()

    refuse("12 of 12 chats", "longer than --row-tokens 8", more=("--row-tokens", "8"))
    refuse("exceeds the model's", more=("--row-tokens", "100000"))
    refuse("--rank 1000 exceeds the width", more=("--rank", "1000"))
    refuse("does not use all 8 devices", "--fsdp", more=("--fsdp", "2"))
    refuse("--data", "is no file", of=tmp_path / "none.jsonl")
    refuse("No model", of=data, more=("--model", str(tmp_path)))
    for line, complaint in (
        ('{"text": "x"}', 'it has no "messages"'),
        ('{"messages": [{"role": "user", "content": "x"}]}', "its messages are of user"),
        ("nonsense", "no JSON object"),
    ):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(data.read_text() + line + "\n" + line + "\n")
        refuse(complaint, of=bad)
    bad.write_text("")
    refuse("holds no chats", of=bad)


def test_a_mesh_that_does_not_divide_the_model(model, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limits, "SMALL", 0)
    words = flags(model, data, tmp_path / "out", "--tensor", "8")
    refused(capsys, command.main, words, "tensor = 8 does not divide num_heads = 2", "--tensor 2")
    assert not (tmp_path / "out").exists()


def test_long_chats_are_dropped_or_cut(model, data, tmp_path):
    chats = [encode_chat(ChatTokenizer(model), messages(chat)) for chat in TALKS]
    middle = chats[1].replies[0][0] + 1  # within the first reply of some, before that of others
    assert sum(len(chat.ids) > middle for chat in chats) == 6
    # of some nothing is left to learn from
    left = sum(cut(chat, middle).num_targets > 0 for chat in chats)
    assert 6 < left < 12
    for how, trained_on in (("drop", 6), ("cut", left)):
        out = tmp_path / how
        more = ("--row-tokens", str(middle), "--overlong", how, "--held-out-share", "0")
        more = (*more, "--epochs", "1")
        command.main(flags(model, data, out, *more))
        counts = json.loads((out / "sft.json").read_text())["counts"]
        assert (counts["trained_on"], counts["overlong"]) == (trained_on, 6)


def test_a_folder_of_other_training_is_left_alone(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    command.main(flags(model, data, out, "--epochs", "1"))
    before = (out / "sft.json").read_bytes()
    refused(capsys, command.main, flags(model, data, out, "--epochs", "2"), "--epochs", "now 2")
    data.write_text(data.read_text() + data.read_text())
    refused(capsys, command.main, flags(model, data, out, "--epochs", "1"), "the data")
    assert (out / "sft.json").read_bytes() == before
    other = tmp_path / "run"
    (other / "checkpoints").mkdir(parents=True)
    refused(capsys, command.main, flags(model, data, other), "the folder of something else")


def test_a_loss_that_is_not_finite_ends_it(model, data, tmp_path, capsys, monkeypatch):
    def broken(*_args, **_options):
        def update(state, base, batch):
            metrics = {LOSS: jnp.nan, "bad_leaves": 0, "tokens": 1, "grad_norm": 1, "skipped": 0}
            return state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

        return update

    monkeypatch.setattr(training, "make_update", broken)
    with pytest.raises(SystemExit) as ended:
        command.main(flags(model, data, tmp_path / "out"))
    assert ended.value.code == 1
    assert "The loss of step 1 is not finite: lower --learning-rate" in capsys.readouterr().err
