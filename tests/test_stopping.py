"""Programs that are asked to end: every one in a process of its own, without anything heavy."""

import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest

from envs import stopping
from experiments.command import run_main

ROOT = pathlib.Path(__file__).parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
_START = """
import asyncio, contextlib, gc, pathlib, sys, time
from envs.fake import FakeEnvironment
from envs.files import replacing
from envs.pool import WorkerPool
from envs.stopping import at_end, check, held, unwinding
from experiments.command import run_main
say = lambda word: print(word, flush=True)
def body():
"""
_END = "\nrun_main(body, 'start it again.')\nsay('survived')\n"


class Running:
    """A program whose body is given, from the moment that it says `ready`."""

    def __init__(self, body, folder):
        lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START + lines + _END],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
            start_new_session=True,
        )
        self.until("ready")

    def until(self, word):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.split()[0] == word:
                return line.split()[1:]
        raise AssertionError(self.process.communicate())

    def ended(self, number):
        """What it still printed; it has to end by this signal, without being killed."""
        shown, errors = self.process.communicate(timeout=30)
        assert self.process.returncode == 128 + number, errors
        name = signal.Signals(number).name
        assert errors.endswith(f"\nictjax: stopped by {name}; start it again.\n"), errors
        assert "Traceback" not in errors and "survived" not in shown
        return shown.split()


@pytest.fixture
def run(tmp_path):
    started = []

    def begin(body):
        started.append(Running(body, tmp_path))
        return started[-1]

    yield begin
    for running in started:
        running.process.kill()
        running.process.communicate()


LOOPS = {
    "a loop that looks": """
with unwinding():
    try:
        say('ready')
        while True:
            check()
    finally:
        say('unwound')
""",
    "one whose exception is swallowed": """
with unwinding():
    try:
        say('ready')
        swallowed = 0
        while swallowed < 3:
            with contextlib.suppress(BaseException):
                swallowed += 1
                check()
                swallowed -= 1
        check()
    finally:
        say('unwound')
""",
    "one in callbacks of the garbage collector": """
def look(phase, info):
    check()
gc.callbacks.append(look)
sys.unraisablehook = lambda what: None
with unwinding():
    try:
        say('ready')
        while True:
            gc.collect()
            check()
    finally:
        gc.callbacks.clear()
        say('unwound')
""",
    "one inside asyncio": """
async def forever():
    say('ready')
    while True:
        await asyncio.sleep(0.001)
        check()
with unwinding():
    try:
        asyncio.run(forever())
    finally:
        say('unwound')
""",
    "work that finishes by itself": """
with unwinding():
    say('ready')
    time.sleep(1)
    say('unwound')
""",
}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("body", LOOPS.values(), ids=LOOPS)
def test_a_loop_ends_where_it_looks(run, body, number):
    running = run(body)
    running.process.send_signal(number)
    assert running.ended(number) == ["unwound"]


@pytest.mark.parametrize(
    "body",
    ["say('ready'); time.sleep(60)", "say('ready'); exec('while True: pass')"],
    ids=["that waits", "that computes"],
)
def test_what_never_looks_is_ended(run, body):
    running = run(body)
    running.process.send_signal(signal.SIGTERM)
    assert running.ended(signal.SIGTERM) == []


def test_an_unfinished_file_and_workers_are_gone_after_a_sudden_end(run, tmp_path):
    running = run(
        """
with WorkerPool('fake', num_workers=2) as pool:
    with replacing(pathlib.Path('file')) as temporary:
        temporary.write_text('half')
        say('ready')
        say(f"workers {' '.join(map(str, pool.worker_pids))}")
        time.sleep(60)
"""
    )
    workers = running.until("workers")
    running.process.send_signal(signal.SIGINT)
    running.ended(signal.SIGINT)
    assert not list(tmp_path.iterdir())
    for pid in workers:
        wait_until_gone(int(pid))


def test_a_held_section_ends_first_and_a_second_signal_ends_it_too(run, tmp_path):
    body = """
with held():
    say('ready')
    time.sleep({})
    pathlib.Path('saved').touch()
check()
"""
    running = run(body.format(1))
    running.process.send_signal(signal.SIGTERM)
    running.ended(signal.SIGTERM)
    (tmp_path / "saved").unlink()
    running = run(body.format(60))
    running.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):  # signals of one kind that wait are one
        running.process.wait(timeout=0.5)
    running.process.send_signal(signal.SIGTERM)
    running.ended(signal.SIGTERM)
    assert not (tmp_path / "saved").exists()


def test_work_that_fails_after_a_signal_was_stopped(run):
    running = run("say('ready'); time.sleep(0.5); raise RuntimeError('of a child')")
    running.process.send_signal(signal.SIGINT)
    running.ended(signal.SIGINT)


def test_a_stopped_worker_does_not_outlive_its_parent(run, tmp_path):
    running = run(
        """
with WorkerPool('fake', num_workers=1) as pool:
    say('ready')
    pool.reset(FakeEnvironment().games('door', 'train')[0], max_steps=1)
    while not pool.poll(1.0):
        pass
    say(f"worker {pool.worker_pids[0]}")
    time.sleep(60)
"""
    )
    pid = int(running.until("worker")[0])
    os.kill(pid, signal.SIGSTOP)
    running.process.kill()
    running.process.wait()
    wait_until_gone(pid)
    assert not list(tmp_path.iterdir())


def wait_until_gone(pid):
    """Until a process is dead; who has lost its parent may not be collected at once."""
    status = pathlib.Path("/proc", str(pid), "stat")
    until = time.monotonic() + 20
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, status.read_text()
        time.sleep(0.02)


def test_without_a_program_nothing_is_answered():
    stopping.check()
    with stopping.unwinding(), stopping.held(), stopping.waiting_for_key():
        pass
    stopping.at_end(lambda: pytest.fail("called"))()


def test_signals_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = []
    run_main(lambda: inside.extend(map(signal.getsignal, SIGNALS)), "")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not set(inside) & set(before)


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_the_cursor_comes_back_on_a_terminal_that_obeys(tmp_path, term):
    body = "    print('ready', flush=True); time.sleep(60)\n"
    seen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _START + body + _END],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": term},
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    try:
        while part := _read(seen):
            shown += part
            if shown == b"ready\r\n":
                process.send_signal(signal.SIGTERM)
    finally:
        process.kill()
        os.close(seen)
    assert process.wait() == 128 + signal.SIGTERM
    assert b"stopped by SIGTERM" in shown
    assert (b"\x1b[?25h" in shown) == (term == "xterm")


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # nobody has it open any more
        return b""
