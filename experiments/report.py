"""One self-contained page of a run, report.html, and the table of results on the terminal.

Reads the run directory only: config.json, manifest.json, metrics.jsonl, evaluation*.json, prompts/
and episodes/.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from envs.files import replacing
from experiments import report_page
from experiments.commands.report import main
from experiments.report_data import ARMS, RunData, split_summaries


def write_report(run: RunData) -> Path:
    """Writes report.html into the run directory, whole or not at all, and returns its path."""
    path = run.folder / "report.html"
    with replacing(path) as temporary:
        # what lone surrogates have no UTF-8 for becomes "?"
        temporary.write_text(report_page.render(run), encoding="utf-8", errors="replace")
    return path


def result_table(run: RunData) -> Table | None:
    """The families, what each arm won, and the paired tests, within 80 columns; None before the
    evaluation.
    """
    splits = [split for evaluation in run.evaluations for split in split_summaries(evaluation)]
    if not splits:
        return None
    table = Table(
        title="Games won, %; difference with its 95 % interval",
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("family", no_wrap=True)
    for name in ("games", *ARMS, "difference", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for split in splits:
        for name, family in split.families.items():
            table.add_row(
                name,
                *_cells(
                    family.get("games"),
                    family.get("arms", {}),
                    family.get("tests", {}).get("trained_vs_untrained"),
                ),
            )
        table.add_row(
            split.title,
            *_cells(split.games, split.arms, split.test),
            style="bold",
            end_section=True,
        )
    return table


def _cells(games: int | None, arms: Mapping[str, Any], test: Mapping[str, Any] | None) -> list[str]:
    cells = [
        str(games or ""),
        *(report_page.percent(arms[arm]["mean"]) if arm in arms else "" for arm in ARMS),
    ]
    if test is None:
        return [*cells, "", ""]
    difference = (
        f"{report_page.points(test['difference'])}"
        f" {report_page.interval(test['ci95'], signed=True)}"
    )
    return [*cells, difference, report_page.p_value(test["p"])]


if __name__ == "__main__":
    main()
