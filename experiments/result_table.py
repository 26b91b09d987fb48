"""The results of an evaluation on the terminal, within 80 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table

from experiments.evaluation_results import ARMS, SPLITS
from experiments.wording import interval, p_value, percent, points

_MAIN = "trained_vs_untrained"


def result_tables(results: Mapping[str, Any], about: str = "") -> Iterator[Table]:
    """What the arms won in every family and split, the headline's first; then how the other arms
    compare where the headline is made.

    Args:
      results: evaluation.json.
      about: what stands behind the titles, for example " of alfworld".
    """
    table = _table("Games won, %; trained - untrained", "family")
    arms = [
        arm for arm in ARMS if any(arm in split["arms"] for split in results["overall"].values())
    ]
    for arm in arms:
        table.add_column(arm, justify="right", no_wrap=True)
    _add_test_columns(table)
    for split, overall in results["overall"].items():
        for name in overall["families"]:
            table.add_row(name, *_row(results["families"][name], arms))
        table.add_row(SPLITS[split] + about, *_row(overall, arms), style="bold", end_section=True)
    table.caption = (
        "p: Holm-corrected for the families of a split, of the bold rows alone. n: trained seeds,"
        " else runs."
    )
    yield table
    split, overall = next(iter(results["overall"].items()))
    others = {name: test for name, test in overall["tests"].items() if name != _MAIN}
    if not others:
        return
    table = _table(f"Other comparisons, {SPLITS[split]}{about}", "arms")
    _add_test_columns(table)
    for name, test in others.items():
        table.add_row(name.replace("_vs_", " - "), *_test_cells(test))
    yield table


def _table(title: str, first: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        caption_style="dim",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    # what gives way to the others where a terminal is narrow
    table.add_column(first, overflow="fold", min_width=10)
    return table


def _add_test_columns(table: Table) -> None:
    for name in ("difference", "p", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)


def _row(numbers: Mapping[str, Any], arms: list[str]) -> list[str]:
    won = [percent(numbers["arms"][arm]["mean"]) if arm in numbers["arms"] else "" for arm in arms]
    return [*won, *_test_cells(numbers["tests"].get(_MAIN))]


def _test_cells(test: Mapping[str, Any] | None) -> list[str]:
    if test is None:
        return ["", "", "", ""]
    return [
        f"{points(test['difference'])} {interval(test['ci95'], signed=True)}",
        p_value(test["p_corrected"]),
        str(test["num_units"]),
        test["verdict"],
    ]
