"""The accelerators that a run can be planned for: memory, peaks, and the names of their topologies.

Standard library only: a name is checked before JAX is imported.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from experiments.gpu_targets import target

_GIB = 2**30
# What of a GPU's memory JAX is given: XLA_PYTHON_CLIENT_MEM_FRACTION=.92 (0.75 without it).
GPU_SHARE = 0.92


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them, by its maker's public figures."""

    name: str
    memory_bytes: int  # that a program can have
    flops: float  # a second, dense bfloat16
    bandwidth: float  # bytes a second, of its memory
    interconnect: float  # bytes a second to its neighbours, one way
    host_bytes: int | None = None  # of its host's memory, for each; None: hosts differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """So many devices of one kind."""

    name: str  # as it was asked for
    chip: Chip
    count: int
    mesh: str  # its name in `ictjax.config.MESHES`, where it has one
    topology: str = ""  # of TPUs, as `jax.experimental.topologies` has it
    accelerator: str = ""  # of the topology, as libtpu reads it from the environment
    host_bounds: tuple[int, ...] = ()  # chips of one host, where they are not the compiler's own
    target: str = ""  # a GPU, as its compiler reads it

    @property
    def hosts(self) -> int:
        """Machines that it is: of TPUs four chips each, but up to eight v5e or v6e are one; GPUs
        are one.
        """
        one = 8 if self.topology.startswith(("v5e:", "v6e:")) else 4
        return 1 if not self.topology or self.count <= one else self.count // 4


def _tpu(
    name: str, gib: float, teraflops: float, gigabytes: float, gigabits: float, host_gib: float
) -> Chip:
    return Chip(
        name=name,
        memory_bytes=int(gib * _GIB),
        flops=teraflops * 1e12,
        bandwidth=gigabytes * 1e9,
        interconnect=gigabits / 8 * 1e9,
        host_bytes=int(host_gib * _GIB),
    )


def _gpu(name: str, gib: float, teraflops: float, gigabytes: float, link: float) -> Chip:
    return Chip(
        name=name,
        memory_bytes=int(gib * GPU_SHARE * _GIB),
        flops=teraflops * 1e12,
        bandwidth=gigabytes * 1e9,
        interconnect=link * 1e9,
    )


# Memory as the TPU compiler counts it; peaks and links (all of a chip's together) as
# cloud.google.com/tpu/docs publishes them; the host's memory by the machine types of
# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, that of four chips by four.
TPUS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": _tpu("TPU v4", 30.75, 275, 1228, 2400, 101.75),
        "v5e": _tpu("TPU v5e", 15.75, 197, 819, 1600, 48),
        "v5p": _tpu("TPU v5p", 95.74, 459, 2765, 4800, 112),
        "v6e": _tpu("TPU v6e", 31.25, 918, 1640, 3584, 180),
    }
)
# As nvidia-smi counts memory; dense peaks, and one direction of NVLink (L4: PCIe), of the data
# sheets.
GPUS: Mapping[str, Chip] = MappingProxyType(
    {
        "h100-80gb": _gpu("H100 80 GB", 79.6, 989, 3350, 450),
        "h200": _gpu("H200", 140.4, 989, 4800, 450),
        "a100-80gb": _gpu("A100 80 GB", 80.0, 312, 2039, 300),
        "a100-40gb": _gpu("A100 40 GB", 40.0, 312, 1555, 300),
        "l4": _gpu("L4", 22.5, 121, 300, 32),
    }
)
_PREFIXES = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_CORES = {"v4": 2, "v5p": 2}  # that names of slices count
# Slices that can be rented, by the product of their sides.
_SHAPES = {
    **dict.fromkeys(("v5e", "v6e"), ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    **dict.fromkeys(
        ("v4", "v5p"),
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    ),
}


def topologies() -> list[str]:
    """The names of `machine` for TPUs: v5e:2x4, and v5e-8, as the slice is rented."""
    names = []
    for kind, shapes in _SHAPES.items():
        for shape in shapes:
            names += [f"{kind}:{shape}", f"{kind}-{_chips(shape) * _CORES.get(kind, 1)}"]
    return names


def machine(name: str) -> Machine:
    """A machine by name: a TPU topology (v5e:2x4), a slice as it is rented (v5e-8; of v4 and v5p
    the number counts cores, two a chip), or GPUs (h200, 8xh100-80gb). Raises ValueError with the
    nearest names for any other.
    """
    given = name.strip().lower()
    for kind, shapes in _SHAPES.items():
        for shape in shapes:
            chips = _chips(shape)
            rented = chips * _CORES.get(kind, 1)
            if given in (f"{kind}:{shape}", f"{kind}-{rented}"):
                return Machine(
                    name=given,
                    chip=TPUS[kind],
                    count=chips,
                    mesh=f"{kind}-{rented}",
                    topology=f"{kind}:{shape}",
                    accelerator=f"{_PREFIXES[kind]}-{rented}",
                    host_bounds=(1, 1, 1) if chips == 1 else (),
                )
    if (found := re.fullmatch(r"(?:(\d{1,5})x)?(\S+)", given)) is not None:
        count, kind = int(found[1] or 1), found[2]
        if kind in GPUS and count > 0:
            mesh = kind.split("-")[0] + (f"-{count}" if count > 1 else "")
            chip = GPUS[kind]
            described = target(kind, int(chip.memory_bytes / GPU_SHARE), chip.bandwidth)
            return Machine(name=given, chip=chip, count=count, mesh=mesh, target=described)
    known = [*topologies(), *GPUS, *(f"8x{kind}" for kind in GPUS)]
    nearest = difflib.get_close_matches(given, known, n=3, cutoff=0.4)
    meant = f" (nearest: {', '.join(nearest)})" if nearest else ""
    raise ValueError(
        f"Unknown topology {name!r}{meant}: give a TPU slice ({', '.join(_SHAPES)}; v5e:2x4 or"
        f" v5e-8, for example) or GPUs ({', '.join(GPUS)}; 8xh100-80gb, for example)."
    )


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))
