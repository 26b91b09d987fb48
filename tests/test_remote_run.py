"""Run directories at an address: gs:// stands for a folder here, whose uploads can be cut off."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils.epath import gpath

from envs.api import CannotGoOn, Refusal
from experiments import cli, remote_run, train
from experiments.fake_pair import save_pair
from experiments.remote_run import (
    CACHE_VARIABLE,
    RemoteLock,
    RemoteRun,
    Sender,
    copy_of_host,
    is_remote,
    readable,
)
from experiments.run_lock import FILE_NAME, SILENT_S
from ictjax import precollection
from ictjax.config import LoraConfig
from ictjax.metrics import read_metrics
from tests.bucket import Store
from tests.test_export import save_run
from tests.test_report import make_run

ADDRESS = Path("gs://bucket/runs/a")  # one slash of two is lost, as on the command line


@pytest.fixture
def store(tmp_path, monkeypatch):
    double = Store(tmp_path / "stores")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", double)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return double


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Moves to the machine of a name, each with a disk of its own."""

    def go(name):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        remote = RemoteRun(ADDRESS, "training")
        remote.fetch_for_training()
        return remote

    return go


def iterate(run, last, *, kept=2):
    """What iterations up to this one leave."""
    for number in range(1, last + 1):
        for folder in ("contexts", "episodes"):
            (run / folder).mkdir(parents=True, exist_ok=True)
            (run / folder / f"iteration_{number:05d}.jsonl").write_text(f'{{"n":{number}}}\n')
        step = run / "checkpoints" / str(number) / "state"
        step.mkdir(parents=True, exist_ok=True)
        (step / "array").write_bytes(bytes([number]) * 1000)
    (run / "metrics.jsonl").write_text(
        "".join(f'{{"iteration":{n}}}\n' for n in range(1, last + 1))
    )
    for number in range(1, last + 1 - kept):
        shutil.rmtree(run / "checkpoints" / str(number))
    (run / "config.json").write_text("{}")
    (run / FILE_NAME).write_text("mine")
    (run / "metrics.jsonl.00.tmp").write_text("half")
    (run / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir(exist_ok=True)
    (run / "checkpoints" / "9.orbax-checkpoint-tmp" / "x").write_text("half")


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "tmp" not in str(path.relative_to(folder)) and path.name != FILE_NAME
    }


def test_which_directories_are_addresses():
    assert is_remote(ADDRESS) and is_remote(Path("s3://b/a"))
    assert not any(map(is_remote, (None, Path("runs/a"), Path("gs:"), Path("ftp://b/a"))))


def test_a_fresh_machine_finds_what_was_sent(store, machine):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    assert sorted({path.split("/")[1] for path in store.written if "checkpoints" in path}) == [
        "2",
        "3",
    ]
    assert store.written[-1] == "index.json"
    records = [path for path in store.written[:-1] if "checkpoints" not in path]
    assert store.written[: len(records)] == records  # before any checkpoint
    assert not any("tmp" in path or FILE_NAME in path for path in store.written)
    two = machine("two")
    assert tree(two.path) == tree(one.path)
    assert {path.name for path in (two.path / "checkpoints").iterdir()} == {"2", "3"}


def test_only_what_is_new_is_sent_and_what_is_too_old_is_removed(store, machine):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    store.written.clear()
    one.push()
    assert store.written == []
    iterate(one.path, 4)
    one.push()
    assert set(store.written) == {
        "contexts/iteration_00004.jsonl",
        "episodes/iteration_00004.jsonl",
        "metrics.jsonl",
        "checkpoints/4/state/array",
        "index.json",
    }
    place = store.folder / "bucket" / "runs" / "a" / "checkpoints"
    assert sorted(path.name for path in place.rglob("array")) == ["array"] * 2
    assert not (place / "2" / "state" / "array").exists()


@pytest.mark.parametrize("left", range(5))
def test_an_upload_that_is_cut_off_leaves_the_run_as_it_was_and_is_made_up_for(
    store, machine, left
):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    iterate(one.path, 4)
    store.left = left
    with pytest.raises(ValueError, match=r"^gs://bucket/runs/a cannot be reached \(503 .*kept in"):
        one.push()
    store.left = 10**9
    elsewhere = machine("elsewhere")  # a machine that only looks
    assert {path.name for path in (elsewhere.path / "checkpoints").iterdir()} == {"2", "3"}
    metrics = (elsewhere.path / "metrics.jsonl").read_text().count("\n")
    assert metrics in (3, 4)  # a record may be ahead of the checkpoints, as after a kill
    again = machine("one")  # started again: what it had done is not lost
    assert (again.path / "checkpoints" / "4").is_dir()
    again.push()
    assert tree(machine("two").path) == tree(one.path)


