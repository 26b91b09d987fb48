"""Jinja for templates of strangers: whatever a template builds is counted before it is built.

Memory is not measured but spent: each rendering has a number of bytes, every value that a template
makes takes its size of them, for good, and what could make a large value (an operator, a filter, a
call, an output) is first asked how large it can become. Values that hold others are weighed as if
each occurrence were written out, so that lists which hold one list twice, sixty times over, are
found before they are printed, compared or hashed.
"""

import functools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinMethodType, MappingProxyType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.runtime import Context, LoopContext, markup_join, str_join
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.utils import Namespace
from markupsafe import Markup, escape

_EACH_TICKS = 16  # the clock is read
_TICK_BYTES = 8  # one turn of a loop may leave a reference behind
_WRITTEN_BYTES = 64  # and what it writes a character and a reference
_HELD_BYTES = 200  # to remember the weight of one value
_GROWTH = 12  # a character as JSON or as part of an address is at most so many bytes per byte
_CHARACTER_BYTES = 256  # of a list of characters, grouped
_WHOLE_BYTES = 2**14  # of a whole number: arithmetic with longer ones takes long
_DEPTH = 100  # of values in values
_SHARE = 8  # values in values take no more than this part of the bytes
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_HOLDERS = (list, tuple, dict, set, frozenset, *_VIEWS)
_PLAIN = (str, bytes, int, float, bool, type(None), *_HOLDERS)

# Filters by what they make: nothing new, a list, text that its arguments stretch, or text whose
# making takes as long as it is long, squared. All others make text no longer than _GROWTH times.
_PICKING = frozenset(
    "attr count d default first items last length map max min reject rejectattr select selectattr"
    " unique".split()
)
_LISTING = frozenset("batch dictsort groupby list slice sort wordcount".split())
_STRETCHING = frozenset("batch center indent round slice tojson".split())
_SLOW = frozenset("pprint striptags urlize wordwrap xmlattr".split())
_PARTICULAR = _LISTING | _STRETCHING | _SLOW | {"format", "join", "replace", "sum"}
_STRETCHING_METHODS = frozenset(
    "center expandtabs from_bytes hex ljust rjust to_bytes translate zfill".split()
)
_SPLITTING_METHODS = frozenset("fromkeys maketrans rsplit split splitlines".split())


class Exceeded(Exception):
    """A bound was exceeded; says which."""


