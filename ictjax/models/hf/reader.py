"""Reads checkpoints: every weight goes straight to its place on the devices, one shard at a
time.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from ictjax import mesh as meshes
from ictjax.models.config import DTYPES, ModelConfig
from ictjax.models.hf.hub import local_folder
from ictjax.models.hf.json_file import read_json
from ictjax.models.hf.layout import HEAD, IGNORED_SUFFIX, STORED, Tensor, layout
from ictjax.models.hf.translate import model_from_hf
from ictjax.models.transformer import Params, abstract_params, param_axes

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# the tokenizer of Gemma 3's text models has it, their embedding does not
_WITHOUT_EMBEDDING = ("<image_soft_token>",)
_POINTER = b"version https://git-lfs"
_MAX_SHOWN = 200  # characters of what a file or a library says
_BLOCK = 256  # rows of a tensor that are in memory beside the shard that they go to


def load_checkpoint(
    source: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, Params]:
    """Reads a checkpoint (`model.safetensors`, or shards with an index) of any supported family.

    Args:
      source: a folder, or an id on the Hugging Face hub (see `hub.local_folder`).
      mesh: where the weights go, by the rules of `ictjax.mesh`; None for the default device. Each
        host reads only what its devices hold, and has one shard of one weight in memory at a time.
      dtype: of the weights in memory, and `param_dtype` of the config; None for the one that
        config.json names.
      progress: is told the bytes read and to be read.

    Raises:
      ValueError: no such folder or id, no or a foreign `config.json`, no weights, unreadable files,
        tensors that are missing, unknown, of another shape or of another type than float32,
        bfloat16 and float16, or a tokenizer with more ids than the model has embeddings.
    """
    folder = local_folder(source)
    config = read_config(folder)
    if dtype is not None:
        config = config.with_param_dtype(dtype)
    check_vocabulary(folder, config)
    tensors = layout(config)
    files = _locate(folder, config, tensors)
    parts: dict[tuple[str, ...], list[str]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(tensor.path, []).append(name)
    shapes = abstract_params(config)
    shardings = None if mesh is None else meshes.param_shardings(param_axes(config), shapes, mesh)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    done = 0
    params: Params = {"layers": {}}
    for path, names in parts.items():
        shape = _at(shapes, path)
        placed = _place(
            shape,
            None if shardings is None else _at(shardings, path),
            [(tensors[n], n, files[n]) for n in names],
        )
        _at(params, path[:-1])[path[-1]] = placed
        done += placed.nbytes
        if progress is not None:
            progress(done, total)
    return config, params


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The config of a checkpoint folder. Raises ValueError where there is none, or one of an
    unsupported model.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{str(folder)!r} has no {CONFIG}: give a Hugging Face checkpoint folder")
    data = read_json(folder / CONFIG)
    try:
        return model_from_hf(data)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def check_checkpoint(folder: pathlib.Path) -> None:
    """Reads a folder's small files and the headers of its weights. Raises ValueError as
    `load_checkpoint`, for what can be seen without reading weights.
    """
    config = read_config(folder)
    check_vocabulary(folder, config)
    _locate(folder, config, layout(config))


def check_vocabulary(folder: pathlib.Path, config: ModelConfig) -> None:
    """Raises ValueError for a tokenizer with more ids than the model has embeddings."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    settings = folder / "tokenizer_config.json"
    added = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(
            f"{path} cannot be read ({_in_a_line(error)}): take the file that the checkpoint was"
            " published with"
        ) from error
    try:
        more = {token["content"]: int(id_) for id_, token in (added or {}).items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{settings} has an added_tokens_decoder that cannot be read: take the file that the"
            " checkpoint was published with"
        ) from error
    for file, ids in ((path, vocabulary), (settings, more)):
        last = max((i for token, i in ids.items() if token not in _WITHOUT_EMBEDDING), default=0)
        if last >= config.vocab_size:
            raise ValueError(
                f"{file} has the id {last}, but the model has embeddings of {config.vocab_size}"
                " ids: take the checkpoint's own tokenizer"
            )