def test_when_another_machine_went_on_the_old_copy_makes_way(store, machine):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    two = machine("two")
    iterate(two.path, 6)
    two.push()
    iterate(one.path, 4)  # was never sent
    assert tree(machine("one").path) == tree(two.path)


def test_a_kill_between_the_index_and_its_note_here_costs_nothing(store, machine, monkeypatch):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    remember, calls = one._remember, []

    def killed(*tokens):
        calls.append(tokens)
        if len(calls) == 2:
            raise KeyboardInterrupt
        remember(*tokens)

    monkeypatch.setattr(one, "_remember", killed)
    iterate(one.path, 4)
    with pytest.raises(KeyboardInterrupt):
        one.push()
    iterate(one.path, 5)
    assert (machine("one").path / "checkpoints" / "5").is_dir()


def test_a_checkpoint_that_is_damaged_there_is_named(store, machine):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    place = store.folder / "bucket" / "runs" / "a" / "checkpoints" / "3" / "state" / "array"
    place.write_bytes(bytes(1000))
    with pytest.raises(ValueError, match=r"checkpoints/3/state/array is not what was sent"):
        machine("two")


def test_a_store_that_is_away_is_told_whatever_is_asked_of_it(store, machine, monkeypatch):
    one, two = machine("one"), machine("two")

    def away(*words, **more):
        raise KeyError("of a library's own kind")

    with RemoteLock(one, about={}) as lock:
        iterate(one.path, 3)
        one.push()
        with monkeypatch.context() as patch:
            patch.setattr(store, "open", away)
            with pytest.raises(Refusal, match=r"^gs://bucket/runs/a cannot be reached .*own kind"):
                lock.check()
        exists = store.exists
        with monkeypatch.context() as patch:
            patch.setattr(
                store, "exists", lambda path: exists(path) if "index" in str(path) else away()
            )
            with pytest.raises(Refusal, match=r"^gs://bucket/runs/a cannot be reached .*own kind"):
                two.fetch_newest()
        iterate(one.path, 4)
        with monkeypatch.context() as patch:
            patch.setattr(store, "remove", away)
            one.push()  # what it need not hold any more stays
        assert [path for path in one.index()["files"] if "checkpoints/2/" in path] == []


def test_a_disk_that_fills_up_while_a_run_is_fetched_is_no_fault_of_the_store(
    store, machine, monkeypatch
):
    one = machine("one")
    iterate(one.path, 3)
    one.push()

    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(remote_run, "_copied", full)
        with pytest.raises(ValueError, match=f"^Too little disk .*gs://.* with {CACHE_VARIABLE}"):
            machine("two")
    assert tree(machine("two").path) == tree(one.path)


def test_what_is_removed_while_it_is_fetched_is_told(store, machine):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    (store.folder / "bucket/runs/a/checkpoints/3/state/array").unlink()
    with pytest.raises(ValueError, match="^gs://bucket/runs/a changed while it was fetched: start"):
        machine("two")


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"token":"x","files":{"a":3}}',
        '{"token":"x","files":{"../a":[1,"0"]}}',
        '{"token":"x","files":{"/a":[1,"0"]}}',
    ],
)
def test_an_index_that_is_damaged_is_named(store, machine, index):
    place = store.folder / "bucket" / "runs" / "a"
    place.mkdir(parents=True)
    (place / "index.json").write_text(index)
    with pytest.raises(ValueError, match=r"^gs://bucket/runs/a/index.json .*restore it"):
        machine("one")


def test_a_reader_fetches_one_checkpoint_and_sends_its_evaluation_beside_the_training(
    store, machine, monkeypatch
):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    for step, names in ((None, set()), ("newest", {"3"}), (2, {"2", "3"})):
        with readable(ADDRESS, checkpoint=step) as run:
            found = run / "checkpoints"
            assert (set(os.listdir(found)) if found.is_dir() else set()) == names
            assert (run / "metrics.jsonl").is_file()
            (run / "evaluation").mkdir(exist_ok=True)
            (run / "evaluation" / "part.json").write_text("{}")
            (run / "report.html").write_text("<p>")
    with pytest.raises(ValueError, match=r"no checkpoint of iteration 7: --step can be 2, 3\."):
        readable(ADDRESS, checkpoint=7).__enter__()
    iterate(one.path, 4)
    one.push()  # leaves evaluations alone
    machine("two")
    with readable(ADDRESS) as run:
        assert (run / "evaluation" / "part.json").read_text() == "{}"
        assert (run / "report.html").is_file() and not (run / "checkpoints" / "4").exists()
    with readable(Path("runs/here")) as run:
        assert run == Path("runs/here")


