"""The pool against games that crash, hang, raise and print, and against signals from outside."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from envs import pool as pool_module
from envs import wire, worker
from envs.api import CannotGoOn, GameId, Outcome, PoolStats, Step
from envs.fake import WORDS, FakeEnvironment
from envs.pool import MAX_ACTION_CHARS, WorkerPool

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 3.0  # for the tests that wait for it
GIVE_UP_S = 60.0


@pytest.fixture
def open_pool(tmp_path):
    """Opens pools that are closed, whatever happens, and that leave nothing behind in their
    temporary root.
    """
    root = tmp_path / "tmp"
    root.mkdir()
    with contextlib.ExitStack() as stack:

        def build(environment="fake", **arguments):
            return stack.enter_context(
                WorkerPool(environment, temp_root=str(root), **{"num_workers": 1, **arguments})
            )

        yield build
    assert list(root.iterdir()) == []


PROBE = """
import os, subprocess, sys, tempfile, time
from envs.api import Observation, Step

class Raw(Exception):
    pass

def RAW(value):
    raise Raw(value)

class Probe:
    name = "probe"
    families = ("any",)
    def games(self, family, split): return ()
    def open(self, family): return self
    def reset(self, game): return Observation(text=game.key)
    def state_hash(self): return ""
    def close(self): pass
    def step(self, action):
        try:
            return Step(observation=Observation(text=str(eval(action))))
        except Raw as raw:
            return raw.args[0]
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """The import path of an environment, found by this process's own search path, whose actions are
    Python expressions.
    """
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "pool_probe.py").write_text(PROBE)
    monkeypatch.syspath_prepend(str(folder))
    return "pool_probe:Probe"


def fake_games(count, family=None):
    families = [family] if family else sorted(WORDS)
    return [
        GameId(env="fake", family=families[i % len(families)], key=str(i)) for i in range(count)
    ]


def script(game):
    """The actions that win a fake game in five steps."""
    return ["look", "walk", "walk", "look", WORDS[game.family]]


def wait_for(pool, count):
    """The next `count` events by ticket."""
    events = {}
    until = time.monotonic() + GIVE_UP_S
    while len(events) < count:
        assert time.monotonic() < until, f"{len(events)} of {count} events came: {pool.stats}"
        for event in pool.poll(1.0):
            assert event.ticket not in events
            events[event.ticket] = event
    return events


def play(pool, games, scripts, *, max_steps=50, disturb=lambda round_: None):
    """Plays all games to the end of their scripts, in lockstep; the steps of each, the reset
    first.
    """
    tickets = [pool.reset(game, max_steps=max_steps) for game in games]
    steps = [[] for _ in games]
    running = dict(zip(tickets, range(len(games)), strict=True))
    round_ = 0
    while running:
        for ticket, event in wait_for(pool, len(running)).items():
            index = running[ticket]
            steps[index].append(event.step)
            if event.step.outcome is not None or len(steps[index]) > len(scripts[index]):
                del running[ticket]
                pool.release(ticket)
        for ticket, index in running.items():
            pool.step(ticket, scripts[index][len(steps[index]) - 1])
        disturb(round_)
        round_ += 1
    return steps


def expected(game, actions):
    """The steps of a game played without any pool."""
    live = FakeEnvironment().open(game.family)
    steps = [Step(observation=live.reset(game))]
    for action in actions:
        steps.append(live.step(action))
        if steps[-1].outcome is not None:
            break
    return steps


def pids(pool):
    """The worker processes of a pool: what the operating system, not the pool, says."""
    listing = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    mine = [int(line.split()[0]) for line in listing.splitlines() if "envs.worker" in line]
    return [pid for pid in pool.worker_pids if pid in mine]


