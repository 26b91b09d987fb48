"""Numbers as text, the same in terminal, report and evaluation.json."""

from collections.abc import Sequence


def counted(count: int, one: str, several: str = "") -> str:
    """1, "game" -> 1 game; 1204 -> 1,204 games. `several` is for what takes more than an "s"."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def percent(value: float) -> str:
    """0.417 -> 42"""
    return f"{100 * value:.0f}"


def points(value: float) -> str:
    """0.417 -> +42; -0.001 -> +0"""
    text = f"{100 * value:+.0f}"
    return "+0" if text == "-0" else text


def interval(ci: Sequence[float], *, signed: bool = False) -> str:
    """[0.3, 0.5] -> [30, 50]; signed: [+30, +50]"""
    return f"[{', '.join((points if signed else percent)(value) for value in ci)}]"


def share(value: float | None) -> str:
    """0.417 -> 42 %; nothing for what is not known"""
    return "" if value is None else f"{percent(value)} %"


def number(value: float | None, digits: int) -> str:
    """With so many digits behind the point; nothing for what is not known."""
    return "" if value is None else f"{value:,.{digits}f}"


def correlation(value: float | None) -> str:
    """0.417 -> +0.42; 0.9984 -> +0.998, as it is not 1"""
    if value is None:
        return ""
    shown = (f"{value:+.{digits}f}" for digits in (2, 3, 4))
    return next(
        (text for text in shown if abs(value) == 1 or abs(float(text)) < 1), f"{value:+.2f}"
    )


def p_value(p: float) -> str:
    """0.0123 -> 0.012; tiny values are bounded, not written out."""
    return "<1e-4" if p < 0.0001 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def p_is(p: float) -> str:
    """0.0123 -> p = 0.012"""
    return "p < 1e-4" if p < 0.0001 else f"p = {p_value(p)}"
