"""The model of a command that answers with one: its shape as it is held, and its weights."""

import dataclasses
import pathlib

from experiments.console import reading_bar
from experiments.memory import check_fits, weights_use
from experiments.model_flags import ModelFlags
from ictjax.config import SamplerConfig
from ictjax.models.config import ModelConfig
from ictjax.models.hf import load_checkpoint
from ictjax.models.hf.reader import read_config
from ictjax.models.int8 import int8_weights
from ictjax.models.transformer import Params
from ictjax.sampler import sampling_weights


def held_model(folder: pathlib.Path, flags: ModelFlags) -> ModelConfig:
    """The model of a folder in Hugging Face layout, as the flags hold it. Raises ValueError as
    `read_config`.
    """
    model = read_config(folder)
    if flags.dtype is not None:
        model = model.with_dtype(flags.dtype)
    return dataclasses.replace(model, weights=flags.weights)


def with_flags(sizes: SamplerConfig, flags: ModelFlags) -> SamplerConfig:
    """Sizes of a sampler that holds its cache and guesses as the flags say."""
    return dataclasses.replace(sizes, cache=flags.cache, guessed_tokens=flags.guessed_tokens)


def read_weights(folder: pathlib.Path, model: ModelConfig) -> Params:
    """The weights as they sample, with a bar while they are read.

    Args:
      folder: in Hugging Face layout.
      model: see `held_model`.

    Raises:
      ValueError: a file that is not the model's, or weights that exceed the memory before they are
        in 8 bits.
    """
    whole = dataclasses.replace(model, weights="float")
    if model.weights == "int8":
        check_fits(
            "Weights, before they are in 8 bits,",
            [weights_use("weights", whole)],
            "Give --dtype bfloat16, or free memory.",
        )
    with reading_bar("reading") as progress:
        _, params = load_checkpoint(folder, dtype=model.param_dtype, progress=progress)
    if model.weights == "int8":
        _, params = int8_weights(whole, params)
    return sampling_weights(model, params, consume=True)
