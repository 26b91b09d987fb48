"""Compilers' figures, kept between plans: to compile a program of 7B weights takes minutes, to
write it down for the compiler seconds.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jaxlib
from jax.stages import Lowered

from envs.files import replacing
from experiments.compiled_cache import FOLDER

_READ = "2"  # how `experiments.hlo` reads a compiled program; figures read otherwise are others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of one program, for each device."""

    argument_bytes: int
    output_bytes: int  # beyond the arguments that they replace
    temporary_bytes: int
    flops: float | None  # by the compiler, which counts the body of every loop once
    sent_bytes: int  # over the interconnect; loops counted as often as they turn
    loops_once: int  # of unknown rounds
    refused: bool  # the compiler itself found no room; temporaries are what it asked for


def kept_figures(
    lowered: Lowered, machine: str, device: jax.Device, compile_it: Callable[[Lowered], Compiled]
) -> Compiled:
    """The figures of a program: those kept beside JAX's compiled programs, else what `compile_it`
    says, which is then kept. Without such a folder nothing is.

    Args:
      lowered: the program.
      machine: that it is compiled for, by name: devices of one kind can be linked in several ways.
      device: one of that machine.
      compile_it: asks the compiler.
    """
    folder = os.environ.get(FOLDER)
    if not folder or "://" in folder:  # JAX can keep its programs in a bucket
        return compile_it(lowered)
    path = pathlib.Path(folder, "figures", f"{_name(lowered, machine, device)}.json")
    try:
        return Compiled(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # not there, or not whole
        figures = compile_it(lowered)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(figures)), encoding="utf-8")
    except OSError:  # a disk that is full or read-only costs time, not the plan
        pass
    return figures


def _name(lowered: Lowered, machine: str, device: jax.Device) -> str:
    """Of the program's text, and of all that decides what a compiler makes of it."""
    decides = (
        lowered.as_text(),
        _READ,
        jax.__version__,
        jaxlib.__version__,
        machine,
        device.client.platform_version,
        device.device_kind,
        *(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
        *(field.name for field in dataclasses.fields(Compiled)),
    )
    return hashlib.sha256("\0".join(decides).encode()).hexdigest()
