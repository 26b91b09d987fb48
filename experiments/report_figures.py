"""The figures of a report as inline SVG: small charts that take the page's font and its colours,
light or dark, and stand side by side as the page has room.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from experiments.arms import ARMS, ENDPOINT
from experiments.html import Html, html, joined

_WIDTH, _HEIGHT = 330.0, 190.0  # of a chart, with its labels
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 24.0, 10.0, 36.0
_LONGEST_NAME = 48  # characters of a title
BOX_WIDTH = 4.0
PLOT_WIDTH = _WIDTH - _LEFT - _RIGHT  # between the ends of x

Point = tuple[float, float]
Style = Literal["solid", "dashed", "dashdot", "dotted"]
Look = tuple[str, Style]  # a CSS variable of the page, and how a line is drawn

_STYLES: tuple[Style, ...] = ("dashed", "dashdot", "dotted", "solid")
_MAIN: dict[str, Look] = {
    "trained": ("--trained", "solid"),
    "untrained": ("--untrained", "dashed"),
    "initial": ("--initial", "dotted"),
}
_COLOURS = ("--fresh", "--other-1", "--other-2", "--other-3", "--other-4")
# what other arms take in turn: colours of their own first, and neighbours differ in both
_FREE: tuple[Look, ...] = (
    *((_COLOURS[n % 5], _STYLES[n % 3]) for n in range(15)),
    *((colour, "solid") for colour in _COLOURS),
    *(
        look
        for look in itertools.product([colour for colour, _ in _MAIN.values()], _STYLES)
        if look not in _MAIN.values()
    ),
)
_OTHERS = [arm for ending in ("", ENDPOINT) for name in ARMS if (arm := name + ending) not in _MAIN]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart, with what may stand around it."""

    name: str
    colour: str  # a CSS variable
    points: Sequence[Point]
    dots: Sequence[Point] = ()  # single measurements
    band: Sequence[tuple[float, float, float]] = ()  # x, low, high
    bars: Sequence[tuple[float, float, float]] = ()  # the same, as intervals
    boxes: Sequence[tuple[float, float, float]] = ()  # the same, as broad faint bars on the left
    style: Style = "solid"


def arm_lines(arms: Sequence[str]) -> list[tuple[str, str, Style]]:
    """How the lines of arms are drawn, in this order: those that lie on others have gaps."""
    first = [arm for arm in _MAIN if arm in arms]
    return [(arm, *arm_look(arm)) for arm in (*first, *(arm for arm in arms if arm not in first))]


def arm_look(arm: str) -> Look:
    """How an arm is drawn, the same wherever it stands; no two arms that can be played alike."""
    if arm in _MAIN:
        return _MAIN[arm]
    number = _OTHERS.index(arm) if arm in _OTHERS else zlib.crc32(arm.encode(errors="replace"))
    return _FREE[number % len(_FREE)]


def arm_colour(arm: str) -> str:
    """The CSS variable of an arm."""
    return arm_look(arm)[0]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    x_ends: Point | None = None,
    y_ends: Point | None = None,
    percent: bool = False,
) -> Html:
    """A chart under its title; empty without a point.

    Args:
      title: of the chart.
      lines: those without any point are left out.
      x_label: what x counts; whole numbers.
      x_ends: the range of x; by default that of the data.
      y_ends: the range of y; by default that of the data.
      percent: whether y holds shares that are labelled in per cent.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Html("")
    every = [point for line in lines for point in _reached(line)]
    axes = _Axes.around(every, x_ends, y_ends)
    drawn = joined(_line(axes, line, number) for number, line in enumerate(lines))
    return _figure(title, [axes.drawing(x_label, percent=percent), drawn], _said(lines))


def histogram(title: str, edges: Sequence[float], counts: Sequence[int], *, x_label: str) -> Html:
    """How often values lie between one edge and the next; empty without any.

    Args:
      title: of the chart.
      edges: ascending, one more than `counts`.
      counts: of values between two edges.
      x_label: what the values are.
    """
    if not sum(counts):
        return Html("")
    axes = _Axes(x_ends=(edges[0], edges[-1]), y_ends=(0.0, float(max(counts))), whole=False)
    bins = list(zip(itertools.pairwise(edges), counts, strict=True))
    bars = joined(
        html(
            '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="bar">'
            "<title>{:.2f} to {:.2f}: {}</title></rect>",
            axes.x(low) + 1,
            axes.y(count),
            max(axes.x(high) - axes.x(low) - 2, 0.5),
            axes.y(0) - axes.y(count),
            low,
            high,
            count,
        )
        for (low, high), count in bins
    )
    low, high = edges[counts.index(max(counts)) :][:2]
    said = f"{sum(counts)} values, most often from {low:.2f} to {high:.2f}"
    return _figure(title, [axes.drawing(x_label, percent=False), bars], said)


def common_ends(charts: Iterable[Sequence[Line]]) -> Point | None:
    """The range of y for charts that are to be compared: what holds the lines of all; None where
    there is no point.
    """
    every = [point for lines in charts for line in lines for point in _reached(line)]
    return _Axes.around(every, None, None).y_ends if every else None


def _reached(line: Line) -> Iterator[Point]:
    yield from line.points
    yield from line.dots
    for x, *ends in (*line.band, *line.bars, *line.boxes):
        for y in ends:
            yield x, y


def smooth(values: Sequence[float], weight: float = 0.75) -> list[float]:
    """Exponential moving average without start-up bias: a constant stays itself."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return smoothed


