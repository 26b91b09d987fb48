"""Measures this machine, each design against a peer in the same run."""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments.bench_actor import bench_int8, bench_speculation
from experiments.bench_cache import bench_cache
from experiments.bench_envs import bench_envs
from experiments.bench_models import bench_update
from experiments.bench_products import bench_products
from experiments.bench_rollout import bench_rollout
from experiments.bench_run import Note, Result
from experiments.bench_sampler import bench_sampler
from experiments.commands.bench import CacheBench, Common, FalseAlarmsBench, ProductsBench, main
from experiments.false_alarms import bench_false_alarms
from experiments.manifest import package_versions
from ictjax.run_files import write_lines

_PACKAGES = (
    "ictjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "transformers",
    "torch",
    "google-tunix",
    "numpy",
    "alfworld",
    "textworld",
    "gymnasium",
    "minihack",
    "nle",
)

_MEASURES: Mapping[str, Callable[[Any, Note], Result]] = MappingProxyType(
    {
        "sampler": bench_sampler,
        "update": bench_update,
        "envs": bench_envs,
        "rollout": bench_rollout,
        "cache": bench_cache,
        "products": bench_products,
        "false-alarms": bench_false_alarms,
        "speculation": bench_speculation,
        "int8": bench_int8,
    }
)
_UNITS = {"gib": "GiB", "mib": "MiB", "gflop/s": "GFLOP/s"}
_PAIRED = "speedup: over {}, median of paired runs."


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
            # a word a line: what is narrower than its words is broken within them
            "\n".join(_UNITS.get(word, word) for word in name.replace("_per_s", "/s").split("_")),
            justify="right" if index else "left",
            no_wrap=not index,
            overflow="fold",
        )
    for row in result.rows:
        table.add_row(*map(_cell, row.values()))
    console.print(table)
    paired = [] if result.peer is None else [_PAIRED.format(result.peer)]
    for note in (*paired, *result.notes):
        console.print(note, highlight=False, markup=False)


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


def run(
    chosen: Mapping[str, Common | CacheBench | FalseAlarmsBench | ProductsBench],
    target: pathlib.Path | None,
    argv: Sequence[str],
    console: Console,
) -> None:
    """Measures, shows a table each, and writes the results to `target`."""
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
    if target is not None:
        report = {
            "started": started.isoformat(timespec="seconds"),
            "seconds": (datetime.datetime.now(datetime.UTC) - started).total_seconds(),
            "argv": ["ictjax bench", *argv],
            "load_at_start": load,
            "machine": found,
            "results": {
                name: result._asdict() | {"settings": _settings(chosen[name])}
                for name, result in results.items()
            },
        }
        write_lines(target, [json.dumps(report, indent=1)])
        console.print(f"Written to {target}", highlight=False, soft_wrap=True, markup=False)


def _settings(bench: Any) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in dataclasses.asdict(bench).items()
        if name != "json"
    }


if __name__ == "__main__":
    main()
