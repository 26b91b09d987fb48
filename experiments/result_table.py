"""The results of an evaluation on the terminal, within 80 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table

from experiments.result_sheets import Sheet, mean, sheets


def result_tables(results: Mapping[str, Any], about: str = "") -> Iterator[Table]:
    """The sheets of `result_sheets.sheets` as tables.

    Args:
      results: evaluation.json.
      about: what stands behind the titles, for example " of alfworld".
    """
    return map(_table, sheets(results, about, mean))


def _table(sheet: Sheet) -> Table:
    table = Table(
        title=sheet.title,
        title_justify="left",
        caption=sheet.note or None,
        caption_justify="left",
        caption_style="dim",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    first, *others = sheet.columns
    # what gives way to the others where a terminal is narrow
    table.add_column(first, overflow="fold", min_width=10)
    for name in others:
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    for row in sheet.rows:
        style = "bold" if row.whole_split else None
        table.add_row(*row.cells, style=style, end_section=row.whole_split)
    return table
