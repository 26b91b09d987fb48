"""Reads the texts of ALFWorld: the grammar `alfred.twl2`, with one command template and one
feedback text per action.

A text is a tuple of parts: `Text` as it stands, `Call` of another rule (`#name#`), `Show` of a
value (`{r.name}`) and `Each` of the facts that match a query (`[{o.name | inreceptacle(o:object,
r:receptacle)}]`, a list in words when in brackets). A rule is a list of alternatives: the first
whose condition holds is the text.
"""

import ast
import dataclasses
import functools
import json
import re
import textwrap
from collections.abc import Mapping
from types import MappingProxyType

from envs.alfworld.rules import Formula

# Possessive: a truncated file must fail at once, not after trying every way to read it.
_BLOCK = re.compile(
    r'\s*(?:grammar\s*::\s*"""(?P<grammar>.*?)"""\s*;'
    r'|action\s+(?P<action>[\w/-]+)\s*\{(?P<body>(?>[^{}"]+|""".*?"""|"[^"]*")*+)\})',
    re.DOTALL,
)
_FIELD = re.compile(
    r"\s*(?P<name>template|feedback|grammar|pddl)\s*::"
    r'\s*(?:"""(?P<block>.*?)"""|"(?P<text>[^"]*)")\s*;',
    re.DOTALL,
)
_COMMENT = re.compile(r"^\s*#.*?$", re.MULTILINE)
_LITERAL = re.compile(r'[^;|"<>\[\]#{}]+')
_CALL = re.compile(r"#([\w()/!<>\-\s,.]+)#")
_QUERY = re.compile(
    r"(?P<list>\[)?\{(?:#(?P<call>[\w()/!<>\-\s,.]+)#|(?P<show>[^|\[\]{}\n<>#]+))"
    r"\s*(?:\|\s*(?P<given>[^;|{}\n\[\]#]+))?\}(?(list)\])"
)
_CONDITION = re.compile(r"(\w+)\(([^()]*)\)")
# The parser that ALFWorld's grammar was written for takes blank lines at the start of a text for
# comments: so `help` starts with its first word.
_LEADING = re.compile(r"\A\s+")
_TASK = re.compile(r'"task"\s*:\s*\[\s*\{\s*"rhs"\s*:\s*("(?:[^"\\\n]|\\.)*")')


@dataclasses.dataclass(frozen=True)
class Text:
    """Characters, as they stand."""

    text: str


@dataclasses.dataclass(frozen=True)
class Call:
    """The text of another rule, about the same things."""

    rule: str


@dataclasses.dataclass(frozen=True)
class Show:
    """A value in words: `terms` are joined; a variable `o` is meant by `("o", "name")`, a plain
    string stands for itself.
    """

    terms: tuple[tuple[str, str] | str, ...]


@dataclasses.dataclass(frozen=True)
class Each:
    """`part` for every match of `given`: the query's atoms, and the types of the variables in
    it.
    """

    part: Call | Show
    given: tuple[Formula, ...]
    types: Mapping[str, str]
    as_list: bool


