"""The page of a sweep: what every variant won, beside the first, and how its rewards went."""

import math
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.html import Html, html, joined
from experiments.report_figures import Line, common_ends, legend, line_chart
from experiments.report_parts import Section, cell, row, section, table, verdict_badge
from experiments.sweep_file import Sweep
from experiments.sweep_results import HEAD, Compared, Result, cells, note, title
from experiments.wording import counted, interval, points

_CSS = Path(__file__).with_name("report.css")
_KEY = (("the variant", "--trained", "solid"), ("the first variant", "--initial", "dashed"))


def render(sweep: Sweep, found: Compared, name: str) -> str:
    """The whole page, which fetches nothing from anywhere.

    Args:
      sweep: what was asked for.
      found: what it came to.
      name: of the folder.
    """
    sections = list(_sections(sweep, found))
    return html(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        " style-src 'unsafe-inline'\">\n"
        "<title>{} - ictjax sweep</title>\n<style>\n{}</style>\n</head>\n<body>\n"
        '<header><p class="kicker">ictjax sweep <b>{}</b> &nbsp;\u00b7&nbsp; {} &nbsp;\u00b7&nbsp;'
        ' {}</p><h1>{}</h1></header>\n<main id="main">\n{}\n</main>\n'
        "<footer>Made by <code>ictjax sweep</code> from the runs in its folder.</footer>\n"
        "</body>\n</html>\n",
        name,
        Html(_CSS.read_text(encoding="utf-8")),
        name,
        counted(len(found.results), "variant"),
        counted(len(sweep.seeds), "trained seed") + " each",
        title(sweep, found),
        joined((one.body for one in sections), "\n"),
    ).markup


def _sections(sweep: Sweep, found: Compared) -> Iterator[Section]:
    first, *others = found.results
    if others:
        yield section(
            "differences",
            f"Beside {first.name}",
            html(
                "Games won by the trained reflectors of each variant less those of {}, in points,"
                " with the 95 % interval; both played the same TEST games.",
                first.name,
            ),
            _lanes(others),
        )
    yield section(
        "table",
        "All numbers",
        html("Compared on {}; {}", ", ".join(found.families), note(sweep, found)),
        table(
            title(sweep, found),
            [
                *(name.format(first=first.name) for name in HEAD),
                "by seed",
                Html('<span class="start">flags</span>'),
            ],
            map(_row, found.results),
        ),
    )
    charts = [_lines(result, first) for result in found.results]
    ends = common_ends(charts)
    yield section(
        "rewards",
        "Rewards in training",
        html(
            "Mean over the seeds; bands: the lowest and the highest seed. What a reward counts is"
            " the variant's own where its flags change that."
        ),
        legend(_KEY),
        html(
            '<div class="charts">{}</div>',
            joined(
                line_chart(result.name, lines, x_label="iteration", y_ends=ends)
                for result, lines in zip(found.results, charts, strict=True)
            ),
        ),
    )


def _lanes(results: Sequence[Result]) -> Html:
    """Every difference as a dot on its interval, 0 in the middle."""
    known = [(result.name, found) for result in results if (found := result.difference)]
    most = max(abs(end) for _, found in known for end in found.ci95)
    limit = math.ceil(10 * most) / 10 or 0.1  # a whole number of ten points

    def place(value: float) -> float:
        return 50 + 50 * value / limit

    return html(
        '<div class="bars">{}</div><p class="muted">From {} to {} points, 0 in the middle.</p>',
        joined(
            html(
                '<div class="lane" style="--c:var(--trained)"><span>{}</span>'
                '<span class="track"><i style="left:{:.1f}%;width:{:.1f}%"></i>'
                '<b style="left:{:.1f}%"></b></span><span class="number">{}'
                ' <span class="ci">{}</span></span></div>',
                name,
                place(found.ci95[0]),
                place(found.ci95[1]) - place(found.ci95[0]),
                place(found.value),
                points(found.value),
                interval(found.ci95, signed=True),
            )
            for name, found in known
        ),
        points(-limit),
        points(limit),
    )


def _row(result: Result) -> Html:
    name, *values, verdict = cells(result)
    by_seed = ", ".join(f"{100 * won:.0f}" for won in result.by_seed)
    return row(
        name,
        *map(cell, values),
        cell(verdict_badge(verdict) if verdict else ""),
        cell(by_seed),
        html('<td class="flags">{}</td>', joined(map(_flag, _by_flag(result.flags)), "<br>")),
    )


def _by_flag(words: Sequence[str]) -> Iterator[str]:
    """Each flag with its values."""
    values: list[str] = []
    for word in words:
        if word.startswith("--") and values:
            yield shlex.join(values)
            values = []
        values.append(word)
    if values:
        yield shlex.join(values)


def _flag(text: str) -> Html:
    return html("<code>{}</code>", text)


def _lines(result: Result, first: Result) -> list[Line]:
    lines = [
        Line(
            name=result.name,
            colour="--trained",
            points=[(reward.iteration, reward.mean) for reward in result.rewards],
            band=[(reward.iteration, reward.low, reward.high) for reward in result.rewards],
        )
    ]
    if result is not first:
        lines.append(
            Line(
                name=first.name,
                colour="--initial",
                points=[(reward.iteration, reward.mean) for reward in first.rewards],
                style="dashed",
            )
        )
    return lines
