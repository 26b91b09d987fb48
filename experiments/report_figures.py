"""The figures of a report: matplotlib drawings as inline SVG, with the colours and fonts of the
page, in its light or dark look.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.html import Html, html
from experiments.visible import visible

# Drawn in stand-in colours that `_svg` turns into the page's CSS variables.
_VARIABLES = {
    "#0a0b0c": "var(--ink)",
    "#1a1b1c": "var(--muted)",
    "#2a2b2c": "var(--line)",
    "#3a3b3c": "var(--initial)",
    "#4a4b4c": "var(--untrained)",
    "#5a5b5c": "var(--trained)",
    "#6a6b6c": "var(--fresh)",
}
_INK, _MUTED, _LINE, INITIAL, UNTRAINED, TRAINED, FRESH = _VARIABLES
ARM_COLOURS = {"initial": INITIAL, "untrained": UNTRAINED, "trained": TRAINED}

_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "ictjax",  # ids depend on the drawing alone
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "text.parse_math": False,  # a dollar in a name is one
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

_LONGEST_NAME = 48  # characters; longer ones leave no room for the drawing

Series = Sequence[float | None]


def learning_curve(iterations: Sequence[int], replay: Series, fresh: Series) -> Html:
    """Mean reward of the candidates per iteration, on replayed and on fresh games: points as
    measured, lines smoothed.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 3.3), layout="constrained")
        axes = figure.subplots()
        for values, colour, label in (
            (replay, TRAINED, "replayed games"),
            (fresh, FRESH, "fresh games"),
        ):
            points = [(x, y) for x, y in zip(iterations, values, strict=True) if y is not None]
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, "o", ms=3.2, mew=0, color=colour, alpha=0.35)
                axes.plot(xs, smooth(ys), lw=2.4, color=colour, label=label, solid_capstyle="round")
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("mean reward")
        axes.margins(x=0.02)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", ncols=2)
        return _svg(figure, "Mean reward per iteration")


def small_multiples(iterations: Sequence[int], panels: Mapping[str, Series]) -> Html:
    """One small panel for each named series that holds a value; empty when none does."""
    shown = {
        title: values
        for title, values in panels.items()
        if any(value is not None for value in values)
    }
    if not shown:
        return Html("")
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context({**_STYLE, "font.size": 9}):
        figure = Figure(figsize=(9.2, 1.95 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, (title, values) in zip(grid.flat, shown.items(), strict=False):
            xs, ys = zip(
                *((x, y) for x, y in zip(iterations, values, strict=True) if y is not None),
                strict=True,
            )
            axes.plot(xs, ys, "o", ms=2.4, mew=0, color=_MUTED, alpha=0.4)
            axes.plot(xs, smooth(ys), lw=1.8, color=_INK)
            axes.set_title(_name(title))
            axes.margins(x=0.03, y=0.12)
            axes.locator_params(axis="y", nbins=4)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        return _svg(figure, ", ".join(shown))


def family_bars(splits: Mapping[str, Mapping[str, Mapping[str, Any]]], arms: Sequence[str]) -> Html:
    """Games won per family and arm with 95 % intervals, one panel a split.

    `splits` maps the title of a split to its families and these to their "arms" in evaluation.json.
    """
    step = len(arms) + 1.2  # rows per family: its bars and a gap
    rows = [max(1, len(families)) * step for families in splits.values()]
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": "x", "axes.spines.bottom": False}):
        figure = Figure(
            figsize=(9.2, 0.19 * sum(rows) + 0.5 * len(rows) + 0.35), layout="constrained"
        )
        panels = figure.subplots(len(splits), 1, sharex=True, squeeze=False, height_ratios=rows)[
            :, 0
        ]
        for axes, (title, families) in zip(panels, splits.items(), strict=True):
            for index, arm in enumerate(arms):
                cells = [
                    (n * step + index, measured[arm])
                    for n, measured in enumerate(families.values())
                    if arm in measured
                ]
                axes.barh(
                    [y for y, _ in cells],
                    [100 * cell["mean"] for _, cell in cells],
                    height=0.86,
                    color=ARM_COLOURS[arm],
                    zorder=2,
                )
                for y, cell in cells:
                    low, high = (100 * value for value in cell["ci95"])
                    axes.plot(
                        [low, high], [y, y], color=_INK, lw=1.3, zorder=3, solid_capstyle="butt"
                    )
                    axes.text(
                        high + 1.2,
                        y,
                        f"{100 * cell['mean']:.0f}",
                        va="center",
                        ha="left",
                        fontsize=8.5,
                        color=_MUTED,
                    )
            axes.set_title(_name(title))
            axes.set_yticks(
                [n * step + (len(arms) - 1) / 2 for n in range(len(families))],
                [_name(family) for family in families],
            )
            axes.tick_params(axis="y", labelcolor=_INK, pad=6)
            axes.set_ylim(len(families) * step - 1, -1)
        panels[-1].set_xlim(0, 107)
        panels[-1].set_xticks([0, 25, 50, 75, 100])
        panels[-1].set_xlabel("games won, %")
        return _svg(figure, "Games won per family and arm")


def smooth(values: Sequence[float], weight: float = 0.75) -> list[float]:
    """Exponential moving average without start-up bias: a constant stays itself."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return smoothed


def _name(text: str) -> str:
    """A name of a file's as it fits beside a drawing."""
    shown = visible(text)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}\u2026"


def _svg(figure: Figure, label: str) -> Html:
    """An <svg> element that scales with the page: no prolog, no fixed size, no metadata, colours by
    CSS variables.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():  # the page's font draws what the stand-in here has no glyph for
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg[^>]*?viewBox="([^"]+)"[^>]*>',
        lambda found: html('<svg viewBox="{}" role="img" aria-label="{}">', found[1], label).markup,
        text,
        count=1,
        flags=re.DOTALL,
    )
    text = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend'
        r'|PathCollection)_\d+"',
        "",
        text,
    )
    text = re.sub(r" font-family: [^;\"]+;", "", text)  # the page's font
    # would style the whole page
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, count=1, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return Html(text)
