"""What a number of a configuration may be: every numeric field of a record states its range in its
annotation, and one function checks them all.
"""

import dataclasses
import functools
import types
import typing
from typing import Any, ClassVar, Literal, NamedTuple

_LONGEST = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Range:
    """Metadata of a numeric field, `Annotated[int, Range(1, 64)]`: its least and its largest value,
    of a tuple those of every item. NaN lies in no range.
    """

    low: float
    high: float
    _: dataclasses.KW_ONLY
    also: float | None = None  # one more value, outside

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and (
            self.low <= value <= self.high or value == self.also
        )

    def __str__(self) -> str:
        between = f"from {_number(self.low)} to {_number(self.high)}"
        return between if self.also is None else f"{_number(self.also)}, or {between}"


class Field(NamedTuple):
    """What a field of a record may hold, where that is numbers or one of several words."""

    name: str
    kind: type[int] | type[float] | None  # None: a word
    allowed: Range | tuple[object, ...]
    many: bool  # a tuple of them
    optional: bool  # or None

    def holds(self, value: object) -> bool:
        """Whether the field may have this value."""
        if value is None:
            return self.optional
        if self.many:
            return isinstance(value, tuple) and all(self._fits(item) for item in value)
        return self._fits(value)

    def _fits(self, value: object) -> bool:
        if self.kind is None:
            return value in self.allowed
        kinds = int if self.kind is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and value in self.allowed

    @property
    def expected(self) -> str:
        """What it must be, in words."""
        if not isinstance(self.allowed, Range):
            return f"one of {', '.join(map(str, self.allowed))}"
        one, many = ("a whole number", "whole numbers") if self.kind is int else ("", "numbers")
        words = f"{many if self.many else one} {self.allowed}".strip()
        return f"{words}, or None" if self.optional else words


class Fault(NamedTuple):
    """A value that its field may not have."""

    name: str  # of the field
    expected: str
    shown: str  # the value, in few characters

    def __str__(self) -> str:
        return f"{self.name} must be {self.expected}, got {self.shown}"


class Ranged:
    """Base of records that check their values when they are built."""

    place: ClassVar[str] = ""  # what messages put before the names of fields, "meta." for example

    def __post_init__(self) -> None:
        """Raises ValueError for the first value that its field may not have."""
        if found := fault(self):
            raise ValueError(f"{self.place}{found}.")


def fault(record: Any) -> Fault | None:
    """The first value of a record that its field may not have."""
    for field in ranged_fields(type(record)):
        value = getattr(record, field.name)
        if not field.holds(value):
            return Fault(field.name, field.expected, shown(value))
    return None


def shown(value: object) -> str:
    """A value as a message can show it."""
    if isinstance(value, int) and value.bit_length() > 128:  # str() refuses those of 4,300 digits
        return "a number of more than 38 digits"
    if isinstance(value, tuple):
        text = ", ".join(map(shown, value[:_LONGEST])) or "none"
    else:
        text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


@functools.cache
def ranged_fields(kind: type) -> tuple[Field, ...]:
    """The fields of a record that hold numbers, or one of several words. Raises TypeError for one
    that holds numbers and states no range.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    found = (_field(field.name, hints[field.name]) for field in dataclasses.fields(kind))
    return tuple(field for field in found if field is not None)


def _field(name: str, hint: Any) -> Field | None:
    about = getattr(hint, "__metadata__", ())
    ranges = [item for item in about if isinstance(item, Range)]
    hint = typing.get_args(hint)[0] if about else hint
    parts, optional = [hint], False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = len(parts) < len(typing.get_args(hint))
    if typing.get_origin(parts[0]) is Literal:
        return Field(name, None, typing.get_args(parts[0]), False, optional)
    many = typing.get_origin(parts[0]) is tuple
    kind = typing.get_args(parts[0])[0] if many else parts[0]
    if kind not in (int, float):
        return None
    if not ranges:
        raise TypeError(f"the field {name} states no range: annotate it with ictjax.ranges.Range")
    return Field(name, kind, ranges[0], many, optional)


def _number(value: float) -> str:
    return f"{value:,.12g}" if value == 0 or 1e-3 <= abs(value) < 1e12 else f"{value:g}"