class Bounds:
    """The processor time and the memory of one rendering.

    Args:
      cpu_s: of this thread.
      num_bytes: that values may take, all together.
    """

    def __init__(self, cpu_s: float, num_bytes: int) -> None:
        self._cpu_s, self._end = cpu_s, time.thread_time() + cpu_s
        self._most = num_bytes
        self.left = num_bytes  # that were not spent
        self._ticks = 0
        # by identity, with the value itself, so that no other gets the same
        self._weights: dict[int, tuple[Any, int, int]] = {}

    def tick(self) -> None:
        """To be called in every loop and call: nothing goes on without it."""
        self._ticks += 1
        if self._ticks % _EACH_TICKS == 0 and time.thread_time() > self._end:
            raise Exceeded(f"takes more than {self._cpu_s} seconds for one text")
        self.left -= _TICK_BYTES
        if self.left < 0:
            self.want(0)

    def want(self, num_bytes: int) -> None:
        """Asks whether something of this size may be made."""
        if num_bytes > self.left:
            raise Exceeded(f"takes more than {self._most >> 20} MB of memory for one text")

    def spend(self, num_bytes: int) -> None:
        """Takes what was made."""
        if num_bytes > self.left:
            self.want(num_bytes)
        self.left -= num_bytes

    def keep(self, value: Any) -> Any:
        """Takes the size of a new value, and returns it."""
        if isinstance(value, str | bytes):
            self.spend(sys.getsizeof(value))
        elif isinstance(value, int):
            size = sys.getsizeof(value)
            self.spend(size if size < _WHOLE_BYTES else self._most + 1)
        elif isinstance(value, _HOLDERS):
            self.weigh(value)
            self.spend(sys.getsizeof(value))
        return value

    def weigh(self, value: Any) -> int:
        """The bytes of a value as if all that it holds were written out."""
        return self._weighed(value)[0]

    def depth(self, value: Any) -> int:
        """How deep a value holds values."""
        return self._weighed(value)[1]

    def note(self, value: Any, weight: int, depth: int) -> None:
        """Remembers the weight of a value."""
        if depth > _DEPTH:
            raise Exceeded(f"nests values more than {_DEPTH} deep")
        if weight > self._most // _SHARE:
            self.want(self._most + 1)
        self.spend(_HELD_BYTES)
        self._weights[id(value)] = value, weight, depth

    def listed(self, value: Any) -> Any:
        """The values that an iterator will yield, others as they are."""
        if isinstance(value, _PLAIN) or not isinstance(value, Iterator):
            return value
        values = []
        for item in value:
            self.spend(2 * sys.getsizeof(None))
            values.append(item)
        return values

    def _weighed(self, value: Any) -> tuple[int, int]:
        if isinstance(value, str | bytes | int):
            return sys.getsizeof(value), 0
        known = self._weights.get(id(value))
        if known is not None:
            return known[1:]
        if not isinstance(value, _HOLDERS):
            return 64, 0
        weight, deepest = 64, 0
        parts: Iterable[Any] = value
        if isinstance(value, dict | _VIEWS[2]):
            pairs = value.items() if isinstance(value, dict) else value
            parts = (part for pair in pairs for part in pair)
        for part in parts:
            more, depth = self._weighed(part)
            weight += more + 32
            deepest = max(deepest, depth)
        self.note(value, weight, deepest + 1)
        return weight, deepest + 1