def test_of_several_hosts_the_first_alone_sends_and_each_has_a_copy(store, machine):
    one = machine("one")
    iterate(one.path, 3)
    one.push()
    second = RemoteRun(ADDRESS, copy_of_host("training", 1))
    second.fetch_newest()
    assert second.path != one.path
    assert os.listdir(second.path / "checkpoints") == ["3"]
    expected = {
        path: data for path, data in tree(one.path).items() if not path.startswith("checkpoints/2")
    }
    assert tree(second.path) == expected
    store.written.clear()
    copies = []
    for host in (1, 0):
        with readable(ADDRESS, host=host) as run:
            copies.append(run)
            (run / "evaluation").mkdir()
            (run / "evaluation" / "part.json").write_text(f"{host}")
        assert store.written == ([] if host else ["evaluation/part.json", "index-evaluation.json"])
    assert len({*copies, one.path, second.path}) == 4


def test_what_is_sent_at_once_is_there_when_that_returns(store, machine):
    one = machine("one")
    with RemoteLock(one, about={}) as lock, Sender(one, lock, print) as sender:
        iterate(one.path, 3)
        sender.send()
        assert store.written[-1] == "index.json"
        iterate(one.path, 4)
        store.left = 0
        with pytest.raises(ValueError, match="cannot be reached .*503"):
            sender.send()
        store.left = 10**9
    assert tree(machine("two").path) == tree(one.path)


def test_an_address_without_a_run_is_named(store, machine):
    machine("one")
    with pytest.raises(ValueError, match="^gs://bucket/runs/a holds no run"):
        readable(ADDRESS).__enter__()


def test_one_trains_at_a_time_and_a_silent_one_makes_way(store, machine):
    one, two = machine("one"), machine("two")
    with RemoteLock(one, about={"host": "first"}) as lock:
        with pytest.raises(ValueError, match="is being trained on first, whose last sign"):
            RemoteLock(two, about={"host": "second"}).__enter__()
        place = store.folder / "bucket" / "runs" / "a" / FILE_NAME
        silent = time.time() - SILENT_S - 60
        os.utime(place, (silent, silent))
        with (
            RemoteLock(two, about={"host": "second"}),
            pytest.raises(CannotGoOn, match="taken over by another machine"),
        ):
            lock.check()
        assert not place.exists()
    assert os.listdir(place.parent) == []


def test_whoever_lost_the_address_sends_nothing_more(store, machine):
    one, two = machine("one"), machine("two")
    place = store.folder / "bucket" / "runs" / "a"
    with RemoteLock(one, about={}) as lock, contextlib.ExitStack() as stack:
        sender = stack.enter_context(Sender(one, lock, print))
        iterate(one.path, 3)
        (place / FILE_NAME).write_text(json.dumps({"host": "x"}))
        with pytest.raises(CannotGoOn, match="was taken over"):
            stack.close()
        with pytest.raises(CannotGoOn, match="was taken over"):
            sender._push()
    assert two.index()["files"] == {} and os.listdir(place) == [FILE_NAME]


def test_the_end_sends_everything_and_what_failed_on_the_way_is_said(store, machine):
    one, said = machine("one"), []
    with RemoteLock(one, about={}) as lock, Sender(one, lock, said.append) as sender:
        iterate(one.path, 3)
        store.left = 1
        sender.poke()
        while not said:
            time.sleep(0.001)
        store.left = 10**9
        iterate(one.path, 4)
    assert "503" in said[0] and said[0].endswith("It is tried again.")
    assert tree(machine("two").path) == tree(one.path)


