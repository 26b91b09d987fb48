"""From the name of a model, a local folder or an id on the Hugging Face hub, to a local folder."""

import os
import pathlib
import re

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

_ID = re.compile(r"[\w.-]+/[\w.-]+")
# config, generation config, tokenizer, chat template, index of the weights
CONFIGS = ("*.json", "*.txt", "*.jinja", "tokenizer.model")
WEIGHTS = "*.safetensors"


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Whether this names a GGUF file."""
    return os.fspath(name).lower().endswith(".gguf")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether this can be `organisation/model` on the hub."""
    text = os.fspath(name)
    return _ID.fullmatch(text) is not None and not text.startswith(".") and not is_gguf(text)


def local_folder(name: str | os.PathLike[str], *, weights: bool = True) -> pathlib.Path:
    """The folder of a model: `name` if it is one, what a GGUF file is unpacked to, else the hub's
    files of that id, downloaded if the local cache lacks them.

    Without a network, or with HF_HUB_OFFLINE=1, the cache alone is looked at. With `weights=False`
    the small files are enough.

    Raises:
      ValueError: no such folder, and the hub does not give it: unknown, not allowed, or not
        reachable and not in the cache; or a GGUF file that cannot be unpacked.
    """
    folder = pathlib.Path(name)
    if os.path.isdir(folder):  # unlike Path.is_dir it is False for names too long to be one
        return folder
    if is_gguf(name):
        # what reads such files reads tokenizers and configs too, and few ask for it
        from ictjax.models.gguf.unpack import unpacked

        return unpacked(folder)
    if not is_hub_id(name):
        raise ValueError(
            f"{str(name)!r} is neither a folder nor a Hugging Face id: give a checkpoint folder, a"
            " .gguf file, or organisation/model"
        )
    patterns = [*CONFIGS, WEIGHTS] if weights else list(CONFIGS)
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                os.fspath(name), allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: ask for access on its page and log in with `hf auth login`, or give"
            " a local folder"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{str(name)!r} is no folder, and the Hugging Face hub has no such model (or it is"
            " private): check the name, or log in"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{str(name)!r} is no folder, not in the local Hugging Face cache, and the hub cannot"
            " be reached: give a checkpoint folder, connect (and unset HF_HUB_OFFLINE), or run `hf"
            f" download {name}` where there is a network and copy the cache ($HF_HOME) here"
        ) from error
