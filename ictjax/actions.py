"""From the actor's text to an action: the ReAct format, `Thought:` then `Action:`."""

import re
from typing import NamedTuple

from ictjax.records import ParseFailure

# Markdown and list marks may stand before a marker and around its colon: "**Action:** go", "-
# Action : go", "2. Action: go".
_LEAD = r"[ \t>#*_\-`]*(?:\d+[.)]\s*)?[*_`]*"
_LINE_MARKER = re.compile(
    rf"^{_LEAD}(thought|action|observation)s?\s*(?:\d+)?\s*[*_`]*\s*:[*_`]*",
    re.IGNORECASE | re.MULTILINE,
)
_INLINE_MARKER = re.compile(r"\b(thought|action|observation)\s*[*_`]*\s*:[*_`]*", re.IGNORECASE)
_EDGES = "\"'`*“”‘’ \t"
_PAIRS = {"[": "]", "(": ")", "<": ">", "{": "}"}


class React(NamedTuple):
    """A parsed reply."""

    thought: str
    action: str


class _Part(NamedTuple):
    name: str
    body: str  # up to the next marker


def parse_react(text: str, *, truncated: bool = False) -> React | ParseFailure:
    """Reads `Thought:` and `Action:` out of a reply.

    The action is the first `Action:` after the last `Thought:` (the last `Action:` of all when none
    follows it), on one line; the line below counts when nothing stands on the marker's own. Case,
    markdown, numbering, quotes, wrapping brackets and closing punctuation are forgiven; markers
    inside a line count only in a reply that has no `Action:` at the start of a line. The action
    itself keeps its case.

    Args:
      text: the reply, without its stop token; a thinking block in front of it is not looked at.
      truncated: the reply was cut off by a limit: an action is then accepted only when something
        follows its line.
    Returns:
      The thought ("" when there is none) and the action, or NO_ACTION, EMPTY_ACTION, TRUNCATED.
    """
    text = after_thinking(text)
    parts = _split(text, _LINE_MARKER)
    if not any(part.name == "action" for part in parts):
        parts = _split(text, _INLINE_MARKER)
    actions = [i for i, part in enumerate(parts) if part.name == "action"]
    if not actions:
        return ParseFailure.TRUNCATED if truncated else ParseFailure.NO_ACTION
    thoughts = [i for i, part in enumerate(parts) if part.name == "thought"]
    chosen = next((i for i in actions if not thoughts or i > thoughts[-1]), actions[-1])
    body = parts[chosen].body.lstrip()
    line, line_break, _ = body.partition("\n")
    if truncated and not line_break and chosen == len(parts) - 1:
        return ParseFailure.TRUNCATED
    action = _clean(line)
    if not action:
        return ParseFailure.EMPTY_ACTION
    before = [i for i in thoughts if i < chosen]
    return React(
        thought=" ".join(parts[before[-1]].body.split()).strip("*_` ") if before else "",
        action=action,
    )


def after_thinking(text: str) -> str:
    """A reply without its <think> ... </think> block; nothing where the block was not closed."""
    _, closed, answer = text.rpartition("</think>")
    return answer if closed or not answer.lstrip().startswith("<think>") else ""


def _split(text: str, marker: re.Pattern[str]) -> list[_Part]:
    found = list(marker.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)] * bool(found)
    return [
        _Part(match.group(1).lower(), text[match.end() : end])
        for match, end in zip(found, ends, strict=True)
    ]


def _clean(line: str) -> str:
    """One action without its wrapping: quotes, markdown, brackets around the whole, closing
    punctuation.
    """
    previous = None
    while line != previous:
        previous = line
        line = line.strip(_EDGES).rstrip(".,;:!")
        if len(line) > 1 and _PAIRS.get(line[0]) == line[-1]:
            line = line[1:-1]
    return " ".join(line.split())