class _Code(CodeGenerator):
    """Compiles what makes values to calls of the environment."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        for part in list(node.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            part.body.insert(0, nodes.ExprStmt(nodes.Const(None)))  # no tag makes this one
        super().visit_Template(node, frame)

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Frame) -> None:
        self.writeline("environment.bounds.tick()")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        operands: list[nodes.Expr] = [node.right]
        left = node.left
        while isinstance(left, nodes.Add):
            operands.append(left.right)
            left = left.left
        self._call("environment.added(", [left, *reversed(operands)], frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._call("environment.joined(context.eval_ctx.autoescape, ", node.nodes, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        if _is_short(node):
            super().visit_List(node, frame)
        else:
            self.write("environment.bounds.keep(")
            super().visit_List(node, frame)
            self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load" or _is_short(node):
            super().visit_Tuple(node, frame)
        else:
            self.write("environment.bounds.keep(")
            super().visit_Tuple(node, frame)
            self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.bounds.keep(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        given = [nodes.Const(None) if bound is None else bound for bound in bounds]
        self._call("environment.sliced(", [node.node, *given], frame)

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        if isinstance(node.expr, nodes.Const) or _is_short(node.expr):
            super().visit_Operand(node, frame)
            return
        self.write(f" {operators[node.op]} (environment.bounds.tick() or ")
        self.visit(node.expr, frame)
        self.write(")")

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData | nodes.Const):
            raise nodes.Impossible  # nothing is built while a template is compiled
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile:
            self.write(
                "(environment.escaped if context.eval_ctx.autoescape else environment.text)("
            )
        else:
            self.write(f"environment.{'escaped' if frame.eval_ctx.autoescape else 'text'}(")

    def _call(self, opening: str, arguments: Iterable[nodes.Expr], frame: Frame) -> None:
        self.write(opening)
        for argument in arguments:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


def _is_short(node: nodes.Expr) -> bool:
    """Whether a list is one of few constants: turns of a loop pay for it."""
    return (
        isinstance(node, nodes.List | nodes.Tuple)
        and len(node.items) <= 16
        and all(isinstance(item, nodes.Const) for item in node.items)
    )


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox for values that are not changed, whose templates are bounded by `run`."""

    code_generator_class = _Code
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    intercepted_unops = frozenset(ImmutableSandboxedEnvironment.default_unop_table)
    bounds: Bounds

    def __init__(
        self, filters: Mapping[str, Callable[..., Any]] = MappingProxyType({}), **settings: Any
    ) -> None:
        super().__init__(optimized=False, **settings)
        self.filters = {
            name: self._bounded(name, function)
            for name, function in {**self.filters, **filters}.items()
        }
        self._lock = threading.Lock()

    def run(
        self, template: jinja2.Template, bounds: Bounds, max_chars: int, variables: dict[str, Any]
    ) -> str:
        """What a template of this environment writes.

        Raises:
          Exceeded: more time, memory or characters than it may. What else is wrong with a template
            raises as Jinja does.
        """
        written, pieces = 0, []
        with self._lock:  # the bounds are those of one
            self.bounds = bounds
            for piece in template.generate(variables):
                written += len(piece)
                if written > max_chars:
                    raise Exceeded(f"writes {written} characters for one conversation")
                if piece:
                    pieces.append(piece)
        return "".join(pieces)

    def added(self, *operands: Any) -> Any:
        """a + b + c."""
        for operand in operands:
            if type(operand) is not str:
                return functools.reduce(self._sum, operands)
        bounds = self.bounds
        size = 4 * sum(map(len, operands))
        if size > bounds.left:
            bounds.want(size)
        text = "".join(operands)
        bounds.left -= sys.getsizeof(text)
        return text

    def joined(self, autoescape: bool, *operands: Any) -> str:
        """a ~ b ~ c."""
        self.bounds.want(_GROWTH * sum(map(self.bounds.weigh, operands)))
        return self.bounds.keep((markup_join if autoescape else str_join)(operands))

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """value[start:stop:step]."""
        part = value[start:stop:step]  # weighs no more than the whole
        self.bounds.spend(sys.getsizeof(part))
        return part

    def text(self, value: Any) -> str:
        """A value as it is written."""
        if type(value) is str:
            self.bounds.left -= _WRITTEN_BYTES
            return value
        self.bounds.want(_GROWTH * self.bounds.weigh(value))
        return self.bounds.keep(str(value))

    def escaped(self, value: Any) -> Markup:
        """A value as it is written where HTML is escaped."""
        self.bounds.want(_GROWTH * self.bounds.weigh(value))
        return self.bounds.keep(escape(value))

    def concat(self, pieces: Iterable[str]) -> str:
        """What a block or a macro writes."""
        pieces = list(pieces)
        self.bounds.want(4 * sum(map(len, pieces)))
        return self.bounds.keep("".join(pieces))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator other than +, see `added`."""
        bounds = self.bounds
        if type(left) is int and type(right) is int and operator != "**":
            return bounds.keep(self.binop_table[operator](left, right))
        if operator == "*":
            if isinstance(left, int) and not isinstance(right, int | float):
                left, right = right, left
            if isinstance(right, int) and not isinstance(left, int | float):
                times = max(right, 0)
                bounds.want(times * sys.getsizeof(left))
                result = left * right
                if isinstance(result, _HOLDERS):
                    bounds.note(result, 64 + times * bounds.weigh(left), bounds.depth(left))
                return bounds.keep(result)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right >= 8 * _WHOLE_BYTES:
                bounds.spend(sys.maxsize)
        elif operator == "%" and isinstance(left, str | bytes):
            bounds.want(_formatted_bytes(bounds, left, right))
        bounds.want(_GROWTH * (bounds.weigh(left) + bounds.weigh(right)))
        return bounds.keep(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As Jinja says, but at once for what most templates ask for."""
        if type(obj) is str or isinstance(obj, LoopContext | Namespace):
            return not attr.startswith("_")
        return super().is_safe_attribute(obj, attr, value)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        """A sign."""
        return self.bounds.keep(super().call_unop(context, operator, arg))

    def call(self, context: Context, function: Any, /, *args: Any, **values: Any) -> Any:
        """A call of anything."""
        bounds = self.bounds
        bounds.tick()
        given = [bounds.listed(arg) for arg in args] if args else args
        if isinstance(function, BuiltinMethodType):
            bounds.want(_called_bytes(bounds, function, given, values))
        else:
            bounds.want(8 * len(given) + sum(map(bounds.weigh, (*given, *values.values()))))
        return bounds.keep(super().call(context, function, *given, **values))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A text's `format` or `format_map`, field by field."""
        if (
            not isinstance(value, BuiltinMethodType | MethodType)
            or value.__name__ not in ("format", "format_map")
            or not isinstance(value.__self__, str)
        ):
            return None
        text = value.__self__
        formatter: SandboxedFormatter = _Formatter(self)
        if isinstance(text, Markup):
            formatter = _EscapeFormatter(self, escape=text.escape)

        def formatted(*args: Any, **values: Any) -> str:
            if value.__name__ == "format_map":
                return type(text)(formatter.vformat(text, (), *args))
            return type(text)(formatter.vformat(text, args, values))

        return formatted

    def _sum(self, left: Any, right: Any) -> Any:
        bounds = self.bounds
        weight = bounds.weigh(left) + bounds.weigh(right)
        bounds.want(4 * (sys.getsizeof(left) + sys.getsizeof(right)))
        result = left + right
        if isinstance(result, _HOLDERS):
            bounds.note(result, weight, max(bounds.depth(left), bounds.depth(right)))
        return bounds.keep(result)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that asks before it makes something."""
        first = int(hasattr(function, "jinja_pass_arg"))  # behind what Jinja itself passes
        plain = first == 0 and name not in _PARTICULAR

        @functools.wraps(function)
        def picking(*args: Any, **values: Any) -> Any:
            result = function(*args, **values)
            if isinstance(result, int):
                self.bounds.keep(result)
            elif isinstance(result, Iterator):
                self.bounds.note(result, 64, self.bounds.depth(args[first]) + 1)
            return result

        @functools.wraps(function)
        def making(*args: Any, **values: Any) -> Any:
            bounds = self.bounds
            if plain and len(args) == 1 and type(args[0]) is str:  # nearly always, so quickly
                if _GROWTH * sys.getsizeof(args[0]) > bounds.left:
                    bounds.want(_GROWTH * sys.getsizeof(args[0]))
                result = function(*args, **values)
                if type(result) is not str:
                    return bounds.keep(result)
                bounds.left -= sys.getsizeof(result)
                return result
            given = [bounds.listed(arg) for arg in args[first:]]
            bounds.want(_filtered_bytes(bounds, name, given, values))
            result = bounds.listed(function(*args[:first], *given, **values))
            return bounds.keep(result)

        return picking if name in _PICKING else making


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: BoundedEnvironment, **settings: Any) -> None:
        super().__init__(environment, **settings)
        self._bounds = environment.bounds

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is None:
            return value
        self._bounds.want(_GROWTH * self._bounds.weigh(value))
        return self._bounds.keep(super().convert_field(value, conversion))

    def format_field(self, value: Any, format_spec: str) -> Any:
        bounds = self._bounds
        bounds.tick()
        bounds.want(_GROWTH * bounds.weigh(value) + 4 * _numbers(format_spec))
        return bounds.keep(super().format_field(value, format_spec))


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


def _numbers(text: str) -> int:
    """The sum of all numbers in a text: no width in it is larger."""
    return sum(int(digits[-18:]) + 10**9 * (len(digits) > 18) for digits in _DIGITS.findall(text))


_DIGITS = re.compile("[0-9]+")


def _formatted_bytes(bounds: Bounds, text: str | bytes, values: Any) -> int:
    """At most of text % values."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    widths = _numbers(text)
    if "*" in text:
        given = values if isinstance(values, tuple) else (values,)
        widths += sum(abs(value) for value in given if isinstance(value, int))
    each = 400 + _GROWTH * bounds.weigh(values)  # a float of all its digits
    return 4 * widths + sys.getsizeof(text) + text.count("%") * each


