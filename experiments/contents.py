"""What the models and adapters of a run hold, as hashes: a run depends on it beside its
configuration.
"""

import pathlib

from experiments.limits import local_roles
from ictjax.models.hf import content_hash
from ictjax.run_config import TrainConfig


def content_hashes(folders: TrainConfig) -> dict[str, str]:
    """The hash of every model that is computed here, by role, and of its adapter, by the role and
    " adapter".

    Args:
      folders: a run with its models and adapters by their folders.

    Raises:
      ValueError: a folder that cannot be read.
    """
    hashes = {}
    for name, role, _ in local_roles(folders):
        hashes[name] = content_hash(pathlib.Path(role.model))
        if role.adapter:
            hashes[f"{name} adapter"] = content_hash(pathlib.Path(role.adapter))
    return hashes