def exists(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def ask(pool, expression):
    """What a Python expression is in a worker with the probe environment."""
    ticket = pool.reset(GameId(env="probe", family="any", key="1"), max_steps=9)
    wait_for(pool, 1)
    pool.step(ticket, expression)
    step = wait_for(pool, 1)[ticket].step
    assert step.error == ""
    pool.release(ticket)
    return step.observation.text


def hang_once(path):
    """An action for the probe that hangs the first time."""
    return (
        f"'went on' if os.path.exists({str(path)!r}) else [open({str(path)!r}, 'w').close(),"
        " time.sleep(1000)]"
    )


def wait_until(condition):
    until = time.monotonic() + GIVE_UP_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_games_in_the_pool_equal_games_in_process(open_pool, num_workers):
    games = fake_games(24)
    pool = open_pool(num_workers=num_workers)
    steps = play(pool, games, [script(game) for game in games])
    assert steps == [expected(game, script(game)) for game in games]
    assert all(episode[-1].outcome is Outcome.SUCCESS for episode in steps)
    assert pool.stats == PoolStats(resets=24, steps=sum(len(episode) - 1 for episode in steps))


def test_the_answer_to_a_reset_carries_the_state_hash(open_pool):
    pool = open_pool()
    ticket = pool.reset(fake_games(1)[0], max_steps=5)
    live = FakeEnvironment().open("bell")
    live.reset(fake_games(1)[0])
    assert wait_for(pool, 1)[ticket].state_hash == live.state_hash()
    pool.step(ticket, "look")
    assert wait_for(pool, 1)[ticket].state_hash == ""


def test_more_episodes_than_live_games_wait_in_a_queue(open_pool):
    pool = open_pool(num_workers=2, max_live_games=3)
    games = fake_games(8)
    tickets = [pool.reset(game, max_steps=5) for game in games]
    first = wait_for(pool, 3)
    assert sorted(first) == tickets[:3]
    assert pool.poll(0.05) == []
    pool.release(tickets[6])  # still queued: it never starts
    for ticket in tickets[:3]:
        pool.release(ticket)
    assert sorted(wait_for(pool, 3)) == tickets[3:6]
    pool.step(tickets[4], "jump")  # a game that ends makes room without being released
    assert sorted(wait_for(pool, 2)) == [tickets[4], tickets[7]]
    assert pool.stats.resets == 7


def test_the_step_limit_ends_an_episode_unless_it_is_won_there(open_pool):
    pool = open_pool()
    game = fake_games(1, "door")[0]
    lost, won = play(pool, [game, game], [["look"] * 9, ["walk", "walk", "open"]], max_steps=3)
    assert [step.outcome for step in lost] == [None, None, None, Outcome.STEP_LIMIT]
    assert lost[-1].observation == lost[-2].observation
    assert [step.outcome for step in won] == [None, None, None, Outcome.SUCCESS]


def test_a_live_game_is_used_again_after_an_early_release(open_pool):
    pool = open_pool(max_live_games=1)
    for game in fake_games(6):
        ticket = pool.reset(game, max_steps=9)
        assert wait_for(pool, 1)[ticket].step == expected(game, [])[0]
        pool.step(ticket, "walk")
        pool.release(ticket)  # with the answer still on its way
        pool.release(ticket)
    assert pool.poll(0.0) == []


def test_calls_that_make_no_sense_are_refused(open_pool):
    pool = open_pool()
    game = fake_games(1)[0]
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        pool.reset(game, max_steps=0)
    with pytest.raises(ValueError, match="GameId, got 'fake|bell|0'"):
        pool.reset(str(game), max_steps=1)
    with pytest.raises(ValueError, match="Ticket 0 names no running episode"):
        pool.step(0, "look")
    with pytest.raises(ValueError, match="Ticket 0 was never given out"):
        pool.release(0)
    ticket = pool.reset(game, max_steps=5)
    with pytest.raises(ValueError, match="still waits for the answer"):
        pool.step(ticket, "look")
    wait_for(pool, 1)
    with pytest.raises(ValueError, match="An action is a string, got bytes"):
        pool.step(ticket, b"look")
    pool.step(ticket, "jump")
    wait_for(pool, 1)
    with pytest.raises(ValueError, match="has ended"):
        pool.step(ticket, "look")
    pool.release(ticket)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"environment": "fkae"}, "Unknown environment 'fkae'"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"num_workers": 3, "max_live_games": 2}, "at least num_workers=3 .* got 2"),
        ({"deadline_s": 0.0}, "positive number of seconds, got 0.0"),
        ({"deadline_s": float("nan")}, "positive number of seconds, got nan"),
        ({"temp_root": "no/such/folder"}, "existing folder, got 'no/such/folder'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WorkerPool(**{"environment": "fake", **arguments})


def test_workers_that_cannot_start_are_an_error_with_the_cause(tmp_path):
    pool = WorkerPool("fake", num_workers=2, options={"speed": "3"}, temp_root=str(tmp_path))
    pool.reset(fake_games(1)[0], max_steps=5)
    with pytest.raises(CannotGoOn, match="cannot start its workers .* does not take the options"):
        wait_for(pool, 1)
    with pytest.raises(CannotGoOn, match="cannot start its workers"):
        pool.poll(0.0)
    assert list(tmp_path.iterdir()) == []


def test_workers_that_die_at_every_start_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "dies_on_import.py").write_text(
        "import os, sys\nprint('no luck', file=sys.stderr, flush=True)\nos._exit(7)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with WorkerPool("dies_on_import:Thing", num_workers=1) as pool:
        pool.reset(fake_games(1)[0], max_steps=5)
        monkeypatch.setattr(pool_module, "_REST_S", dict.fromkeys(pool_module._REST_S, 0.0))
        with pytest.raises(
            CannotGoOn, match="lost the same worker 5 times in a row; .* exit code 7 .*'no luck'"
        ):
            wait_for(pool, 1)
        assert pool.stats.crashes == 5


def test_what_a_game_prints_does_not_reach_the_protocol(open_pool, capfd):
    pool = open_pool(options={"print_on": "look"})
    games = fake_games(4)
    steps = play(pool, games, [["look"] * 20 + script(game) for game in games])
    assert all(episode[-1].outcome is Outcome.SUCCESS for episode in steps)
    assert pool.stats.crashes == 0
    assert "noise" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("fault", "num_replays"), [("crash", 4), ("hang", 4), ("raise", 1)])
