"""What is compiled is kept for the next run, where the user's caches are, unless told otherwise."""

import os
import pathlib
import subprocess
import sys

from experiments.compiled_cache import keep_compiled

ROOT = pathlib.Path(__file__).parent.parent
NAME = "JAX_COMPILATION_CACHE_DIR"


def test_the_folder_is_the_users_and_of_this_processor():
    environment = {"HOME": "/home/somebody"}
    keep_compiled(environment)
    folder = pathlib.Path(environment[NAME])
    assert folder.parent == pathlib.Path("/home/somebody/.cache/ictjax/xla")
    environment = {"HOME": "/home/somebody", "XDG_CACHE_HOME": "/caches"}
    keep_compiled(environment)
    assert environment[NAME] == f"/caches/ictjax/xla/{folder.name}"


def test_who_says_otherwise_is_obeyed():
    for said in (
        {NAME: "/elsewhere", "HOME": "/home/somebody"},
        {"JAX_ENABLE_COMPILATION_CACHE": "false", "HOME": "/home/somebody"},
        {},
    ):
        environment = dict(said)
        keep_compiled(environment)
        assert environment == said


def test_a_command_leaves_its_programs_there(tmp_path):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR")
    } | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    program = (
        "from experiments.__main__ import main\n"
        "import sys; sys.argv = ['ictjax', '--help']; main()\n"
        "import jax; jax.jit(lambda x: x + 1)(1.0)\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, cwd=tmp_path)
    assert list((tmp_path / "ictjax" / "xla").glob("*/*"))
