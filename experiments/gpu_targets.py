"""GPUs as XLA's compiler has to know them to compile for one that is not here.

Standard library only, as `experiments.machines`.
"""

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# What all of them have in common, as CUDA's programming guide has it.
_COMMON = """\
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536"""


class _Figures(NamedTuple):
    """Of one kind, by its data sheet and by the guide's table of compute capabilities."""

    description: str
    capability: tuple[int, int]
    features: str  # beyond the capability, of which code runs on this architecture alone
    cores: int  # streaming multiprocessors
    units: int  # float32, of each
    threads: int  # of each at most
    shared_kib: int  # of each; a block can have 1 KiB less
    cache_mib: int
    clock_ghz: float


_HOPPER = ((9, 0), "ACCELERATED_FEATURES", 132, 128, 2048, 228, 50, 1.98)
_AMPERE = ((8, 0), "NONE", 108, 64, 2048, 164, 40, 1.41)
_FIGURES: Mapping[str, _Figures] = MappingProxyType(
    {
        "h100-80gb": _Figures("NVIDIA H100 80GB HBM3", *_HOPPER),
        "h200": _Figures("NVIDIA H200", *_HOPPER),
        "a100-80gb": _Figures("NVIDIA A100-SXM4-80GB", *_AMPERE),
        "a100-40gb": _Figures("NVIDIA A100-SXM4-40GB", *_AMPERE),
        "l4": _Figures("NVIDIA L4", (8, 9), "NONE", 58, 128, 1536, 100, 48, 2.04),
    }
)


def compiler_is_here() -> bool:
    """Whether JAX's plugin for CUDA is installed, which compiles without a GPU."""
    return any(importlib.util.find_spec(name) is not None for name in _PLUGINS)


def target(kind: str, memory_bytes: int, bandwidth: float) -> str:
    """A GPU as text of XLA's `GpuTargetConfigProto` (xla/backends/gpu/target_config).

    Args:
      kind: of `experiments.machines.GPUS`.
      memory_bytes: of the device.
      bandwidth: of its memory, bytes a second.
    """
    gpu = _FIGURES[kind]
    major, minor = gpu.capability
    return f"""\
gpu_device_info {{
{_COMMON}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {gpu.features} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  threads_per_core_limit: {gpu.threads}
  shared_memory_per_core: {gpu.shared_kib * 2**10}
  shared_memory_per_block_optin: {(gpu.shared_kib - 1) * 2**10}
  l2_cache_size: {gpu.cache_mib * 2**20}
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {int(bandwidth)}
  device_memory_size: {memory_bytes}
}}
platform_name: "CUDA"
device_description_str: "{gpu.description}"
"""
