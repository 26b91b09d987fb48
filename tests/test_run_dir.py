"""What a training finds in its directory, and what it makes there."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from envs.fake import FakeEnvironment
from envs.stopping import Stopped
from experiments.manifest import make_manifest
from experiments.presets import PRESETS
from experiments.run_dir import check_restart, check_run, new_run, read_manifest, set_aside
from experiments.run_lock import FILE_NAME, RunLock
from ictjax.run_config import differences, to_dict

CONFIG = PRESETS["fake-tiny"]
OTHER = dataclasses.replace(CONFIG, seed=9)


def check(folder, config=CONFIG):
    return check_run(folder, config, FakeEnvironment())


def make(folder, config=CONFIG, **manifest):
    """A run that has been started, and ended before it had made anything."""
    about = make_manifest(
        "fake-tiny", config, FakeEnvironment(), ["cpu"], {"actor": "1"}, "blocks", {}
    )
    with new_run(folder, config, about | manifest):
        pass


def record(folder, last, *, checkpoints=()):
    """What iterations 1 to `last` leave."""
    for name in ("contexts", "episodes", "prompts"):
        (folder / name).mkdir(exist_ok=True)
        for number in range(1, last + 1):
            (folder / name / f"iteration_{number:05d}.jsonl").write_text("{}\n")
    lines = [json.dumps({"iteration": number}) + "\n" for number in range(1, last + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "checkpoints").mkdir(exist_ok=True)
    for step in map(str, checkpoints):
        (folder / "checkpoints" / step / "state").mkdir(exist_ok=True, parents=True)


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


# A start.


def test_a_new_directory_holds_config_and_manifest_and_its_lock_while_it_is_used(tmp_path):
    folder = tmp_path / "above" / "run"
    assert check(folder) == "new"
    with new_run(folder, CONFIG, {"preset": "x"}):
        assert sorted(os.listdir(folder)) == ["config.json", "manifest.json", FILE_NAME]
        with pytest.raises(ValueError, match="is being trained"):
            check(folder)
        with pytest.raises(ValueError, match="is being trained"):
            check_restart(folder)
        with pytest.raises(ValueError, match="is being trained"), new_run(folder, OTHER, {}):
            pass
    assert json.loads((folder / "config.json").read_text()) == to_dict(CONFIG)
    assert os.listdir(tmp_path / "above") == ["run"]


STARTS = """
import os, pathlib, signal, sys
from experiments.presets import PRESETS
from experiments.run_dir import new_run

folder, count = pathlib.Path(sys.argv[1]), 0
if sys.argv[2] == "there":
    folder.mkdir()

def start(last):
    events = 0
    def hook(event, args):
        nonlocal events
        if event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"):
            events += 1
            if events == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    with new_run(folder, PRESETS["fake-tiny"], {"preset": "fake-tiny"}):
        pass
    os._exit(0)

import dataclasses
from envs.fake import FakeEnvironment
from experiments.run_dir import check_run
corrected = dataclasses.replace(PRESETS["fake-tiny"], seed=9)
for last in range(1, 1000):
    child = os.fork()
    if not child:
        start(last)
    _, status = os.waitpid(child, 0)
    names = sorted(os.listdir(folder)) if folder.exists() else []
    assert sys.argv[2] == "there" or not names or {"config.json", "manifest.json"} <= set(names)
    assert check_run(folder, corrected, FakeEnvironment()) == "new", names
    if os.WIFEXITED(status):
        assert status == 0, status
        break
    with new_run(folder, corrected, {"preset": "fake-tiny"}):
        pass
    assert '"seed": 9' in (folder / "config.json").read_text()
    for path in folder.iterdir():
        # a lock that was killed before its name was in it is removed later
        assert path.name in ("config.json", "manifest.json") or not path.read_text(), path
        path.unlink()
    if sys.argv[2] != "there":
        folder.rmdir()
