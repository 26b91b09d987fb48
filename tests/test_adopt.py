"""A run whose reflector was trained elsewhere."""

import json
import pathlib

import chex
import jax
import pytest

from experiments import evaluate, report, train
from experiments.commands import adopt
from experiments.presets import FAKE_TINY, model_folder
from experiments.run_dir import read_run
from ictjax.config import LoraConfig
from ictjax.models.hf.reader import read_config
from ictjax.models.lora import init_adapter
from ictjax.models.peft import load_adapter, save_adapter
from ictjax.players import restore_trained

LORA = LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))
_LORA_FLAGS = (
    "--reflector.lora.rank=2",
    "--reflector.lora.alpha=4",
    "--reflector.lora.targets",
    "q",
    "down",
)


@pytest.fixture
def adapter(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "adapter"
    model = read_config(pathlib.Path(model_folder(FAKE_TINY.reflector.model)))
    factors = jax.tree.map(lambda x: x + 0.5, init_adapter(model, LORA, jax.random.key(1)))
    save_adapter(folder, model, LORA, factors, base="fake")
    return folder


def _flags(adapter: pathlib.Path, run_dir: pathlib.Path) -> list[str]:
    return ["--preset=fake-tiny", f"--adapter={adapter}", f"--run-dir={run_dir}"]


def test_an_adapter_becomes_a_run_that_is_evaluated(tmp_path, adapter, capsys):
    run_dir = tmp_path / "a run"
    adopt.main([*_flags(adapter, run_dir), *_LORA_FLAGS])
    said = capsys.readouterr().out
    assert "is a run whose reflector is" in said
    assert f"try `ictjax evaluate --run-dir '{run_dir}'`" in said
    config = read_run(run_dir)
    model = read_config(pathlib.Path(model_folder(config.reflector.model)))
    step, trained = restore_trained(run_dir, config)
    assert step == config.iterations
    chex.assert_trees_all_equal(trained, load_adapter(adapter, model)[1])
    assert "adopted" in json.loads((run_dir / "manifest.json").read_text())

    evaluate.main([f"--run-dir={run_dir}", "--evaluation.families=bell", "--evaluation.runs=1"])
    results = json.loads((run_dir / "evaluation.json").read_text())
    assert {"untrained", "trained"} <= results["families"]["bell"]["arms"].keys()
    assert f"the adapter of {run_dir}" in results["protocol"]["pretraining"]
    report.main([f"--run-dir={run_dir}"])
    page = (run_dir / "report.html").read_text()
    assert "reflector trained elsewhere" in page and "0 of" not in page.partition("<h1")[0]
    capsys.readouterr()
    for command in (
        lambda: adopt.main([*_flags(adapter, run_dir), *_LORA_FLAGS]),
        lambda: train.main(["--preset=fake-tiny", f"--run-dir={run_dir}"]),
    ):
        with pytest.raises(SystemExit, match="2"):
            command()
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_adapter_of_another_rank_is_refused_with_the_flags_to_give(tmp_path, adapter, capsys):
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        adopt.main([*_flags(adapter, run_dir), "--reflector.lora.rank=3"])
    error = " ".join(capsys.readouterr().err.split())
    assert "--reflector.lora.rank 2 --reflector.lora.alpha 4" in error
    assert not run_dir.exists()


def test_a_mesh_of_other_devices_is_refused_with_the_flags_to_give(tmp_path, adapter, capsys):
    run_dir = tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        adopt.main([*_flags(adapter, run_dir), *_LORA_FLAGS, "--reflector.mesh.data=2"])
    error = " ".join(capsys.readouterr().err.split())
    assert "does not use all 8 devices" in error and "--reflector.mesh.*" in error
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("missing", "message"), [("--adapter", "--adapter is missing"), ("--run-dir", "--run-dir is")]
)
def test_what_is_missing_is_named(tmp_path, adapter, capsys, missing, message):
    flags = [x for x in _flags(adapter, tmp_path / "run") if not x.startswith(missing)]
    with pytest.raises(SystemExit, match="2"):
        adopt.main(flags)
    assert message in capsys.readouterr().err
