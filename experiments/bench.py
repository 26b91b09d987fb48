"""`python -m experiments.bench [sampler | update | envs | all]`: measures this machine, each design
against a peer in the same run.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench_envs import EnvsBench, bench_envs
from experiments.bench_models import SamplerBench, UpdateBench, bench_sampler, bench_update
from experiments.bench_run import Common, Note, Result
from experiments.run_dir import package_versions, parse, run_main
from ictjax.run_files import write_lines

_DESCRIPTION = (
    "Measures the sampler, the update and the environments on this machine, each against a peer in"
    " the same run."
)
_PACKAGES = (
    "ictjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "transformers",
    "torch",
    "numpy",
    "alfworld",
    "textworld",
    "gymnasium",
    "minihack",
    "nle",
)

_PLAIN_WIDTH = 140  # of tables that go to a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllBenches(Common):
    """All three at their default sizes."""


# Command line.

_COMMANDS: Mapping[str, type] = MappingProxyType(
    {"sampler": SamplerBench, "update": UpdateBench, "envs": EnvsBench, "all": AllBenches}
)
_MEASURES: Mapping[str, Callable[[Any, Note], Result]] = MappingProxyType(
    {"sampler": bench_sampler, "update": bench_update, "envs": bench_envs}
)


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, memory, devices and versions."""
    processors = pathlib.Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in processors.read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": platform.platform(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
    }


def show(result: Result, console: Console) -> None:
    """Prints a table with its notes."""
    table = Table(title=result.title, title_justify="left")
    for index, name in enumerate(result.rows[0]):
        table.add_column(
            name.replace("_per_s", "/s").replace("_", " "),
            justify="right" if index else "left",
            no_wrap=not index,
            overflow="fold",
        )
    for row in result.rows:
        table.add_row(*map(_cell, row.values()))
    console.print(table)
    for each in (f"speedup: over {result.peer}, median of paired runs.", *result.notes):
        console.print(each, highlight=False, markup=False)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:,.0f}"
            if abs(value) >= 1000
            else f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(argv), "nothing was written; start it again to measure.")


def _main(argv: list[str]) -> None:
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["all", *argv]
    if argv[0] not in (*_COMMANDS, "-h", "--help"):
        raise ValueError(f"Unknown benchmark {argv[0]!r}: use one of {', '.join(_COMMANDS)}.")
    kinds: Any = None
    for name, kind in _COMMANDS.items():
        each = Annotated[kind, tyro.conf.subcommand(name)]
        kinds = each if kinds is None else kinds | each
    args = parse(kinds, _DESCRIPTION, argv)
    _check_target(args.json)
    benches = {"sampler": SamplerBench, "update": UpdateBench, "envs": EnvsBench}
    if isinstance(args, AllBenches):
        chosen = {name: kind(repetitions=args.repetitions) for name, kind in benches.items()}
    else:
        chosen = {argv[0]: args}
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    started, load = datetime.datetime.now(datetime.UTC), os.getloadavg()[0]
    found = machine()
    results = {}
    with console.status("") as status:
        for name, bench in chosen.items():
            results[name] = _MEASURES[name](
                bench, lambda text, name=name: status.update(f"{name}: {text}")
            )
            show(results[name], console)
    busy = (
        f" Other programs were running (load {load:.1f} at the start): expect more on an idle"
        " machine."
        if load > 0.5
        else ""
    )
    console.print(
        f"{found['processor']}, {found['cores']} cores, {', '.join(found['devices'])}.{busy}",
        highlight=False,
        markup=False,
    )
    if args.json is not None:
        report = {
            "started": started.isoformat(timespec="seconds"),
            "seconds": (datetime.datetime.now(datetime.UTC) - started).total_seconds(),
            "argv": ["experiments.bench", *argv],
            "load_at_start": load,
            "machine": found,
            "results": {
                name: result._asdict() | {"settings": _settings(chosen[name])}
                for name, result in results.items()
            },
        }
        write_lines(args.json, [json.dumps(report, indent=1)])
        console.print(f"Written to {args.json}", highlight=False, soft_wrap=True, markup=False)


def _settings(bench: Any) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(bench).items() if name != "json"}


def _check_target(path: pathlib.Path | None) -> None:
    """Raises ValueError, before anything is measured, for a file that could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"--json {path} is a folder: name a file.")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"The folder of --json {path} does not exist: make it, or name a file elsewhere."
        )
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(
            f"The folder of --json {path} cannot be written to: name a file elsewhere."
        )


if __name__ == "__main__":
    main()
