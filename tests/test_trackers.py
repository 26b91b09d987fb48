"""Metrics for wandb and trackio, with stand-ins of the same interface."""

import dataclasses
import json
import logging
import sys
import threading
import types

import pytest

from experiments.commands import train
from experiments.presets import FAKE_TINY
from ictjax import trackers
from ictjax.metrics import MetricsWriter, read_metrics
from ictjax.trackers import FILE_NAME, check_trackers, open_trackers


class Service(types.ModuleType):
    """A tracker as a module: runs by what they go on by, and what went wrong with it."""

    def __init__(self, name):
        super().__init__(name)
        self.runs, self.opened = {}, []
        self.broken = None  # raised by the iteration of this number, or by init
        self.release = threading.Event()
        self.release.set()

    def init(self, **about):
        if self.broken == "init":
            raise RuntimeError("no key\nfor you")
        assert about["resume"] == "allow" and about["project"] == "ictjax"
        assert about["config"]["seed"] == FAKE_TINY.seed
        self.opened.append(about)
        logged = self.runs.setdefault(about.get("id") or about["name"], [])
        return types.SimpleNamespace(
            log=lambda metrics, step: self.log(logged, metrics, step), finish=self.finish
        )

    def log(self, logged, metrics, step):
        if step == self.broken:
            raise SystemExit("quota")
        logged.append((step, metrics))

    def finish(self):
        self.release.wait()


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    module = Service(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def write(run_dir, service, iterations, *, last_iteration=None):
    config = dataclasses.replace(FAKE_TINY, track=(service.__name__,))
    opened = open_trackers(config, run_dir)
    with MetricsWriter(run_dir, last_iteration=last_iteration, mirrors=opened) as writer:
        for iteration in iterations:
            writer.write(iteration, {"loss": iteration / 4, "by": {"a": 1}}, {"update_s": 2.0})
    assert [line["iteration"] for line in read_metrics(run_dir)] == [
        *range(1, (last_iteration or 0) + 1),
        *iterations,
    ]


def steps(service):
    (logged,) = service.runs.values()
    return [step for step, _ in logged]


def test_a_resumed_run_goes_on_in_the_same_tracked_run(service, tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    write(run, service, [1, 2, 3])
    ((_, first), *_) = next(iter(service.runs.values()))
    assert first == {"loss": 0.25, "time/update_s": 2.0}  # as TensorBoard has it
    # killed, and gone on from iteration 1: what is made again is there already
    write(run.rename(tmp_path / "moved"), service, [2, 3, 4], last_iteration=1)
    assert steps(service) == [1, 2, 3, 4]
    other = tmp_path / "my run"
    other.mkdir()
    write(other, service, [1])
    assert len(service.runs) == 2  # of the same name, and another run


def test_what_was_trained_without_a_tracker_is_sent_first(service, tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for iteration in (1, 2):
            writer.write(iteration, {"loss": 0.5})
    write(tmp_path, service, [3], last_iteration=2)
    assert steps(service) == [1, 2, 3]


@pytest.mark.parametrize("broken", ["init", 2])
def test_one_that_fails_is_said_once_and_the_run_goes_on(service, tmp_path, caplog, broken):
    service.broken = broken
    write(tmp_path, service, [1, 2, 3])
    (said,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert service.__name__ in said.getMessage() and "\n" not in said.getMessage()
    assert f"--track {service.__name__}" in said.getMessage()
    service.broken = None
    write(tmp_path, service, [4], last_iteration=3)
    assert steps(service) == [1, 2, 3, 4]


def test_one_that_hangs_does_not_hold_the_end(service, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.01)
    service.release.clear()
    write(tmp_path, service, [1])
    service.release.set()
    assert "within" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"wandb": 3, "trackio": []}', "\x00"])
def test_notes_that_are_damaged_begin_another_tracked_run(service, tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    write(tmp_path, service, [1])
    assert steps(service) == [1]
    noted = json.loads((tmp_path / FILE_NAME).read_text())
    assert noted[service.__name__]["iteration"] == 1


def test_one_that_is_not_installed_is_refused_with_its_extra(tmp_path, monkeypatch, capsys):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=rf"--track {name} needs .*'\.\[{name}\]'"):
            check_trackers([name])
        run = tmp_path / "run"
        with pytest.raises(SystemExit) as stopped:
            train.main(["--preset", "fake-tiny", f"--run-dir={run}", "--track", name])
        assert stopped.value.code == 2 and f".[{name}]" in capsys.readouterr().err
        assert not run.exists()
