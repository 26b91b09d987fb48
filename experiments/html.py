"""HTML in which nothing can be forgotten to be escaped: whatever is not `Html` is text."""

import json
import string
from collections.abc import Iterable
from html import escape
from typing import Any, LiteralString

from experiments.visible import visible


class Html:
    """A piece of a page. Only literal templates and what was drawn here are made into one."""

    def __init__(self, markup: str):
        self.markup = markup

    def __bool__(self) -> bool:
        return bool(self.markup)


def html(template: LiteralString, *values: object) -> Html:
    """The template with a value for every {}, each as text unless it is Html itself; {:.0f} and the
    like are for numbers.
    """
    return Html(_Template().format(template, *values))


def joined(parts: Iterable[Html], between: LiteralString = "") -> Html:
    """The parts that are not empty, one after the other."""
    return Html(between.join(part.markup for part in parts if part))


def data(name: str, value: Any) -> Html:
    """A value as JSON that scripts of the page read by its id; no text in it can end the element.

    Texts are taken as they are: make what hides in them `visible` before.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return html('<script type="application/json" id="{}">{}</script>', name, Html(text))


class _Template(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, Html):
            return value.markup
        return escape(visible(format(value, format_spec)))
