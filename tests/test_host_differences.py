"""Hosts that were started alike, and others."""

import threading

import pytest

from envs.api import Refusal
from experiments import host_differences
from experiments.commands.train import read_args
from experiments.host_differences import check_same_files, check_started_alike
from ictjax.hosts import ALONE
from tests.side_by_side import side_by_side

FLAGS = ["--preset", "fake-tiny", "--run-dir=runs/a", "--hosts.coordinator=a:1", "--hosts.count=2"]


def started(*flags):
    """What two hosts raise, of which the second has these flags as well."""
    told = []
    for index, more in enumerate(((), flags)):
        args, _ = read_args([*FLAGS, f"--hosts.index={index}", *more])
        told.append((args, args.settings))
    return side_by_side(lambda hosts: check_started_alike(hosts, *told[hosts.index]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed=7"], "--seed is 7, not 0"),
        (["--grpo.clip-high=0.5"], "--grpo.clip-high is 0.5, not "),
        (["--meta.fresh-games=3"], "--meta.fresh-games is 3, not "),
        (["--actor-sampler.num-slots=64"], "--actor-sampler.num-slots is 64, not "),
        (["--evaluation.runs=9"], "--evaluation.runs is 9, not "),
        (["--task.environment.max-live-games=99"], "--task.environment.max-live-games is 99, not "),
        (["--run-dir=gs://b/a"], "--run-dir is gs://b/a, not runs/a"),
        (["--restart"], "--restart is true, not false"),
        (["--algorithm=dapo"], "--algorithm is dapo, not null; "),
        (["--preset=pocket-minihack"], "--preset is pocket-minihack, not fake-tiny; "),
        (
            ["--actor.endpoint.url=http://a/v1", "--actor.model=b"],
            '--actor.endpoint.url is http://a/v1, not ""; --actor.model is b, not null',
        ),
    ],
)
def test_a_flag_that_differs_is_named_with_both_values_on_both_hosts(flags, said):
    errors = started(*flags)
    assert [type(error) for error in errors] == [Refusal, Refusal]
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith(f"Host 1 of 2 was not started as host 0 was: {said}")
    assert str(errors[0]).endswith(": start the same command on every host.")


def test_what_is_a_hosts_own_may_differ():
    own = [
        "--actor.model=/a",
        "--reflector.model=/b",
        "--task.environment.num-workers=3",
        "--task.environment.deadline-s=9",
        "--track=wandb",
        "--track-project=mine",
        "--trust",
    ]
    assert started(*own) == [None, None]


def test_more_than_four_differences_are_counted():
    flags = ["--seed=7", "--iterations=9", "--patience=2", "--keep-last=5", "--keep-best=1"]
    sentence = str(started(*flags)[0])
    assert sentence.count(", not ") == 4 and "; and 1 more: start the same" in sentence


def test_long_values_are_cut():
    assert "..., not " in str(started(f"--task.initial-prompt={'a' * 100}")[0])


@pytest.mark.parametrize(
    ("differing", "said"),
    [
        ({"jax": "1.3"}, "jax is 1.3, not 1.2"),
        ({"ictjax": "0.2.0 (source 12)"}, "ictjax is 0.2.0 (source 12), not 0.1.0 (source 12)"),
        (
            {"ictjax": "0.1.0 (source 34)", "the commit": "cd"},
            "ictjax is 0.1.0 (source 34), not 0.1.0 (source 12); the commit is cd, not ab",
        ),
        ({"the commit": None}, ""),  # the source is the same
        ({}, ""),
    ],
)
def test_a_program_that_differs_is_named_before_flags(monkeypatch, differing, said):
    here = threading.local()
    same = {"ictjax": "0.1.0 (source 12)", "the commit": "ab", "jax": "1.2"}
    monkeypatch.setattr(host_differences, "_program", lambda: same | here.differing)
    told = [read_args([*FLAGS, *more])[0] for more in ((), ("--seed=7",) if said else ())]

    def body(hosts):
        here.differing = differing if hosts.index else {}
        check_started_alike(hosts, told[hosts.index], told[hosts.index].settings)

    errors = side_by_side(body)
    if not said:
        assert errors == [None, None]
        return
    assert set(map(str, errors)) == {
        f"Host 1 of 2 does not run the program of host 0: {said}: install the same on every host."
    }


def test_the_program_is_its_source_and_nothing_beside_it(tmp_path, monkeypatch):
    for package in ("envs", "ictjax", "experiments"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "a.py").write_text("one = 1\n")
    monkeypatch.setattr(host_differences, "__file__", str(tmp_path / "experiments" / "a.py"))
    before = host_differences._program()
    (tmp_path / "envs" / ".#a.py").symlink_to("someone@somewhere.1")  # an editor's lock
    (tmp_path / "envs" / "notes.txt").write_text("two")
    assert host_differences._program() == before
    (tmp_path / "envs" / "a.py").rename(tmp_path / "envs" / "b.py")
    assert host_differences._program() != before
    (tmp_path / "envs" / "b.py").rename(tmp_path / "envs" / "a.py")
    assert host_differences._program() == before
    (tmp_path / "ictjax" / "a.py").write_text("one = 2\n")
    assert host_differences._program() != before


def test_a_host_that_cannot_read_its_program_tells_the_other(monkeypatch):
    here = threading.local()

    def program():
        if here.index:
            raise OSError("no source")
        return {}

    monkeypatch.setattr(host_differences, "_program", program)
    args = read_args(FLAGS)[0]

    def body(hosts):
        here.index = hosts.index
        check_started_alike(hosts, args, args.settings)

    first, second = side_by_side(body)
    assert str(first) == "Host 1 of 2 cannot go on: no source" and str(second) == "no source"


def test_one_host_is_like_itself(monkeypatch):
    monkeypatch.setattr(host_differences, "_program", None)  # not even asked for
    check_started_alike(ALONE, object(), read_args(FLAGS)[0].settings)
    check_same_files(ALONE, {}, "1")


def test_hosts_with_other_models_or_games_end():
    models = {"actor": "a" * 64, "reflector adapter": "b" * 64}

    def body(hosts, other, games="1"):
        check_same_files(hosts, other if hosts.index else models, games if hosts.index else "1")

    assert side_by_side(lambda hosts: body(hosts, models)) == [None, None]
    errors = side_by_side(lambda hosts: body(hosts, models | {"actor": "c" * 64}, games="2"))
    assert [type(error) for error in errors] == [Refusal, Refusal]
    assert set(map(str, errors)) == {
        "Host 1 of 2 does not have the files of host 0: the sha256 of the actor is cccccccccccc,"
        " not aaaaaaaaaaaa; the sha256 of the games is 2, not 1: give every host the same models"
        " and games."
    }
