"""Writes safetensors files, one tensor in memory at a time.
https://github.com/huggingface/safetensors
"""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ictjax.models.hf.layout import STORED, Tensor

_CODES = {name: code for code, name in STORED.items()}


def write_tensors(
    path: pathlib.Path,
    tensors: Mapping[str, Tensor],
    dtype: np.dtype,
    values: Callable[[str, Tensor], np.ndarray],
) -> None:
    """A file: the length of its header, the header, the bytes.

    Args:
      path: of it.
      tensors: what goes into it, in order.
      dtype: of all of them.
      values: of each, in the shape that the file has it in and in that dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.file_shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype.name],
            "shape": list(tensor.file_shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            data = np.ascontiguousarray(values(name, tensor))
            # not tofile, which does not say why a disk refuses
            file.write(data.view(np.uint8).data)
