"""Writes the table of docs/scale.md: `python -m experiments.scale_table [ROW ...]` plans each row
as `ictjax plan --json` does, in a process of its own.

Rows that are not named keep the lines that they have.
"""

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from experiments.command import run_main, unknown
from experiments.console import counting_bar
from experiments.wording import counted

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "scale.md"
_START, _END = "<!-- plans -->", "<!-- end plans -->"
_GIB = 2**30


class Row(NamedTuple):
    """A run and a machine, as the page names them."""

    name: str
    argv: tuple[str, ...]


def _row(name: str, preset: str, topology: str, *flags: str) -> Row:
    return Row(name, ("--preset", preset, "--topology", topology, *flags))


ROWS = (
    _row("7b-lora-16k-v5e-8", "qwen2.5-7b-lora", "v5e-8"),
    _row("7b-lora-32k-v5e-16", "qwen2.5-7b-lora", "v5e-16", "--context=32768"),
    _row("7b-lora-32k-v6e-8", "qwen2.5-7b-lora", "v6e-8", "--context=32768"),
    _row("7b-all-32k-v5p-8", "qwen2.5-7b-minihack", "v5p-8"),
    _row("7b-all-32k-v5e-64", "qwen2.5-7b-minihack", "v5e-64"),
    _row("14b-lora-16k-v5e-16", "qwen2.5-14b-lora", "v5e-16"),
    _row("14b-lora-16k-v6e-8", "qwen2.5-14b-lora", "v6e-8"),
    *(
        _row(f"{size}-{machine}", f"{model}-lora", machine)
        for size, model in (("0.5b", "qwen2.5-0.5b"), ("1.5b", "qwen2.5-1.5b"), ("4b", "qwen3-4b"))
        for machine in ("v5e-1", "v5e-4", "l4")
    ),
    _row("7b-lora-16k-h100", "qwen2.5-7b-lora", "h100-80gb"),
    _row("7b-all-32k-h100-8", "qwen2.5-7b-minihack", "8xh100-80gb"),
    _row("7b-all-32k-h200-8", "qwen2.5-7b-minihack", "8xh200"),
)
_HEADING = (
    "| row | `ictjax plan` | mesh | needed / there, GiB | phase | kept | temporaries"
    " | sent, GB/update | s/iteration | hours | longest | verdict |"
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit code 2 with one sentence on bad input."""
    names = list(sys.argv[1:] if argv is None else argv)
    run_main(lambda: _main(names), "name the rows that are missing to go on.")


def _main(names: list[str]) -> None:
    known = {row.name: row for row in ROWS}
    for name in names:
        if name not in known:
            raise unknown(f"Unknown row {name!r}", name, list(known))
    wanted = [known[name] for name in names] or list(ROWS)
    with counting_bar("rows") as advance:
        for number, row in enumerate(wanted):
            advance(number, len(wanted))
            write_line(row, _plan(row))


def _plan(row: Row) -> dict:
    command = [sys.executable, "-m", "experiments", "plan", *row.argv, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.startswith("{"):
        raise ValueError(f"Row {row.name} has no plan (exit code {done.returncode}): see above.")
    return json.loads(done.stdout)


def write_line(row: Row, plan: dict) -> None:
    """Puts one plan into the table, at the place of its row."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_START)
    table, _, after = rest.partition(_END)
    lines = {
        found[1]: line
        for line in table.splitlines()
        if (found := re.match(r"\| ([\w.\-]+) \| `", line))
    }
    lines[row.name] = line_of(row, plan)
    ordered = [lines[known.name] for known in ROWS if known.name in lines]
    body = "\n".join([_HEADING, "|" + "---|" * (_HEADING.count("|") - 1), *ordered])
    PAGE.write_text(f"{before}{_START}\n{body}\n{_END}{after}", encoding="utf-8")


def line_of(row: Row, plan: dict) -> str:
    """The cells of one row."""
    mesh = plan["mesh"]
    kept = sum(part["device_bytes"] for part in plan["kept"])
    phases = sorted(plan["phases"], key=lambda phase: phase["total_bytes"])
    worst = phases[-1] if phases else None
    run = plan["run"]
    verdict = "fits" if plan["fits"] else plan["verdict"].split(": ", 1)[1].rstrip(".")
    if not plan["fits"]:
        changes = "; or ".join(f"`{change['flags']}`" for change in plan["changes"])
        verdict = f"no: {verdict}. Fits with {changes or 'no single change that was tried'}"
    cells = (
        row.name,
        f"`{' '.join(row.argv)}`",
        f"{mesh['data']} x {mesh['fsdp']} x {mesh['tensor']}",
        f"{_gib(plan['needed_bytes'])} / {_gib(plan['device_bytes'])}",
        worst["phase"] if worst else "-",
        _gib(kept),
        _gib(worst["temporaries_bytes"]) if worst else "-",
        _sent(plan["phases"]),
        f"{run['seconds_per_iteration']:,.0f}" if run else "-",
        f"{run['hours']:,.1f}" if run else "-",
        _longest(plan["phases"]),
        verdict + (" (estimate)" if plan["estimated_on"] else ""),
    )
    return f"| {' | '.join(cells)} |"


def _sent(phases: Sequence[dict]) -> str:
    """By a device in an update, and of how many loops only one round is counted."""
    for phase in phases:
        if phase["phase"] == "update" and not phase["refused_by_compiler"]:
            once = phase["interconnect_loops_counted_once"]
            size = f"{phase['interconnect_bytes_per_run'] / 1e9:,.1f}"
            return f"{size} ({counted(once, 'loop')} once)" if once else size
    return "-"


def _longest(phases: Sequence[dict]) -> str:
    """The phase that takes most of an iteration, and what limits it."""
    timed = [phase for phase in phases if phase["seconds_per_iteration"] is not None]
    if not timed:
        return "-"
    longest = max(timed, key=lambda phase: phase["seconds_per_iteration"])
    return f"{longest['phase']}: {longest['limited_by']}"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"


if __name__ == "__main__":
    main()
