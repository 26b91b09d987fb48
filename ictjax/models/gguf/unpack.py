"""A GGUF file as a checkpoint folder, made once and kept."""

import json
import pathlib
import shutil
import tempfile

import numpy as np
from tqdm import tqdm

from envs.cache_files import cache_file
from envs.terminals import draws_anew
from ictjax.models.gguf.config import hf_config
from ictjax.models.gguf.file import GGUF
from ictjax.models.gguf.tensors import hf_values, stored_names
from ictjax.models.gguf.tokenizer import hf_tokenizer
from ictjax.models.hf.content import file_sha256
from ictjax.models.hf.layout import Tensor, layout
from ictjax.models.hf.tensors import write_tensors
from ictjax.models.hf.translate import model_from_hf

_VERSION = 1  # of what is written; raised when the same file becomes something else


def unpacked(path: pathlib.Path) -> pathlib.Path:
    """The folder in Hugging Face's layout that a file is unpacked to, below
    `$XDG_CACHE_HOME/ictjax/models` (default `~/.cache`), by the hash of its contents: config,
    weights, tokenizer, chat template and stop ids. Made if it is not there.

    Raises:
      ValueError: no such file, one that cannot be read, another architecture or tokenizer, tensors
        that do not fit, or no room for the folder.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}: name a GGUF file that is there")
    folder = cache_file(f"models/{path.stem}-{file_sha256(path)[:16]}-{_VERSION}")
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as temporary:
            made = pathlib.Path(temporary) / "model"
            made.mkdir()
            _unpack(path, made)
            try:
                made.rename(folder)
            except OSError:  # somebody else was first
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise ValueError(
            f"{path} cannot be unpacked to {folder} ({error.strerror or error}): make room, or set"
            " XDG_CACHE_HOME to a folder with room"
        ) from error
    return folder


def _unpack(path: pathlib.Path, folder: pathlib.Path) -> None:
    file = GGUF(path)
    data = hf_config(file)
    try:
        config = model_from_hf(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = layout(config)
    names = stored_names(file, config, tensors)
    texts = hf_tokenizer(file)
    dtype = np.dtype(config.param_dtype)
    needed, free = config.num_params * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{path} needs {needed / 2**30:.1f} GiB unpacked in {folder.parent.parent}, where"
            f" {free / 2**30:.1f} GiB are free: make room, or set XDG_CACHE_HOME to a folder with"
            " room"
        )
    with tqdm(
        total=len(tensors),
        desc=f"Unpacking {path.name}",
        unit="tensor",
        disable=None if draws_anew() else True,
        leave=False,
    ) as bar:

        def values(name: str, _: Tensor) -> np.ndarray:
            bar.update()
            return hf_values(file, config, name, names[name]).astype(dtype, copy=False)

        write_tensors(folder / "model.safetensors", tensors, dtype, values)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
