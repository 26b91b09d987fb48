import os

import pytest

pytest.importorskip("tensorboardX")

from tensorboardX import SummaryWriter

from ictjax.events import EventLog, _events


def _write(folder, last, iterations, value=0.0):
    with EventLog(folder, last) as log:
        for iteration in iterations:
            log.write(iteration, {"loss": value, "reward": -value})


def _newest(folder):
    """The only file that is not empty, and the last."""
    (path,) = (path for path in folder.iterdir() if path.stat().st_size)
    assert path == max(folder.iterdir())
    return path


def _shown(folder):
    """What TensorBoard shows: steps and values of the loss."""
    path = _newest(folder)
    events = [event for event, _ in _events(path.read_bytes())]
    assert events[0].file_version == "brain.Event:2"
    assert events[1].HasField("session_log") and events[1].step == 0
    return [
        (event.step, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == "loss"
    ]


def test_a_run_that_begins_forgets_what_was_there(tmp_path):
    _write(tmp_path / "new", None, range(3))
    assert _shown(tmp_path / "new") == [(0, 0), (1, 0), (2, 0)]
    _write(tmp_path / "new", None, [1], 1.0)
    assert _shown(tmp_path / "new") == [(1, 1)]


def test_every_iteration_stands_there_once_over_many_resumes(tmp_path):
    _write(tmp_path, None, range(1, 5))
    (first,) = (path.name for path in tmp_path.iterdir())
    with open(tmp_path / first, "rb") as file:
        times = [event.wall_time for event, _ in _events(file.read())][2:]
    for resume in range(1, 4):  # within the same second
        _write(tmp_path, 2, range(3, 5), float(resume))
        assert _shown(tmp_path) == [(1, 0), (2, 0), (3, resume), (4, resume)]
    last = _newest(tmp_path)
    assert last.name > first  # or TensorBoard would not open it
    kept = [event.wall_time for event, _ in _events(last.read_bytes())][2:4]
    assert kept == times[:2]


def test_the_files_of_older_versions_become_one(tmp_path):
    for step, purge in ((1, 0), (3, 2)):
        with SummaryWriter(str(tmp_path), purge_step=purge) as writer:
            for iteration in (step, step + 1, step + 2):
                writer.add_scalar("loss", step, iteration)
        (path,) = (path for path in tmp_path.iterdir() if path.suffix != ".old")
        path.rename(tmp_path / f"events.out.tfevents.{step:010}.old")
    _write(tmp_path, 4, [5], 9.0)
    assert _shown(tmp_path) == [(1, 1), (3, 3), (4, 3), (5, 9)]


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:-30] + bytes(30)])
def test_a_torn_or_damaged_end_is_left_out(tmp_path, damage):
    _write(tmp_path, None, [1, 2])
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    _write(tmp_path, 2, [3])
    assert [step for step, _ in _shown(tmp_path)][-1] == 3
    assert _shown(tmp_path)[0] == (1, 0)


@pytest.mark.parametrize("data", [b"", b"x", bytes(16), b"\xff" * 100])
def test_a_file_of_something_else_is_no_obstacle(tmp_path, data):
    (tmp_path / "events.out.tfevents.5.host").write_bytes(data)
    (tmp_path / "notes.txt").write_text("mine")
    _write(tmp_path, 0, [1])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".host", ".ictjax", ".txt"]
    assert (tmp_path / "events.out.tfevents.5.host").read_bytes() == b""


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    _write(tmp_path, None, [1])
    before = os.listdir(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        EventLog(tmp_path, 1)
    assert os.listdir(tmp_path) == before
