"""Which implementation of attention an update uses: chosen once, by platform and model."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ictjax.config import AttentionName
from ictjax.models.attention import BLOCKS, PLAIN, Attention
from ictjax.models.config import ModelConfig
from ictjax.models.tpu_attention import tpu_attention

Implementation = Literal["blocks", "plain", "pallas_tpu"]
_TPU_DTYPES = ("bfloat16", "float32")


def platform_of(mesh: Mesh | None) -> str:
    """Where an update on this mesh runs, or one on the default device: cpu, gpu, tpu."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def resolve(name: AttentionName, model: ModelConfig, platform: str) -> Implementation:
    """The implementation that a configuration asks for; "auto" is the fastest one that is proven
    for the platform and the model.

    Raises:
      ValueError: it cannot work there.
    """
    dtype = jnp.dtype(model.dtype).name
    if name == "auto":
        return "pallas_tpu" if platform == "tpu" and dtype in _TPU_DTYPES else "blocks"
    if name == "pallas_tpu" and platform != "tpu":
        raise ValueError(
            f"learner.attention is 'pallas_tpu', and the update runs on {platform}: take auto or"
            " blocks."
        )
    if name == "pallas_tpu" and dtype not in _TPU_DTYPES:
        raise ValueError(
            f"learner.attention is 'pallas_tpu', which computes {' and '.join(_TPU_DTYPES)}, and"
            f" the model is {dtype}: take auto or blocks."
        )
    return name


def attention_of(name: Implementation, mesh: Mesh | None) -> Attention:
    """An implementation on a mesh, or on one device."""
    if name == "pallas_tpu":
        return tpu_attention(mesh)
    return PLAIN if name == "plain" else BLOCKS
