"""Pieces that the sections of a report share: sections themselves, tables, badges, arms."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import LiteralString

from experiments.html import Html, html, joined
from experiments.report_data import Evaluation, Json
from experiments.report_figures import arm_colour
from experiments.wording import counted, interval, p_value, percent, points

ARM_TEXTS = {
    "initial": "initial prompt",
    "untrained": "untrained reflector",
    "trained": "trained reflector",
}
_LONGEST_TEXT = 20_000  # characters of one text on the page; files hold the rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page that the table of contents leads to."""

    anchor: str
    title: str
    body: Html


def section(anchor: str, title: str, lead: Html, *parts: Html) -> Section:
    """A section under its heading; the lead says what is seen."""
    body = html(
        '<section id="{}" aria-labelledby="{}-title"><h2 id="{}-title">{}</h2>'
        '<div class="lead">{}</div>{}</section>',
        anchor,
        anchor,
        anchor,
        title,
        lead,
        joined(parts, "\n"),
    )
    return Section(anchor=anchor, title=title, body=body)


def table(caption: str, head: Sequence[Html | str], rows: Iterable[Html]) -> Html:
    """A table that scrolls by itself where it is too wide; `rows` are <tr>, the first cell of each
    a heading.
    """
    return html(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table>'
        "<caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>",
        caption,
        caption,
        joined(html('<th scope="col">{}</th>', cell) for cell in head),
        joined(rows),
    )


def row(name: Html | str, *cells: Html, kind: str = "") -> Html:
    """A row of a table: its heading, then cells with their <td>; "pooled" sets it off."""
    return html('<tr class="{}"><th scope="row">{}</th>{}</tr>', kind, name, joined(cells))


def cell(value: object) -> Html:
    """A value in its <td>."""
    return html("<td>{}</td>", value)


def details(summary: Html | str, body: Html, *, opened: bool = False) -> Html:
    """What is shown on demand."""
    return html(
        "<details{}><summary>{}</summary>{}</details>",
        Html(" open") if opened else "",
        summary,
        body,
    )


def arm_mark(arm: str) -> Html:
    """The coloured dot of an arm and its name."""
    return html('<span class="key" style="--c:var({})"></span>{}', arm_colour(arm), arm)


def badge(text: str, tone: LiteralString = "") -> Html:
    """A word in a pill; `tone` is "good", "bad" or nothing."""
    return html('<span class="badge {}">{}</span>', tone, text)


def verdict_badge(verdict: str) -> Html:
    """The word of a verdict."""
    sign = {"better": "\u25b2 ", "worse": "\u25bc "}.get(verdict, "")
    return badge(sign + verdict, "good" if verdict == "better" else "bad" if sign else "")


def badges(counts: Mapping[str, float], of: Mapping[str, float] | None = None) -> Html:
    """Counts of what went wrong, zeros included, so that silence is a statement; of how many, where
    `of` knows that.
    """
    shown = joined(
        (
            html(
                '<span class="badge">{}: <b>{:,.0f}</b>{}</span>',
                text,
                value,
                f" of {of[text]:,.0f}" if of and of.get(text) else "",
            )
            for text, value in counts.items()
        ),
        " ",
    )
    return html('<p class="badges">{}</p>', shown) if shown else shown


def estimate(mean: float, ends: Sequence[float]) -> Html:
    """A share in per cent with its interval."""
    return html('{} <span class="ci">{}</span>', percent(mean), interval(ends))


def comparison_cells(test: Json | None) -> list[Html]:
    """Difference, verdict, p and n of a comparison."""
    if test is None:
        return [Html("<td></td>")] * 4
    return [
        html(
            '<td>{} <span class="ci">{}</span></td>',
            points(test["difference"]),
            interval(test["ci95"], signed=True),
        ),
        cell(verdict_badge(test["verdict"])),
        cell(p_value(test["p_corrected"])),
        cell(test["num_units"]),
    ]


def on(evaluation: Evaluation) -> str:
    """The end of a heading: which task, when it is not the one trained on."""
    return f", on {evaluation.label}" if evaluation.label else ""


def split_badge(evaluation: Evaluation, family: str) -> Html:
    """Says so where a family is held out."""
    held = evaluation.families.get(family, {}).get("split") == "heldout"
    return badge("held out") if held else Html("")


def clipped(text: str) -> str:
    """A text as long as a page can hold it, and how much is left out."""
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:_LONGEST_TEXT]}\u2026 ({counted(len(text) - _LONGEST_TEXT, 'more character')})"
