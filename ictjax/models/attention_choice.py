"""Which implementation of attention an update uses, and a sampler: chosen once, by platform and
model.
"""

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ictjax.config import AttentionName, SamplerConfig
from ictjax.models.attention import BLOCKS, PLAIN, WHOLE, Attention
from ictjax.models.config import ModelConfig
from ictjax.models.paged_attention import PAGES, PagedAttention

Implementation = Literal["blocks", "plain", "pallas_tpu", "pallas_gpu"]
PagedImplementation = Literal["slots", "pages", "pallas_tpu", "pallas_gpu"]
_KERNELS: Mapping[Implementation, str] = MappingProxyType(
    {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
)
_KERNEL_DTYPES = ("bfloat16", "float32")
# positions of a page that they take
_PAGE_SIZES: Mapping[PagedImplementation, str] = MappingProxyType(
    {"pallas_tpu": "a multiple of 128", "pallas_gpu": "a power of 2 of at least 16"}
)
_TRITON = "jax.experimental.pallas.triton"


def platform_of(mesh: Mesh | None) -> str:
    """Where a program on this mesh runs, or one on the default device: cpu, tpu, gpu (of NVIDIA,
    compute capability 8.0 and newer, as the kernels need it), or another gpu.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform not in ("gpu", "cuda", "rocm"):
        return device.platform
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return "gpu" if major.isdigit() and minor.isdigit() and int(major) >= 8 else "another gpu"


def resolve(name: AttentionName, model: ModelConfig, platform: str) -> Implementation:
    """The implementation that a configuration asks for; "auto" is the fastest one that is proven
    for the platform and the model.

    Raises:
      ValueError: it cannot work there.
    """
    dtype = jnp.dtype(model.dtype).name
    if name == "auto":
        here = _kernels_of(platform)
        return here if here and dtype in _KERNEL_DTYPES else "blocks"
    if name in _KERNELS and platform != _KERNELS[name]:
        raise ValueError(
            f"learner.attention is {name!r}, and the update runs on {platform}: take auto or"
            " blocks."
        )
    if name in _KERNELS and dtype not in _KERNEL_DTYPES:
        raise ValueError(
            f"learner.attention is {name!r}, which computes {' and '.join(_KERNEL_DTYPES)}, and"
            f" the model is {dtype}: take auto or blocks."
        )
    return name


def _kernels_of(platform: str) -> Literal["pallas_tpu", "pallas_gpu"] | None:
    """The kernels of a platform, if this JAX can compile them."""
    if platform == "tpu":
        return "pallas_tpu"
    # JAX 0.12 announces that a later version has no Triton
    there = platform == "gpu" and importlib.util.find_spec(_TRITON) is not None
    return "pallas_gpu" if there else None


def attention_of(name: Implementation, model: ModelConfig, mesh: Mesh | None) -> Attention:
    """An implementation for a model, on a mesh or on one device."""
    # Pallas takes a tenth of the time that a start needs: imported where kernels run.
    if name == "pallas_tpu":
        from ictjax.models.tpu_attention import tpu_attention

        return tpu_attention(mesh)
    if name == "pallas_gpu":
        from ictjax.models.gpu_attention import gpu_attention

        return gpu_attention(model.head_dim, model.dtype, mesh)
    return PLAIN if name == "plain" else BLOCKS


def resolve_paged(sizes: SamplerConfig, model: ModelConfig, platform: str) -> PagedImplementation:
    """The implementation that a sampler's configuration asks for; "slots" where its cache has no
    pages, whose rows have one way.

    Raises:
      ValueError: it cannot work there.
    """
    if not sizes.page_size:
        return "slots"
    dtype, name = jnp.dtype(model.dtype).name, sizes.attention
    if name == "auto":
        here = _kernels_of(platform)
        suits = here and dtype in _KERNEL_DTYPES and _takes(here, sizes.page_size)
        return here if here and suits else "pages"
    if name in _KERNELS and platform != _KERNELS[name]:
        raise ValueError(
            f"attention of a sampler is {name!r}, and it runs on {platform}: take auto or pages."
        )
    if name in _KERNELS and not (dtype in _KERNEL_DTYPES and _takes(name, sizes.page_size)):
        raise ValueError(
            f"attention of a sampler is {name!r}, which computes {' and '.join(_KERNEL_DTYPES)}"
            f" over pages of {_PAGE_SIZES[name]} positions, and the model is {dtype} and page_size"
            f" {sizes.page_size}: take auto or pages."
        )
    return name


def part_bytes_of(platform: str) -> int:
    """Of the logits that rows of slots compute at a time (`attention.attend_in_parts`): on CPUs
    about what a core's own cache holds.
    """
    return 2 * 2**20 if platform == "cpu" else WHOLE


def _takes(name: PagedImplementation, page_size: int) -> bool:
    """Whether kernels work on pages of this size, as `_PAGE_SIZES` says it."""
    if name == "pallas_tpu":
        return page_size % 128 == 0
    return page_size >= 16 and page_size.bit_count() == 1


def paged_attention_of(name: PagedImplementation, mesh: Mesh | None) -> PagedAttention:
    """An implementation on a mesh or on one device."""
    if name == "pallas_tpu":
        from ictjax.models.tpu_paged_attention import tpu_paged_attention

        return tpu_paged_attention(mesh)
    if name == "pallas_gpu":
        from ictjax.models.gpu_paged_attention import gpu_paged_attention

        return gpu_paged_attention(mesh)
    return PAGES
