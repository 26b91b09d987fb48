"""The command lines on bad input: one sentence on stderr, exit code 2, nothing overwritten."""

import json

import pytest

from experiments import evaluate, run_dir, train
from experiments.fake_pair import save_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))


def flags(models, folder, *more):
    return [
        "--preset",
        "fake-tiny",
        "--actor.model",
        str(models[0]),
        "--reflector.model",
        str(models[1]),
        "--run-dir",
        str(folder),
        *more,
    ]


def refused(capsys, main, argv, *words):
    """Asserts that the program ends with exit code 2 and one sentence that holds all words."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    errors = capsys.readouterr().err
    assert ended.value.code == 2, errors
    sentence = [line for line in errors.splitlines() if line.startswith("ictjax: ")]
    assert len(sentence) == 1, errors
    for word in words:
        assert word in sentence[0]
    assert "Traceback" not in errors


def test_unknown_preset(capsys):
    refused(capsys, train.main, ["--preset", "gpt-9"], "'gpt-9'", "pocket-minihack")
    refused(capsys, train.main, [], "--preset is missing")


def test_unknown_flag(capsys, models, tmp_path):
    refused(capsys, train.main, flags(models, tmp_path / "run", "--sead", "3"), "--sead", "--help")
    refused(capsys, evaluate.main, ["--run-dir", str(tmp_path)], "no config.json")
    assert not (tmp_path / "run").exists()


def test_values_that_do_not_fit(capsys, models, tmp_path):
    refused(
        capsys,
        train.main,
        flags(models, tmp_path / "run", "--meta.replay-weight", "3"),
        "replay_weight",
        "3",
    )
    assert not (tmp_path / "run").exists()


def test_unknown_family_and_environment(capsys, models, tmp_path):
    argv = flags(models, tmp_path / "run", "--task.environment.train-families", "castle")
    refused(capsys, train.main, argv, "'castle'", "bell, door, lamp")
    argv = flags(models, tmp_path / "run", "--task.environment.name", "chess")
    refused(capsys, train.main, argv, "'chess'", "minihack")
    assert not (tmp_path / "run").exists()


def test_missing_checkpoint(capsys, models, tmp_path):
    argv = [*flags(models, tmp_path / "run"), "--reflector.model", str(tmp_path / "nothing")]
    refused(capsys, train.main, argv, "nothing", "--reflector.model")
    refused(
        capsys,
        train.main,
        ["--preset", "qwen2.5-7b-minihack", "--run-dir", str(tmp_path / "run")],
        "Qwen2.5-7B-Instruct",
    )
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_another_configuration_is_left_alone(capsys, models, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": 5}))
    refused(capsys, train.main, flags(models, folder), "another configuration", "--run-dir")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text()) == {"seed": 5}


def test_a_folder_that_holds_something_else_is_left_alone(capsys, models, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    refused(capsys, train.main, flags(models, tmp_path), "no run directory", "--run-dir")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_little_disk(capsys, models, tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "_MIN_FREE_BYTES", 2**60)
    refused(capsys, train.main, flags(models, tmp_path / "run"), "MiB of disk", "--run-dir")
    assert not (tmp_path / "run").exists()


def test_evaluate_without_checkpoint(capsys, models, tmp_path):
    refused(capsys, evaluate.main, [], "--run-dir is missing")
    from experiments.presets import PRESETS
    from ictjax.run_config import to_dict

    config = to_dict(PRESETS["fake-tiny"].with_models(*map(str, models)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(capsys, evaluate.main, ["--run-dir", str(tmp_path)], "no checkpoint", "train first")


@pytest.mark.parametrize("main", [train.main, evaluate.main])
def test_help_names_the_main_flags(capsys, main):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--run-dir" in text
    if main is train.main:
        assert all(
            flag in text for flag in ("--preset", "--seed", "--iterations", "--meta.fresh-games")
        )


def test_the_7b_preset_builds_on_shapes_alone(capsys):
    train.main(["--preset", "qwen2.5-7b-minihack", "--check"])
    text = capsys.readouterr().out
    assert "7,615,616,512" in text
    assert "build on shapes" in text
