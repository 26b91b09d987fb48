"""docs/models.md says what the code does: families, memory, commands."""

import dataclasses
import io
import pathlib
import re
import shlex

import pytest
from rich.console import Console

from experiments import plan_shapes
from experiments.command import parse
from experiments.commands.generate import GenerateArgs
from experiments.presets import PRESETS, on_named_mesh
from ictjax.config import MESHES, LoraConfig
from ictjax.models.hf.translate import FAMILIES

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


def rows(text):
    """The cells of a table's rows, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def per_device(preset, mesh, rank, monkeypatch):
    """GiB per device by what it is, as --check prints it."""
    monkeypatch.setattr(plan_shapes, "_trace_update", lambda *_: None)
    config = PRESETS[preset]
    config = dataclasses.replace(
        config, reflector=dataclasses.replace(config.reflector, lora=LoraConfig(rank=rank))
    )
    printed = io.StringIO()
    plan_shapes.check(on_named_mesh(config, mesh), Console(file=printed, width=200))
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in printed.getvalue().splitlines()
        if line.startswith("│")
    ]
    return {cells[0]: float(cells[-1]) for cells in lines}


def test_every_family_is_on_the_page():
    table = PAGE.partition("## Families")[2].partition("### Parity")[0]
    assert [row[1].strip("`") for row in rows(table)] == [
        family.architecture for family in FAMILIES.values()
    ]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_memory_table_is_what_check_prints(mesh, monkeypatch):
    table = PAGE.partition("<!-- memory -->")[2].partition("<!-- end memory -->")[0]
    found = {row[0].strip("`"): row[1:] for row in rows(table)}
    assert list(found) == list(MESHES)
    sizes, _, base, trained, copy, caches, total = found[mesh]
    meshes = MESHES[mesh].actor
    assert sizes in ("1", f"{meshes.data} x {meshes.fsdp} x {meshes.tensor}")
    for index, rank in enumerate((0, 64)):
        memory = per_device("qwen2.5-7b-minihack", mesh, rank, monkeypatch)
        parts = {
            base: sum(size for what, size in memory.items() if what.startswith("actor, ")),
            trained.split(r" \| ")[index]: sum(
                memory[name] for name in ("trained weights", "first moments", "second moments")
            ),
            copy.split(r" \| ")[index]: memory.get("trained weights as they sample, bfloat16", 0.0),
            caches: sum(size for what, size in memory.items() if " cache, " in what),
            total.split(r" \| ")[index]: sum(memory.values()),
        }
        for said, size in parts.items():
            assert float(said) == pytest.approx(size, abs=0.06), (mesh, rank, said, size)


def test_the_commands_of_the_page_parse():
    commands = re.findall(r"^\.venv/bin/ictjax generate (.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)
    assert len(commands) > 4
    for command in commands:
        parse(GenerateArgs, "generate", "", shlex.split(command))
