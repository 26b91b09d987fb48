"""The pool at the limits of its machine and of its environment's author: full disks, many games,
signals, leaks, broken contracts.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from envs.alfworld import generate
from envs.api import GameId, Outcome
from envs.pool import WorkerPool
from tests.test_pool import ROOT, exists, expected, fake_games, script, wait_for, wait_until

MODULE = '''
import re, subprocess, time
from envs.api import Observation, Step

def hold():
    """Hangs in C with the interpreter's lock held: no other thread runs."""
    re.match("(a+)+$", "a" * 60 + "b")

class Game:
    def reset(self, game):
        self.key = game.key
        text = {"reset none": None, "reset text": Observation(text=7), "reset actions": Observation(text="", actions=(1, 2))}
        return text.get(game.key, Observation(text="ready"))
    def state_hash(self):
        return None if self.key == "hash" else "00"
    def step(self, action):
        if action == "child":
            child = subprocess.Popen(["sleep", "1000"], start_new_session=self.key == "1")
            return Step(observation=Observation(text=str(child.pid)))
        if action == "fill":
            with open(__import__("tempfile").mkstemp()[1], "w") as file:
                while True:
                    file.write("x" * 1000)
                    file.flush()
        if action == "print":
            print("noise \\ud800" * 10_000)
        if action == "hang":
            time.sleep(1000)
        if action == "hold":
            hold()
        seen = Observation(text=action)
        return {
            "step text": Step(observation=Observation(text=b"bytes")),
            "step observation": Step(observation="a string"),
            "step reward": Step(observation=seen, reward="high"),
            "step outcome": Step(observation=seen, outcome="won"),
            "step nan": Step(observation=seen, reward=float("nan")),
            "step inf": Step(observation=seen, reward=float("-inf")),
            "step large": Step(observation=seen, reward=10**400),
            "step text 50 MB": Step(observation=Observation(text="x" * 50_000_000)),
            "step many actions": Step(observation=Observation(text="", actions=("",) * 6_000_000)),
            "step actions": Step(observation=Observation(text="", actions="go")),
            "step error": Step(observation=seen, error=None),
        }.get(self.key, Step(observation=seen))
    def close(self):
        pass

class Games:
    name = "odd"
    families = ("any", "closed", "nothing")
    def games(self, family, split):
        return ()
    def open(self, family):
        if family == "closed":
            raise OSError("the library is missing")
        return None if family == "nothing" else Game()
