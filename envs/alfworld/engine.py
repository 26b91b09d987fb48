"""Plays ALFWorld: a game file is compiled once into numbered things and indexed facts, then every
step touches only what it changes.

The rules and texts are those inside the game file, which must be those of the installed alfworld
package (`_check_version` says what may differ); `envs.alfworld.program` writes them as Python.
Equal to the stock engine step by step: see `envs.alfworld.differential`.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from envs.alfworld.grammar import Grammar, Text, parse_grammar, split_task
from envs.alfworld.program import Program, World, build_program
from envs.alfworld.rules import (
    Domain,
    Formula,
    check_predicates,
    parse_domain,
    parse_formula,
    typed_names,
)
from envs.alfworld.tables import package_text

NOTHING_HAPPENS = "Nothing happens."  # TextWorld's own words, in no grammar
_FACT = re.compile(r"\(\s*([^\s()]+)\s+([^\s()]+)\s*([^\s()]*)\s*\)")  # of one or two things
_FACTS = re.compile(r"\s*(?:\([^()]*\)\s*)*")
_NUMBER = re.compile(r"\(\s*=\s*\([^()]*\)\s*[\d.]+\s*\)")  # a cost of the planner


class Answer(NamedTuple):
    """What a player sees: the text, the admissible commands (sorted), and whether the game is
    won.
    """

    text: str
    commands: tuple[str, ...]
    won: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CompiledGame:
    """One game, immutable: its program, the names of its things, its facts by view, and its task
    sentence.
    """

    program: Program
    names: tuple[str, ...]
    constants: Mapping[str, int]
    static: Mapping[str, Any]
    initial: Mapping[str, Any]
    task: str

    def start(self) -> "LiveGame":
        """A live game, ready for `reset`."""
        return LiveGame(self)

    @functools.cached_property
    def state_hash(self) -> str:
        """A hex digest of names, initial facts and goal: games with the same digest play alike, but
        for the wording of the task.
        """
        content: list = [self.program.goal, self.names, sorted(self.constants.items())]
        for view, facts in sorted({**self.static, **self.initial}.items()):
            content.append(
                (
                    view,
                    (
                        sorted((key, sorted(values)) for key, values in facts.items() if values)
                        if isinstance(facts, dict)
                        else sorted(facts)
                    ),
                )
            )
        return hashlib.sha256(repr(content).encode()).hexdigest()


class LiveGame:
    """A game under way: `reset`, then `step`. After the win every step repeats the last answer, as
    in the stock environment.
    """

    def __init__(self, game: CompiledGame):
        self._game = game
        self._program = game.program
        self._answer = Answer("", (), False)

    def reset(self) -> Answer:
        """Starts the game: the welcome, the room, and the task."""
        self._world = world = World()
        world.__dict__.update(
            self._game.static,
            name=self._game.names,
            constants=self._game.constants,
            task=self._game.task,
        )
        world.__dict__.update((view, _copy(facts)) for view, facts in self._game.initial.items())
        self._found = [commands(world) for commands in self._program.commands]
        self._answer = Answer(
            self._program.intro(world), self._admissible(), self._program.won(world)
        )
        return self._answer

    def step(self, command: str) -> Answer:
        """Plays one command, upper and lower case told apart, blanks around it left out. What is
        not admissible changes nothing.
        """
        last = self._answer
        if last.won:
            return last
        command = command.strip()
        index = next(
            (index for index, commands in enumerate(self._found) if command in commands), None
        )
        if index is None:
            self._answer = Answer(NOTHING_HAPPENS, last.commands, False)
            return self._answer
        arguments = self._found[index][command]
        program, world = self._program, self._world
        program.apply[index](world, *arguments)
        refresh = program.refresh[index]
        for other in refresh:
            self._found[other] = program.commands[other](world)
        self._answer = Answer(
            program.feedback[index](world, *arguments),
            self._admissible() if refresh else last.commands,
            program.touches_goal[index] and program.won(world),
        )
        return self._answer

    def _admissible(self) -> tuple[str, ...]:
        every: dict[str, tuple[int, ...]] = {}
        for commands in self._found:
            every.update(commands)
        return tuple(sorted(every))


def compile_game(game: Mapping[str, Any]) -> CompiledGame:
    """Compiles the content of a `game.tw-pddl`: `pddl_domain`, `grammar` and `pddl_problem`.

    Raises ValueError, in one sentence, for a damaged game and for rules or texts of another
    ALFWorld version.
    """
    domain_text, grammar_text, problem = (
        _text(game, field) for field in ("pddl_domain", "grammar", "pddl_problem")
    )
    grammar_text, task = split_task(grammar_text)
    objects, facts, goal, goal_constants = _read_problem(problem)
    program = _program(domain_text, grammar_text, goal)
    ids = sorted(objects)
    number = {name: index for index, name in enumerate(ids)}
    try:
        # -1: this game has none, so nothing is true of it
        constants = {name: number.get(name, -1) for name in program.constants}
        constants |= {f"${index}": number[name] for index, name in enumerate(goal_constants)}
    except KeyError as error:
        raise ValueError(
            f"The goal of the game names {error.args[0]!r}, which is not among its objects."
        ) from error
    columns = _columns(facts, objects, program.domain)
    mentioned = set().union(*(column for pair in columns.values() for column in pair))
    static, initial = {}, {}
    for predicate, views in program.views.items():
        target = initial if predicate in program.fluents else static
        if predicate.startswith("type_"):
            kind = predicate.removeprefix("type_")
            target[predicate] = frozenset(
                number[name] for name in ids if kind in (objects[name], "object")
            )
            continue
        for view in views:
            target[view] = _index(columns.get(predicate, ()), number, view)
    return CompiledGame(
        program=program,
        names=_names(ids, mentioned),
        constants=MappingProxyType(constants),
        static=MappingProxyType(static),
        initial=MappingProxyType(initial),
        task=task,
    )


def _text(game: Mapping[str, Any], field: str) -> str:
    text = game.get(field) if isinstance(game, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(
            f"A game file must hold pddl_domain, grammar and pddl_problem as texts, but its {field}"
            f" is {text!r:.60}."
        )
    return text


# --- the program of a game, and its version ---


@functools.lru_cache(maxsize=32)  # by rules, texts and shape of goal: one per family in practice
def _program(domain_text: str, grammar_text: str, goal: Formula) -> Program:
    domain, grammar = parse_domain(domain_text), parse_grammar(grammar_text)
    _check_version(domain, grammar)
    check_predicates(goal, domain.predicates, "the goal")
    return build_program(domain, grammar, goal)


def _check_version(domain: Domain, grammar: Grammar):
    """Raises ValueError unless the rules and texts are the package's, but for layout, comments and
    two harmless differences.

    The games that the package's own downloader brings still let CleanObject use a SinkType (no game
    has such a receptacle), and write the text of `help` where the package names a rule with the
    same text.
    """
    package_domain, package_grammar = (
        parse_domain(package_text("data/alfred.pddl")),
        parse_grammar(split_task(package_text("data/alfred.twl2"))[0]),
    )
    version = importlib.metadata.version("alfworld")
    advice = (
        f"differs from alfworld {version}: fetch the games with its alfworld-download, or install"
        " the alfworld that they were made with"
    )
    for index, (ours, theirs) in enumerate(_sections(domain, package_domain)):
        if ours != theirs:
            name = " ".join(word for word in (ours or theirs)[:2] if isinstance(word, str))
            raise ValueError(f"The game's PDDL domain {advice} (section {index + 1}, {name!r}).")
    for name in sorted(package_domain.actions.keys()):
        for kind in ("commands", "feedback"):
            ours, theirs = (
                _written(texts, getattr(texts, kind).get(name))
                for texts in (grammar, package_grammar)
            )
            if ours != theirs:
                raise ValueError(f"The game's grammar {advice} ({kind} of {name!r}).")
    for name in sorted(package_grammar.rules.keys() | grammar.rules.keys()):
        if name != "help.feedback" and grammar.rules.get(name) != package_grammar.rules.get(name):
            raise ValueError(f"The game's grammar {advice} (rule {name!r}).")


def _sections(*domains: Domain):
    """The sections of two domains side by side, without the sink that never is one."""
    plain = [
        [_without(section, ("receptacletype", "?r", "sinktype")) for section in domain.source]
        for domain in domains
    ]
    longest = max(map(len, plain))
    return zip(*(sections + [()] * (longest - len(sections)) for sections in plain), strict=True)


def _without(formula: Formula, unwanted: Formula) -> Formula:
    return tuple(
        _without(part, unwanted) if isinstance(part, tuple) else part
        for part in formula
        if part != unwanted
    )


def _written(grammar: Grammar, parts: tuple | None) -> tuple | str | None:
    """A text's parts; a fixed text as it reads, whether written in place or in a rule of its
    own.
    """
    if parts and len(parts) == 1 and not isinstance(parts[0], Text):
        rule = grammar.rules.get(getattr(parts[0], "rule", ""), ())
        if len(rule) == 1 and not rule[0].given and len(rule[0].parts) == 1:
            parts = rule[0].parts
    if parts and len(parts) == 1 and isinstance(parts[0], Text):
        return parts[0].text.strip()
    return parts


# --- the problem of a game ---


def _read_problem(
    problem: str,
) -> tuple[dict[str, str], list[tuple[str, str, str]], Formula, tuple[str, ...]]:
    """Objects with their types, initial facts as written, the goal with `$0`, `$1` for its
    constants, and these constants.
    """
    text = problem.lower()
    starts = [text.find(section) for section in ("(:objects", "(:init", "(:goal")]
    if -1 in starts or starts != sorted(starts):
        raise ValueError(
            "The PDDL problem must have :objects, :init and :goal in this order, got"
            f" {problem.strip()[:60]!r}..."
        )
    if text.count("(") != text.count(")"):
        raise ValueError(
            f"The PDDL problem has {text.count('(')} opening and {text.count(')')} closing"
            " parentheses: the game file is damaged."
        )
    objects_text, init_text = (
        text[starts[0] : starts[1]].strip(),
        text[starts[1] : starts[2]].strip(),
    )
    goal_text = text[starts[2] :].strip()
    objects = _objects(objects_text)
    init = init_text.removeprefix("(:init").removesuffix(")")
    if "=" in init:
        init = _NUMBER.sub("", init)
    facts = _FACT.findall(init)
    if len(facts) != init.count("(") or not _FACTS.fullmatch(init):
        wrong = _FACT.sub("", init).strip()
        raise ValueError(
            f"The PDDL problem has {wrong[:80]!r} among its initial facts, which is not understood."
        )
    goal = parse_formula(goal_text.removesuffix(")"))
    if len(goal) != 2 or goal[0] != ":goal" or not isinstance(goal[1], tuple):
        raise ValueError(f"The PDDL problem has the goal {goal!r}, which is not understood.")
    constants: list[str] = []
    return objects, facts, _lift(goal[1], constants), tuple(constants)


def _objects(text: str) -> dict[str, str]:
    if not text.endswith(")"):
        raise ValueError("The PDDL problem does not close its list of objects.")
    words = text.removeprefix("(:objects").removesuffix(")").split()
    # one `name - type` after the other, as in all games
    if len(words) % 3 == 0 and set(words[1::3]) == {"-"}:
        objects = dict(zip(words[::3], words[2::3], strict=True))
        if len(objects) * 3 == len(words):
            return objects
    return typed_names(tuple(words))


def _lift(formula: Formula, constants: list[str]) -> Formula:
    match formula:
        case ("and" | "or" | "not", *parts):
            return (formula[0], *(_lift(part, constants) for part in parts))
        case ("exists" | "forall", variables, part):
            return (formula[0], variables, _lift(part, constants))
    words = []
    for word in formula[1:]:
        if not isinstance(word, str):
            raise ValueError(f"The goal holds {formula!r}, which is not understood.")
        if not word.startswith("?"):
            constants.append(word)
            word = f"${len(constants) - 1}"
        words.append(word)
    return (*formula[:1], *words)


def _columns(
    facts: list[tuple[str, str, str]], objects: Mapping[str, str], domain: Domain
) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The initial facts by predicate, as one tuple per argument, each of exactly the declared type.
    Raises ValueError for others.
    """
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for predicate, first, second in facts:
        rows[predicate].append((first, second))
    found = {}
    for predicate, pairs in rows.items():
        if predicate not in domain.predicates:
            raise ValueError(f"Undefined predicate {predicate!r} in the initial facts of the game.")
        kinds = (*domain.predicates[predicate], "")[:2]
        columns = tuple(zip(*pairs, strict=True))
        if any(
            set(map(objects.get, column)) != {kind}
            for column, kind in zip(columns, kinds, strict=True)
            if kind
        ) or (not kinds[1] and any(columns[1])):
            row = next(
                pair for pair in pairs if tuple(objects.get(name, "") for name in pair) != kinds
            )
            raise ValueError(
                f"The initial fact '{predicate} {' '.join(row).strip()}' is not about objects of"
                f" type {' and '.join(kinds).strip()}."
            )
        found[predicate] = columns if kinds[1] else columns[:1]
    return found


