"""What `ictjax watch` shows of a run, from its files alone."""

import dataclasses
import io
import json
import pathlib

import pytest

from experiments import watch as watching
from experiments.commands import watch
from experiments.console import Terminal
from experiments.presets import preset
from experiments.run_lock import RunLock
from tests.test_cli import refused

ITERATIONS = 4


def record(number):
    return {
        "iteration": number,
        "reward": number / 10,
        "reward_replay": number / 10,
        "reward_fresh": None,
        "context_success": 0.25,
        "reward_family": {"door": 0.5, "key": None},
        "dead_groups": 1,
        "candidates": 8,
        "malformed_candidates": 2,
        "reflector_failures": {"truncated": 1},
        "actor_failures": {"no_action": 3, "truncated": 0},
        "turns": 100,
        "kl": 0.002,
        "time": {"contexts_s": 60.0, "rewards_s": 30.0, "update_s": 10.0, "compilations": 3},
    }


def line(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in records)


@pytest.fixture
def run(tmp_path):
    """A run of which one iteration has ended."""
    folder = tmp_path / "run"
    config = dataclasses.asdict(preset("fake-tiny")) | {"iterations": ITERATIONS}
    line(folder / "config.json", config)
    add(folder, 1)
    return folder


def add(folder, number, said="take the [bold]key[/bold]\x1b[31m"):
    line(folder / "metrics.jsonl", record(number))
    name = f"iteration_{number:05d}.jsonl"
    prompts = [
        {"family": "door", "reward": 0.25, "system_prompt": "worse"},
        {"family": "key", "reward": 0.75, "system_prompt": said},
        {"family": "key", "reward": None, "system_prompt": "no reward"},
        {"family": "key", "reward": 1.0, "system_prompt": None},
    ]
    turns = [{"observation": f"room {n} " + "x" * 6000, "action": f"go {n}"} for n in range(9)]
    game = {"system_prompt": said, "outcome": "success", "turns": turns}
    line(folder / "prompts" / name, *prompts)
    line(folder / "episodes" / name, game | {"system_prompt": "worse"}, game)


def shown(capsys, folder, *more):
    watch.main([str(folder), "--once", *more])
    return capsys.readouterr().out


def test_what_is_shown(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, run)
    assert max(len(row) for row in text.splitlines() if str(run) not in row) <= 80
    assert f"Iteration 1 of {ITERATIONS}, stopped" in text
    for part in (
        "0.100",
        "door 0.500, key -",
        "dead groups 1 of",
        "malformed 25.0 %",
        "truncated 12.5 %",
        "KL 0.002",
        "contexts 60.0, rewards 30.0, update 10.0",
        "about 5 min, until",  # three times 100 seconds
        "Best new prompt: key, reward 0.750",
        "A game under it: success, 9 turns",
        "> go 8",
        "To go on: ictjax train --run-dir",
    ):
        assert part in text, part
    assert "fresh games" not in text and "go 2" not in text and "worse" not in text
    # what a prompt spells is text
    assert "[bold]key[/bold]" in text and "\x1b" not in text


def test_a_curve(run, capsys):
    add(run, 2)
    add(run, 3)
    assert "0.100 to 0.300, best 0.300 (iteration 3)" in shown(capsys, run)
    assert watching.curve([0.0, None, 0.5, 1.0], "01234") == "0 24"
    assert watching.curve([0.5, 0.5], "01234") == "22"
    assert watching.curve(list(range(400)), "0123456789") == "".join(
        str(round(9 * place / 39)) for place in range(40)
    )


def test_a_run_that_is_trained_or_finished(run, capsys):
    with RunLock(run):
        text = shown(capsys, run)
        assert f"Iteration 1 of {ITERATIONS}, training" in text
        assert "Ctrl-C ends watching" in text
    for number in range(2, ITERATIONS + 1):
        add(run, number)
    text = shown(capsys, run)
    assert "finished" in text and "Next: ictjax evaluate --run-dir" in text and "left" not in text


def test_a_run_that_has_just_begun(run, capsys):
    (run / "metrics.jsonl").unlink()
    assert "No iteration has ended yet" in shown(capsys, run)


def test_on_a_terminal_it_goes_on_until_nobody_trains(run, monkeypatch):
    console = Terminal(file=io.StringIO(), force_terminal=True, width=80)
    lock = RunLock(run)
    lock.__enter__()
    looks = []

    def later(folder, before=None):
        if before is not None:
            if len(looks) == 1:
                add(folder, 2, said="a better prompt")
            if len(looks) == 2:
                lock.release()
        looks.append(real(folder, before))
        return looks[-1]

    real = watching.look
    monkeypatch.setattr(watching, "look", later)
    watching.watch(run, console, every=0.01, once=False)
    assert [seen.done for seen in looks] == [1, 2, 2]
    assert looks[2].prompt is looks[1].prompt  # read once
    assert "a better prompt" in console.file.getvalue()
    assert "Iteration 2 of 4, stopped" in console.file.getvalue()


def test_what_is_no_run(tmp_path, capsys):
    refused(capsys, watch.main, [str(tmp_path / "none"), "--once"], "none")
    refused(capsys, watch.main, ["--once"], "DIR")
    assert not pathlib.Path(tmp_path / "none").exists()
