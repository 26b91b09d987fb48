"""docs/scale.md says what is planned today: its rows, their meshes and what is kept."""

import re

import pytest

from experiments.commands.plan import PlanArgs
from experiments.commands.train import read_flags
from experiments.machines import machine
from experiments.memory import uses
from experiments.scale_table import PAGE, ROWS, line_of
from ictjax.config import MESHES

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


def test_the_page_has_no_other_rows():
    assert LINES and LINES.keys() <= {row.name for row in ROWS}


def test_a_row_that_does_not_fit_says_what_would():
    plan = {
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "kept": [{"device_bytes": 2**30}],
        "phases": [{"phase": "update", "total_bytes": 2**34, "temporaries_bytes": 2**33}],
        "needed_bytes": 2**34,
        "device_bytes": 2**33,
        "fits": False,
        "verdict": "It does not fit: update needs 16.0 GiB.",
        "changes": [{"field": "LoRA", "flags": "--reflector.lora.rank 16"}],
        "run": None,
        "estimated_on": "",
    }
    line = line_of(ROWS[0], plan)
    assert "16.0 / 8.0 | update | 1.0 | 8.0 | - | - |" in line
    assert "no: update needs 16.0 GiB. Fits with `--reflector.lora.rank 16`" in line
