"""Hugging Face checkpoints, in and out."""

from ictjax.models.hf.reader import load_checkpoint
from ictjax.models.hf.writer import save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
