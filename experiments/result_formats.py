"""The results of an evaluation for papers, pages and spreadsheets: CSV, LaTeX, Markdown."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from experiments.report_data import Evaluation
from experiments.result_sheets import Sheet, mean_with_interval, sheet_of_other_arms, sheets
from experiments.visible import visible

Json = Mapping[str, Any]

_COLUMNS = (
    "evaluation",
    "iteration",
    "protocol",
    "split",
    "family",  # empty: all of the split together
    "games",
    "runs",
    "arm",
    "minus",  # the arm that it is compared with; empty: what it won itself
    "value",  # share of games won, or the difference of two
    "ci95_low",
    "ci95_high",
    "p",
    "p_corrected",
    "num_tests",
    "units",
    "num_units",
    "verdict",
    "seeds",
    # of an arm and of a comparison
    "chosen",  # as "value", of the prompts that were chosen on SELECT
    "chosen_ci95_low",
    "chosen_ci95_high",
    # of a comparison
    "smallest_p",
    "detectable",
    "improvement",
    "reason",
    # of a comparison over all of a split
    "over_families_num_families",
    "over_families_p",
    "over_families_smallest_p",
    # of an arm
    "area",
    "sd_runs",
    "sd_seeds",
    "rise",
    "rise_ci95_low",
    "rise_ci95_high",
    "rise_p",
)
_OF_TEST = (
    *("p", "p_corrected", "num_tests", "units", "num_units", "verdict"),
    *("smallest_p", "detectable", "improvement", "reason"),
)
# of an arm on a family
_COUNTS = ("malformed_replies", "failed_episodes")
_KINDS = ("actor_failures", "budget")  # counts by kind
_SUCCESS = ("select", "training_replay", "training_fresh")  # of the analyses
# what spreadsheets take for a formula
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_OF_LATEX = MappingProxyType(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
        '"': "''",
    }
)
_OF_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>()#!|~&]")


def csv_text(evaluations: tuple[Evaluation, ...]) -> str:
    """A line for every arm and every comparison, in every family and split, with all that
    evaluation.json says of it. A text that a spreadsheet would take for a formula has an apostrophe
    before it.

    Counts by kind have a column for each kind that there is ("budget_actor_tokens"), the curve one
    for each meta-turn ("turn_0"). "select", "training_replay" and "training_fresh" are what the
    analyses say of success; the last two are of the family alone.
    """
    found = [line for evaluation in evaluations for line in _lines(evaluation)]
    names = dict.fromkeys((*_COLUMNS, *_COUNTS, *_SUCCESS))
    names |= dict.fromkeys(name for line in found for name in line)
    page = io.StringIO()
    lines = csv.DictWriter(page, [*map(_csv_cell, names)], restval="", lineterminator="\n")
    lines.writeheader()
    for line in found:
        lines.writerow({_csv_cell(name): _csv_cell(value) for name, value in line.items()})
    return page.getvalue()


def _lines(evaluation: Evaluation) -> Iterator[Json]:
    results = evaluation.results
    of_all = {
        "evaluation": evaluation.name,
        "iteration": evaluation.checkpoint,
        "protocol": results["protocol"].get("protocol", ""),
    }
    for split, overall in results["overall"].items():
        parts = {name: results["families"][name] for name in overall["families"]}
        for family, numbers in [*parts.items(), ("", overall)]:
            of_part = {
                **of_all,
                "split": split,
                "family": family,
                "games": numbers["games"],
                "runs": numbers["runs"],
                "seeds": overall.get("seeds"),
            }
            for arm, won in numbers["arms"].items():
                yield {
                    **of_part,
                    "arm": arm,
                    "value": won["mean"],
                    **_ends(won),
                    **_chosen(won, "mean"),
                    **{name: won.get(name) for name in ("area", "sd_runs", "sd_seeds")},
                    **_rise(won.get("rise")),
                    **_counts(numbers, arm),
                    **_success(results, family, arm),
                    **{f"turn_{turn}": rate for turn, rate in enumerate(won["curve"])},
                }
            for pair, test in numbers["tests"].items():
                arm, _, minus = pair.partition("_vs_")
                yield {
                    **of_part,
                    "arm": arm,
                    "minus": minus,
                    "value": test["difference"],
                    **_ends(test),
                    **_chosen(test, "difference"),
                    **{name: test.get(name) for name in _OF_TEST},
                    **{
                        f"over_families_{name}": value
                        for name, value in test.get("over_families", {}).items()
                    },
                }


def _rise(rise: Json | None) -> Json:
    if rise is None:
        return {}
    of_rise = {"rise": rise["difference"], "rise_p": rise["p"]}
    return of_rise | {f"rise_{name}": end for name, end in _ends(rise).items()}


def _ends(estimate: Json) -> Json:
    low, high = estimate["ci95"]
    return {"ci95_low": low, "ci95_high": high}


def _chosen(numbers: Json, name: str) -> Json:
    chosen = numbers.get("chosen")
    if not chosen:
        return {}
    return {
        "chosen": chosen[name],
        **{f"chosen_{end}": value for end, value in _ends(chosen).items()},
    }


def _counts(numbers: Json, arm: str) -> Json:
    """Of a family; splits have none."""
    return {
        **{name: numbers[name][arm] for name in _COUNTS if arm in numbers.get(name, {})},
        **{
            f"{name}_{kind}": count
            for name in _KINDS
            for kind, count in numbers.get(name, {}).get(arm, {}).items()
        },
    }


def _success(results: Json, family: str, arm: str) -> Json:
    found = results.get("analyses", {}).get("success", {}).get(family)
    if found is None:
        return {}
    training = found["training"] or {}
    return {
        "select": found["arms"].get(arm, {}).get("select"),
        **{f"training_{games}": training.get(games) for games in ("replay", "fresh")},
    }


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def markdown_text(evaluations: tuple[Evaluation, ...]) -> str:
    """Tables as GitHub and pandoc show them."""
    return "\n".join(
        "\n".join(_markdown_table(sheet)) + "\n"
        for evaluation in evaluations
        for sheet in _sheets(evaluation)
    )


def _markdown_table(sheet: Sheet) -> Iterator[str]:
    yield f"{_markdown(sheet.title)}\n"
    yield _markdown_row(map(_markdown, sheet.columns))
    yield _markdown_row("---" if _is_text(sheet, n) else "---:" for n in range(len(sheet.columns)))
    for row in sheet.rows:
        cells = (_markdown(row.cells[0]), *row.cells[1:])  # the others are numbers and verdicts
        yield _markdown_row(f"**{cell}**" if row.whole_split and cell else cell for cell in cells)
    if sheet.note:
        yield f"\n{_markdown(sheet.note)}"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    return _OF_MARKDOWN.sub(lambda found: f"\\{found[0]}", _in_line(text))


def latex_text(evaluations: tuple[Evaluation, ...]) -> str:
    """Tables for the package booktabs, whole splits in bold."""
    tables = [
        "\n".join(_latex_table(evaluation, sheet))
        for evaluation in evaluations
        for sheet in _sheets(evaluation)
    ]
    return "% needs \\usepackage{booktabs}\n" + "\n\n".join(tables) + "\n"


def _latex_table(evaluation: Evaluation, sheet: Sheet) -> Iterator[str]:
    protocol = evaluation.results["protocol"].get("protocol")
    about = [
        f"{sheet.title}.",
        "In brackets: 95 % intervals.",
        f"Iteration {evaluation.checkpoint}{f', protocol {protocol}' if protocol else ''}.",
        sheet.note,
    ]
    yield "\\begin{table}"
    yield "\\centering\\scriptsize\\setlength{\\tabcolsep}{2pt}"  # as wide as a column of article
    yield f"\\caption{{{_latex(' '.join(filter(None, about)))}}}"
    alignment = "".join("l" if _is_text(sheet, n) else "r" for n in range(len(sheet.columns)))
    yield f"\\begin{{tabular}}{{{alignment}}}"
    yield "\\toprule"
    yield _latex_row(sheet.columns, "{}")
    begins = True  # of a split
    for row in sheet.rows:
        if begins:
            yield "\\midrule"
        begins = row.whole_split
        yield _latex_row(row.cells, "\\textbf{{{}}}" if row.whole_split else "{}")
    yield "\\bottomrule"
    yield "\\end{tabular}"
    yield "\\end{table}"


def _latex_row(cells: tuple[str, ...], style: str) -> str:
    row = " & ".join(style.format(_latex(cell)) if cell else "" for cell in cells)
    # behind the end of the row before, these would belong to it
    return f"{'{}' if row.startswith(('[', '*')) else ''}{row} \\\\"


def _latex(text: str) -> str:
    escaped = "".join(_OF_LATEX.get(character, character) for character in _in_line(text))
    # signs as long as those of formulas; two hyphens would become one dash
    signed = re.sub(r"(?<![\w-])([+-])(?=\d)", r"$\1$", escaped)
    return re.sub("-(?=-)", "-{}", signed)


def _sheets(evaluation: Evaluation) -> Iterator[Sheet]:
    about = (evaluation.results, evaluation.about, mean_with_interval)
    yield from sheets(*about)
    yield from sheet_of_other_arms(*about)


def _is_text(sheet: Sheet, column: int) -> bool:
    return column == 0 or sheet.columns[column] == "verdict"


def _in_line(text: str) -> str:
    return " ".join(visible(text).split())


TEXTS: Mapping[str, Callable[[tuple[Evaluation, ...]], str]] = MappingProxyType(
    {"csv": csv_text, "latex": latex_text, "markdown": markdown_text}
)
