"""The shapes of models, from their own config.json; those of a few published ones are known here,
for machines that neither have them nor reach the hub.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

from experiments.presets import SMOLLM2, adapter_folder, shipped_folder
from ictjax.config import LoraConfig
from ictjax.models.config import ModelConfig
from ictjax.models.hf.hub import local_folder
from ictjax.models.hf.reader import read_config
from ictjax.models.peft import read_lora
from ictjax.run_config import ActorConfig, RoleConfig, TrainedRoleConfig

_QWEN_7B = ModelConfig(
    vocab_size=152_064,
    num_layers=28,
    d_model=3584,
    d_ff=18_944,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
_QWEN_14B = dataclasses.replace(
    _QWEN_7B, num_layers=48, d_model=5120, d_ff=13_824, num_heads=40, num_kv_heads=8
)
_QWEN3_4B = dataclasses.replace(
    _QWEN_7B,
    family="qwen3",
    qkv_bias=False,
    qk_norm=True,
    tie_embeddings=True,
    vocab_size=151_936,
    num_layers=36,
    d_model=2560,
    d_ff=9728,
    num_heads=32,
    num_kv_heads=8,
    max_positions=40_960,
)
_QWEN3_SMALL = dataclasses.replace(_QWEN3_4B, num_layers=28, num_heads=16)
_QWEN_SMALL = dataclasses.replace(_QWEN_7B, vocab_size=151_936, num_kv_heads=2, tie_embeddings=True)

# From the config.json that each was published with.
PUBLISHED: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "Qwen/Qwen2.5-0.5B-Instruct": dataclasses.replace(
            _QWEN_SMALL, num_layers=24, d_model=896, d_ff=4864, num_heads=14, head_dim=64
        ),
        "Qwen/Qwen2.5-1.5B-Instruct": dataclasses.replace(
            _QWEN_SMALL, d_model=1536, d_ff=8960, num_heads=12
        ),
        "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B,
        "Qwen/Qwen2.5-14B-Instruct": _QWEN_14B,
        "Qwen/Qwen3-0.6B": dataclasses.replace(_QWEN3_SMALL, d_model=1024, d_ff=3072),
        "Qwen/Qwen3-1.7B": dataclasses.replace(_QWEN3_SMALL, d_model=2048, d_ff=6144),
        "Qwen/Qwen3-4B": _QWEN3_4B,
        # the file that `ictjax models fetch smollm2` gets
        SMOLLM2: ModelConfig(
            family="llama",
            vocab_size=49_152,
            num_layers=30,
            d_model=576,
            d_ff=1536,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            qkv_bias=False,
            tie_embeddings=True,
            rope_theta=100_000.0,
            norm_eps=1e-5,
            max_positions=8192,
        ),
    }
)


def config_folder(name: str) -> pathlib.Path | None:
    """Where the config.json and the tokenizer of a model are, fetched from the hub if need be; None
    for a published model whose files are not to be had.

    Raises ValueError, with the remedy, for a model that nobody knows.
    """
    folder = shipped_folder(name)
    if folder is not None:
        return folder
    try:
        return local_folder(name, weights=False)
    except ValueError:
        if name in PUBLISHED:
            return None
        raise


def adapter_shape(role: RoleConfig) -> LoraConfig | None:
    """What the adapter that a role has is; None where it has none. Raises ValueError for a folder
    that does not hold one.
    """
    if not role.adapter:
        return None
    if isinstance(role, TrainedRoleConfig):
        return role.lora
    return read_lora(adapter_folder(role.adapter, "--actor.adapter"))


def model_shape(role: RoleConfig) -> ModelConfig:
    """The shape of a role's model, in the role's types. Raises ValueError as `config_folder`."""
    folder = config_folder(role.model)
    model = PUBLISHED[role.model] if folder is None else read_config(folder)
    weights = role.weights if isinstance(role, ActorConfig) else "float"
    return dataclasses.replace(model.with_dtype(role.dtype), weights=weights)
