"""Reads the rules of ALFWorld: the PDDL domain `alfred.pddl`, and formulas in PDDL.

Formulas and actions stay nested tuples of lower-case words, as written: `("and", ("atlocation",
"?a", "?l"), ("not", ("opened", "?r")))`.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from types import MappingProxyType

_TOKEN = re.compile(r"[()]|[^\s()]+")
_COMMENT = re.compile(r";[^\n]*")
Formula = tuple  # a nested tuple of words


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """One fact that an action makes true or false, where `condition` (a formula) held before it."""

    condition: Formula
    holds: bool
    atom: Formula


@dataclasses.dataclass(frozen=True, kw_only=True)
class Action:
    """One action schema: `parameters` maps variables to types, in order."""

    name: str
    parameters: Mapping[str, str]
    precondition: Formula
    effects: tuple[Effect, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain:
    """The rules. `predicates` gives the type of every argument; `source` is the whole domain as
    nested tuples, without comments.
    """

    types: frozenset[str]
    predicates: Mapping[str, tuple[str, ...]]
    actions: Mapping[str, Action]
    source: Formula


def parse_formula(text: str) -> Formula:
    """Reads one parenthesised expression. Raises ValueError when parentheses do not match or
    something follows.
    """
    stack: list[list] = [[]]
    for token in _TOKEN.findall(_COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) == 1:
            raise ValueError(
                f"PDDL closes a parenthesis that was never opened, near {_near(stack[-1])}."
            )
        else:
            done = tuple(stack.pop())
            stack[-1].append(done)
    if len(stack) != 1:
        raise ValueError(
            f"PDDL ends inside {len(stack) - 1} open parentheses, near {_near(stack[-1])}."
        )
    if len(stack[0]) != 1 or not isinstance(stack[0][0], tuple):
        raise ValueError(f"PDDL must be one parenthesised expression, got {_near(stack[0])}.")
    return stack[0][0]


def typed_names(words: tuple) -> dict[str, str]:
    """Reads `a b - t c - u` as {a: t, b: t, c: u}; names without a type are objects. Raises
    ValueError for a name given twice.
    """
    found: dict[str, str] = {}
    waiting: list[str] = []
    position = 0
    while position < len(words):
        if words[position] == "-":
            if position + 1 == len(words):
                raise ValueError(f"PDDL lacks a type after {waiting[-1:]!r} -.")
            found.update(dict.fromkeys(waiting, words[position + 1]))
            waiting = []
            position += 2
            continue
        name = words[position]
        if not isinstance(name, str) or name in found or name in waiting:
            raise ValueError(f"PDDL declares {name!r} twice, or as no name.")
        waiting.append(name)
        position += 1
    return found | dict.fromkeys(waiting, "object")


@functools.lru_cache(maxsize=8)
def parse_domain(text: str) -> Domain:
    """Reads a PDDL domain. Raises ValueError, naming the place, for anything it does not
    understand.
    """
    source = parse_formula(text)
    if source[:1] != ("define",) or source[1:2] != (("domain", "alfred"),):
        raise ValueError(
            f"The PDDL domain must start with (define (domain alfred), got {_near(source)}."
        )
    types: frozenset[str] = frozenset()
    predicates: dict[str, tuple[str, ...]] = {}
    actions: dict[str, Action] = {}
    for section in source[2:]:
        head = section[0] if section else ""
        if head == ":types":
            types = frozenset(typed_names(section[1:])) | {"object"}
        elif head == ":predicates":
            predicates = {
                name: tuple(typed_names(tuple(words)).values()) for name, *words in section[1:]
            }
        elif head == ":action":
            action = _action(section, predicates)
            actions[action.name] = action
        elif head not in (":requirements", ":functions"):
            raise ValueError(f"The PDDL domain has an unknown section {head!r}.")
    return Domain(
        types=types,
        predicates=MappingProxyType(predicates),
        actions=MappingProxyType(actions),
        source=source,
    )


def _action(section: tuple, predicates: Mapping[str, tuple[str, ...]]) -> Action:
    name, fields = section[1], dict(zip(section[2::2], section[3::2], strict=True))
    if set(fields) != {":parameters", ":precondition", ":effect"}:
        raise ValueError(
            f"The action {name!r} must have parameters, a precondition and an effect, got"
            f" {sorted(fields)!r}."
        )
    precondition = fields[":precondition"] or ("and",)
    effects = tuple(_effects(fields[":effect"], ("and",), name))
    for formula in (
        precondition,
        *(effect.condition for effect in effects),
        *(effect.atom for effect in effects),
    ):
        check_predicates(formula, predicates, f"the action {name!r}")
    return Action(
        name=name,
        parameters=MappingProxyType(typed_names(fields[":parameters"])),
        precondition=precondition,
        effects=effects,
    )


def _effects(formula: Formula, condition: Formula, action: str):
    match formula:
        case ("and", *parts):
            for part in parts:
                yield from _effects(part, condition, action)
        case ("when", new_condition, part):
            yield from _effects(part, new_condition, action)
        case ("increase", *_):
            pass  # the planner's cost, no part of the state
        case ("not", tuple() as atom):
            yield Effect(condition=condition, holds=False, atom=atom)
        case ("forall" | "or" | "exists", *_):
            raise ValueError(
                f"The action {action!r} has an effect with {formula[0]!r}, which is not supported."
            )
        case _:
            yield Effect(condition=condition, holds=True, atom=formula)


def check_predicates(formula: Formula, predicates: Mapping[str, tuple[str, ...]], where: str):
    """Raises ValueError for what is no formula, and for atoms of undeclared predicates or with too
    many or few arguments; `where` names the place.
    """
    match formula:
        case ("and" | "or", *parts):
            for part in parts:
                check_predicates(part, predicates, where)
        case ("not", part) | ("exists" | "forall", tuple(), part):
            check_predicates(part, predicates, where)
        case ("=", str(), str()):
            pass
        case (str() as name, *arguments) if all(
            isinstance(argument, str) for argument in arguments
        ):
            if name not in predicates:
                raise ValueError(f"Undefined predicate {name!r} in {where}.")
            if len(predicates[name]) != len(arguments):
                raise ValueError(
                    f"The predicate {name!r} takes {len(predicates[name])} arguments, got"
                    f" {len(arguments)} in {where}."
                )
        case _:
            raise ValueError(f"PDDL formula {_near(formula)} in {where} is not understood.")


def _near(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
