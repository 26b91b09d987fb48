"""LoRA adapters in the format of the PEFT library, in and out: `adapter_config.json` and
`adapter_model.safetensors`.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. The library itself is not
needed.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from envs.files import replacing
from ictjax.config import LoraConfig
from ictjax.models.config import ModelConfig
from ictjax.models.hf.layout import STORED, projection_names
from ictjax.models.hf.reader import read_json
from ictjax.models.lora import adapter_axes
from ictjax.models.transformer import PROJECTION_AXES, Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What changes the result and is not implemented, with the values that mean "off".
_OFF: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


def save_adapter(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    lora: LoraConfig,
    adapter: Params,
    *,
    base: str,
) -> None:
    """Writes an adapter (the tree of `lora.init_adapter`) in float32, so that PEFT puts it on the
    model of that config.

    Args:
      base: the name or folder of the base model, for whoever loads the adapter.

    Raises:
      ValueError: the tree is not that of the two configs.
    """
    _check(config, lora, adapter)
    tensors = {}
    for name in lora.targets:
        a_lir = np.asarray(adapter[f"{name}_lora_a"], np.float32).reshape(
            config.num_layers, -1, lora.rank
        )
        b_lro = np.asarray(adapter[f"{name}_lora_b"], np.float32).reshape(
            config.num_layers, lora.rank, -1
        )
        for layer in range(config.num_layers):
            tensors[_key(layer, name, "A")] = np.ascontiguousarray(a_lir[layer].T)
            tensors[_key(layer, name, "B")] = np.ascontiguousarray(b_lro[layer].T)
    data = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": [_module(name) for name in lora.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }
    text = json.dumps(data, indent=2) + "\n"
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as temporary:
        # not save_file, which has an exception of its own for a full disk
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> tuple[LoraConfig, Params]:
    """Reads an adapter for the model of that config; float32, whatever it is stored in.

    Raises:
      ValueError: files that are missing or unreadable, another kind of adapter, or tensors that do
        not fit the model.
    """
    folder = pathlib.Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{str(folder)!r} has no {name}: give a folder that PEFT saved a LoRA adapter to"
            )
    data = read_json(folder / CONFIG)
    if data.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder / CONFIG} has peft_type {data.get('peft_type')!r}: only LORA adapters are"
            " read"
        )
    for name, values in _OFF.items():
        if data.get(name) not in values:
            raise ValueError(
                f"{folder / CONFIG} sets {name} to {data[name]!r}, which is not implemented: use a"
                " plain LoRA adapter"
            )
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            names = list(file.keys())  # the file is no mapping
            mistyped = [name for name in names if file.get_slice(name).get_dtype() not in STORED]
            if mistyped:
                raise ValueError(
                    f"{folder / WEIGHTS} holds {mistyped[0]}, which is not"
                    f" {', '.join(STORED.values())}: convert it"
                )
            found = {name: file.get_tensor(name).astype(np.float32) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS} cannot be read ({error}): download it again"
        ) from error
    rank, alpha = int(data["r"]), float(data["lora_alpha"])
    if data.get("use_rslora"):
        alpha *= math.sqrt(rank)  # such adapters are scaled by alpha / sqrt(rank)
    targets = tuple(name for name in PROJECTION_AXES if _key(0, name, "A") in found)
    lora = LoraConfig(rank=rank, alpha=alpha, targets=targets)
    adapter: Params = {}
    for factor, letter in (("a", "A"), ("b", "B")):
        for name in targets:
            shape = _shape(config, lora, f"{name}_lora_{factor}")
            flat = (math.prod(shape[1:-1]), rank) if factor == "a" else (rank, math.prod(shape[2:]))
            layers = []
            for layer in range(config.num_layers):
                key = _key(layer, name, letter)
                if key not in found or found[key].shape != flat[::-1]:
                    there = list(found[key].shape) if key in found else "missing"
                    raise ValueError(
                        f"{folder / WEIGHTS} does not fit the model: {key} is {there}, expected"
                        f" {list(flat[::-1])}"
                    )
                layers.append(found.pop(key).T)
            adapter[f"{name}_lora_{factor}"] = jnp.asarray(np.stack(layers).reshape(shape))
    if found:
        raise ValueError(
            f"{folder / WEIGHTS} holds {min(found)}, which is no projection of the model's layers:"
            " it was made for another model"
        )
    return lora, adapter


def _key(layer: int, name: str, letter: str) -> str:
    return f"{_PREFIX}model.layers.{layer}.{projection_names()[name]}.lora_{letter}.weight"


def _module(name: str) -> str:
    return projection_names()[name].rpartition(".")[2]


def _shape(config: ModelConfig, lora: LoraConfig, leaf: str) -> tuple[int, ...]:
    sizes = config.axis_sizes | {"rank": lora.rank}
    return tuple(sizes[axis] for axis in adapter_axes(lora)[leaf])


def _check(config: ModelConfig, lora: LoraConfig, adapter: Params) -> None:
    expected = {name: _shape(config, lora, name) for name in adapter_axes(lora)}
    actual = jax.tree.map(lambda leaf: tuple(leaf.shape), adapter)
    if actual != expected:
        raise ValueError(
            f"the adapter has shapes {actual}, the configs ask for {expected}: save an adapter with"
            " its own configs"
        )