def test_a_store_that_is_away_at_the_end_is_told_and_nothing_is_lost(store, machine):
    one = machine("one")
    with RemoteLock(one, about={}) as lock:
        iterate(one.path, 3)
        with pytest.raises(ValueError, match="cannot be reached .*503"), Sender(one, lock, print):
            store.left = 0
    store.left = 10**9
    again = machine("one")
    again.push()
    assert tree(machine("two").path) == tree(one.path)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run on a disk, with everything that is read of one."""
    folder = tmp_path_factory.mktemp("evaluated")
    run = make_run(folder / "a", iterations=3)
    save_run(folder, LoraConfig())
    for name in ("config.json", "checkpoints"):
        (folder / "run" / name).replace(run / name)
    return run


@pytest.mark.parametrize(
    "command",
    [
        "report --run-dir {run}",
        "compare {run}",
        "results {run} --format csv",
        "results {run} --format inspect --out {out}",
        "watch {run} --once",
        "bundle {run} --out {out}",
        "export --run-dir {run} --out {out}",
        "export --run-dir {run} --out {out} --step 1",
    ],
)
def test_commands_do_with_an_address_what_they_do_with_a_folder(
    store, machine, evaluated, tmp_path, monkeypatch, capsys, command
):
    if "inspect" in command:
        pytest.importorskip("inspect_ai")
    shutil.copytree(evaluated, machine("one").path, dirs_exist_ok=True)
    one = machine("one")
    one.push()
    one.push_measured()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "two"))  # of whoever reads
    monkeypatch.setenv("COLUMNS", "200")  # the folder has a longer name than the address
    said, written = [], []
    for name, run in (("here", evaluated), ("there", "gs://bucket/runs/a")):
        out = tmp_path / name / "out"
        out.parent.mkdir()
        cli.main([word.format(run=run, out=out) for word in command.split()])
        page = capsys.readouterr().out.replace(str(run), "RUN").replace(str(out), "OUT")
        said.append([line for line in page.splitlines() if not line.startswith("A copy")])
        written.append(tree(out.parent))
    assert said[0] == said[1] and said[0]
    assert written[0] == written[1] and bool(written[0]) == ("{out}" in command)
    if "report" in command:
        page = store.folder / "bucket" / "runs" / "a" / "report.html"
        assert page.read_bytes() == (evaluated / "report.html").read_bytes()


@pytest.mark.parametrize("command", ["report --run-dir {run}", "compare {run}", "results {run}"])
def test_commands_say_of_an_address_without_results_what_they_say_of_a_folder(
    store, machine, evaluated, tmp_path, monkeypatch, capsys, command
):
    run = tmp_path / "a"
    shutil.copytree(evaluated, run, ignore=shutil.ignore_patterns("evaluation*", "checkpoints"))
    shutil.copytree(run, machine("one").path, dirs_exist_ok=True)
    machine("one").push()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "two"))
    said = []
    for name in (str(run), "gs://bucket/runs/a"):
        with contextlib.suppress(SystemExit):
            cli.main([word.format(run=name) for word in command.split()])
        page = "".join(capsys.readouterr()).replace(name, "RUN")
        said.append([line for line in page.splitlines() if not line.startswith("A copy")])
    assert said[0] == said[1] and "evaluate --run-dir RUN" in "".join(said[0])


KILLED = """
import os, signal, sys, time
from ictjax import loops, precollection
from tests import bucket

sent, piece, sys.argv = sys.argv[1], sys.argv[2], ["bucket", *sys.argv[3:]]

def killed():
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if os.path.exists(sent) and piece in open(sent).read():
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
    sys.exit("it was not sent")

play, played = precollection._play, []

def play_one(*all):
    if played and "partial" in piece:
        killed()
    played.append(play(*all))
    return played[-1]

precollection._play = play_one
loops.draw_contexts = lambda *_: killed()
bucket.main()
"""


@pytest.mark.parametrize(
    ("piece", "played_later"), [("precollected.partial.jsonl", 1), ("precollected.jsonl", 0)]
)
def test_a_machine_that_goes_before_the_first_iteration_loses_no_contexts(
    store, tmp_path, monkeypatch, piece, played_later
):
    """Two meta-turns of two loops, each of which is a piece; killed after the first one, or at the
    begin of the first iteration.
    """
    actor, reflector = map(str, save_pair(tmp_path / "models"))
    argv = [
        *("--preset=fake-tiny", f"--actor.model={actor}", f"--reflector.model={reflector}"),
        *("--iterations=1", "--meta.collection=precollected", "--meta.precollected-loops=2"),
        *("--task.environment.max-live-games=1", f"--run-dir={ADDRESS}"),
    ]
    sent = store.folder / "bucket" / "runs" / "a"
    one = subprocess.run(
        [sys.executable, "-c", KILLED, sent / "index.json", piece, store.folder, "train", *argv],
        env=os.environ | {CACHE_VARIABLE: str(tmp_path / "one")},
        capture_output=True,
        text=True,
    )
    assert one.returncode == -signal.SIGKILL, one.stdout + one.stderr
    (sent / FILE_NAME).unlink()  # or five minutes later
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "two"))
    play, played = precollection._play, []
    monkeypatch.setattr(precollection, "_play", lambda *all: played.append(all[1]) or play(*all))
    train.main(argv)
    assert len(played) == played_later
    contexts = sent / "contexts"
    assert len((contexts / "precollected.jsonl").read_text().splitlines()) == 4
    named = json.loads((sent / "index.json").read_text())["files"]
    assert "contexts/precollected.partial.jsonl" not in named
    assert [line["iteration"] for line in read_metrics(sent)] == [1]
