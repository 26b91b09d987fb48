"""What one text has and another has not, word by word."""

import difflib
import re
from collections.abc import Iterator
from typing import Literal

_MAX_PIECES = 1500  # of both texts; comparing more takes seconds
_WORDS = re.compile(r"\s*\S+|\s+$")
_SENTENCES = re.compile(r".+?(?:[.!?]\s+|\n+|$)", re.DOTALL)

Piece = tuple[Literal["same", "new", "gone"], str]


def word_diff(before: str, after: str) -> Iterator[Piece]:
    """The second text in pieces, with what is gone of the first: "same" and "new" pieces joined
    are `after`. Long texts are compared by sentences, very long ones as a whole.
    """
    first, second = [before], [after]
    for pieces in (_WORDS, _SENTENCES):
        cut = pieces.findall(before), pieces.findall(after)
        if sum(map(len, cut)) <= _MAX_PIECES:
            first, second = cut
            break
    matcher = difflib.SequenceMatcher(
        a=[word.strip() for word in first], b=[word.strip() for word in second], autojunk=False
    )
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            yield "same", "".join(second[c:d])
            continue
        if a < b:
            yield "gone", "".join(first[a:b])
        if c < d:
            yield "new", "".join(second[c:d])
