"""What installs an extra."""

import pathlib
import sys

import pytest

from ictjax.extras import install


@pytest.mark.parametrize(
    ("version", "pins"),
    [((3, 11), "constraints.txt"), ((3, 12), "constraints-py312.txt")],
)
def test_this_pip_and_the_pins_of_this_python_are_named(monkeypatch, tmp_path, version, pins):
    python = tmp_path / ".venv" / "bin" / "python"
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    assert install("wandb") == f"{python} -m pip install -c {pins} -e '.[wandb]'"
    (tmp_path / pins).touch()  # in the clone
    assert install("wandb") == f".venv/bin/python -m pip install -c {pins} -e '.[wandb]'"


def test_the_pins_are_there():
    root = pathlib.Path(__file__).parents[1]
    assert (root / install("wandb").split(" -c ")[1].split()[0]).is_file()