Part = Text | Call | Show | Each


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One text of a rule, for when all atoms of `given` can be matched."""

    given: tuple[Formula, ...]
    types: Mapping[str, str]
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """`rules` by name; `commands` and `feedback` are the texts of every action, by its lower-case
    name.
    """

    rules: Mapping[str, tuple[Alternative, ...]]
    commands: Mapping[str, tuple[Part, ...]]
    feedback: Mapping[str, tuple[Part, ...]]


def split_task(text: str) -> tuple[str, str]:
    """Takes the task sentence out of a game's grammar, so that the rest is the same for all games.
    Raises ValueError when there is none.
    """
    found = _TASK.search(text)
    if not found:
        raise ValueError(
            'The grammar has no rule "task" with one text: the game file is damaged or of another'
            " ALFWorld version."
        )
    task = json.loads(found.group(1), strict=False)
    if not task or not _LITERAL.fullmatch(task):
        raise ValueError(
            f"The task sentence {task!r} is empty or holds characters with a meaning in the"
            " grammar."
        )
    return text[: found.start(1)] + '"TASK"' + text[found.end(1) :], task


@functools.lru_cache(maxsize=8)
def parse_grammar(text: str) -> Grammar:
    """Reads a grammar. Raises ValueError, naming the place, for anything it does not understand."""
    text = text.strip()
    rules: dict[str, tuple[Alternative, ...]] = {}
    commands: dict[str, tuple[Part, ...]] = {}
    feedback: dict[str, tuple[Part, ...]] = {}
    position = 0
    while position < len(text):
        found = _BLOCK.match(text, position)
        if not found:
            raise ValueError(
                f"The grammar is not understood at {text[position : position + 40]!r}."
            )
        position = found.end()
        if found["grammar"] is not None:
            rules |= _rules(found["grammar"])
            continue
        name, body, fields = found["action"].lower(), found["body"].strip(), {}
        at = 0
        while at < len(body):
            field = _FIELD.match(body, at)
            if not field:
                raise ValueError(
                    f"The action {name!r} of the grammar is not understood at"
                    f" {body[at : at + 40]!r}."
                )
            fields[field["name"]] = field["block"] if field["block"] is not None else field["text"]
            at = field.end()
        if not {"template", "feedback"} <= set(fields):
            raise ValueError(
                f"The action {name!r} of the grammar must have a template and a feedback, got"
                f" {sorted(fields)!r}."
            )
        commands[name], feedback[name] = (
            parse_text(fields["template"]),
            parse_text(fields["feedback"]),
        )
        rules |= _rules(_COMMENT.sub("", fields.get("grammar", "{}")))
    return Grammar(
        rules=MappingProxyType(rules),
        commands=MappingProxyType(commands),
        feedback=MappingProxyType(feedback),
    )


def _rules(block: str) -> dict[str, tuple[Alternative, ...]]:
    try:
        data = json.loads(textwrap.dedent(block))
        return {
            name: tuple(_alternative(alternative) for alternative in alternatives)
            for name, alternatives in data.items()
        }
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"A block of rules of the grammar is no JSON of the known form: {error}."
        ) from error


def _alternative(data: Mapping) -> Alternative:
    given, types = _conjunction(data.get("condition", ""))
    return Alternative(given, types, parse_text(data["rhs"]))


def parse_text(text: str) -> tuple[Part, ...]:
    """Reads one text. What follows a character that fits nowhere is left out, as the original
    parser does.
    """
    parts: list[Part] = []
    text = _LEADING.sub("", text).replace("\\n", "\n")
    position = 0
    while position < len(text):
        if found := _LITERAL.match(text, position):
            parts.append(Text(found.group()))
        elif found := _CALL.match(text, position):
            parts.append(Call(found.group(1)))
        elif found := _QUERY.match(text, position):
            inner = Call(found["call"]) if found["call"] else _show(found["show"])
            given, types = _conjunction(found["given"] or "")
            parts.append(
                Each(inner, given, types, True)
                if found["list"]
                else Each(inner, given, types, False)
                if given
                else inner
            )
        else:
            break
        position = found.end()
    return tuple(parts)


def _conjunction(text: str) -> tuple[tuple[Formula, ...], Mapping[str, str]]:
    """Reads `p(a:agent) & q(a:agent, o:object)` into atoms and the types of their variables."""
    atoms, types = [], {}
    for term in filter(None, (part.strip() for part in text.split("&"))):
        found = _CONDITION.fullmatch(term)
        arguments = (
            [argument.strip().split(":") for argument in found.group(2).split(",")]
            if found
            else [[]]
        )
        if not found or any(len(argument) != 2 for argument in arguments):
            raise ValueError(f"The condition {term!r} of the grammar is not understood.")
        for variable, kind in arguments:
            if types.setdefault(variable, kind) != kind:
                raise ValueError(
                    f"The variable {variable!r} has two types in the condition {text!r} of the"
                    " grammar."
                )
        atoms.append((found.group(1), *(variable for variable, _ in arguments)))
    return tuple(atoms), MappingProxyType(types)


def _show(expression: str) -> Show:
    """Reads the few Python expressions that the texts use: `o`, `o.name`, string constants, `+`,
    and `x or y` (names are never empty).
    """

    def terms(node: ast.expr) -> tuple:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return terms(left) + terms(right)
            case ast.BoolOp(op=ast.Or(), values=[first, *_]):
                return terms(first)
            case ast.Constant(value=str() as text):
                return (text,)
            case ast.Name(id=variable):
                return ((variable, "name"),)
            case ast.Attribute(value=ast.Name(id=variable), attr="name" | "indefinite" as field):
                return ((variable, field),)
        raise ValueError(f"The expression {expression!r} of the grammar is not understood.")

    try:
        return Show(terms(ast.parse(expression.strip(), mode="eval").body))
    except SyntaxError as error:
        raise ValueError(
            f"The expression {expression!r} of the grammar is not understood."
        ) from error