def _replaced_bytes(text: Any, old: Any, new: Any) -> int:
    """At most of text.replace(old, new)."""
    times = text.count(old) if type(text) is type(old) else len(text) + 1
    return _GROWTH * (sys.getsizeof(text) + times * len(new))


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes)


def _joined_bytes(bounds: Bounds, between: Any, items: Any) -> int:
    """At most of between.join(items)."""
    count = len(items) if hasattr(items, "__len__") else 0
    return _GROWTH * (bounds.weigh(items) + count * sys.getsizeof(between))


def _stretch(values: Iterable[Any]) -> int:
    """How often something may be repeated by one of these: widths, and texts put in between."""
    most = 1
    for value in values:
        if isinstance(value, int):
            most = max(most, abs(value))
        elif isinstance(value, str | bytes):
            most = max(most, len(value))
        elif isinstance(value, list | tuple):  # of separators
            most = max(most, _stretch(value))
        elif isinstance(value, dict):  # of a translation
            most = max(most, _stretch(value.values()))
    return most


def _called_bytes(
    bounds: Bounds, method: BuiltinMethodType, args: Sequence[Any], values: Mapping[str, Any]
) -> int:
    """At most of what a method of Python's own makes."""
    owner, name = method.__self__, method.__name__
    given = (*args, *values.values())
    size = sum(map(bounds.weigh, given))
    if isinstance(owner, str | bytes):
        size += sys.getsizeof(owner)
        if (
            name == "replace"
            and len(args) > 1
            and all(isinstance(a, str | bytes) for a in args[:2])
        ):
            return _replaced_bytes(owner, *args[:2])
        if name == "join" and args:
            return _joined_bytes(bounds, owner, args[0])
    if name == "strftime":
        return 1024 * size  # Python's own bound is 256 characters for each
    if name in _SPLITTING_METHODS:
        iterated = sum(len(value) for value in given if isinstance(value, str | bytes | range))
        if name in ("split", "rsplit", "splitlines"):
            assert isinstance(owner, str | bytes)
            separated = args and type(args[0]) is type(owner) and args[0]
            iterated = owner.count(args[0]) + 1 if separated else len(owner) // 2 + 1
            return 2 * size + 80 * iterated
        return _GROWTH * size + _CHARACTER_BYTES * iterated
    if name in _STRETCHING_METHODS:
        return 4 * size * _stretch(given or (8,))
    return _GROWTH * size


def _filtered_bytes(
    bounds: Bounds, name: str, args: Sequence[Any], values: Mapping[str, Any]
) -> int:
    """At most of what a filter makes."""
    given = (*args, *values.values())
    size = sum(map(bounds.weigh, given))
    if not given:
        return 0
    if name == "format":
        return _formatted_bytes(bounds, str(given[0]), given[1:])
    if name == "join":
        between = given[1] if len(given) > 1 else ""
        return _joined_bytes(bounds, between, given[0]) + _GROWTH * size
    if name == "replace" and len(args) > 2 and all(map(_is_text, args[:3])):
        return _replaced_bytes(*args[:3])
    if name == "replace":
        return _GROWTH * size * size
    if name == "sum":
        return size * (len(given[0]) if hasattr(given[0], "__len__") else 1)
    if name in _SLOW:
        return size * size
    wanted = _GROWTH * size
    if name in _STRETCHING:
        wanted *= max(bounds.depth(given[0]), 1) * _stretch(given[1:])
    if name in _LISTING and hasattr(given[0], "__len__"):
        wanted += _CHARACTER_BYTES * len(given[0])
    return wanted
