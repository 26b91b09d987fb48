"""Several hosts: processes that talk to each other, each with a device and workers of its own."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import gpath
from jax.experimental import multihost_utils

from envs.api import CannotGoOn, Refusal
from experiments import hosts as hosts_module
from experiments import last_words
from experiments.commands import evaluate
from experiments.fake_pair import save_pair
from experiments.hosts import decide
from experiments.memory import uses
from experiments.presets import preset
from experiments.remote_run import CACHE_VARIABLE, RemoteRun
from experiments.run_lock import RunLost
from ictjax.config import HostsConfig
from ictjax.digests import changed, digests, sums
from ictjax.hosts import ALONE, HostFailed, HostLost, Hosts, is_common
from ictjax.metrics import read_metrics
from ictjax.run_config import from_dict, to_dict
from tests.bucket import Store
from tests.one_device import one_device
from tests.side_by_side import side_by_side

ROOT = Path(__file__).parents[1]
# What one process and two sum in another order; games, replies and prompts are the same.
ROUNDED = ("grad_norm", "loss", "policy_loss", "update_norm", "entropy", "kl", "ratio", "clip")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    actor, reflector = map(str, save_pair(tmp_path_factory.mktemp("models")))
    models = ["--actor.model", actor, "--reflector.model", reflector]
    # Adam divides a gradient by its own size: with less, what is rounding makes whole steps
    return ["--preset", "fake-tiny", *models, "--optimizer.eps=1e-3"]


@pytest.fixture(scope="module")
def start():
    """Starts a command on so many hosts; whatever still runs at the end is killed."""
    environ = one_device()
    started = []

    def begin(
        count,
        command,
        *words,
        program=("-m", "experiments"),
        caches=None,
        odd=None,
        flag=(),
        away="",
        place=None,
        variables=None,
        mesh=None,
    ):
        """With `caches`, each host has a folder of that name and its number for working copies. The
        host `odd` has one more flag, cannot read these objects of a bucket, has these environment
        variables, or is started in another folder, whose packages it takes first.
        """
        port = free_port()
        sizes = mesh or {"data": count}
        together = [
            f"--{role}.mesh.{axis}={size}"
            for role in ("actor", "reflector")
            for axis, size in sizes.items()
        ]
        if count > 1:
            together += [f"--hosts.coordinator=127.0.0.1:{port}", f"--hosts.count={count}"]
        processes = []
        for index in range(count):
            own = [f"--hosts.index={index}"] if count > 1 else []
            more = {} if caches is None else {CACHE_VARIABLE: f"{caches}-{index}"}
            more["PYTHONPATH"] = str(ROOT)
            if index == odd:
                own += flag
                more |= {"AWAY": away, **(variables or {})}
            processes.append(
                subprocess.Popen(
                    [sys.executable, *program, command, *words, *together, *own],
                    env=environ | more,
                    cwd=place if index == odd else None,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        started.extend(processes)
        return processes

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def finish(processes):
    for process in processes:
        out, errors = process.communicate()
        assert process.returncode == 0, out + errors


@pytest.fixture(scope="module")
def runs(flags, start, tmp_path_factory):
    """The same run, on one host and on two."""
    folder = tmp_path_factory.mktemp("runs")
    for count in (1, 2):
        finish(start(count, "train", *flags, "--iterations=3", f"--run-dir={folder / str(count)}"))
    return folder / "1", folder / "2"


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


def same_metrics(one, other, iterations=3):
    lines = [read_metrics(run) for run in (one, other)]
    assert len(lines[0]) == len(lines[1]) == iterations
    for before, now in zip(*lines, strict=True):
        assert before.keys() == now.keys()
        for name in before.keys() - {"time"}:
            if name.startswith(ROUNDED):
                np.testing.assert_allclose(now[name], before[name], rtol=1e-4, atol=1e-6)
            else:
                assert now[name] == before[name], name


def test_two_hosts_train_what_one_trains(runs):
    one, two = runs
    same_metrics(one, two)
    for name in ("episodes", "contexts", "prompts"):
        assert tree(one / name) == tree(two / name)
    assert len(json.loads((two / "manifest.json").read_text())["devices"]) == 2


def test_two_hosts_train_the_pocket_preset_as_one_does(start, tmp_path):
    """Its own models on games of MiniHack: fewer of them, and one size of each program."""
    sizes = (
        "--iterations=2 --meta.contexts-per-iteration=2 --meta.games-per-context=2"
        " --meta.fresh-games=2 --grpo.group-size=4 --task.rollout.max-steps=6"
        " --task.environment.num-workers=1 --actor-sampler.num-slots=8"
        " --actor-sampler.row-buckets=8 --actor-sampler.extend-buckets=64"
        " --actor-sampler.attended-buckets=512 --reflector-sampler.num-slots=8"
        " --reflector-sampler.row-buckets=8 --reflector-sampler.attended-buckets=448"
        " --batch.num-rows=2 --batch.replies-per-row=4 --batch.token-buckets=896"
        " --learner.num-microbatches=1 --optimizer.eps=1e-3"
    ).split()
    for count in (1, 2):
        run = tmp_path / str(count)
        finish(start(count, "train", "--preset=pocket-minihack", *sizes, f"--run-dir={run}"))
    same_metrics(tmp_path / "1", tmp_path / "2", iterations=2)
    for name in ("episodes", "contexts", "prompts"):
        assert tree(tmp_path / "1" / name) == tree(tmp_path / "2" / name)


def test_every_device_holds_what_is_planned_for_it(runs):
    """What `plan` counts: caches that filled up, on the first of two hosts and on one alone."""
    for run in runs:
        config = from_dict(json.loads((run / "config.json").read_text()))
        caches = {use.what: use for use in uses(config) if use.kind == "cache"}
        assert [use.devices for use in caches.values()] == [config.actor.mesh.data] * 2
        times = read_metrics(run)[-1]["time"]
        for name, use in zip(("actor", "reflector"), caches.values(), strict=True):
            assert times[f"{name}_peak_bytes"] == use.device_bytes, name


def test_two_hosts_check_the_mesh_of_both(flags, start):
    first, second = start(2, "train", *flags, "--check")
    said = [process.communicate() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert "Plan for 2 x cpu, mesh data=2" in said[0][0] and "It fits" in said[0][0]
    assert "Plan for" not in said[1][0]
    for process in start(2, "train", *flags, "--check", mesh={"tensor": 2}):
        _, errors = process.communicate()
        assert process.returncode == 2
        assert "mesh data=1 is not a multiple of the 2 hosts" in errors


def test_a_run_of_one_host_goes_on_with_two(runs, flags, start, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "3")  # as if it had ended before that was saved
    finish(start(2, "train", *flags, "--iterations=3", f"--run-dir={run}"))
    same_metrics(runs[0], run)
    before, now = ([line["time"] for line in read_metrics(path)] for path in (runs[0], run))
    assert [old == new for old, new in zip(before, now, strict=True)] == [True, True, False]


def test_two_hosts_evaluate_what_one_evaluates(runs, start):
    results = []
    for run, count in zip(runs, (1, 2), strict=True):
        finish(
            start(
                count,
                "evaluate",
                f"--run-dir={run}",
                "--step=3",
                "--evaluation.runs=3",
                "--evaluation.test-games=2",
                "--deletions=1",
            )
        )
        (folder,) = (run / "evaluation").iterdir()
        found = json.loads((run / "evaluation.json").read_text())
        numbers = found["overall"], found["analyses"]["deletions"]
        assert numbers[1]
        results.append((numbers, tree(folder)))
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()


def test_hosts_with_disks_of_their_own_share_a_run_in_a_bucket(runs, flags, start, tmp_path):
    """What two hosts in one folder do: each has a working copy that the other does not see. They
    begin, go on on two other machines, and two more evaluate.
    """

    def go(machines, command, *words):
        bucket = ("-m", "tests.bucket", str(tmp_path / "stores"))
        words = [*words, "--run-dir=gs://bucket/runs/a"]
        finish(start(2, command, *words, program=bucket, caches=tmp_path / machines))

    go("first", "train", *flags, "--iterations=2")
    go("others", "train", *flags, "--iterations=3")
    place = tmp_path / "stores" / "bucket" / "runs" / "a"
    same_metrics(runs[0], place)
    for name in ("episodes", "contexts", "prompts"):
        assert tree(place / name) == tree(runs[0] / name)
    (copy,) = (tmp_path / "others-1").glob("runs/*/training-1/a")
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"2"}  # it wrote none
    assert not (copy / "episodes" / "iteration_00003.jsonl").exists()

    go("third", "evaluate", "--evaluation.runs=3", "--evaluation.test-games=2")
    results = json.loads((place / "evaluation.json").read_text())
    assert results["protocol"]["checkpoint"] == 3
    (read,) = (tmp_path / "third-1").glob("runs/*/reading-1/a")
    assert tree(read / results["folder"]).keys() < tree(place / results["folder"]).keys()


@pytest.fixture
def bucket(runs, tmp_path, monkeypatch):
    """How `start` begins commands beside a bucket that holds a run of one host."""
    stores = tmp_path / "stores"
    with monkeypatch.context() as here:
        here.setitem(gpath._PREFIX_TO_BACKEND, "gs", Store(stores))
        here.setattr(gpath, "_is_tf_installed", lambda: False)
        here.setenv(CACHE_VARIABLE, str(tmp_path / "sent"))
        remote = RemoteRun(Path("gs://bucket/runs/a"), "training")
        shutil.copytree(runs[0], remote.path)
        remote.push()
    return {
        "program": ("-m", "tests.bucket", str(stores)),
        "caches": tmp_path / "host",
    }


@pytest.mark.parametrize(
    ("command", "odd", "fault", "reason"),
    [
        ("evaluate", 1, {"away": "config.json"}, "503 Service Unavailable"),
        ("evaluate", 0, {"away": "checkpoints/3/"}, "503 Service Unavailable"),
        ("evaluate", 1, {}, "the actor's model (its files differ)"),
        ("train", 1, {"away": "checkpoints/3/"}, "503 Service Unavailable"),
        ("train", 1, {}, "'abacus'"),
    ],
)
def test_a_host_that_fails_alone_before_all_compute_tells_the_others_why(
    bucket, flags, start, tmp_path, command, odd, fault, reason
):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    fault = fault or {"flag": [f"--actor.model={tmp_path}"]}
    words = [*flags, "--iterations=4"] if command == "train" else []
    words.append("--run-dir=gs://bucket/runs/a")
    processes = start(2, command, *words, **bucket, odd=odd, **fault)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == ([2, 1] if odd == 0 else [1, 2])
    assert f"ictjax: Host {odd} of 2 cannot go on: " in errors[1 - odd]
    assert all(reason in said and "Traceback" not in said for said in errors)
    assert "cannot go on" not in errors[odd]


# Steps between the meeting of all hosts and the first game, at which one of them may fail alone.
STEPS = [
    ("train", 1, "experiments.train:open_pool"),
    ("train", 1, "ictjax.train:Checkpointer"),
    ("train", 0, "ictjax.players:load_checkpoint"),
    ("train", 1, "ictjax.players:ModelSpeaker"),
    ("train", 1, "ictjax.train:compile_all"),
    ("train", 0, "ictjax.train:open_trackers"),
    ("go on", 1, "ictjax.checkpoint:CheckpointReader._arrays"),
    ("evaluate", 0, "ictjax.checkpoint:CheckpointReader._arrays"),
    ("evaluate", 1, "experiments.evaluate:open_pool"),
    ("evaluate", 1, "ictjax.players:load_checkpoint"),
]


@pytest.mark.parametrize(("command", "odd", "fault"), STEPS)
def test_a_host_that_fails_alone_before_the_first_game_tells_the_others_why(
    request, flags, start, tmp_path, command, odd, fault
):
    run = tmp_path / "run"
    words = [*flags, "--iterations=4", f"--run-dir={run}"]
    if command != "train":
        shutil.copytree(request.getfixturevalue("runs")[0], run)
    if command == "evaluate":
        words = [f"--run-dir={run}"]
    memory = {"BYTES": "1"} if fault.endswith("compile_all") else {}
    processes = start(
        2,
        "evaluate" if command == "evaluate" else "train",
        *words,
        program=("-m", "tests.faulty"),
        odd=odd,
        variables={"FAULT": fault, **memory},
    )
    errors = [process.communicate()[1] for process in processes]
    codes = [1, 1]
    codes[odd] = 1 if memory else 2
    assert [process.returncode for process in processes] == codes, errors
    reason = "RESOURCE_EXHAUSTED" if memory else f"{fault.partition(':')[2]} is broken here"
    assert f"ictjax: Host {odd} of 2 cannot go on: " in errors[1 - odd]
    assert reason in errors[1 - odd] and "cannot go on" not in errors[odd]
    assert not any("Traceback" in said for said in errors)


def test_a_host_that_fails_while_the_others_compute_ends_and_they_end_with_it(
    flags, start, tmp_path
):
    """Its end would wait five minutes for the other one, which waits for its devices."""
    processes = start(
        2,
        "train",
        *flags,
        "--iterations=1",
        f"--run-dir={tmp_path / 'run'}",
        program=("-m", "tests.faulty"),
        odd=1,
        variables={"FAULT": "ictjax.train:pack_groups", "SILENT": str(SILENT_S)},
    )
    other, failed = (process.communicate(timeout=240)[1] for process in processes)
    assert [process.returncode for process in processes] == [1, 1], (other, failed)
    assert "ictjax: pack_groups is broken here." in failed
    assert "ictjax: Another of the 2 hosts ended" in other


def another_jax(folder):
    about = folder / "jax-0.0.1.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.0.1\n")


def another_source(folder):
    for name in ("envs", "ictjax", "experiments"):
        shutil.copytree(ROOT / name, folder / name)
    with (folder / "envs" / "fake.py").open("a") as file:
        file.write("# changed\n")


@pytest.mark.parametrize(
    ("command", "flag", "elsewhere", "said"),
    [
        (
            "train",
            ["--seed=7", "--grpo.group-size=2"],
            None,
            "was not started as host 0 was: --seed is 7, not 0; --grpo.group-size is 2, not ",
        ),
        ("train", [], another_jax, "does not run the program of host 0: jax is 0.0.1, not "),
        ("train", [], another_source, "does not run the program of host 0: ictjax is "),
        (
            "evaluate",
            ["--evaluation.runs=2"],
            None,
            "was not started as host 0 was: --evaluation.runs is 2, not 3:",
        ),
    ],
)
def test_hosts_that_are_not_started_alike_end_with_the_same_sentence(
    flags, start, tmp_path, command, flag, elsewhere, said
):
    place, run = tmp_path / "place", tmp_path / "run"
    place.mkdir()
    if elsewhere is not None:
        elsewhere(place)
    words = [*flags, f"--run-dir={run}"]
    if command == "evaluate":
        run.mkdir()
        (run / "config.json").write_text(json.dumps(to_dict(preset("fake-tiny"))))
        words = ["--evaluation.runs=3", f"--run-dir={run}"]
    processes = start(2, command, *words, odd=1, flag=flag, place=place)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    sentences = {error.splitlines()[-1] for error in errors}  # behind the transport's own words
    assert len(sentences) == 1 and sentences.pop().startswith(f"ictjax: Host 1 of 2 {said}")
    assert run.exists() == (command == "evaluate")  # nothing was begun


def test_a_host_that_dies_ends_the_others_and_another_number_of_hosts_goes_on(
    runs, flags, start, tmp_path
):
    run = tmp_path / "run"
    words = [*flags, "--iterations=3", f"--run-dir={run}"]
    first, second = start(2, "train", *words)
    while len(read_metrics(run)) < 1:
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    _, errors = first.communicate(timeout=60)
    assert first.returncode not in (0, None)
    assert "Another of the 2 hosts ended" in errors and "Traceback" not in errors
    finish(start(1, "train", *words))
    same_metrics(runs[0], run)


SILENT_S = 8
IMPATIENT = f"""
import sys
from experiments import hosts

