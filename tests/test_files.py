import errno
import os
import resource
import stat
import subprocess
import sys
import threading

import pytest

from envs.cache_files import cache_file, write_json
from envs.files import append, replacing


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "whole.txt"
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith("whole.txt.") and temporary.suffix == ".tmp"
        temporary.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert os.listdir(tmp_path) == ["whole.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_is_told_with_the_name_of_the_file(tmp_path, monkeypatch, number):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path}/new.txt'"),
        replacing(tmp_path / "new.txt") as temporary,
    ):
        temporary.write_text("x")
    with (
        (tmp_path / "lines").open("ab", buffering=0) as file,
        pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path}/lines'"),
    ):
        append(file, b"x")
    assert os.listdir(tmp_path) == ["lines"]
    assert (tmp_path / "lines").read_bytes() == b""


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), replacing(tmp_path / "new.txt"):
        (tmp_path / "missing").read_text()
    with (
        pytest.raises(FileNotFoundError, match=r"no/new.txt'"),
        replacing(tmp_path / "no" / "new.txt"),
    ):
        pass


def test_an_append_that_is_cut_off_leaves_the_file_as_it_was(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "lines"
    with path.open("ab", buffering=0) as file:
        append(file, b"first\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            with pytest.raises(OSError, match="File too large.*lines"):
                append(file, b"second\n")  # 4 bytes of it fit
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == b"first\n"
        append(file, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_exception_keeps_the_old_file_and_leaves_no_other(tmp_path, error):
    def fail(path):
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error("from the block")

    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("kept")
    for path in (old, new):
        with pytest.raises(error, match="from the block"):
            fail(path)
    assert old.read_text() == "kept"
    assert os.listdir(tmp_path) == ["old.txt"]


def test_a_block_that_moves_its_file_away_is_an_error_of_its_own(tmp_path):
    path = tmp_path / "whole.txt"
    path.write_text("kept")
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        temporary.unlink()
    assert path.read_text() == "kept"


def test_a_missing_folder_is_told_before_anything_is_written(tmp_path):
    entered = []
    with (
        pytest.raises(FileNotFoundError, match="no_such_folder"),
        replacing(tmp_path / "no_such_folder" / "file") as temporary,
    ):
        entered.append(temporary)
    assert entered == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    os.umask(umask)
    path = tmp_path / "file"
    path.touch(mode=0o600)
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    with replacing(path) as temporary:  # as libraries do that write atomically themselves
        private = tmp_path / "private"
        private.touch(mode=0o600)
        private.replace(temporary)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_the_content_is_on_disk_before_the_file_is_moved(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    synced = []

    def fsync(fd):
        synced.append((os.pread(fd, 100, 0), path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert synced == [(b"new", "old")]
    assert path.read_text() == "new"


def test_writers_in_turn_within_each_other_have_a_file_each(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as outer:
        outer.write_text("outer")
        with replacing(path) as inner:
            inner.write_text("inner")
        assert path.read_text() == "inner"
        assert outer.read_text() == "outer"
    assert path.read_text() == "outer"


def test_many_threads_and_processes_write_one_file_whole(tmp_path):
    path = tmp_path / "file"
    program = (
        "import pathlib, sys\n"
        "from envs.files import replacing\n"
        "for _ in range(100):\n"
        "    with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "        temporary.write_text(sys.argv[2] * 10_000)\n"
    )
    texts = {letter * 10_000 for letter in "abcd"}
    seen, failures, done = set(), [], threading.Event()

    def write(letter):
        try:
            for _ in range(100):
                with replacing(path) as temporary:
                    temporary.write_text(letter * 10_000)
        except Exception as error:
            failures.append(error)

    def read():
        while not done.is_set():
            if path.exists():
                seen.add(path.read_text())

    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(path), letter]) for letter in "ab"
    ]
    threads = [threading.Thread(target=write, args=(letter,)) for letter in "cd"]
    reader = threading.Thread(target=read)
    for thread in (*threads, reader):
        thread.start()
    codes = [process.wait(timeout=60) for process in processes]
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert codes == [0, 0]
    assert failures == []
    assert seen and seen <= texts
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["file"]


def test_caches_lie_below_the_named_folder_or_the_home(tmp_path, monkeypatch):
    odd = tmp_path / "a b'\"[1]\\\n\u00e9\udcff"
    monkeypatch.setenv("XDG_CACHE_HOME", str(odd))
    write_json(cache_file("x.json"), {"\udcff": 1})
    assert [path.name for path in (odd / "ictjax").iterdir()] == ["x.json"]
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(odd))
    assert cache_file("x.json") == odd / ".cache" / "ictjax" / "x.json"


def test_a_home_that_nobody_knows_is_refused(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match="no home folder .* set HOME or XDG_CACHE_HOME"):
        cache_file("x.json")