'''


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """The import path of an environment that breaks every promise once."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "odd_games.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))  # for programs that tests start
    return "odd_games:Games"


def run_program(text, *arguments, prefix=()):
    """Starts a Python program of its own session, as a shell would."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("family", "key", "cause"),
    [
        ("any", "reset none", "reset returned NoneType where an Observation was expected"),
        ("any", "reset text", "reset returned the text 7 where a string was expected"),
        ("any", "reset actions", "reset returned actions that are no strings"),
        ("any", "hash", "state_hash returned NoneType where a string was expected"),
        ("any", "step text", "step returned the text b'bytes' where a string was expected"),
        (
            "any",
            "step observation",
            "step returned the observation 'a string' where an Observation was expected",
        ),
        ("any", "step reward", "step returned the reward 'high' where a number was expected"),
        ("any", "step outcome", "'won' is not a valid Outcome"),
        ("any", "step nan", "step returned the reward nan where a number from -1e+09 to 1e+09 was"),
        (
            "any",
            "step inf",
            "step returned the reward -inf where a number from -1e+09 to 1e+09 was",
        ),
        ("any", "step large", "where a number from -1e+09 to 1e+09 was expected"),
        ("any", "step text 50 MB", "50,000,000 characters where at most 5,000,000 are taken"),
        ("any", "step many actions", "6,000,000 characters where at most 5,000,000 are taken"),
        ("any", "step actions", "step returned str where a tuple of actions was expected"),
        ("any", "step error", "step returned the error None where a string was expected"),
        ("closed", "1", "OSError: the library is missing"),
        ("nothing", "1", "open returned NoneType where a game was expected"),
    ],
)
def test_a_broken_promise_is_named_and_the_other_games_go_on(odd_pool, family, key, cause):
    good = [
        odd_pool.reset(GameId(env="odd", family="any", key=str(n)), max_steps=9) for n in range(2)
    ]
    bad = odd_pool.reset(GameId(env="odd", family=family, key=key), max_steps=9)
    events = wait_for(odd_pool, 3)
    if events[bad].step.outcome is None:
        for ticket in (*good, bad):
            odd_pool.step(ticket, "go")
        events = wait_for(odd_pool, 3)
    last = events[bad].step
    assert last.outcome is Outcome.FAILED
    assert last.error.startswith(f"The game odd|{family}|{key} failed 2 times at ")
    assert cause in last.error
    assert "\n" not in last.error
    assert [events[ticket].step.observation.text for ticket in good] in (["ready"] * 2, ["go"] * 2)
    for ticket in good:
        odd_pool.release(ticket)
    assert odd_pool.stats.crashes == 0


@pytest.fixture(scope="module")
def odd_pool(tmp_path_factory):
    """One pool for all broken promises: it survives each of them."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd_games.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        with WorkerPool("odd_games:Games", num_workers=1, temp_root=str(folder)) as pool:
            yield pool


def test_a_thousand_games_over_two_workers():
    games = fake_games(1000)
    with WorkerPool("fake", num_workers=2, max_live_games=64) as pool:
        tickets = {pool.reset(game, max_steps=9): game for game in games}
        texts = {ticket: [] for ticket in tickets}
        while tickets:
            events = pool.poll(10.0)
            assert events
            for event in events:
                texts[event.ticket].append(event.step)
                if event.step.outcome is None:
                    pool.step(
                        event.ticket, script(tickets[event.ticket])[len(texts[event.ticket]) - 1]
                    )
                else:
                    del tickets[event.ticket]
        assert (pool.stats.resets, pool.stats.crashes, pool.stats.timeouts) == (1000, 0, 0)
    assert list(texts.values()) == [expected(game, script(game)) for game in games]


def grown(before, after, what):
    return {name: after[name][what] - before[name][what] for name in before}


def footprint(pids):
    """Open files and resident memory in kB of processes."""
    return {
        pid: {
            "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
            "kilobytes": int(
                Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]
            ),
        }
        for pid in pids
    }


def test_five_thousand_episodes_keep_files_and_memory_flat():
    with WorkerPool("fake", num_workers=1, max_live_games=16) as pool:
        processes = (os.getpid(), *pool.worker_pids)

        def episodes(count):
            for first in range(0, count, 250):
                games = fake_games(250) if first % 500 else fake_games(250, "door")
                running = len([pool.reset(game, max_steps=2) for game in games])
                while running:
                    for event in pool.poll(10.0):
                        if event.step.outcome is None:
                            pool.step(event.ticket, "look")
                        else:
                            running -= 1

        episodes(1000)
        before = footprint(processes)
        episodes(5000)
        after = footprint(processes)
        assert pool.stats.resets == 6000
    assert set(grown(before, after, "files").values()) == {0}
    # 5,000 episodes that each kept a kilobyte would show as 5,000 kB.
    assert max(grown(before, after, "kilobytes").values()) < 2500


CTRL_C = """
    import signal, sys
    from envs.api import GameId
    from envs.pool import WorkerPool
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in a shell's background hands on that the signal is ignored
    with WorkerPool("fake", num_workers=2, temp_root=sys.argv[1]) as pool:
        tickets = [pool.reset(GameId(env="fake", family="door", key=str(key)), max_steps=10**9) for key in range(8)]
        said = False
        while True:
            for event in pool.poll(1.0):
                pool.step(event.ticket, "look")
            if pool.stats.steps > 100 and not said:
                print(*pool.worker_pids, flush=True)
                said = True
"""


def test_ctrl_c_in_the_middle_ends_everything(tmp_path):
    program = run_program(CTRL_C, tmp_path)
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    os.killpg(program.pid, signal.SIGINT)
    try:
        _, errors = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")
    assert not any(map(exists, workers))
    assert list(tmp_path.iterdir()) == []


KILLED = """
    import os, signal, sys
    from envs.api import GameId
    from envs.pool import WorkerPool
    pool = WorkerPool("odd_games:Games", num_workers=2, temp_root=sys.argv[1], deadline_s=1.0)
    tickets = [pool.reset(GameId(env="odd", family="any", key=str(key)), max_steps=9) for key in range(2)]
    count = 0
    while count < 2:
        count += len(pool.poll(1.0))
    for ticket in tickets if sys.argv[2] else ():
        pool.step(ticket, sys.argv[2])
    children = [event.step.observation.text for event in pool.poll(10.0 if sys.argv[2] == "child" else 0.3)]
    print(*pool.worker_pids, *children, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("doing", ["", "hang", "hold", "child"])
def test_workers_end_within_five_seconds_of_their_parents_death(tmp_path, odd, doing):
    root = tmp_path / "temp"
    root.mkdir()
    program = run_program(KILLED, root, doing)
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) >= 2 + (doing == "child")
    try:
        _, errors = program.communicate(timeout=30)
        died_at = time.monotonic()
        assert program.returncode == -signal.SIGKILL, errors
        wait_until(lambda: not any(map(exists, workers)))
        assert time.monotonic() - died_at < 5
    finally:
        for pid in filter(exists, workers):
            os.kill(pid, signal.SIGKILL)
    if doing != "hold":  # nobody is left who could
        assert list(root.iterdir()) == []


FULL = """
    import os, signal, sys
    from envs.api import GameId
    from envs.pool import WorkerPool

    def answers(pool, count):
        events = {}
        while len(events) < count:
            events |= {event.ticket: event.step for event in pool.poll(1.0)}
        return events

    with WorkerPool("odd_games:Games", num_workers=1, temp_root=sys.argv[1]) as pool:
        tickets = [pool.reset(GameId(env="odd", family="any", key=str(key)), max_steps=9) for key in range(3)]
        answers(pool, 3)
        for ticket, action in zip(tickets, ("go", "fill", "print")):
            pool.step(ticket, action)
        events = answers(pool, 3)
        print([events[ticket].observation.text for ticket in tickets], events[tickets[1]].error)
        assert os.statvfs(sys.argv[1]).f_bavail == 0
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        pool.step(tickets[0], "print")
        print(answers(pool, 1)[tickets[0]].observation.text, pool.stats.crashes)
    try:
        for number in range(10_000):
            os.mkdir(sys.argv[1] + f"/{number}")
    except OSError:
        WorkerPool("odd_games:Games", num_workers=1, temp_root=sys.argv[1])
"""


def test_a_full_temporary_disk_fails_the_game_that_fills_it_and_no_other(tmp_path, odd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs -o size=256k,nr_inodes=64 tmpfs {disk} && exec "$@"',
        "sh",
    ]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*mount, "true"], capture_output=True).returncode == 0:
            program = run_program(FULL, disk, prefix=mount)
            said, errors = program.communicate(timeout=60)
            first, second = said.splitlines()
            assert first.startswith(
                "['go', '', 'print'] The game odd|any|1 failed 2 times at action 1: it raised"
                " OSError: "
            )
            assert "No space left on device" in first
            assert second == "print 1"
            assert (
                errors.strip().splitlines()[-1]
                == f"ValueError: The worker pool cannot make a folder in {disk} (No space left on"
                " device): free some space there, or name another in TMPDIR."
            )
            return
    pytest.skip("this machine lets nobody mount a small disk of his own (unshare --mount)")


def alfworld_tree(folder):
    """A download of one whole game and one whose file was cut; their keys."""
    rooms = generate.rooms_named("small")
    seed = next(iter(generate.seeds("put", "train")))
    keys = []
    for name, length in (("whole", None), ("cut", 5000)):
        keys.append(f"train/pick_and_place_simple-Apple-None-Fridge-1/trial_{name}")
        trial = folder / "json_2.1.1" / keys[-1]
        trial.mkdir(parents=True)
        (trial / "game.tw-pddl").write_text(json.dumps(generate.generate(seed, rooms))[:length])
        (trial / "traj_data.json").write_text('{"task_type": "pick_and_place_simple"}')
    return keys


def test_bad_alfworld_games_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole, cut = alfworld_tree(tmp_path / "data")
    good = [
        whole,
        generate.key_of(next(iter(generate.seeds("put", "test"))), generate.rooms_named("full")),
    ]
    bad = {
        ("put", cut): "trial_cut",
        ("put", "train/pick_and_place_simple-Apple-None-Fridge-1/trial_lost"): "trial_lost",
        ("put", "generated/small/many"): "'generated/small/many'",
        ("cool", whole): "is of family 'put', not 'cool'",
        ("stir", whole): "Unknown family 'stir' of ALFWorld",
    }
    with WorkerPool("alfworld", num_workers=1, options={"data": str(tmp_path / "data")}) as pool:
        names = [("put", key) for key in good] + list(bad)
        tickets = {
            pool.reset(GameId(env="alfworld", family=family, key=key), max_steps=9): (family, key)
            for family, key in names
        }
        events = wait_for(pool, len(tickets))
        for ticket, name in tickets.items():
            step = events[ticket].step
            if name in bad:
                assert step.outcome is Outcome.FAILED
                assert bad[name] in step.error and "\n" not in step.error, step.error
            else:
                assert "Your task is to" in step.observation.text
                pool.step(ticket, "look")
        assert {event.step.outcome for event in wait_for(pool, 2).values()} == {None}
        assert pool.stats.crashes == 0