hosts._SILENT_S = {SILENT_S}
sys.argv[0] = "ictjax"
from experiments.__main__ import main

main()
"""  # and else as users start it, who wait longer
A_MINUTE_S = 60 - (hosts_module._SILENT_S - SILENT_S)  # of the user's


@pytest.mark.parametrize(
    ("number", "lost"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)]
)
def test_a_first_host_that_dies_and_any_that_falls_silent_end_the_other_within_a_minute(
    flags, start, tmp_path, number, lost
):
    run, words = tmp_path / "run", [*flags, "--iterations=1000"]
    processes = start(2, "train", *words, f"--run-dir={run}", program=("-c", IMPATIENT))
    gone, other = processes[lost], processes[1 - lost]
    while len(read_metrics(run)) < 1:
        assert other.poll() is None, other.communicate()
        time.sleep(0.01)
    gone.send_signal(number)
    _, errors = other.communicate(timeout=A_MINUTE_S)
    assert other.returncode not in (0, None)
    said = f"ictjax: (Another|Host {lost}) of the 2 hosts ended or .*last checkpoint\\.\n"
    assert re.fullmatch(said, errors), errors
    if number == signal.SIGKILL:
        return
    written = tree(run)  # by the first host, whether it is the silent one or the other
    gone.send_signal(signal.SIGCONT)
    _, errors = gone.communicate(timeout=A_MINUTE_S)
    assert gone.returncode not in (0, None)
    assert re.fullmatch(r"ictjax: .*last checkpoint\.\n", errors), errors
    assert tree(run) == written


BUSY = """
import ctypes, sys
from experiments import hosts
from ictjax.config import HostsConfig

