"""A run directory and a configuration are data: what they name is not called unless the user says
so.
"""

import json

import pytest

from experiments import compare, evaluate, export, play, report, train
from experiments.presets import PRESETS
from ictjax.run_config import to_dict
from tests.test_cli import refused

COMMANDS = {
    "evaluate": lambda run: (evaluate.main, ["--run-dir", run]),
    "evaluate another task": lambda run: (evaluate.main, ["--run-dir", run, "--eval-env", "x"]),
    "play": lambda run: (play.main, ["--run-dir", run, "--family", "door"]),
    "train": lambda run: (train.main, ["--config", f"{run}/config.json", "--run-dir", f"{run}2"]),
    "export": lambda run: (export.main, ["--run-dir", run, "--out", f"{run}3"]),
    "compare": lambda run: (compare.main, [run]),
    "report": lambda run: (report.main, ["--run-dir", run]),
}
ASKED = ("evaluate", "play", "train")  # the commands that would call something


def write_run(folder, **changes):
    """A run directory with a checkpoint folder, and fields of its config.json changed."""
    config = to_dict(PRESETS["fake-tiny"])
    config["task"]["environment"] |= changes.get("environment", {})
    config["actor"]["endpoint"] |= changes.get("endpoint", {})
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps({"preset": "fake-tiny"}), encoding="utf-8")
    return str(folder)


@pytest.fixture
def hostile(tmp_path):
    """A run whose environment, when it is built, writes the file that is given too."""
    ran = tmp_path / "ran"
    options = {"args": f"touch {ran}", "shell": "1"}
    return write_run(
        tmp_path / "run", environment={"name": "subprocess:Popen", "options": options}
    ), ran


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_run_names_is_not_called(command, hostile, capsys):
    run, ran = hostile
    main, argv = COMMANDS[command](run)
    if command in ASKED:
        sentence = refused(capsys, main, argv, f"{run}/config.json", "'subprocess:Popen'")
        assert sentence.endswith("add --trust.")
    elif command == "report":
        main(argv)
    else:
        refused(capsys, main, argv)
    assert not ran.exists()


@pytest.mark.parametrize("command", ASKED)
def test_an_endpoint_of_a_run_is_not_called(command, tmp_path, capsys):
    endpoint = {"url": "http://127.0.0.1:9/v1", "key_variable": "SOMEBODYS_SECRET"}
    main, argv = COMMANDS[command](write_run(tmp_path / "run", endpoint=endpoint))
    refused(capsys, main, argv, "http://127.0.0.1:9/v1", "SOMEBODYS_SECRET", "--trust")


@pytest.mark.parametrize("command", ASKED)
def test_who_trusts_a_run_says_so(command, tmp_path, capsys):
    run = write_run(tmp_path / "run", environment={"name": "no_such_module:Game"})
    main, argv = COMMANDS[command](run)
    refused(capsys, main, [*argv, "--trust"], "cannot be imported", "no_such_module")


def test_the_command_line_may_name_code(tmp_path, capsys):
    name = "no_such_module:Game"
    run = write_run(tmp_path / "run", environment={"name": name})
    for command, flags in (("train", ["--task.environment.name", name]), ("play", ["--env", name])):
        main, argv = COMMANDS[command](run)
        refused(capsys, main, [*argv, *flags], "cannot be imported", "no_such_module")
    # naming another environment leaves nothing of the file to be trusted
    main, argv = COMMANDS["train"](run)
    refused(capsys, main, [*argv, "--task.environment.name", "fake", "--iterations", "0"], "1")
    main, argv = COMMANDS["train"](write_run(tmp_path / "b", endpoint={"url": "http://a.b/v1"}))
    flags = ["--actor.endpoint.url", "http://c.d/v1", "--task.environment.name", name]
    refused(capsys, main, [*argv, *flags], "cannot be imported")
