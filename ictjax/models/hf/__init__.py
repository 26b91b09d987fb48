"""Hugging Face checkpoints, in and out."""

from typing import TYPE_CHECKING, Any

from ictjax.models.hf.content import content_hash

if TYPE_CHECKING:
    from ictjax.models.hf.reader import load_checkpoint
    from ictjax.models.hf.writer import save_checkpoint

__all__ = ["content_hash", "load_checkpoint", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    """What reads and writes weights, imported when it is first asked for: what looks up names
    and contents stays light.
    """
    if name == "load_checkpoint":
        from ictjax.models.hf.reader import load_checkpoint

        return load_checkpoint
    if name == "save_checkpoint":
        from ictjax.models.hf.writer import save_checkpoint

        return save_checkpoint
    raise AttributeError(f"module 'ictjax.models.hf' has no attribute {name!r}")
