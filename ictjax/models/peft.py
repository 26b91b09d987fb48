"""LoRA adapters in the format of the PEFT library, in and out: `adapter_config.json` and
`adapter_model.safetensors`.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. The library itself is not
needed.
"""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from envs.files import replacing
from ictjax.config import LoraConfig
from ictjax.models.config import ModelConfig
from ictjax.models.hf.json_file import read_json
from ictjax.models.hf.layout import STORED, projection_names
from ictjax.models.lora import adapter_axes
from ictjax.models.transformer import PROJECTION_AXES, Params
from ictjax.ranges import shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys that say nothing of what an adapter computes: where it came from, how it was trained.
_IDLE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # read with use_qalora only
        "revision",
        "task_type",
    }
)
# Read here.
_READ = frozenset({"lora_alpha", "peft_type", "r", "target_modules", "use_rslora"})
# How the factors began, where that left the base as it is: others (PiSSA, OLoRA, LoftQ, CorDA,
# LoRA-GA) change the base's weights, which the file does not have.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
# Of any other key: PEFT's way to say that a variant is off.
_OFF: tuple[object, ...] = (None, False, "none", "", [], {})
_MAX_RANK, _MAX_ALPHA = 2**14, 10**6  # of LoraConfig


def save_adapter(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    lora: LoraConfig,
    adapter: Params,
    *,
    base: str,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Writes an adapter (the tree of `lora.init_adapter`), so that PEFT puts it on the model of
    that config.

    Args:
      base: the name or folder of the base model, for whoever loads the adapter.
      dtype: of the factors in the file.

    Raises:
      ValueError: the tree is not that of the two configs.
    """
    _check(config, lora, adapter)
    tensors = {}
    kind = jnp.dtype(dtype)
    for name in lora.targets:
        a_lir = np.asarray(adapter[f"{name}_lora_a"], kind).reshape(
            config.num_layers, -1, lora.rank
        )
        b_lro = np.asarray(adapter[f"{name}_lora_b"], kind).reshape(
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


def read_lora(folder: str | os.PathLike[str]) -> LoraConfig:
    """What an adapter is, from its config and the header of its weights.

    Raises:
      ValueError: files that are missing or unreadable, or another kind of adapter.
    """
    folder = pathlib.Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{str(folder)!r} has no {name}: give a folder that PEFT saved a LoRA adapter to"
            )
    path = folder / CONFIG
    data = read_json(path)
    _check_plain(path, data)
    rank, alpha = _sizes(path, data)
    with _opened(folder / WEIGHTS) as file:
        names = frozenset(file.keys())  # the file is no mapping
        mistyped = [name for name in names if file.get_slice(name).get_dtype() not in STORED]
    if mistyped:
        raise ValueError(
            f"{folder / WEIGHTS} holds {_name(min(mistyped))}, which is not"
            f" {', '.join(STORED.values())}: convert it"
        )
    targets = tuple(name for name in PROJECTION_AXES if _key(0, name, "A") in names)
    _check_targets(path, data.get("target_modules"), targets)
    try:
        return LoraConfig(rank=rank, alpha=alpha, targets=targets)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds no adapter that can be read ({error}): take the files that PEFT wrote"
        ) from error


def load_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> tuple[LoraConfig, Params]:
    """Reads an adapter for the model of that config; float32, whatever it is stored in.

    Raises:
      ValueError: as `read_lora`, or tensors that do not fit the model.
    """
    folder, lora = pathlib.Path(folder), read_lora(folder)
    with _opened(folder / WEIGHTS) as file:
        found = {name: file.get_tensor(name).astype(np.float32) for name in list(file.keys())}
    broken = [name for name, value in found.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"{folder / WEIGHTS} holds {_name(broken[0])}, which is not finite: take another"
            " checkpoint of that adapter"
        )
    adapter: Params = {}
    for factor, letter in (("a", "A"), ("b", "B")):
        for name in lora.targets:
            shape = _shape(config, lora, f"{name}_lora_{factor}")
            outer = math.prod(shape[1:-1] if factor == "a" else shape[2:])
            flat = (outer, lora.rank) if factor == "a" else (lora.rank, outer)
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
            f"{folder / WEIGHTS} holds {_name(min(found))}, which is no projection of the model's"
            " layers: it was made for another model"
        )
    return lora, adapter


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}): download it again"
        ) from error


def _check_plain(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    """Raises ValueError for any kind of adapter but plain LoRA, unknown ones included."""
    if data.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} has peft_type {shown(data.get('peft_type'))}: only LORA adapters are read"
        )
    for name, value in data.items():
        allowed = _PLAIN_STARTS if name == "init_lora_weights" else _OFF
        # 0 and 1 are equal to False and True
        if name not in _IDLE | _READ and not any(
            type(value) is type(known) and value == known for known in allowed
        ):
            raise ValueError(
                f"{path} sets {_name(name)} to {str(value)[:60]!r}, which is not implemented: use a"
                " plain LoRA adapter, or merge this one into its model with PEFT"
            )


def _sizes(path: pathlib.Path, data: Mapping[str, Any]) -> tuple[int, float]:
    """Rank, and the alpha that alpha / rank scales with."""
    rank, alpha, stabilised = (data.get(name) for name in ("r", "lora_alpha", "use_rslora"))
    if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
        raise ValueError(
            f"{path} sets r to {shown(rank)}: a rank is a whole number from 1 to {_MAX_RANK};"
            " take the file that PEFT wrote"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= _MAX_ALPHA:
        raise ValueError(
            f"{path} sets lora_alpha to {shown(alpha)}, which is no positive number up to"
            f" {_MAX_ALPHA:,}: take the file that PEFT wrote"
        )
    if stabilised not in (None, False, True):
        raise ValueError(f"{path} sets use_rslora to {shown(stabilised)}: give true or false")
    # such adapters are scaled by alpha / sqrt(rank)
    return rank, float(alpha) * (math.sqrt(rank) if stabilised else 1.0)


def _check_targets(path: pathlib.Path, named: object, found: Sequence[str]) -> None:
    """Raises ValueError where a module that the adapter is for has no factors. A text is a pattern
    over module names: what it matches is what is found.
    """
    if not isinstance(named, list):
        return
    modules = {_module(name) for name in found}
    for name in named:
        if not isinstance(name, str) or name.rpartition(".")[2] not in modules:
            raise ValueError(
                f"{path} names {shown(name)} in target_modules, but {WEIGHTS} holds no factors"
                " of it that fit this model: it was made for another one, or its download is not"
                " complete"
            )


def _name(name: str) -> str:
    """A name that a file gives, as one sentence can hold it."""
    return (name if name.isprintable() else repr(name))[:100]


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
