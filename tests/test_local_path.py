import dataclasses
import os
import pathlib
import shutil
import sys

import pytest

from experiments.local_path import command_line, local_path, with_local_paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Args:
    out: pathlib.Path
    run_dirs: tuple[pathlib.Path, ...] = ()
    name: str = "~"


def test_the_home_folder_stands_in_the_place_of_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/runs", "--out") == "/home/me/runs"
    assert local_path("runs/~", "--out") == "runs/~"
    args = with_local_paths(_Args(out=pathlib.Path("~/a"), run_dirs=(pathlib.Path("~"),)))
    assert args == _Args(out=pathlib.Path("/home/me/a"), run_dirs=(pathlib.Path("/home/me"),))


@pytest.mark.parametrize("text", ["runs/a", "/a b/é[1]", "a:b", "c:/x", "org/model", ":/", ""])
def test_other_paths_stay_as_they_are(text):
    assert local_path(text, "--out") == text


@pytest.mark.parametrize("text", ["gs://bucket/a", "gs:/bucket/a", "s3://bucket/a", "file:///a"])
def test_an_address_is_no_folder_of_that_name(text):
    for refused in (
        lambda: local_path(text, "--out"),
        lambda: with_local_paths(_Args(out=pathlib.Path(text))),
    ):
        with pytest.raises(ValueError, match="^--out '(gs|s3|file)://(bucket/)?a' is an address"):
            refused()


def test_runs_may_lie_in_a_store_that_is_known_and_nowhere_else():
    for text in ("gs://bucket/a", "gs:/bucket/a", "s3://bucket/a"):
        args = _Args(out=pathlib.Path(), run_dirs=(pathlib.Path(text),))
        assert with_local_paths(args) == args
    for text in ("file:///a", "ftp://host/a"):
        with pytest.raises(ValueError, match="^The run "):
            with_local_paths(_Args(out=pathlib.Path(), run_dirs=(pathlib.Path(text),)))


def test_the_home_folder_of_nobody():
    with pytest.raises(ValueError, match="^--out ~no-such-user/a begins with"):
        local_path("~no-such-user/a", "--out")


def test_a_name_that_is_not_utf8(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^--out a\\udcff is not UTF-8"):
        local_path(os.fsdecode(b"a\xff"), "--out")
    above = tmp_path / os.fsdecode(b"a\xff")
    above.mkdir()
    monkeypatch.chdir(above)
    with pytest.raises(ValueError, match=r"^--out runs/a is not UTF-8"):
        local_path("runs/a", "--out")


@pytest.mark.parametrize(
    ("started", "original", "found", "typed_again"),
    [
        ("/env/bin/ictjax", "/env/bin/python", "/env/bin/ictjax", "ictjax"),
        (".venv/bin/ictjax", "/env/bin/python", None, ".venv/bin/ictjax"),
        ("my env/bin/ictjax", "/env/bin/python", None, "'my env/bin/ictjax'"),
        (
            "/clone/experiments/__main__.py",
            ".venv/bin/python",
            None,
            ".venv/bin/python -m experiments",
        ),
        ("/env/pytest/__main__.py", "python", None, "ictjax"),
    ],
)
def test_a_command_is_shown_as_it_can_be_pasted(monkeypatch, started, original, found, typed_again):
    monkeypatch.setattr(sys, "argv", [started, "evaluate"])
    monkeypatch.setattr(sys, "orig_argv", [original, "-m", "experiments", "evaluate"])
    monkeypatch.setattr(shutil, "which", lambda name: found)
    assert command_line("report --run-dir runs/a") == f"{typed_again} report --run-dir runs/a"
