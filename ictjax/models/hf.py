"""Qwen2 checkpoints in the Hugging Face layout: a folder with `config.json` and safetensors, in and out."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ictjax.models.config import ModelConfig
from ictjax.models.transformer import Params, abstract_params

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Written by some exporters beside the weights; derived from the config, so never read.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


class _Weight(NamedTuple):
    """How one Hugging Face tensor maps onto (a layer of) one of our weights."""

    path: tuple[str, ...]
    layer: int | None
    hf_shape: tuple[int, ...]
    transposed: bool  # torch Linear keeps [out, in]


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[ModelConfig, Params]:
    """Reads a Qwen2 folder (`model.safetensors`, or shards with an index).

    Returns:
      The config, and the weights as NumPy arrays in `config.param_dtype` in the tree of `init_params` (the caller places them on devices).

    Raises:
      ValueError: no such folder, no or a foreign `config.json`, no weights, or tensors that are missing, unknown or of another shape.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint folder {str(folder)!r} does not exist: give a folder with {_CONFIG} and {_WEIGHTS}")
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{str(folder)!r} has no {_CONFIG}: give a Hugging Face Qwen2 checkpoint folder")
    try:
        data = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / _CONFIG} is not JSON ({error}): take the file that the checkpoint was published with") from error
    config = ModelConfig.from_hf(data)
    weights = _layout(config)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_params(config))
    unseen = dict(weights)
    unknown, misshapen = [], []
    for name, shape, read in _tensors(folder):
        if name.endswith(_IGNORED_SUFFIX) or (config.tie_embeddings and name == "lm_head.weight"):
            continue  # a tied head, where a file has one, repeats the embedding
        weight = weights.get(name)
        unseen.pop(name, None)
        if weight is None:
            unknown.append(name)
        elif shape != weight.hf_shape:
            misshapen.append(f"{name} is {list(shape)}, expected {list(weight.hf_shape)}")
        else:
            target = _leaf(params, weight)
            value = read()
            target[...] = (value.T if weight.transposed else value).reshape(target.shape)
    problems = [
        f"{label}: {', '.join(sorted(names)[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for label, names in (
            ("missing tensors", list(unseen)),
            ("unknown tensors", unknown),
            ("tensors of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{str(folder)!r} does not hold the model of its {_CONFIG}; {'; '.join(problems)}")
    return config, params


def save_checkpoint(folder: str | os.PathLike[str], config: ModelConfig, params: Params) -> None:
    """Writes `config.json` and `model.safetensors` so that Hugging Face transformers loads the same model; other files stay.

    Each file appears whole or not at all. Raises ValueError if the tree is not that of the config.
    """
    expected = jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    actual = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if actual != expected:
        raise ValueError(f"the parameters have shapes {actual}, the config asks for {expected}: save a model with its own config")
    text = json.dumps(config.to_hf(), indent=2) + "\n"
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    host = jax.tree.map(lambda leaf: np.asarray(leaf, dtype=jnp.dtype(config.param_dtype)), params)
    tensors = {}
    for name, weight in _layout(config).items():
        value = _leaf(host, weight)
        value = value.reshape(weight.hf_shape[::-1]).T if weight.transposed else value.reshape(weight.hf_shape)
        tensors[name] = np.ascontiguousarray(value)
    _replace(
        folder / _WEIGHTS,
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )
    _replace(
        folder / _CONFIG,
        lambda path: pathlib.Path(path).write_text(text, encoding="utf-8"),
    )
    (folder / _INDEX).unlink(missing_ok=True)  # shards of an earlier model would win over the new file


def _layout(config: ModelConfig) -> dict[str, _Weight]:
    """Every tensor of the checkpoint by its Hugging Face name."""
    d, f = config.d_model, config.d_ff
    queries, keys = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    layout = {
        "model.embed_tokens.weight": _Weight(("embed",), None, (config.vocab_size, d), False),
        "model.norm.weight": _Weight(("norm",), None, (d,), False),
    }
    if not config.tie_embeddings:
        layout["lm_head.weight"] = _Weight(("head",), None, (config.vocab_size, d), True)
    for layer in range(config.num_layers):
        for name, leaf, shape in (
            ("input_layernorm.weight", "attn_norm", (d,)),
            ("self_attn.q_proj.weight", "q", (queries, d)),
            ("self_attn.q_proj.bias", "q_bias", (queries,)),
            ("self_attn.k_proj.weight", "k", (keys, d)),
            ("self_attn.k_proj.bias", "k_bias", (keys,)),
            ("self_attn.v_proj.weight", "v", (keys, d)),
            ("self_attn.v_proj.bias", "v_bias", (keys,)),
            ("self_attn.o_proj.weight", "o", (d, queries)),
            ("post_attention_layernorm.weight", "mlp_norm", (d,)),
            ("mlp.gate_proj.weight", "gate", (f, d)),
            ("mlp.up_proj.weight", "up", (f, d)),
            ("mlp.down_proj.weight", "down", (d, f)),
        ):
            layout[f"model.layers.{layer}.{name}"] = _Weight(("layers", leaf), layer, shape, len(shape) == 2)
    return layout


def _leaf(tree: Mapping, weight: _Weight) -> np.ndarray:
    for key in weight.path:
        tree = tree[key]
    return tree if weight.layer is None else tree[weight.layer]


def _tensors(
    folder: pathlib.Path,
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Name, shape and reader of every tensor; one tensor is in memory at a time."""
    if (folder / _INDEX).is_file():
        shards = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    elif (folder / _WEIGHTS).is_file():
        shards = [_WEIGHTS]
    else:
        raise ValueError(f"{str(folder)!r} has neither {_WEIGHTS} nor {_INDEX}: convert the weights to safetensors")
    for shard in shards:
        if not (folder / shard).is_file():
            raise ValueError(f"{str(folder)!r} lacks {shard}, which {_INDEX} names: download it")
        try:
            with safe_open(folder / shard, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield (
                        name,
                        tuple(file.get_slice(name).get_shape()),
                        lambda name=name, file=file: file.get_tensor(name),
                    )
        except SafetensorError as error:
            raise ValueError(f"{folder / shard} cannot be read ({error}): download it again") from error


def _replace(path: pathlib.Path, write: Callable[[str], object]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)