def test_an_episode_that_fails_once_goes_on_with_the_same_results(
    open_pool, tmp_path, fault, num_replays
):
    pool = open_pool(
        options={f"{fault}_on": "boom", "once_in": str(tmp_path)}, deadline_s=DEADLINE_S
    )
    games = fake_games(4)
    scripts = [
        [*script(game)[:-1], "boom" if index == 2 else "look", script(game)[-1]]
        for index, game in enumerate(games)
    ]
    steps = play(pool, games, scripts)
    assert steps == [expected(game, actions) for game, actions in zip(games, scripts, strict=True)]
    assert pool.stats.quarantined == 0
    assert pool.stats.crashes == (1 if fault == "crash" else 0)
    assert pool.stats.timeouts == (1 if fault == "hang" else 0)
    assert pool.stats.replays == num_replays


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("crash", "its process died of SIGSEGV"),
        ("hang", "did not answer within 3 s"),
        ("raise", "told to raise on 'boom'"),
    ],
)
def test_an_episode_that_fails_twice_ends_and_its_siblings_go_on(open_pool, fault, reason):
    pool = open_pool(options={f"{fault}_on": "boom"}, deadline_s=DEADLINE_S)
    games = fake_games(4)
    scripts = [
        ["look", "boom", "look"] if index == 1 else script(game) for index, game in enumerate(games)
    ]
    steps = play(pool, games, scripts)
    last = steps[1].pop()
    assert last.outcome is Outcome.FAILED
    assert f"The game {games[1]} failed 2 times at action 2: " in last.error
    assert reason in last.error
    assert "\n" not in last.error
    assert last.reward == 0.0
    assert len(steps[1]) == 2
    for index in (0, 2, 3):
        assert steps[index] == expected(games[index], scripts[index])
    assert pool.stats.quarantined == 1
    again = play(pool, [games[1]], [script(games[1])])  # the game itself is not to blame
    assert again == [expected(games[1], script(games[1]))]


