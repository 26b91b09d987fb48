"""The scripts that start runs on rented machines: as far as they go without one."""

import os
import pathlib
import subprocess
import sys

import pytest
import yaml

from experiments.commands.train import read_args
from ictjax.config import MESHES

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "experiments" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def start(script, *words, cwd=ROOT, path=""):
    environ = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(
        [script, *words], cwd=cwd, env=environ, capture_output=True, text=True, timeout=60
    )


def test_shellcheck_finds_nothing():
    program = pathlib.Path(sys.executable).with_name("shellcheck")
    assert SCRIPTS
    for script in (*SCRIPTS, ROOT / ".ci" / "run"):
        found = start(program, script)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("setup.sh", (), "setup.sh tpu, or setup.sh cuda"),
        ("setup.sh", ("cpu",), "setup.sh tpu, or setup.sh cuda"),
        ("tpu_pod.sh", ("ict", "us-west4-a"), "its zone and the command"),
    ],
)
def test_what_is_missing_is_one_sentence(name, words, said):
    ended = start(LAUNCH / name, *words)
    assert ended.returncode == 2
    assert said in ended.stderr and ended.stderr.count("\n") == 1


def test_setup_installs_in_a_checkout_only(tmp_path):
    ended = start(LAUNCH / "setup.sh", "tpu", cwd=tmp_path)
    assert ended.returncode == 2
    assert f"no constraints-py312.txt in {tmp_path}" in ended.stderr


def test_flags_reach_the_hosts_as_they_were_typed(tmp_path):
    noted = tmp_path / "noted"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{noted}"\n')
    gcloud.chmod(0o755)
    words = ("train", "--preset", "qwen2.5-7b-lora", "--task.initial-prompt", "it's $HOME; rm x")
    ended = start(LAUNCH / "tpu_pod.sh", "ict", "z1", *words, path=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "--zone=z1\n--worker=all\n" in noted.read_text()
    command = noted.read_text().partition("--command=")[2]
    # what the remote shell makes of it
    place = tmp_path / "home"
    (place / "ictjax" / ".venv" / "bin").mkdir(parents=True)
    program = place / "ictjax" / ".venv" / "bin" / "ictjax"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "token: $HF_TOKEN"\n')
    program.chmod(0o755)

    def logged():
        environ = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        subprocess.run(
            ["bash", "-c", f"{command}\nwait"], cwd=place, env=environ, check=True, timeout=60
        )
        (log,) = (place / "ictjax" / "logs").iterdir()
        lines = log.read_text().splitlines()
        log.unlink()
        return lines

    assert logged() == [*words, "--hosts.detect", "token: "]
    (place / "ictjax.env").write_text("HF_TOKEN='its secret'\n")
    assert logged() == [*words, "--hosts.detect", "token: its secret"]


def test_the_sky_file_starts_what_there_is():
    job = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    args, _ = read_args(["--preset", job["envs"]["PRESET"], "--run-dir", "gs://bucket/a"])
    assert args.run_dir == pathlib.Path("gs://bucket/a")
    for mesh in ("h100-8", "v5e-8"):
        assert mesh in MESHES and f"mesh={mesh}" in job["run"]
    checked = subprocess.run(["bash", "-n"], input=job["setup"] + job["run"], text=True, timeout=60)
    assert checked.returncode == 0
