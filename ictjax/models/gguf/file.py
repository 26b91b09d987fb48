"""A GGUF file: what it says of a model, and its tensors.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from ictjax.extras import install
from ictjax.ranges import shown

_AGAIN = "download it again"
# By which 16-bit and 32-bit floats are stored; everything else is quantised.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Stored(NamedTuple):
    """A tensor of the file."""

    shape: tuple[int, ...]  # [outputs, inputs], as in PyTorch
    kind: str  # F32, Q4_1, ...
    data: Any  # as the package gguf gives it, read when it is looked at


class GGUF:
    """An open file.

    Args:
      path: of it.

    Raises:
      ValueError: the package gguf is not installed, or the file is no GGUF file, damaged, or one of
        several parts.
    """

    def __init__(self, path: pathlib.Path) -> None:
        try:
            import gguf  # an optional package
        except ImportError:
            raise ValueError(
                f"{path} is read by the package gguf, which is not installed: install ictjax with"
                f" its extra gguf: in the clone, run `{install('gguf')}`"
            ) from None
        self.path = path
        self._gguf = gguf
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is no GGUF file: {_AGAIN}")
        try:
            reader = gguf.GGUFReader(path)
            self._values = {name: field.contents() for name, field in reader.fields.items()}
            self.tensors = {
                tensor.name: Stored(
                    tuple(int(size) for size in reversed(tensor.shape)),
                    tensor.tensor_type.name,
                    tensor.data,
                )
                for tensor in reader.tensors
            }
        except Exception as error:  # the package raises whatever its reading meets
            detail = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} cannot be read ({detail}): {_AGAIN}") from error
        if self.get("split.count", 1) != 1:
            raise ValueError(
                f"{path} is one of {shown(self.get('split.count'))} parts: join them with"
                " llama.cpp's `llama-gguf-split --merge`"
            )

    def get(self, name: str, default: Any = None) -> Any:
        """A value by its key."""
        return self._values.get(name, default)

    def need(self, name: str) -> Any:
        """Raises ValueError where the file does not have it."""
        if name not in self._values:
            raise ValueError(f"{self.path} does not say {name}: take another file of the model")
        return self._values[name]

    def need_list(self, name: str) -> list[Any]:
        value = self.need(name)
        if not isinstance(value, list):
            raise ValueError(
                f"{self.path} sets {name} to {shown(value)}, no list: take another file of the"
                " model"
            )
        return value

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, or in the 16 bits that it is stored in. Raises ValueError for a type
        that the package gguf cannot convert.
        """
        stored = self.tensors[name]
        try:
            if stored.kind == "F16":
                values = stored.data
            else:
                kind = self._gguf.GGMLQuantizationType[stored.kind]
                values = self._gguf.dequantize(stored.data, kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path} has {name} in {stored.kind}, which is not read: take a file in F32,"
                " F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 or K quants"
            ) from error
        return np.asarray(values).reshape(stored.shape)