@pytest.mark.parametrize("fault", ["crash", "raise"])
def test_a_game_that_cannot_be_reset_is_barred(open_pool, fault):
    games = fake_games(3)
    pool = open_pool(options={f"{fault}_on": f"reset:{games[1].key}"})
    steps = play(pool, games, [script(game) for game in games])
    assert [episode[-1].outcome for episode in steps] == [
        Outcome.SUCCESS,
        Outcome.FAILED,
        Outcome.SUCCESS,
    ]
    assert "failed 2 times at its reset" in steps[1][0].error
    crashes = pool.stats.crashes
    again = play(pool, games, [script(game) for game in games])
    assert again == steps
    assert pool.stats.crashes == crashes
    pool.release(pool.reset(games[1], max_steps=5))
    assert pool.poll(0.0) == []  # a released ticket is never heard of again


def test_a_game_of_another_environment_fails_with_the_cause(open_pool):
    pool = open_pool()
    (steps,) = play(pool, [GameId(env="fake", family="cup", key="1")], [["look"]])
    assert steps[0].outcome is Outcome.FAILED
    assert "Unknown family 'cup'" in steps[0].error


def test_a_game_that_is_not_deterministic_fails_when_it_is_replayed(open_pool, tmp_path):
    pool = open_pool(options={"drift_on": "clock", "crash_on": "boom", "once_in": ""})
    games = fake_games(3)
    scripts = [["look", "clock", "look", "look"], ["look", "look", "boom"], ["look"] * 4]
    steps = play(pool, games, scripts)
    assert steps[0][-1].outcome is Outcome.FAILED
    assert steps[0][-1].error == (
        f"The game {games[0]} is not deterministic: its replay differed from the first play at"
        " action 2."
    )
    assert steps[1][-1].outcome is Outcome.FAILED
    assert steps[2] == expected(games[2], scripts[2])
    assert pool.stats.quarantined == 2


