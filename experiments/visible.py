"""Text of models, games and files as it can be shown: what has no look of its own, and what turns
the text around it over, stands there as a mark.
"""

import unicodedata

# joins letters of Persian and parts of emoji
_KEPT = frozenset("\n\t\u200c\u200d")
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # control, format, surrogate, line, paragraph


def visible(text: str) -> str:
    """The same text with a mark for every character that a terminal or a page would obey or hide:
    control characters (as their pictures, \\x1b as \u241b), bidirectional overrides, invisible
    ones, line separators and lone surrogates (as \u27e8U+202E\u27e9). Line feeds and tabs stay.
    """
    # nearly all texts, and looking at every character is slow
    if text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(map(_mark, text))


def _mark(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"
