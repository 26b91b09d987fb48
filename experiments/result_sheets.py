"""The results of an evaluation as sheets of text, the same wherever they are shown."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.evaluation_results import ARMS, SPLITS
from experiments.wording import interval, p_value, percent, points

Json = Mapping[str, Any]
NUMBERS = ("difference", "p", "n")  # columns of a test, before its verdict

_MAIN = "trained_vs_untrained"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A name and the cells behind it; of all families of a split together, which end its rows, or
    of a single one.
    """

    cells: tuple[str, ...]
    whole_split: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """A title, what the columns are called, the rows, and a sentence to stand below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


def sheets(results: Json, about: str, arm_cell: Callable[[Json], str]) -> Iterator[Sheet]:
    """What the main arms won in every family and split, the headline's first, and how trained and
    untrained differ; then how the other arms compare where the headline is made.

    Args:
      results: evaluation.json.
      about: what stands behind the titles, for example " of alfworld".
      arm_cell: what is said of an arm.
    """
    main = [arm for arm in ARMS if arm in _arms(results)]
    yield Sheet(
        title="Games won, %; trained - untrained",
        columns=("family", *main, *NUMBERS, "verdict"),
        rows=_rows(
            results,
            about,
            lambda numbers: (
                *_arm_cells(numbers, main, arm_cell),
                *_test_cells(numbers["tests"].get(_MAIN)),
            ),
        ),
        note=(
            "p: Holm-corrected for the families of a split, of the bold rows alone. n: trained"
            " seeds, else runs."
        ),
    )
    split, overall = next(iter(results["overall"].items()))
    if tests := {name: test for name, test in overall["tests"].items() if name != _MAIN}:
        yield Sheet(
            title=f"Other comparisons, {SPLITS[split]}{about}",
            columns=("arms", "won", *NUMBERS, "verdict"),
            rows=tuple(
                Row(
                    cells=(
                        name.replace("_vs_", " - "),
                        " - ".join(
                            percent(overall["arms"][arm]["mean"]) for arm in name.split("_vs_")
                        ),
                        *_test_cells(test),
                    )
                )
                for name, test in tests.items()
            ),
        )
    if rises := {arm: of["rise"] for arm, of in overall["arms"].items() if of.get("rise")}:
        yield Sheet(
            title=f"After the last meta-turn and after the first, {SPLITS[split]}{about}",
            columns=("arm", "won", "difference", "p"),
            rows=tuple(
                Row(
                    cells=(
                        arm,
                        " - ".join(
                            percent(overall["arms"][arm]["curve"][turn]) for turn in (-1, 1)
                        ),
                        f"{points(rise['difference'])} {interval(rise['ci95'], signed=True)}",
                        p_value(rise["p"]),
                    )
                )
                for arm, rise in rises.items()
            ),
            note="p: of each alone, over trained seeds, else runs.",
        )


def sheet_of_other_arms(
    results: Json, about: str, arm_cell: Callable[[Json], str]
) -> Iterator[Sheet]:
    """What the arms won that no main sheet has room for; nothing where there are none."""
    if others := [arm for arm in _arms(results) if arm not in ARMS]:
        yield Sheet(
            title=f"Games won by other arms, %{about}",
            columns=("family", *others),
            rows=_rows(results, about, lambda numbers: _arm_cells(numbers, others, arm_cell)),
        )


def _arms(results: Json) -> list[str]:
    return list(
        dict.fromkeys(arm for split in results["overall"].values() for arm in split["arms"])
    )


def _rows(results: Json, about: str, cells: Callable[[Json], tuple[str, ...]]) -> tuple[Row, ...]:
    rows: list[Row] = []
    for split, overall in results["overall"].items():
        rows += [
            Row(cells=(name, *cells(results["families"][name]))) for name in overall["families"]
        ]
        rows.append(Row(cells=(SPLITS[split] + about, *cells(overall)), whole_split=True))
    return tuple(rows)


def _arm_cells(
    numbers: Json, arms: Sequence[str], arm_cell: Callable[[Json], str]
) -> tuple[str, ...]:
    return tuple(arm_cell(numbers["arms"][arm]) if arm in numbers["arms"] else "" for arm in arms)


def _test_cells(test: Json | None) -> tuple[str, ...]:
    if test is None:
        return ("", "", "", "")
    return (
        f"{points(test['difference'])} {interval(test['ci95'], signed=True)}",
        p_value(test["p_corrected"]),
        str(test["num_units"]),
        test["verdict"],
    )


def mean(arm: Json) -> str:
    """42"""
    return percent(arm["mean"])


def mean_with_interval(arm: Json) -> str:
    """42 [35, 50]"""
    return f"{percent(arm['mean'])} {interval(arm['ci95'])}"
