"""Writes checkpoints that Hugging Face transformers loads unchanged, one tensor in memory at a
time.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from envs.files import replacing
from ictjax.models.config import ModelConfig
from ictjax.models.hf.json_file import read_json
from ictjax.models.hf.layout import Tensor, layout
from ictjax.models.hf.reader import CONFIG, INDEX, WEIGHTS
from ictjax.models.hf.tensors import write_tensors
from ictjax.models.hf.translate import model_from_hf, model_to_hf
from ictjax.models.transformer import Params, abstract_params

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# What a checkpoint has beside its weights and its config: generation settings, tokenizer, chat
# template.
_COMPANIONS = (
    "generation_config.json",
    "ictjax.json",  # how the model is spoken to: ictjax.manners
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    source: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that Hugging Face transformers loads as the same model; files of other names
    stay.

    The weights are in `config.param_dtype`: one `model.safetensors`, or several shards with an
    index. Each file appears whole or not at all, config.json last. One tensor is in host memory at
    a time.

    Args:
      source: the checkpoint folder that the model came from. Its generation config, tokenizer and
        chat template are copied, and its config.json is kept (with the new dtype) where it
        describes this model, so that what we do not read is kept too.

    Raises:
      ValueError: the tree is not that of the config, its family cannot hold it, or the weights lie
        on other hosts too.
    """
    expected = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    actual = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if actual != expected:
        raise ValueError(
            f"the parameters have shapes {actual}, the config asks for {expected}: save a model"
            " with its own config"
        )
    if not all(
        leaf.is_fully_addressable for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)
    ):
        raise ValueError(
            "the weights are spread over several hosts: export them from the run's checkpoint on"
            " one host"
        )
    text = json.dumps(_config_data(config, source), indent=2) + "\n"
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = jnp.dtype(config.param_dtype)
    shards = _shards(layout(config), dtype.itemsize, max_shard_bytes)
    for file, tensors in shards.items():
        with replacing(folder / file) as temporary:
            write_tensors(
                temporary, tensors, dtype, lambda _, tensor: _value(params, tensor, dtype)
            )
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": config.num_params * dtype.itemsize},
            "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
        }
        with replacing(folder / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    else:
        # shards of an earlier model would win over the new file
        (folder / INDEX).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors"):
        if path.name not in shards and (path.name == WEIGHTS or _SHARD.fullmatch(path.name)):
            path.unlink()  # of an earlier model
    if source is not None and pathlib.Path(source).resolve() != folder.resolve():
        for name in _COMPANIONS:
            if (pathlib.Path(source) / name).is_file():
                with replacing(folder / name) as temporary:
                    shutil.copyfile(pathlib.Path(source) / name, temporary)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _config_data(config: ModelConfig, source: str | os.PathLike[str] | None) -> dict[str, Any]:
    data = model_to_hf(config)
    if source is None:
        return data
    original = read_json(pathlib.Path(source) / CONFIG)
    original.pop("torch_dtype", None)
    original["dtype"] = config.param_dtype
    return original if model_from_hf(original) == model_from_hf(data) else data


def _shards(
    tensors: Mapping[str, Tensor], itemsize: int, max_bytes: int
) -> dict[str, dict[str, Tensor]]:
    """The tensors of every file, in order; a file is larger than `max_bytes` only if it holds a
    single tensor.
    """
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape)) * itemsize
        if groups[-1] and filled + size > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _value(params: Params, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    weight: Any = params
    for key in tensor.path:
        weight = weight[key]
    value = np.asarray(weight if tensor.layer is None else weight[tensor.layer]).astype(
        dtype, copy=False
    )
    return tensor.file_view(np.ascontiguousarray(value))