print(last)
"""


@pytest.mark.parametrize("place", ["new", "there"])
def test_a_start_killed_at_any_moment_makes_no_command_impossible(tmp_path, place):
    """SIGKILL before the first, the second, ... thing that a start does to a file; then a corrected
    command.
    """
    command = [sys.executable, "-c", STARTS, str(tmp_path / "run"), place]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 12


def test_what_killed_starts_left_beside_it_is_removed_after_a_while(tmp_path):
    for name in (".00.ictjax-start", ".01.ictjax-start"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    os.utime(tmp_path / ".00.ictjax-start", (0, 0))
    make(tmp_path / "run")
    assert sorted(os.listdir(tmp_path)) == [".01.ictjax-start", "run"]


def test_a_start_that_came_to_nothing_is_replaced(tmp_path):
    make(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "contexts").mkdir()
    (tmp_path / "contexts" / "precollected.jsonl.00.tmp").touch()
    (tmp_path / "notes.txt").write_text("mine")
    assert check(tmp_path, OTHER) == "new"
    make(tmp_path, OTHER)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "manifest.json", "notes.txt"]
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 9


def test_a_folder_that_is_a_link_to_another_disk_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    assert check(tmp_path / "run") == "new"
    make(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").is_symlink()
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "config.json", "manifest.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 5}', "[" * 99_999, "\0\xff"])
def test_a_damaged_config_is_named(tmp_path, text):
    make(tmp_path)
    record(tmp_path, 1, checkpoints=(1,))
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    named = (
        "another configuration .*actor is missing" if "seed" in text else "config.json .*restore"
    )
    with pytest.raises(ValueError, match=named):
        check(tmp_path)


def test_a_start_that_fails_puts_back_what_it_replaced(tmp_path):
    make(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="too large"), new_run(tmp_path, OTHER, {}):
        raise ValueError("too large")
    assert tree(tmp_path) == before


def test_a_run_that_somebody_began_meanwhile_is_left_alone(tmp_path):
    make(tmp_path / "run")
    record(tmp_path / "run", 2, checkpoints=(2,))
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="Another run has just begun"):
        make(tmp_path / "run", OTHER)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [ValueError, Stopped])
def test_a_start_that_ends_early_leaves_nothing_behind(tmp_path, error):
    folder = tmp_path / "above" / "run"
    with pytest.raises(error), new_run(folder, CONFIG, {}):
        raise error(signal.SIGTERM)
    assert not list(tmp_path.iterdir())


def test_a_start_that_was_taken_over_touches_nothing(tmp_path):
    with contextlib.suppress(ValueError), new_run(tmp_path, CONFIG, {}):
        (tmp_path / FILE_NAME).write_text("another trainer")
        raise ValueError("taken over")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "manifest.json", FILE_NAME]


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "thesis.txt", "episodes"])
def test_what_is_somebodys_own_is_left_alone(tmp_path, name):
    """A manifest alone is what a killed start of older versions left."""
    if name == "episodes":
        record(tmp_path, 1)
    else:
        (tmp_path / name).write_text("{}")
    if name == "manifest.json":
        assert check(tmp_path) == "new"
        return
    with pytest.raises(ValueError, match=f"^{tmp_path} (exists and is no|is a) run"):
        check(tmp_path)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="is no directory"):
        check(tmp_path / "run")


# Going on.


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "go on"),
        ({"iterations": 9}, "go on"),
        ({"checkpoint_every": 3}, "go on"),
        ({"seed": 1}, "--seed was 0, is 1"),
        ({"iterations": 1}, "has done 2 iterations, more than --iterations 1: give at least 2"),
        ({"seed": 1, "iterations": 9}, r"\(--seed was 0, is 1\): choose another --run-dir, or"),
    ],
)
def test_what_may_change_and_what_may_not(tmp_path, changes, answer):
    make(tmp_path)
    record(tmp_path, 2, checkpoints=(1, 2))
    before, config = tree(tmp_path), dataclasses.replace(CONFIG, **changes)
    if answer == "go on":
        assert check(tmp_path, config) == "go on"
    else:
        with pytest.raises(ValueError, match=answer):
            check(tmp_path, config)
    assert tree(tmp_path) == before


def test_a_configuration_without_a_number_equals_itself(tmp_path):
    """Older versions wrote such; JSON reads NaN back as one that differs from itself."""
    make(tmp_path)
    record(tmp_path, 1, checkpoints=(1,))
    config = json.loads((tmp_path / "config.json").read_text())
    config["actor"]["endpoint"]["input_price"] = math.nan
    assert differences(config, json.loads(json.dumps(config))) == []
    assert [d.field for d in differences(config, to_dict(CONFIG))] == ["actor.endpoint.input_price"]


def test_a_field_that_is_newer_than_the_run_counts_as_it_was(tmp_path):
    make(tmp_path)
    record(tmp_path, 1, checkpoints=(1,))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["remat"], config["actor"]["endpoint"]["seeded"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert check(tmp_path) == "go on"


def test_other_games_are_refused(tmp_path):
    make(tmp_path, games_sha256="0")
    record(tmp_path, 1, checkpoints=(1,))
    with pytest.raises(ValueError, match="games of 'fake' are no longer those .*--restart"):
        check(tmp_path)


@pytest.mark.parametrize("manifest", ["[]", "{", '{"models": []}', '{"resumed": {}}', ""])
def test_a_damaged_manifest_is_named(tmp_path, manifest):
    make(tmp_path)
    record(tmp_path, 1, checkpoints=(1,))
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=r"manifest.json .*restore it"):
        check(tmp_path)


# Lost checkpoints.


@pytest.mark.parametrize("folder", ["missing", "empty", "killed in a save"])
@pytest.mark.parametrize("last", [1, 3])
def test_a_run_that_has_lost_its_checkpoints_is_never_begun_again(tmp_path, folder, last):
    make(tmp_path)
    record(tmp_path, last)
    if folder == "missing":
        (tmp_path / "checkpoints").rmdir()
    if folder == "killed in a save":
        (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir()
    before = tree(tmp_path)
    if last == 1 and folder != "missing":
        assert check(tmp_path) == "go on"  # killed before its first checkpoint was whole
    else:
        with pytest.raises(ValueError, match=f"no checkpoint, but {last} iterations .*--restart"):
            check(tmp_path)
        assert check_restart(tmp_path) == "restart"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("proof", ["finished", "resumed", "evaluated"])
def test_a_run_that_was_finished_resumed_or_evaluated_had_a_checkpoint(tmp_path, proof):
    about = {"finished": "yesterday", "resumed": [{"from_iteration": 1}]}
    make(tmp_path, **{name: value for name, value in about.items() if name == proof})
    record(tmp_path, 1)
    if proof == "evaluated":
        (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint, but 1 iterations"):
        check(tmp_path)


def test_a_run_with_rare_checkpoints_begins_again_before_the_first(tmp_path):
    config = dataclasses.replace(CONFIG, iterations=30, checkpoint_every=10)
    make(tmp_path, config)
    record(tmp_path, 10)
    assert check(tmp_path, config) == "go on"
    record(tmp_path, 11)
    with pytest.raises(ValueError, match="no checkpoint, but 11 iterations"):
        check(tmp_path, config)


# Restarts.


def test_a_restart_moves_the_run_beside_itself(tmp_path):
    folder = tmp_path / "run"
    for number in (1, 2):
        make(folder)
        record(folder, 1)
        before = {path.name: data for path, data in tree(folder).items()}
        assert check_restart(folder) == "restart"
        assert set_aside(folder) == tmp_path / f"run.old-{number}"
        aside = tree(tmp_path / f"run.old-{number}")
        assert {path.name: data for path, data in aside.items()} == before
        assert not folder.exists()


def test_a_restart_follows_a_link_to_another_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    make(disk / "run")
    record(disk / "run", 1)
    (tmp_path / "run").symlink_to(disk / "run")
    assert set_aside(tmp_path / "run") == disk / "run.old-1"
    assert not (tmp_path / "run").exists() and (tmp_path / "run").is_symlink()


def test_a_restart_of_nothing_is_a_start_and_never_moves_what_is_not_a_run(tmp_path):
    assert check_restart(tmp_path) == check_restart(tmp_path / "missing") == "new"
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="so --restart leaves it alone"):
        check_restart(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert check_restart(tmp_path) == "restart"
    with RunLock(tmp_path), pytest.raises(ValueError, match="is being trained"):
        set_aside(tmp_path)


def test_no_manifest_is_an_empty_one(tmp_path):
    assert read_manifest(tmp_path) == {}
