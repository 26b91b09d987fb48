"""`ictjax train` on a directory that holds a run already: what goes on, and what is refused."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console

import experiments.train
from experiments import evaluate, pretrain_pocket, train
from experiments.fake_pair import save_pair
from experiments.presets import preset
from experiments.run_dir import open_environment
from experiments.run_lock import RunLock
from ictjax.hosts import Hosts
from tests.test_cli import flags, refused, tree


def trained(monkeypatch, folder, *more, last=2):
    """A run of so many iterations, without any training."""
    monkeypatch.setattr(experiments.train, "train", lambda *_, **__: None)
    train.main(flags(folder, *more))
    for name in ("contexts", "episodes", "prompts"):
        (folder / name).mkdir()
        for number in range(1, last + 1):
            (folder / name / f"iteration_{number:05d}.jsonl").write_text("{}\n")
    lines = [json.dumps({"iteration": number}) + "\n" for number in range(1, last + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "checkpoints" / str(last) / "state").mkdir(parents=True)


def test_a_run_goes_on_with_more_iterations_and_other_workers_and_says_so(
    capsys, tmp_path, monkeypatch
):
    trained(monkeypatch, tmp_path / "run")
    (tmp_path / "run" / "episodes" / "iteration_00001.jsonl").unlink()
    more = ("--iterations", "9", "--task.environment.num-workers", "5")
    train.main(flags(tmp_path / "run", *more))
    said = capsys.readouterr().out
    assert f"Going on with {tmp_path / 'run'} from iteration 2.\n" in said
    assert "--task.environment.num-workers was 1, is 5; --iterations was 3, is 9.\n" in said
    assert "no longer whole: episodes/ lacks iteration 1." in said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["iterations"], config["task"]["environment"]["num_workers"]) == (9, 5)
    refused(capsys, train.main, flags(tmp_path / "run", *more, "--seed", "4"), "--seed was 0, is 4")


def test_nothing_is_begun_again_without_restart(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trained(monkeypatch, folder)
    shutil.rmtree(folder / "checkpoints")
    before = tree(folder)
    refused(capsys, train.main, flags(folder), "holds no checkpoint", "2 iterations", "--restart")
    assert tree(folder) == before
    train.main(flags(folder, "--restart", "--seed", "4"))
    assert f"The run that was in {folder} is now {folder}.old-1." in capsys.readouterr().out
    assert tree(tmp_path / "run.old-1").keys() == {
        tmp_path / "run.old-1" / path.relative_to(folder) for path in before
    }
    assert json.loads((folder / "config.json").read_text())["seed"] == 4
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "manifest.json"]


def test_a_run_whose_newest_checkpoint_was_emptied_is_not_finished(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trained(monkeypatch, folder, last=3)
    shutil.rmtree(folder / "checkpoints" / "3" / "state")
    before = tree(folder)
    refused(capsys, train.main, flags(folder), "holds no checkpoint", "3 iterations")
    assert tree(folder) == before


def test_a_restart_that_is_refused_moves_nothing(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    trained(monkeypatch, folder)
    before = tree(tmp_path)
    argv = flags(folder, "--restart", "--reflector-sampler.max-len", "65536")
    refused(capsys, train.main, argv, "reflector_sampler.max_len")
    assert tree(tmp_path) == before


def test_a_model_that_changed_is_noticed_and_one_that_moved_is_not(capsys, tmp_path, monkeypatch):
    actor, _ = save_pair(tmp_path / "models")
    folder = tmp_path / "run"
    trained(monkeypatch, folder, "--actor.model", str(actor))
    moved = actor.rename(tmp_path / "moved")
    train.main(flags(folder, "--actor.model", str(moved)))
    assert json.loads((folder / "config.json").read_text())["actor"]["model"] == str(moved)
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"!")
    argv = flags(folder, "--actor.model", str(moved))
    refused(capsys, train.main, argv, f"actor's model in {moved} is not the one", "--actor.model")


def test_two_trainings_of_one_directory(capsys, tmp_path, monkeypatch):
    trained(monkeypatch, tmp_path)
    with RunLock(tmp_path):
        refused(capsys, train.main, flags(tmp_path), "is being trained by process", "kill")
        refused(capsys, train.main, flags(tmp_path, "--restart"), "is being trained by process")


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (train.main, ["--preset", "fake-tiny", "--actor.model=gs://bucket/actor"]),
        (train.main, ["--config=gs://bucket/config.json"]),
        (train.main, ["--preset", "fake-tiny", "--run-dir=ftp://bucket/run"]),
        (evaluate.main, ["--run-dir=ftp://bucket/run"]),
    ],
)
def test_an_address_is_no_local_folder(capsys, tmp_path, monkeypatch, main, argv):
    monkeypatch.chdir(tmp_path)
    refused(capsys, main, argv, "://bucket/", "is an address")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed: it would be asked"
)
@pytest.mark.parametrize("main", [train.main, evaluate.main])
def test_a_run_at_an_address_needs_what_reads_it(capsys, tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    argv = ["--preset", "fake-tiny"] if main is train.main else []
    refused(capsys, main, [*argv, "--run-dir=gs://bucket/run"], "gs://bucket/run", "gcsfs")
    assert not list(tmp_path.iterdir())


def test_the_home_folder_behind_a_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    actor, _ = save_pair(tmp_path / "models")
    monkeypatch.setattr(experiments.train, "train", lambda *_, **__: None)
    train.main(
        ["--preset", "fake-tiny", "--run-dir=~/run", "--actor.model=~/models/actor", "--seed", "3"]
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["actor"]["model"] == str(actor)


def test_a_directory_that_is_moved_while_it_is_trained_is_not_made_anew(
    capsys, tmp_path, monkeypatch
):
    folder = tmp_path / "run"

    def moved(*_, progress, **__):
        progress.phase("contexts", 0, 1)
        folder.rename(tmp_path / "elsewhere")
        progress.phase("contexts", 1, 1)

    monkeypatch.setattr(experiments.train, "train", moved)
    with pytest.raises(SystemExit) as ended:
        train.main(flags(folder))
    assert ended.value.code == 1
    assert f"ictjax: {folder} was moved or removed while it was trained" in capsys.readouterr().err
    assert not folder.exists()
    assert {"config.json", "manifest.json"} < {
        path.name for path in (tmp_path / "elsewhere").iterdir()
    }


@pytest.mark.parametrize("name", ["episodes", "contexts", "prompts", "checkpoints", "tensorboard"])
def test_a_file_where_a_run_has_a_folder_is_refused_before_anything_is_made(capsys, tmp_path, name):
    (tmp_path / name).write_text("mine")
    words = (f"{tmp_path / name} is a file, where a run has a folder", "--run-dir")
    refused(capsys, train.main, flags(tmp_path), *words)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("argv", [["--run-dir", ""], ["--run-dir="], ["--run_dir", ""]])
def test_an_empty_path_is_not_the_current_folder(capsys, argv):
    for command in (train.main, evaluate.main):
        refused(capsys, command, argv, "--run-dir is empty")


def test_a_current_folder_that_was_removed_is_named(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PWD", str(folder))
    folder.rmdir()
    argv = ["--preset", "fake-tiny", "--run-dir", "x"]
    refused(capsys, train.main, argv, f"The current folder {folder} was removed")


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(capsys):
    argv = ["--out", "/proc/x"]
    refused(capsys, pretrain_pocket.main, argv, "--out /proc/x cannot be made or written to")


def test_a_host_that_writes_no_checkpoint_needs_no_disk_for_any(tmp_path, monkeypatch):
    class Begins(Exception):
        pass

    def begin(config):
        raise Begins

    config = preset("fake-tiny").with_models(*map(str, save_pair(tmp_path / "models")))
    environment = open_environment(config.task.environment.name, {})
    monkeypatch.setattr(experiments.train, "content_hashes", begin)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))

    def start(hosts):
        where, console = tmp_path / "run", Console(quiet=True)
        experiments.train.start(
            None, config, where, environment, console, how="new", hosts=hosts, even_so=True
        )

    def exchange():
        pass

    monkeypatch.setattr(Hosts, "_everyone", lambda self, message: [message] * self.count)
    with pytest.raises(Begins):  # a copy of its own, which the first host's checkpoints never fill
        start(Hosts(index=1, count=2, exchange=exchange))
    for hosts in (Hosts(index=0, count=2, exchange=exchange), Hosts(index=1, count=2)):
        with pytest.raises(ValueError, match="Too little disk for the checkpoints"):
            start(hosts)
