"""`ictjax plan --preset NAME --topology v5e:2x4`."""

import dataclasses
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from experiments.assumptions import Assumptions
from experiments.command import parse_known, run_main
from experiments.commands.train import RunArgs, read_flags, with_local_models
from experiments.console import Terminal
from experiments.gpu_targets import compiler_is_here
from experiments.machines import Machine, machine
from experiments.presets import PRESETS
from experiments.remote_run import is_remote
from ictjax.config import MESHES
from ictjax.extras import install

_DESCRIPTION = (
    "Compiles what a training run would compile (restore, update, prefill, decode) for other"
    " devices or for those here, and prints memory per device, FLOPs and expected time. Ends with"
    " exit code 1 if it does not fit, after the single changes with which it would. TPUs need the"
    " extra `plan` and no TPU, GPUs the extra `plan-gpu` and no GPU; without it they are estimated"
    " from what the compiler for CPUs says. Every field of the preset can be overridden, as for"
    f" train. Presets: {', '.join(PRESETS)}."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TopologyArgs:
    """What decides the mesh, and is therefore read first."""

    topology: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the devices here)"),
    ] = None
    """A TPU slice (v5e:2x4, or v5e-8 as it is rented) or GPUs (h200, 8xh100-80gb)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArgs(_TopologyArgs, RunArgs):
    """All flags."""

    run_dir: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = (
        None
    )
    """Where the run will be: at an address the first of several hosts holds whole checkpoints."""
    json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Print one JSON object."""
    assume: Assumptions = dataclasses.field(default_factory=Assumptions)
    """What a plan cannot know."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input, 1 where the run does not
    fit.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(words), "start it again.")


def _main(argv: list[str]) -> None:
    named, _ = parse_known(_TopologyArgs, "plan", argv)
    wanted = None if named.topology is None else machine(named.topology)
    mesh = None if wanted is None or wanted.mesh not in MESHES else wanted.mesh
    args, _ = read_flags(PlanArgs, "plan", _DESCRIPTION, argv, lambda: mesh)
    settings = with_local_models(args.settings)
    if wanted is not None:
        prepare(wanted)
    from experiments.plan_run import check  # loads JAX, which reads the environment then

    check(
        settings,
        Terminal(),
        machine=wanted,
        assumed=args.assume,
        as_json=args.json,
        own_copies=is_remote(args.run_dir),
    )


def prepare(wanted: Machine) -> None:
    """Sets the environment in which JAX describes other devices than those here; call it before JAX
    is loaded. Raises ValueError where the TPU compiler is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if wanted.target and not compiler_is_here():
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={wanted.count}"
        return
    # what is kept can be read for real devices only
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if wanted.target:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # that there is no GPU
        return
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "The compiler for TPUs (libtpu) is not installed: for the extra `plan`, run in the"
            f" clone `{install('plan')}`."
        )
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU whose metadata could be asked for
        "TPU_ACCELERATOR_TYPE": wanted.accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened: a run here, or a plan, may go on
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
    }
