"""In-context Training in JAX: a reflector learns, by GRPO, to write system prompts that make an
actor better.

Dimension key: the letters of every array-name suffix and every jaxtyping annotation in the package.

====  =====================================================
B     rows of a batch, or slots of the sampler
T     tokens of the current call
S     positions of the KV cache (sources of attention)
D     model width
F     feed-forward width
N     query heads
K     key/value heads
H     width of one head
V     vocabulary
L     layers
R     response positions of a row of a training batch
Q     contexts of one update
G     candidates per context (the GRPO group)
M     games per candidate
====  =====================================================
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ictjax.meta_env import MetaEnv
    from ictjax.players import open_speaker
    from ictjax.reflector import Reflector

__all__ = ["MetaEnv", "Reflector", "open_speaker"]

_HOMES = {"MetaEnv": "meta_env", "Reflector": "reflector", "open_speaker": "players"}

# transformers advises, whenever it is imported, to install PyTorch; nothing here runs on it. Every
# other warning of transformers stays.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)


def __getattr__(name: str) -> Any:
    """The names above are imported when they are first asked for: `import ictjax` alone stays
    light and touches no device.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'ictjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ictjax.{_HOMES[name]}"), name)
