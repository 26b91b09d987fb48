"""docs/scale.md says what is planned today: its rows, their meshes and what is kept; with the compiler
for TPUs also what the smallest of them need.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.commands.plan import PlanArgs
from experiments.commands.train import read_flags
from experiments.machines import machine
from experiments.memory import uses, written_checkpoint
from experiments.scale_table import PAGE, ROWS, line_of
from ictjax.config import MESHES

ROOT = pathlib.Path(__file__).parent.parent
SMALLEST = [row for row in ROWS if row.name in ("0.5b-v5e-1", "0.5b-v5e-4")]
LINES = {
    cells[0]: cells
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| [\w.\-]+ \| `--preset", line)
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def planned(row):
    topology = machine(row.argv[row.argv.index("--topology") + 1])
    args, _ = read_flags(PlanArgs, "plan", "", row.argv, lambda: topology.mesh)
    return topology, args.settings


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_rows_use_every_device_and_are_what_the_page_says(row):
    topology, config = planned(row)
    there = topology.chip.host_bytes
    kept = (*uses(config), written_checkpoint(config))
    assert there is None or sum(use.host_bytes for use in kept) < there
    assert topology.mesh in MESHES
    assert config.reflector.mesh.num_devices == topology.count
    if row.name in LINES:
        _, flags, mesh, needed, _, kept, *_ = LINES[row.name]
        sizes = config.reflector.mesh
        assert flags == f"`{' '.join(row.argv)}`"
        assert mesh == f"{sizes.data} x {sizes.fsdp} x {sizes.tensor}"
        held = sum(use.device_bytes for use in uses(config)) / 2**30
        assert float(kept) == pytest.approx(held, abs=0.06)
        assert float(needed.split(" / ")[1]) == pytest.approx(
            topology.chip.memory_bytes / 2**30, abs=0.06
        )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the compiler for TPUs is not installed (the extra `plan`)",
)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", SMALLEST, ids=[row.name for row in SMALLEST])
def test_the_smallest_rows_compile_to_what_the_page_says(row):
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "plan", *row.argv, "--json"],
        # compiled as users' are, see conftest.py
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    plan = json.loads(done.stdout)
    _, _, _, needed, worst, _, temporaries, *_, verdict = LINES[row.name]
    phase = max(plan["phases"], key=lambda phase: phase["total_bytes"])
    assert (phase["phase"], "fits" if plan["fits"] else "no") == (worst, verdict)
    for found, said in (
        (plan["needed_bytes"], needed.split(" / ")[0]),
        (phase["temporaries_bytes"], temporaries),
    ):
        assert float(said) == pytest.approx(found / 2**30, abs=0.06)


def test_the_page_has_no_other_rows():
    assert LINES and LINES.keys() <= {row.name for row in ROWS}


def test_a_row_that_does_not_fit_says_what_would():
    plan = {
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "kept": [{"device_bytes": 2**30}],
        "phases": [
            {
                "phase": "update",
                "total_bytes": 2**34,
                "temporaries_bytes": 2**33,
                "refused_by_compiler": False,
                "interconnect_bytes_per_run": 5_630_000_000,
                "interconnect_loops_counted_once": 1,
                "seconds_per_iteration": 2.0,
                "limited_by": "products",
            },
            {
                "phase": "actor decode",
                "total_bytes": 2**33,
                "temporaries_bytes": 2**32,
                "seconds_per_iteration": 3.0,
                "limited_by": "memory",
            },
        ],
        "needed_bytes": 2**34,
        "device_bytes": 2**33,
        "fits": False,
        "verdict": "It does not fit: update needs 16.0 GiB.",
        "changes": [{"field": "LoRA", "flags": "--reflector.lora.rank 16"}],
        "run": None,
        "estimated_on": "",
    }
    line = line_of(ROWS[0], plan)
    assert "16.0 / 8.0 | update | 1.0 | 8.0 | 5.6 (1 loop once) | - | - | actor decode: mem" in line
    assert "no: update needs 16.0 GiB. Fits with `--reflector.lora.rank 16`" in line