hosts._SILENT_S = 6
index, port, busy = map(int, sys.argv[1:])
both = hosts.connect(HostsConfig(coordinator=f"127.0.0.1:{port}", count=2, index=index))
if index == busy:
    ctypes.PyDLL(None).sleep(12)  # with the interpreter's lock
assert both.agree(index) == 0
"""


@pytest.mark.parametrize("busy", [0, 1])
def test_a_host_that_is_only_busy_is_not_taken_for_silent(busy):
    """Signs of life are not Python's to give: it does nothing for twice as long as is waited."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, *map(str, (index, port, busy))],
            env=one_device() | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    finish(processes)


# What jaxlib 0.10 writes when it ends a process.
ENDS = (
    "F1130 12:10:34.436027    8867 client.h:80] Terminating process because the JAX distributed"
    " service detected fatal errors. This most likely indicates that another task died"
)
STACK = "*** Check failure stack trace: ***\n    @     0x7f16e9440634  absl::LogMessage::Flush()\n"
SILENT = (
    "E1130 12:10:34.434459    8856 coordination_service.cc:1549] Use error polling to propagate:"
    " UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe tasks"
    " have crashed. Check the task logs for an earlier error.\n"
)
OURS = "ictjax: Another of the 4 hosts ended.\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a\nno line end", "a\nno line end"),
        (f"a\n{ENDS}: Socket closed\n{STACK}", "a\nictjax: Host 0 of the 4 hosts ended or"),
        (f"{SILENT.format(3)}{ENDS}\n{STACK}", "ictjax: Host 3 of the 4 hosts ended or"),
        (SILENT.format("0\n3") + ENDS, "ictjax: Hosts 0 and 3 of the 4 hosts ended or"),
        (f"{SILENT.format(1)}{ENDS}", "ictjax: Host 1 of the 4 hosts, which is this one, gave no"),
        (f"{OURS}{ENDS}\n{STACK}", OURS),  # whoever was sooner
        (f"{SILENT.format(3)}{OURS}{ENDS}\n{STACK}", OURS),
        (SILENT.format(3), SILENT.format(3)),  # it did not end the process
        (f"F1130 12:10:34 1 other.cc:1] Check failed\n{STACK}", "F1130 12:10:34 1 other.cc:1]"),
    ],
)
def test_the_words_of_the_coordination_service_become_one_sentence(words, expected):
    done = subprocess.run(
        [sys.executable, last_words.__file__, "1", "4"],
        input=words,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.startswith(expected) and done.stdout == ""
    assert ("Check failure" in done.stderr) == ("other.cc" in words)


def test_words_that_were_not_the_last_are_passed_on_in_time():
    code = (
        "import sys; from experiments import last_words;"
        " sys.argv[1:] = ['1', '4']; last_words._HELD_S = 0.2; last_words.main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stderr
        for words in (SILENT.format(3), "iteration 2\n"):
            process.stdin.write(words)
            process.stdin.flush()
            for line in words.splitlines(keepends=True):
                assert process.stderr.readline() == line  # it has not ended
        process.stdin.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_every_process_of_a_host_does_not_cut_off_what_it_says(number):
    with subprocess.Popen(
        [sys.executable, last_words.__file__, "1", "4"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stderr
        for line in ("iteration 2\n", "ictjax: stopped\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stderr.readline() == line
            process.send_signal(number)
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detect": True, "count": 2, "coordinator": "a:1"}, "give either"),
        ({"count": 2}, "do not fit together"),
        ({"coordinator": "a:1"}, "do not fit together"),
        ({"count": 2, "coordinator": "a:1", "index": 2}, "count from 0 to 1"),
        ({"count": 0}, "count"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        HostsConfig(**settings)


def test_shares_are_neighbours_and_all_of_it():
    for count in (1, 2, 3, 7):
        shares = [Hosts(index=i, count=count).share(range(5)) for i in range(count)]
        assert [item for share in shares for item in share] == list(range(5))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_host_asks_nobody():
    assert ALONE.together([1, 2], lambda items: [2 * i for i in items], str, int) == [2, 4]
    assert decide(ALONE, lambda: "new") == ALONE.agree("new") == "new"
    ALONE.meet()
    with pytest.raises(ValueError, match="mine"), ALONE.connected():
        raise ValueError("mine: connection lost")


def test_hosts_exchange_what_is_written_when_they_meet():
    calls = []
    hosts = Hosts(exchange=lambda: calls.append("sent"))
    hosts.meet()
    assert calls == ["sent"] and hosts.own_copies and not ALONE.own_copies

    def away():
        raise ValueError("the store is away")

    with pytest.raises(ValueError, match="^the store is away$"):
        Hosts(exchange=away).meet()


@pytest.mark.parametrize("kind", [Refusal, CannotGoOn, OSError])
@pytest.mark.parametrize("index", [0, 1])
def test_what_one_host_cannot_exchange_ends_the_other_one_too(kind, index):
    calls = []

    def exchange(host):
        calls.append(host)
        if host == index:
            raise kind("the store is away")

    errors = side_by_side(Hosts.meet, exchange)
    assert type(errors[index]) is kind and str(errors[index]) == "the store is away"
    assert type(errors[1 - index]) is HostFailed
    assert str(errors[1 - index]) == f"Host {index} of 2 cannot go on: the store is away"
    assert calls == [0, 1][: index + 1]  # nobody fetches what was not sent
    assert side_by_side(Hosts.meet, calls.append) == [None, None] and calls[-2:] == [0, 1]


@pytest.mark.parametrize("index", [0, 1])
def test_what_one_host_cannot_do_alone_ends_the_other_one_at_the_next_meeting(index):
    def alone(hosts):
        with hosts.told():
            if hosts.index == index:
                raise ValueError("no\nmodel")

    for meeting in (
        Hosts.meet,
        lambda hosts: hosts.agree(1),
        lambda hosts: decide(hosts, lambda: 1),
        lambda hosts: hosts.together([1, 2], list, str, int),
    ):
        errors = side_by_side(lambda hosts, meeting=meeting: (alone(hosts), meeting(hosts)))
        assert (type(errors[index]), str(errors[index])) == (ValueError, "no\nmodel")
        assert type(errors[1 - index]) is HostFailed
        assert str(errors[1 - index]) == f"Host {index} of 2 cannot go on: no model"


@pytest.mark.parametrize("index", [0, 1])
def test_what_is_told_is_told_once_also_where_all_meet_within(index):
    """A second word would be taken for the answer to a later question, or wait for ever."""

    def twice(hosts):
        with hosts.told():
            hosts.agree(1)
            if hosts.index == index:
                with hosts.told():
                    raise ValueError("no model")
            with hosts.told():
                hosts.agree(2)

    def until(hosts):
        with hosts.told_until() as wait:
            if hosts.index == index:
                raise ValueError("no model")
            wait()

    for body in (twice, until):
        errors = side_by_side(body)
        assert (type(errors[index]), str(errors[index])) == (ValueError, "no model")
        assert type(errors[1 - index]) is HostFailed
        assert str(errors[1 - index]) == f"Host {index} of 2 cannot go on: no model"


def test_nobody_is_told_of_a_connection_that_broke(monkeypatch):
    asked = []

    def broken(array):
        asked.append(array)
        raise ValueError("Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(multihost_utils, "process_allgather", broken)

    def meet():
        two = Hosts(count=2)
        with two.connected(), two.told():
            two.agree(1)

    with pytest.raises(HostLost):
        meet()
    assert len(asked) == 1


def _unlike(hosts):
    with hosts.told():
        if hosts.first:
            raise ValueError("no model")
    hosts.meet()


def test_what_fails_while_all_compute_together_is_not_told():
    """Whoever waits for a device of this host would take its words for numbers."""
    said = []
    told, found = side_by_side(_unlike)
    assert is_common(told) and is_common(found) and is_common(Refusal("a"))

    class Alone(Hosts):
        def _everyone(self, message):
            said.append(message)
            return [message, message]

    def fail():
        with Alone(count=2).told_until() as wait:
            wait()
            raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory") as ended:
        fail()
    assert not is_common(ended.value)
    assert said == [{"value": None}]


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (RunLost("taken over"), True),
        (RuntimeError("no memory"), True),
        (CannotGoOn("the loss is not finite"), False),
    ],
)
def test_only_a_host_that_ends_alone_does_not_wait_for_the_others(error, waits, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(hosts_module, "_end_late", ended.set)
    with pytest.raises(type(error)), hosts_module.ended_together(Hosts(count=2)):
        raise error
    assert ended.wait(5 if waits else 0.2) == waits


def test_help_waits_for_no_other_host(runs, monkeypatch, capsys):
    monkeypatch.setattr(hosts_module, "connect", pytest.fail)
    words = ["--run-dir", str(runs[0]), "--hosts.coordinator=127.0.0.1:1", "--hosts.count=2"]
    with pytest.raises(SystemExit) as ended:
        evaluate.main([*words, "--help"])
    assert ended.value.code == 0
    assert "--evaluation.runs" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "first"), [(ValueError, Refusal), (CannotGoOn, CannotGoOn)])
def test_what_the_first_host_cannot_decide_ends_the_other_one_too(kind, first):
    def judge():
        raise kind("it is taken")

    errors = side_by_side(lambda hosts: decide(hosts, judge))
    assert list(map(type, errors)) == [first, Refusal]
    assert set(map(str, errors)) == {"it is taken"}


def test_a_lost_host_is_told_from_other_faults():
    two = Hosts(index=0, count=2)
    lost = "of the 2 hosts ended .*Connection closed"
    with pytest.raises(HostLost, match=lost), two.connected():
        raise ValueError("Gloo AllGather failed: Connection closed by peer")
    with pytest.raises(ValueError, match="too large"), two.connected():
        raise ValueError("too large")
    for kind in (Refusal, CannotGoOn):  # a store's words are like those of a host that is gone
        said = r"^gs://b/a cannot be reached \(503 Service Unavailable\): check it\.$"
        with pytest.raises(kind, match=said), two.connected():
            raise kind("gs://b/a cannot be reached (503 Service Unavailable): check it.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_sums_are_the_same_however_an_array_is_split(dtype):
    array = (100 * jax.random.normal(jax.random.key(0), (16, 3, 8))).astype(dtype)
    mesh = jax.make_mesh((4, 2), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
    expected = sums({"a": array})
    for spec in (("x",), (None, None, "y"), ("x", None, "y")):
        placed = jax.device_put(
            array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        )
        assert sums({"a": placed}) == expected
    assert changed(expected, {"a": np.asarray(array)}) == ""
    assert changed(digests({"a": array}), {"a": array}) == ""
    rng = np.random.default_rng(0)
    flat = np.asarray(array).reshape(-1).view(np.uint8)
    for _ in range(30):  # flipped bits
        damaged = flat.copy()
        bit = 0 if dtype == "bool" else rng.integers(8)
        damaged[rng.integers(len(flat))] ^= 1 << bit
        back = damaged.view(np.asarray(array).dtype).reshape(array.shape)
        assert changed(expected, {"a": jnp.asarray(back)}) == "a"