def legend(lines: Sequence[tuple[str, str, Style]]) -> Html:
    """Names with the colours and styles of their lines."""
    return html(
        '<p class="legend">{}</p>',
        joined(
            html(
                '<span><span class="key {}" style="--c:var({})"></span>{}</span>',
                style,
                colour,
                name,
            )
            for name, colour, style in lines
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Axes:
    """Where numbers lie in a chart."""

    x_ends: Point
    y_ends: Point
    whole: bool = True  # whether x counts

    @classmethod
    def around(cls, points: Sequence[Point], x_ends: Point | None, y_ends: Point | None) -> "_Axes":
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = y_ends or (min(ys), max(ys))
        flat = high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-200)
        room = 0.0 if y_ends else abs(high) or 1.0 if flat else 0.06 * (high - low)
        at_zero = low >= 0 and not y_ends  # counts do not begin below zero
        x_low, x_high = x_ends or (min(xs), max(xs))
        return cls(
            x_ends=(x_low, x_high if x_high > x_low else x_low + 1),
            y_ends=(max(0.0, low - room) if at_zero else low - room, high + room),
        )

    def x(self, value: float) -> float:
        low, high = self.x_ends
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ends
        share = (min(max(value, low), high) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def drawing(self, x_label: str, *, percent: bool) -> Html:
        right = _WIDTH - _RIGHT
        rows = joined(
            html(
                '<path class="grid" d="M{:.1f} {:.1f}H{:.1f}"/>'
                '<text x="{:.1f}" y="{:.1f}" class="end">{}</text>',
                _LEFT,
                self.y(tick),
                right,
                _LEFT - 6,
                self.y(tick) + 4,
                f"{100 * tick:.0f}" if percent else f"{tick:.4g}",
            )
            for tick in _ticks(*self.y_ends, 4)
        )
        columns = joined(
            html(
                '<text x="{:.1f}" y="{:.1f}" class="mid">{:g}</text>',
                self.x(tick),
                _HEIGHT - _BOTTOM + 15,
                tick,
            )
            for tick in _ticks(*self.x_ends, 5)
            if not self.whole or tick == int(tick)
        )
        return html(
            '{}{}<text x="{:.1f}" y="{:.1f}" class="mid">{}</text>',
            rows,
            columns,
            (_LEFT + right) / 2,
            _HEIGHT - 5,
            x_label,
        )


def _line(axes: _Axes, line: Line, number: int) -> Html:
    beside = 4.0 + 3.0 * number  # intervals stand beside each other
    before = BOX_WIDTH * (number + 1)
    place = [(axes.x(x), axes.y(y)) for x, y in line.points]
    over = [(axes.x(x), axes.y(high)) for x, _, high in line.band]
    under = [(axes.x(x), axes.y(low)) for x, low, _ in reversed(line.band)]
    return html(
        '<g style="--c:var({})">{}{}{}{}<path class="line {}" d="{}"/>{}</g>',
        line.colour,
        html('<path class="band" d="{}Z"/>', _path([*over, *under])) if over else Html(""),
        joined(
            html('<circle class="dot" r="1.8" cx="{:.1f}" cy="{:.1f}"/>', axes.x(x), axes.y(y))
            for x, y in line.dots
        ),
        joined(
            html(
                '<path class="ci" d="M{:.1f} {:.1f}V{:.1f}"/>',
                axes.x(x) + beside,
                axes.y(low),
                axes.y(high),
            )
            for x, low, high in line.bars
        ),
        joined(
            html(
                '<path class="box" d="M{:.1f} {:.1f}V{:.1f}"/>',
                axes.x(x) - before,
                axes.y(low) + 1,  # those without a height are seen as well
                axes.y(high) - 1,
            )
            for x, low, high in line.boxes
        ),
        line.style,
        _path(place),
        # a line of one point has no length
        html('<circle r="3" cx="{:.1f}" cy="{:.1f}"/>', *place[0]) if len(place) == 1 else Html(""),
    )


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _said(lines: Sequence[Line]) -> str:
    """The ends of every line, for those who do not see it."""
    return "; ".join(
        f"{line.name}: from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines
    )


def _figure(title: str, parts: Sequence[Html], said: str) -> Html:
    name = title if len(title) <= _LONGEST_NAME else f"{title[: _LONGEST_NAME - 1]}\u2026"
    return html(
        '<figure class="chart"><figcaption>{}</figcaption>'
        '<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg></figure>',
        name,
        _WIDTH,
        _HEIGHT,
        f"{name}. {said}"[:2000],
        joined(parts),
    )


def _ticks(low: float, high: float, most: int) -> Iterator[float]:
    """At most so many round numbers between two, 1, 2 or 5 times a power of ten apart."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * n for n in (1, 2, 5, 10, 20) if span / (power * n) <= most)
    first = math.ceil(low / step - 1e-9)
    while first * step <= high + 1e-9 * span:
        yield round(first * step, 12) + 0.0
        first += 1