def _index(columns: tuple[tuple[str, ...], ...], number: Mapping[str, int], view: str):
    """One index of a predicate's facts: a set for `p`, a mapping from numbers to sets for `p_0` and
    `p_1`.
    """
    numbers = [map(number.__getitem__, column) for column in columns]
    if not view.endswith(("_0", "_1")):
        return set(*numbers)
    found: dict[int, set[int]] = {}
    for key, value in (
        zip(*(numbers if view.endswith("_0") else reversed(numbers)), strict=True)
        if numbers
        else ()
    ):
        if key in found:
            found[key].add(value)
        else:
            found[key] = {value}
    return found


def _copy(facts):
    return (
        {key: set(values) for key, values in facts.items()}
        if isinstance(facts, dict)
        else set(facts)
    )


def _names(ids: list[str], mentioned: set[str]) -> tuple[str, ...]:
    """What the things are called: `fridge_bar_...` is "fridge 1". Of things of one name the first
    id has the highest number.

    Things in no fact are not counted, as in the stock engine; they are never shown.
    """
    kinds = [_kind(name) if name in mentioned else "" for name in ids]
    left = Counter(kinds)
    names = []
    for name, kind in zip(ids, kinds, strict=True):
        if not kind:
            names.append(name + " ")
            continue
        names.append(f"{kind} {left[kind]}")
        left[kind] -= 1
    return tuple(names)


def _kind(name: str) -> str:
    """The word for a thing with a place, "" for others (the agent, types, locations have numbers
    elsewhere).
    """
    kind, mark, _ = name.partition("_bar_")
    if not mark:
        return ""
    return kind + "basin" if "basin" in name else kind
