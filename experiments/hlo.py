"""What a compiled program sends between devices, counted from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALL = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64)\[([\d,]*)\]")
_BYTES = {"pred": 1, "bf16": 2, "c64": 8}


class Traffic(NamedTuple):
    """Bytes that one device sends in one run of a program."""

    sent: int
    loops_once: (
        int  # loops with traffic whose number of rounds the text does not tell: counted once
    )


def traffic(text: str) -> Traffic:
    """Counts the collectives of an optimized program, those in a loop as often as it turns.

    A ring sends, of an all-gather, what the others hold; of an all-reduce twice the part of the
    others; of the rest once.
    """
    lines = dict(_computations(text))
    sums: dict[str, Traffic] = {}

    def total(name: str) -> Traffic:
        if name not in sums:
            sums[name] = Traffic(0, 0)  # a cycle cannot be
            sent = unknown = 0
            for line in lines.get(name, ()):
                sent += _sent(line)
                rounds, once = 1, 0
                if " while(" in line:
                    condition = re.search(r"condition=%?([\w.\-]+)", line)
                    bound = None if condition is None else _bound(lines, condition[1])
                    rounds, once = (1, 1) if bound is None else (bound, 0)
                for called in _called(line):
                    inner = total(called)
                    sent += rounds * inner.sent
                    unknown += inner.loops_once + (once if inner.sent else 0)
            sums[name] = Traffic(sent, unknown)
        return sums[name]

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return Traffic(0, 0) if entry is None else total(entry[1])


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, body = "", []
    for line in text.splitlines():
        if (head := _HEAD.match(line)) is not None:
            name, body = head[1], []
        elif line.startswith("}"):
            yield name, body
        elif name:
            body.append(line)


def _called(line: str) -> Iterator[str]:
    for found in _CALL.finditer(line):
        if found[1]:
            yield found[1]
        else:
            yield from (part.strip().lstrip("%") for part in found[2].split(","))


def _bound(lines: dict[str, list[str]], condition: str) -> int | None:
    """What the counter of a loop is compared with, where that is one constant."""
    constants = set()
    for line in lines.get(condition, ()):
        constants |= {int(x) for x in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", line)}
        for called in _called(line):
            for inner in lines.get(called, ()):
                constants |= {int(x) for x in re.findall(r"s32\[\][^ ]* constant\((\d+)\)", inner)}
    return constants.pop() if len(constants) == 1 else None


def _sent(line: str) -> int:
    found = re.search(r"= (.*?) ([\w\-]+)\(", line)
    if found is None:
        return 0
    kind = found[2].removesuffix("-start")
    if kind not in _KINDS or found[2].endswith("-done"):
        return 0
    sizes = [_size(dtype, shape) for dtype, shape in _SHAPE.findall(found[1])]
    whole = max(sizes, default=0)  # of a start: operand and result, of which the result counts
    if kind in ("all-reduce", "reduce-scatter", "all-to-all") and not found[2].endswith("-start"):
        whole = sum(sizes)
    group = _group(line)
    share = (group - 1) / group
    if kind == "collective-permute":
        return whole
    if kind == "reduce-scatter":
        return int(whole * (group - 1))
    return int(whole * share * (2 if kind == "all-reduce" else 1))


def _size(dtype: str, shape: str) -> int:
    bits = re.search(r"\d+", dtype)
    width = _BYTES.get(dtype) or (int(bits[0]) // 8 if bits else 1)
    return math.prod(int(size) for size in shape.split(",") if size) * max(width, 1)


def _group(line: str) -> int:
    """Devices that take part together."""
    if (found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line)) is not None:
        return int(found[2])
    if (found := re.search(r"replica_groups=\{\{([\d,]*)\}", line)) is not None:
        return len(found[1].split(","))
    # axes of a mesh, or parts of them: mesh['a'=4,'b'=8] {'a','b':(1)2} are groups of 8
    if (found := re.search(r"replica_groups=mesh\[(.*?)\] \{([^}]*)\}", line)) is not None:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 2