def test_workers_killed_between_calls_change_no_result(open_pool):
    pool = open_pool(num_workers=2)
    games = fake_games(16)

    def disturb(round_):
        if round_ in (1, 3):
            os.kill(pids(pool)[round_ // 2], signal.SIGKILL)

    steps = play(pool, games, [script(game) for game in games], disturb=disturb)
    assert steps == [expected(game, script(game)) for game in games]
    assert pool.stats == PoolStats(
        resets=16, steps=sum(len(episode) - 1 for episode in steps), crashes=2, replays=16
    )


def test_a_stopped_worker_is_seen_by_its_deadline(open_pool):
    pool = open_pool(num_workers=2, deadline_s=DEADLINE_S)
    games = fake_games(8)

    def disturb(round_):
        if round_ == 2:
            os.kill(pids(pool)[0], signal.SIGSTOP)

    steps = play(pool, games, [script(game) for game in games], disturb=disturb)
    assert steps == [expected(game, script(game)) for game in games]
    assert pool.stats == PoolStats(
        resets=8, steps=sum(len(episode) - 1 for episode in steps), timeouts=1, replays=4
    )


def test_a_worker_killed_within_a_call_repeats_the_call(open_pool, probe, tmp_path):
    pool = open_pool(probe)
    games = [GameId(env="probe", family="any", key=str(i)) for i in range(3)]
    tickets = [pool.reset(game, max_steps=9) for game in games]
    wait_for(pool, 3)
    started = tmp_path / "started"
    for ticket, action in zip(tickets, ["'before'", hang_once(started), "'behind'"], strict=True):
        pool.step(ticket, action)
    pool.poll(0.0)
    wait_until(started.exists)
    (victim,) = pids(pool)
    os.kill(victim, signal.SIGKILL)
    # the answer to the first may have come before the death
    events = wait_for(pool, 3 - pool.stats.steps)
    assert events[tickets[1]].step.observation.text == "went on"
    assert events[tickets[2]].step.observation.text == "behind"
    assert (pool.stats.crashes, pool.stats.quarantined) == (1, 0)


def test_a_replay_that_hangs_is_bounded_and_told_in_answer_to_the_next_action(
    open_pool, probe, tmp_path
):
    pool = open_pool(probe, deadline_s=DEADLINE_S)
    ticket = pool.reset(GameId(env="probe", family="any", key="1"), max_steps=9)
    wait_for(pool, 1)
    flag = str(tmp_path / "flag")
    pool.step(ticket, f"os.path.exists({flag!r}) and time.sleep(1000)")
    wait_for(pool, 1)
    Path(flag).touch()
    os.kill(pids(pool)[0], signal.SIGKILL)
    until = time.monotonic() + GIVE_UP_S
    while pool.stats.quarantined == 0:
        assert pool.poll(0.05) == []
        assert time.monotonic() < until
    assert (pool.stats.crashes, pool.stats.timeouts) == (1, 2)
    pool.step(ticket, "'more'")
    (event,) = pool.poll(0.0)
    assert event.step.outcome is Outcome.FAILED
    assert "failed 2 times at a replay: it did not answer within" in event.step.error


def test_the_time_the_caller_is_away_does_not_count(open_pool, probe):
    pool = open_pool(probe, num_workers=2, deadline_s=DEADLINE_S)
    tickets = [
        pool.reset(GameId(env="probe", family="any", key=str(i)), max_steps=9) for i in range(2)
    ]
    wait_for(pool, 2)
    pool.step(tickets[0], "'z' * 3_000_000")  # one worker waits for us to read its answer
    early = pool.poll(0.0)  # nothing, unless this process was kept waiting itself
    pool.step(tickets[1], "'z'")  # the other for us to send its request
    time.sleep(DEADLINE_S + 0.2)
    wait_for(pool, 2 - len(early))
    assert (pool.stats.timeouts, pool.stats.crashes) == (0, 0)


@pytest.mark.parametrize(
    ("action", "note"),
    [
        (
            "x" * 10_000_000,
            f"(Your action had 10000000 characters: only the first {MAX_ACTION_CHARS} were"
            " used.)\n",
        ),
        (
            "open \ud800\udfff",
            "(Your action held invalid characters: they were replaced by '?'.)\n",
        ),
        ("\x00\uffff\U0001f511", ""),
        ("", ""),
    ],
)
def test_actions_of_any_size_and_content_are_played(open_pool, action, note):
    pool = open_pool()
    game = fake_games(1)[0]
    steps = play(pool, [game], [[action, *script(game)]])[0]
    assert steps[1].observation.text.startswith(note + "Nothing happens")
    assert steps[-1].outcome is Outcome.SUCCESS


def test_an_action_that_was_cut_is_replayed_as_it_was_played(open_pool, tmp_path):
    pool = open_pool(options={"crash_on": "boom", "once_in": str(tmp_path)})
    game = fake_games(1)[0]
    steps = play(pool, [game], [["y\udc00" * 3000, "boom", *script(game)]])[0]
    assert steps[-1].outcome is Outcome.SUCCESS
    assert pool.stats.replays == 1


def test_whatever_a_game_returns_or_raises_the_pool_goes_on(open_pool, probe):
    pool = open_pool(probe)
    ticket = pool.reset(GameId(env="probe", family="any", key="1"), max_steps=99)
    wait_for(pool, 1)

    def say(action):
        pool.step(ticket, action)
        return wait_for(pool, 1)[ticket].step

    assert say("'\\ud800 é'").observation.text == "? é"
    assert len(say("'z' * 3_000_000").observation.text) == 3_000_000
    assert say("'\\x00'").observation.text == "\x00"
    assert say("sys.exit(3)").error.endswith("at action 4: it raised SystemExit: 3.")
    for action, cause in [
        ("RAW(None)", "TypeError: step returned NoneType"),
        ("1 / 0", "ZeroDivisionError"),
        ("SURROGATE", "NameError"),
    ]:
        ticket = pool.reset(GameId(env="probe", family="any", key="1"), max_steps=99)
        wait_for(pool, 1)
        assert cause in say(action).error
    assert pool.stats.crashes == 0


def test_a_worker_imports_neither_jax_nor_ictjax_and_ignores_their_settings(
    open_pool, probe, monkeypatch
):
    monkeypatch.setenv("JAX_PLATFORMS", "no-such-platform")
    monkeypatch.setenv("XLA_FLAGS", "--no-such-flag")
    pool = open_pool(probe)
    loaded = set(ask(pool, "' '.join(sorted(sys.modules))").split())
    assert "envs.worker" not in loaded  # it is __main__ there
    assert "envs.wire" in loaded
    packages = {name.split(".")[0] for name in loaded}
    assert not packages & {"jax", "jaxlib", "flax", "ictjax", "numpy", "multiprocessing"}


def test_temporary_files_go_to_the_folder_of_the_pool(open_pool, probe, tmp_path):
    pool = open_pool(probe, num_workers=2)
    folders = {ask(pool, "tempfile.mkdtemp()") for _ in range(3)}
    assert len(folders) == 3
    assert all(Path(folder).is_relative_to(tmp_path / "tmp") for folder in folders)
    pool.close()
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.parametrize("own_session", [False, True])
def test_a_replaced_worker_takes_its_children_and_files_with_it(open_pool, probe, own_session):
    pool = open_pool(probe)
    folder = ask(pool, "tempfile.mkdtemp()")
    child = int(
        ask(pool, f"subprocess.Popen(['sleep', '1000'], start_new_session={own_session}).pid")
    )
    assert exists(child)
    os.kill(pids(pool)[0], signal.SIGKILL)
    assert ask(pool, "'back'") == "back"
    wait_until(lambda: not exists(child))
    assert not Path(folder).exists()


def test_the_pool_works_in_a_folder_of_any_name(probe, tmp_path):
    root = tmp_path / "a b'\"[1]\\\n\u00e9"
    root.mkdir()
    with WorkerPool(probe, num_workers=1, temp_root=str(root)) as pool:
        assert ask(pool, "tempfile.gettempdir()").startswith(str(root))
        child = int(ask(pool, "subprocess.Popen(['sleep', '1000'], start_new_session=True).pid"))
    wait_until(lambda: not exists(child))
    assert list(root.iterdir()) == []


def framed(body):
    return repr(len(body).to_bytes(4, "little") + body)


@pytest.mark.parametrize(
    "written",
    [
        framed(b"[[1]]"),
        framed(b'[[-1,"ready"]]'),
        framed(b'[[-1,"unusable","the whole pool"]]'),
        framed(b'[[99,"raised","nobody asked"]]'),
        framed(b'[[1,"replayed",[]]]'),
        "(2_000_000_000).to_bytes(4, 'little')",
    ],
)
def test_answers_that_a_game_writes_are_its_failure_and_no_siblings(open_pool, probe, written):
    pool = open_pool(probe)
    tickets = [
        pool.reset(GameId(env="probe", family="any", key=str(i)), max_steps=9) for i in range(3)
    ]
    wait_for(pool, 3)
    write = f"[os.write(int(sys.argv[2]), {written}), time.sleep(0.01)]"
    for ticket, action in zip(tickets, ["'a'", write, "'c'"], strict=True):
        pool.step(ticket, action)
    events = wait_for(pool, 3)
    assert [events[ticket].step.observation.text for ticket in tickets] == ["a", "", "c"]
    assert events[tickets[1]].step.error.endswith("at action 1: its process garbled its answers.")
    assert pool.stats.quarantined == 1
    assert pool.stats.crashes >= 2


def test_a_flood_of_answers_costs_its_worker_alone(open_pool, probe):
    pool = open_pool(probe)
    tickets = [
        pool.reset(GameId(env="probe", family="any", key=str(i)), max_steps=9) for i in range(2)
    ]
    wait_for(pool, 2)
    flood = "[os.write(int(sys.argv[2]), bytes(range(200, 256)) * 1000) for _ in range(10**9)]"
    pool.step(tickets[0], flood)
    pool.step(tickets[1], "'a'")
    events = wait_for(pool, 2)
    assert "garbled its answers" in events[tickets[0]].step.error
    assert events[tickets[1]].step.observation.text == "a"


def test_a_worker_that_dies_again_and_again_rests_longer_and_longer(
    open_pool, tmp_path, monkeypatch
):
    """Four deaths for a reason that passes: the pool goes on."""
    (tmp_path / "passing_trouble.py").write_text(
        "import os, pathlib\nfrom envs.fake import FakeEnvironment\n"
        f"deaths = pathlib.Path({str(tmp_path / 'deaths')!r})\n"
        "deaths.write_text((deaths.read_text() if deaths.exists() else '') + 'x')\n"
        "if len(deaths.read_text()) < 5:\n    os._exit(9)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rests = []

    class Rests(dict):
        def get(self, deaths, default):
            rests.append(super().get(deaths, default))
            return rests[-1] / 100

    monkeypatch.setattr(pool_module, "_REST_S", Rests(pool_module._REST_S))
    pool = open_pool("passing_trouble:FakeEnvironment")
    game = fake_games(1)[0]
    assert play(pool, [game], [script(game)]) == [expected(game, script(game))]
    assert rests == [0.0, 0.1, 1.0, 5.0]
    assert pool.stats.crashes == 4


def test_a_worker_that_cannot_be_started_again_at_once_is_started_later(open_pool, monkeypatch):
    pool = open_pool()
    game = fake_games(1)[0]
    ticket = pool.reset(game, max_steps=9)
    wait_for(pool, 1)
    real, failures = subprocess.Popen, [OSError(11, "Resource temporarily unavailable")] * 2

    def popen(*args, **kwargs):
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(pool_module.subprocess, "Popen", popen)
    monkeypatch.setattr(pool_module, "_REST_S", {})
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    pool.step(ticket, "look")
    assert wait_for(pool, 1)[ticket].step == expected(game, ["look"])[1]
    assert (failures, pool.stats.crashes) == ([], 1)


def test_a_death_between_calls_ends_with_a_culprit_too(open_pool, probe):
    pool = open_pool(probe)
    tickets = [
        pool.reset(GameId(env="probe", family="any", key=str(i)), max_steps=9) for i in range(3)
    ]
    wait_for(pool, 3)
    # when the worker sends the answers of its batch
    dies_later = "sys.modules['__main__'].__dict__.update(send=lambda *_: os._exit(4))"
    for ticket, action in zip(tickets, ["'a'", dies_later, "'c'"], strict=True):
        pool.step(ticket, action)
    events = wait_for(pool, 3)
    assert [events[ticket].step.observation.text for ticket in tickets] == ["a", "", "c"]
    assert events[tickets[1]].step.error.endswith(
        "at action 1: its process ended with exit code 4."
    )
    assert pool.stats.quarantined == 1


def test_ctrl_c_does_not_reach_the_workers(open_pool):
    pool = open_pool(num_workers=2)
    workers = pids(pool)
    assert [os.getpgid(pid) for pid in workers] == workers  # each leads a group of its own
    assert len(workers) == 2


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "hung"])
def test_workers_end_and_clean_up_when_their_parent_is_killed(tmp_path, busy):
    parent = textwrap.dedent(f"""
        import os, signal, sys, time
        from envs.api import GameId
        from envs.pool import WorkerPool
        pool = WorkerPool("fake", num_workers=2, temp_root=sys.argv[1], options={{"hang_on": "look"}})
        tickets = [pool.reset(GameId(env="fake", family="door", key=str(key)), max_steps=5) for key in range(2)]
        count = 0
        while count < 2:
            count += len(pool.poll(1.0))
        if {busy}:
            for ticket in tickets:
                pool.step(ticket, "look")
            pool.poll(0.1)
        print(*pool.worker_pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """)
    done = subprocess.run(
        [sys.executable, "-c", parent, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    try:
        wait_until(lambda: not any(exists(pid) for pid in workers))
    finally:
        for pid in filter(exists, workers):  # a failing test leaves no orphans either
            os.kill(pid, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_an_exit_without_close_leaves_nothing_behind(tmp_path):
    parent = (
        "import sys; from envs.pool import WorkerPool; pool = WorkerPool('fake',"
        " temp_root=sys.argv[1]); pool.poll(0.1); sys.exit(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_closes_the_pool(tmp_path):
    def use(pool):
        workers.extend(pids(pool))
        pool.reset(fake_games(1)[0], max_steps=5)
        raise KeyError("from the caller")

    workers = []
    with pytest.raises(KeyError), WorkerPool("fake", temp_root=str(tmp_path)) as pool:
        use(pool)
    assert len(workers) == 2
    assert not any(exists(pid) for pid in workers)
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_pool_ends_its_workers(tmp_path):
    pool = WorkerPool("fake", temp_root=str(tmp_path))
    until = time.monotonic() + GIVE_UP_S
    while len(workers := pids(pool)) < 2:  # a process has its own name a moment after it is there
        assert time.monotonic() < until
    del pool
    gc.collect()
    assert len(workers) == 2
    assert not any(exists(pid) for pid in workers)
    assert list(tmp_path.iterdir()) == []


def test_close_is_final_and_idempotent(tmp_path):
    pool = WorkerPool("fake", num_workers=1, temp_root=str(tmp_path), options={"hang_on": "look"})
    ticket = pool.reset(fake_games(1)[0], max_steps=5)
    wait_for(pool, 1)
    pool.step(ticket, "look")
    pool.poll(0.0)
    pool.close()
    pool.close()
    assert pool.stats.resets == 1
    for call in (
        lambda: pool.reset(fake_games(1)[0], max_steps=5),
        lambda: pool.step(ticket, "look"),
        lambda: pool.release(ticket),
        lambda: pool.poll(0.0),
        pool.__enter__,
    ):
        with pytest.raises(RuntimeError, match="The worker pool was closed: open a new one"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_fork_of_the_owner_cannot_close_the_pool(open_pool):
    pool = open_pool()
    child = os.fork()
    if child == 0:
        pool.close()
        os._exit(0)
    os.waitpid(child, 0)
    game = fake_games(1)[0]
    assert play(pool, [game], [script(game)]) == [expected(game, script(game))]
    assert pool.stats.crashes == 0


def test_a_game_that_raised_is_closed_and_not_played_again():
    opened = []

    class Environment(FakeEnvironment):
        def open(self, family):
            opened.append(super().open(family))
            return opened[-1]

    games = worker.LiveGames(Environment(raise_on="boom"), max_games=2)
    calls = []
    worker.execute(games, [wire.RESET, 5, "fake|door|1"], lambda: calls.append(1))
    answer = worker.execute(games, [wire.STEP, 5, "boom"], lambda: calls.append(1))
    assert answer.startswith('[5,"raised","RuntimeError: ')
    games.release(5)
    assert games.take(6, "door") is not opened[0]
    assert len(opened) == 2
    assert len(calls) == 2


def test_live_games_are_kept_per_family_bounded_and_renewed(monkeypatch):
    opened, closed = [], []

    class Environment(FakeEnvironment):
        def open(self, family):
            game = super().open(family)
            opened.append(family)
            game.close = lambda: closed.append(family)
            return game

    games = worker.LiveGames(Environment(), max_games=2)
    for ticket, family in enumerate(["door", "lamp", "door", "bell", "lamp"]):
        games.take(ticket, family)
        games.release(ticket)
    assert opened == ["door", "lamp", "bell", "lamp"]  # the second door is the first one again
    assert closed == ["lamp", "door"]  # the longest idle makes room
    games.take(9, "bell")
    games.discard(9)
    assert closed == ["lamp", "door", "bell"]
    games.close()
    games.close()
    assert closed == ["lamp", "door", "bell", "lamp"]
    monkeypatch.setattr(worker, "_MAX_RESETS", 2)
    games.take(0, "door")
    games.release(0)
    games.take(0, "door")
    games.release(0)
    assert closed[4:] == ["door"]
