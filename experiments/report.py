"""One self-contained page of a run, report.html, and the tables of results on the terminal.

Reads the run directory only: config.json, manifest.json, metrics.jsonl, evaluation*.json and the
folders that these name.
"""

from pathlib import Path

from rich.table import Table

from envs.files import replacing
from experiments import report_page
from experiments.commands.report import main
from experiments.report_data import RunData
from experiments.result_table import result_tables


def write_report(run: RunData, path: Path | None = None) -> Path:
    """Writes the page, by default report.html of the run directory, whole or not at all, and
    returns its path.
    """
    path = path or run.folder / "report.html"
    with replacing(path) as temporary:
        # what lone surrogates have no UTF-8 for becomes "?"
        temporary.write_text(report_page.render(run), encoding="utf-8", errors="replace")
    return path


def tables(run: RunData) -> list[Table]:
    """The results of all evaluations; none before the first."""
    return [
        table
        for evaluation in run.evaluations
        for table in result_tables(evaluation.results, evaluation.about)
    ]


if __name__ == "__main__":
    main()
