"""One trainer per run directory, with a second process that really dies."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from envs.api import CannotGoOn
from experiments import run_lock
from experiments.run_lock import FILE_NAME, SILENT_S, RunLock, check_free

HOLDS = """
import pathlib, sys
from experiments.run_lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_trainer(folder):
    """A process that holds the lock of a folder until it is told to end, or killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_is_there_while_it_is_held_and_names_its_holder(tmp_path):
    check_free(tmp_path)
    with RunLock(tmp_path) as lock:
        assert names(tmp_path) == [FILE_NAME]
        assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
        lock.check()
        assert lock.is_held
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            check_free(tmp_path)
    assert names(tmp_path) == []
    lock.release()


def test_a_second_trainer_is_refused_until_the_first_one_ends(tmp_path):
    with another_trainer(tmp_path) as other:
        with (
            pytest.raises(ValueError, match=rf"process {other.pid} on .*kill {other.pid}\)"),
            RunLock(tmp_path),
        ):
            pass
        assert names(tmp_path) == [FILE_NAME]
        other.communicate()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_lock_does_not_outlive_sigkill(tmp_path, reaped):
    with another_trainer(tmp_path) as other:
        other.kill()
        if reaped:
            other.wait()
        else:
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        check_free(tmp_path)
        with RunLock(tmp_path):
            assert json.loads((tmp_path / FILE_NAME).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def test_a_stopped_trainer_still_holds_its_lock(tmp_path):
    with another_trainer(tmp_path) as other:
        other.send_signal(signal.SIGSTOP)
        os.utime(tmp_path / FILE_NAME, (0, 0))
        with pytest.raises(ValueError, match="is being trained"), RunLock(tmp_path):
            pass


def left_by(folder, **changes):
    """A lock that this process took, as if somebody else had."""
    with RunLock(folder):
        fields = json.loads((folder / FILE_NAME).read_text())
    (folder / FILE_NAME).write_text(json.dumps(fields | {"token": "other"} | changes))


def test_a_process_number_that_was_given_again_is_another_process(tmp_path):
    with RunLock(tmp_path):
        fields = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="is being trained"), RunLock(tmp_path):
        pass
    (tmp_path / FILE_NAME).write_text(json.dumps(fields | {"started": 1}))
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("machine", ["another boot pid:[1]", ""])
def test_elsewhere_the_last_sign_of_life_decides(tmp_path, machine):
    """Process numbers of other machines, and of other containers on this one, say nothing here."""
    left_by(tmp_path, machine=machine, host="tpu-7", pid=1)
    for silent_s in (0, SILENT_S - 60):
        os.utime(tmp_path / FILE_NAME, (time.time() - silent_s,) * 2)
        with pytest.raises(ValueError, match="process 1 on tpu-7 .* s old: stop it there"):
            check_free(tmp_path)
        with (
            pytest.raises(ValueError, match="process 1 on tpu-7 .* s old: stop it there"),
            RunLock(tmp_path),
        ):
            pass
    os.utime(tmp_path / FILE_NAME, (time.time() - SILENT_S - 60,) * 2)
    check_free(tmp_path)
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": "x"}', "\xff", "[" * 100_000])
def test_a_damaged_lock_is_somebodys_for_a_while(tmp_path, text):
    (tmp_path / FILE_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is being trained"), RunLock(tmp_path):
        pass
    os.utime(tmp_path / FILE_NAME, (0, 0))
    with RunLock(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_disk_without_hard_links_has_locks_too(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "link", link)
    with RunLock(tmp_path):
        with pytest.raises(ValueError, match="is being trained"), RunLock(tmp_path):
            pass
        assert names(tmp_path) == [FILE_NAME]
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="Cannot write the lock file .*--run-dir"):
        RunLock(tmp_path / "missing").__enter__()


def after_a_beat(lock, holds):
    """Waits until something is so; the lock beats every few milliseconds."""
    ended = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < ended
        time.sleep(0.002)


def test_a_holder_gives_signs_of_life_and_puts_its_lock_back(tmp_path):
    path = tmp_path / FILE_NAME
    with RunLock(tmp_path, beat_s=0.005) as lock:
        os.utime(path, (0, 0))
        after_a_beat(lock, lambda: path.stat().st_mtime > 0)
        path.unlink()  # somebody tidied up
        after_a_beat(lock, path.exists)
        lock.check()
        with pytest.raises(ValueError, match="is being trained"), RunLock(tmp_path):
            pass
    assert names(tmp_path) == []


def test_a_holder_that_was_thought_gone_stops(tmp_path):
    def lost():
        try:
            lock.check()
        except CannotGoOn as error:
            return "taken over by process 1 on tpu-7" in str(error)
        return False

    with RunLock(tmp_path, beat_s=0.005) as lock:
        taken = run_lock.Holder(host="tpu-7", pid=1, token="theirs")
        spare = tmp_path / "spare"
        spare.write_text(json.dumps(dataclasses.asdict(taken)))
        spare.replace(tmp_path / FILE_NAME)
        after_a_beat(lock, lost)
        assert not lock.is_held
    assert json.loads((tmp_path / FILE_NAME).read_text())["token"] == "theirs"


def test_of_many_who_find_a_dead_lock_one_takes_it(tmp_path):
    left_by(tmp_path, started=1)
    taken, refused, start, end = [], [], threading.Barrier(8), threading.Barrier(9)

    def take():
        start.wait()
        try:
            with RunLock(tmp_path) as lock:
                taken.append(lock)
                end.wait()
        except ValueError as error:
            refused.append(str(error))
            end.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    end.wait()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7
    assert names(tmp_path) == []
