"""The weights of a GGUF file, by the names and in the order of Hugging Face's checkpoints."""

import math
import re
from collections.abc import Mapping

import numpy as np

from ictjax.models.config import ModelConfig
from ictjax.models.gguf.config import ROPE_FREQS
from ictjax.models.gguf.file import GGUF
from ictjax.models.hf.layout import Tensor

_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")
_HEADS = re.compile(r"self_attn\.([qk])_proj\.")


def stored_names(file: GGUF, config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The file's name of every tensor of a checkpoint.

    Raises:
      ValueError: tensors that are missing, that this decoder does not know, or of another shape.
    """
    layer = _LAYER | (_SANDWICH if config.sandwich_norms else {})
    names = {}
    for name in tensors:
        found = _NAME.fullmatch(name)
        assert found, f"{name} is no name of the layout"
        number, module, kind = found.groups()
        names[name] = (
            f"{_TOP[module]}.{kind}" if number is None else f"blk.{number}.{layer[module]}.{kind}"
        )
    problems = [
        f"{label}: {', '.join(found[:8])}{f' and {len(found) - 8} more' if len(found) > 8 else ''}"
        for label, found in (
            ("missing tensors", sorted({*names.values()} - {*file.tensors})),
            ("unknown tensors", sorted({*file.tensors} - {*names.values(), ROPE_FREQS})),
            (
                "tensors of another shape",
                [
                    f"{there} is {list(file.tensors[there].shape)}, expected"
                    f" {list(tensors[name].file_shape)}"
                    for name, there in names.items()
                    if there in file.tensors
                    and file.tensors[there].shape != tensors[name].file_shape
                ],
            ),
        )
        if found
    ]
    if problems:
        raise ValueError(
            f"{file.path} does not hold the model that it describes; {'; '.join(problems)}:"
            " download it again, or take another file of the model"
        )
    return names


def hf_values(file: GGUF, config: ModelConfig, name: str, stored: str) -> np.ndarray:
    """A tensor as Hugging Face's checkpoint of the model has it."""
    values = file.read(stored)
    heads = _HEADS.search(name)
    if heads and config.family == "llama":
        return _unpaired(values, config.num_heads if heads[1] == "q" else config.num_kv_heads)
    if config.norm_offset and name.endswith("norm.weight"):
        return values - 1  # llama.cpp multiplies by the weight, the model by 1 + weight
    return values


def _unpaired(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates the pairs (2 i, 2 i + 1) of Llama's heads, we rotate (i, i + H/2)."""
    half = values.shape[0] // num_heads // 2
    rest = values.shape[1:]
    paired = values.reshape(num_heads, half, 2, math.prod(rest))
    return paired.swapaxes(1, 2).reshape(values.shape)