def _locate(
    folder: pathlib.Path, config: ModelConfig, tensors: dict[str, Tensor]
) -> dict[str, pathlib.Path]:
    """The file of every tensor, after checking that all are there and fit."""
    files: dict[str, pathlib.Path] = {}
    unknown, doubled, misshapen, mistyped = [], [], [], []
    for path in _files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(IGNORED_SUFFIX) or (config.tie_embeddings and name == HEAD):
                    continue  # a tied head, where a file has one, repeats the embedding
                if name not in tensors:
                    unknown.append(name)
                    continue
                if name in files:
                    doubled.append(f"{name} in {files[name].name} and {path.name}")
                files[name] = path
                shape, dtype = (
                    tuple(file.get_slice(name).get_shape()),
                    file.get_slice(name).get_dtype(),
                )
                if dtype not in STORED:
                    mistyped.append(f"{name} is {dtype}")
                elif shape != tensors[name].file_shape:
                    misshapen.append(
                        f"{name} is {list(shape)}, expected {list(tensors[name].file_shape)}"
                    )
    problems = [
        f"{label}:"
        f" {', '.join(map(_in_a_line, sorted(names)[:8]))}"
        f"{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for label, names in (
            (
                f"tensors that are not {', '.join(DTYPES)} (quantised checkpoints are not read)",
                mistyped,
            ),
            ("missing tensors", [name for name in tensors if name not in files]),
            ("unknown tensors", unknown),
            ("tensors in two files", doubled),
            ("tensors of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{str(folder)!r} does not hold the model of its {CONFIG}; {'; '.join(problems)}:"
            " download the folder again, or take a checkpoint with weights of that config"
        )
    return files


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files with the weights; all of them are there."""
    whole, index = (folder / WEIGHTS).is_file(), (folder / INDEX).is_file()
    if not whole and not index:
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ValueError(
            f"{str(folder)!r} has neither {WEIGHTS} nor {INDEX}"
            f"{f', only {shards[0]}' if shards else ''}: finish its download, or convert its"
            " weights to safetensors"
        )
    if not index:
        return [folder / WEIGHTS]
    weight_map = read_json(folder / INDEX).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(
            f"{folder / INDEX} has no weight_map: take the file that the checkpoint was published"
            " with"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        # the file itself may be a link, as in the cache of the hub
        if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
            raise ValueError(
                f"{folder / INDEX} names {name[:200]!r}, which is no file of this folder: take the"
                " file that the checkpoint was published with"
            )
    if whole and names != [WEIGHTS]:
        raise ValueError(
            f"{str(folder)!r} has weights twice, {WEIGHTS} and those of {INDEX} ({names[0]}):"
            " remove the ones that are not meant"
        )
    for name in names:
        if not os.path.isfile(folder / name):  # Path.is_file raises for a long name
            raise ValueError(
                f"{str(folder)!r} lacks {_in_a_line(name)}, which {INDEX} names: download it"
            )
    return [folder / name for name in names]


def _open(path: pathlib.Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError(
                    f"{path} is a pointer of Git LFS, not the weights: fetch them with `git lfs"
                    " pull`, or download the folder again"
                ) from error
        raise ValueError(
            f"{path} cannot be read ({_in_a_line(error)}): download it again"
        ) from error


def _in_a_line(text: object) -> str:
    """What a file or a library says, short and without line breaks."""
    return " ".join(str(text).split())[:_MAX_SHOWN]


def _at(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _place(
    shape: jax.ShapeDtypeStruct, sharding: Any, sources: list[tuple[Tensor, str, pathlib.Path]]
) -> jax.Array:
    """One weight on its devices; `sources` are its tensors, one per layer, or a single one."""
    if sharding is None:
        return jax.device_put(_read(shape, [slice(0, size) for size in shape.shape], sources))
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape.shape).items():
        bounds = tuple(
            part.indices(size)[:2] for part, size in zip(index, shape.shape, strict=True)
        )
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        value = _read(shape, [slice(*start_stop) for start_stop in bounds], sources)
        arrays += [jax.device_put(value, device) for device in holders]
        jax.block_until_ready(arrays)  # before the next shard takes the memory of this one
        del value
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, arrays)


def _read(
    shape: jax.ShapeDtypeStruct,
    index: Sequence[slice],
    sources: list[tuple[Tensor, str, pathlib.Path]],
) -> np.ndarray:
    """One shard of a weight."""
    target = np.empty([part.stop - part.start for part in index], shape.dtype)
    for tensor, name, path in sources:
        if tensor.layer is None:
            _fill(target, tensor, index, name, path)
        elif index[0].start <= tensor.layer < index[0].stop:
            _fill(target[tensor.layer - index[0].start], tensor, index[1:], name, path)
    return target


def _fill(
    target: np.ndarray, tensor: Tensor, index: Sequence[slice], name: str, path: pathlib.Path
) -> None:
    """Copies one tensor's part at `index` into `target`, block by block: a transposed copy of a
    large matrix misses the cache all the time.
    """
    view = tensor.file_view(target)
    rows, *columns = tensor.window(index)
    with _open(path) as file:
        stored = file.get_slice(name)
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            part = stored[(slice(rows.start + start, rows.start + start + len(block)), *columns)]
            if part.dtype == block.dtype:  # NumPy copies plain integers faster than bfloat16
                part, block = (values.view(f"u{values.itemsize}") for values in (part, block))
            if part.ndim == 1 or block.flags.c_contiguous:
                block[...] = part
            else:
                for column in range(0, part.shape[1], _BLOCK):
                    block[:, column : column + _BLOCK] = part[:, column : column + _BLOCK]
