"""The reflector of a run as a Hugging Face folder or a PEFT adapter."""

import dataclasses
import errno
import json
import os

import chex
import jax
import numpy as np
import pytest
from tiny import save_tiny_model

from experiments import export
from experiments.presets import PRESETS
from ictjax.checkpoint import Checkpointer
from ictjax.config import LoraConfig
from ictjax.learner import init_state, make_optimizer
from ictjax.models.hf import load_checkpoint
from ictjax.models.lora import init_adapter, merge
from ictjax.models.peft import load_adapter
from ictjax.run_config import to_dict

LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))


def save_run(tmp_path, lora):
    """A run directory whose newest checkpoint (of iterations 1 and 2) holds weights of its own;
    returns them and the base.
    """
    save_tiny_model(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": 2}')
    model, base = load_checkpoint(tmp_path / "base")
    config = PRESETS["fake-tiny"].with_models(str(tmp_path / "base"), str(tmp_path / "base"))
    config = dataclasses.replace(config, reflector=dataclasses.replace(config.reflector, lora=lora))
    start = init_adapter(model, lora, jax.random.key(0)) if lora.rank else base
    trained = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.25), start)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(to_dict(config)))
    with Checkpointer(run_dir / "checkpoints") as checkpointer:
        for step, weights in ((1, start), (2, trained)):
            checkpointer.save(
                step, init_state(weights, make_optimizer(config.optimizer)), {"iteration": step}
            )
    return trained, base


def test_all_weights(tmp_path, capsys):
    trained, _ = save_run(tmp_path, LoraConfig())
    export.main(["--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert "iteration 2" in capsys.readouterr().out
    chex.assert_trees_all_equal(load_checkpoint(tmp_path / "out")[1], trained)
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / "base" / name
        ).read_bytes() or name == "config.json"
    with pytest.raises(SystemExit, match="2"):
        export.main(
            ["--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "adapter"), "--adapter"]
        )
    assert "trained all weights" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_adapter_merged_and_alone(tmp_path, capsys):
    trained, base = save_run(tmp_path, LORA)
    export.main(
        [
            "--run-dir",
            str(tmp_path / "run"),
            "--out",
            str(tmp_path / "merged"),
            "--dtype",
            "bfloat16",
        ]
    )
    model, merged = load_checkpoint(tmp_path / "merged")
    assert model.param_dtype == "bfloat16"
    chex.assert_trees_all_equal(
        merged, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), merge(LORA, base, trained))
    )
    export.main(["--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "alone"), "--adapter"])
    lora, adapter = load_adapter(tmp_path / "alone", model)
    assert lora == LORA
    chex.assert_trees_all_equal(adapter, trained)
    short = ["--run-dir", str(tmp_path / "run"), "--adapter", "--out", str(tmp_path / "short")]
    with pytest.raises(SystemExit, match="2"):
        export.main([*short, "--dtype", "float16"])
    assert "float16 has too small a range for an adapter" in capsys.readouterr().err
    export.main([*short, "--dtype", "bfloat16"])
    chex.assert_trees_all_equal(
        load_adapter(tmp_path / "short", model)[1],
        jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), trained),
    )


@pytest.mark.parametrize("flags", [[], ["--adapter"]])
@pytest.mark.parametrize("made", [False, True])
def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, capsys, monkeypatch, flags, made):
    save_run(tmp_path, LORA)
    out = tmp_path / "out"
    if made:
        out.mkdir()
    left = iter([None])  # one file is written before the disk is full

    def fsync(descriptor):
        if next(left, True):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit, match="2"):
        export.main(["--run-dir", str(tmp_path / "run"), "--out", str(out), *flags])
    error = capsys.readouterr().err
    assert f"ictjax: {out}/" in error
    assert "No space left on device; free some space and start it again" in error
    assert len(error.splitlines()) == 1
    assert out.exists() == made
    assert not made or not any(out.iterdir())


@pytest.mark.parametrize(
    ("run", "out", "message"),
    [
        ("nowhere", "new", "nowhere is no run directory"),
        ("empty", "new", "holds no checkpoint"),
        ("empty", "empty", "is not an empty folder"),
    ],
)
def test_bad_input_ends_with_one_sentence(tmp_path, capsys, run, out, message):
    save_tiny_model(tmp_path / "base")
    config = PRESETS["fake-tiny"].with_models(str(tmp_path / "base"), str(tmp_path / "base"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(to_dict(config)))
    with pytest.raises(SystemExit, match="2"):
        export.main(["--run-dir", str(tmp_path / run), "--out", str(tmp_path / out)])
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
