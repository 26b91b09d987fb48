"""From the actor's text to an action: the ReAct format, `Thought:` then `Action:`."""

import re
from typing import NamedTuple

from ictjax.records import ParseFailure

# Every repetition is possessive (`*+`) and no two neighbours share a character: a reply is read in
# time that grows as its length, whatever it is made of.
#
# Markdown and list marks may stand before a marker and around its colon: "**Action:** go", "-
# Action : go", "2. Action: go".
_LEAD = r"[ \t\r\x0b\x0c\xa0\u3000>#*_\-`•+–→\ufeff\u200b]*+(?:\(?\d++[.)]\s*+)?[*_`]*+"
_NAME = r"(thought|action|observation)"
_COLON = r"\s*+[*_`]*+\s*+[:：][*_`]*+"
_NUMBERED_COLON = rf"\s*+(?:\d++)?{_COLON}"
_LINE_MARKER = re.compile(rf"^{_LEAD}{_NAME}s?{_NUMBERED_COLON}", re.IGNORECASE | re.MULTILINE)
# Without a colon: a line of its own ("## Action 2"), a word in bold, or a dash or an arrow behind
# it.
_HEADING = re.compile(
    rf"^{_LEAD}{_NAME}s?(?:{_NUMBERED_COLON}|[ \t]*+(?:\d++)?"
    r"(?:[^\S\n]*+[*_`#]*+[^\S\n]*+$|[*_`]++[^\S\n]++"
    r"|[^\S\n]*+[*_`]*+[^\S\n]*+[-–—=]++>?+[^\S\n]++))",
    re.IGNORECASE | re.MULTILINE,
)
_INLINE_MARKER = re.compile(rf"\b{_NAME}{_COLON}", re.IGNORECASE)
_ECHO = re.compile(rf"(?:{_LEAD}action{_COLON}[^\S\n]*+)++", re.IGNORECASE)  # "Action: Action: go"
_FENCES = re.compile(r"(?:\s*+(?:`{3,}+|~{3,}+)[\w+-]*+[^\S\n]*+\n)++\s*+")
_LIST_MARK = re.compile(r"(?:[-*•+–—>]|\d{1,3}[.)])\s+(?=\S)")
_EDGES = "\"'`*“”‘’ \t"
_CLOSING = ".,;:!。，；：！…"
_PAIRS = {"[": "]", "(": ")", "<": ">", "{": "}", "_": "_", "«": "»", "「": "」"}
_MAX_PAIRS = 100  # more brackets around one action are left alone
THINK, THOUGHT = "<think>", "</think>"
# The end of a thought, where it is set off from the text.
_SET_OFF = re.compile(
    rf"^[^\S\n]*+{THOUGHT}[^\S\n]*+$|{THOUGHT}[^\S\n]*+\n(?=[^\S\n]*+\n)", re.MULTILINE
)


class React(NamedTuple):
    """A parsed reply."""

    thought: str
    action: str


class _Part(NamedTuple):
    name: str
    body: str  # up to the next marker


def parse_react(text: str, *, truncated: bool = False) -> React | ParseFailure:
    """Reads `Thought:` and `Action:` out of a reply.

    The action is the first `Action:` that says something after the last `Thought:` (the last
    `Action:` of all when none follows it), on one line; the line below counts when nothing stands
    on the marker's own, and a code fence around it is not looked at. Case, markdown, numbering,
    list marks, quotes, wrapping brackets and closing punctuation are forgiven, and so is a heading
    without a colon where no line begins with `Action:`; markers inside a line count only in a reply
    that has neither. The action itself keeps its case.

    Args:
      text: the reply, without its stop token; a thinking block in front of it is not looked at.
      truncated: the reply was cut off by a limit: an action is then accepted only when something
        follows its line.
    Returns:
      The thought ("" when there is none) and the action, or NO_ACTION, EMPTY_ACTION, TRUNCATED,
      UNFINISHED_THOUGHT.
    """
    answer = after_thinking(text)
    if answer is None:
        return ParseFailure.UNFINISHED_THOUGHT
    parts = _parts(answer)
    actions = [i for i, part in enumerate(parts) if part.name == "action"]
    if not actions:
        return ParseFailure.TRUNCATED if truncated else ParseFailure.NO_ACTION
    thoughts = [i for i, part in enumerate(parts) if part.name == "thought"]
    last = [i for i in actions if not thoughts or i > thoughts[-1]] or actions[-1:]
    chosen = next((i for i in last if parts[i].body.strip()), last[0])
    body = parts[chosen].body
    fences = _FENCES.match(body)
    line, line_break, _ = body[fences.end() if fences else 0 :].lstrip().partition("\n")
    if fences and not _clean(line):  # the word behind the fence was no language
        line, line_break, _ = body.lstrip().partition("\n")
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


def after_thinking(text: str) -> str | None:
    """A reply without the thinking block in front of it; None where a thought was not finished.

    A block begins with `<think>`; where a chat template has written that, `ictjax.model_speaker`
    puts it before the reply. A reply that was begun for its model elsewhere shows the end alone:
    that counts where it is set off from the text. Within a line `</think>` is a word like others.
    """
    begun = text.lstrip()
    opened = begun.startswith(THINK)
    set_off = _SET_OFF.search(text)
    if set_off and text[set_off.end() :].strip():
        return text[set_off.end() :]
    if not opened:
        return text
    _, closed, answer = begun.partition(THOUGHT)
    return answer if closed else None


def _parts(text: str) -> list[_Part]:
    """The marked parts of a reply, by the strictest markers that name an action."""
    parts = _split(text, _LINE_MARKER)
    if any(part.name == "action" for part in parts):
        return parts
    headed = _split(text, _HEADING)
    if any(part.name == "action" and part.body.strip() for part in headed):
        return headed
    return _split(text, _INLINE_MARKER)


def _split(text: str, marker: re.Pattern[str]) -> list[_Part]:
    found = list(marker.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)] * bool(found)
    return [
        _Part(match.group(1).lower(), text[match.end() : end])
        for match, end in zip(found, ends, strict=True)
    ]


def _clean(line: str) -> str:
    """One action without its wrapping: a second marker, list marks, quotes, markdown, brackets
    around the whole, closing punctuation; and without what begins behind it on the same line.
    """
    if echo := _ECHO.match(line):
        line = line[echo.end() :]
    if (following := _INLINE_MARKER.search(line)) and line[: following.start()].strip(_EDGES):
        line = line[: following.start()]
    line = " ".join(line.split())
    if mark := _LIST_MARK.match(line):
        line = line[mark.end() :]
    for _ in range(_MAX_PAIRS):
        line = line.lstrip(_EDGES).rstrip(_EDGES + _CLOSING)
        if len(line) < 2 or _PAIRS.get(line[0]) != line[-1]:
            break
        line = line[1:-1]
    return " ".join(line.split())
