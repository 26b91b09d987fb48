"""Writes the rules and texts of ALFWorld as Python: preconditions and queries become nested
comprehensions over indexed facts.

A `World` holds one game's facts. A unary fact is a member of the set `world.opened`; a binary fact
is kept under its first or second argument, as the rules need it: `world.inreceptacle_0` maps an
object to the set of its receptacles, `world.inreceptacle_1` a receptacle to the set of its objects.
Things are numbered in the order of their ids, so that sorted numbers are sorted ids. `not_p` holds
what an action made false and none made true since, which is what the grammar means by it.
`Program.source` is the whole text.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from envs.alfworld.grammar import Call, Each, Grammar, Part, Show, Text
from envs.alfworld.rules import Action, Domain, Formula, typed_names

TASK_RULE = "task"
_NOTHING: frozenset[int] = frozenset()


class World:
    """One game's facts as attributes, `name` (of every thing) and `task`; see the top of this
    file.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The rules, the texts and one shape of goal, as functions of a World.

    `views` says which indexes of which predicates they read, `fluents` which of these change.
    `constants` are the things that the rules name. Actions are numbered: `commands[i](world)` maps
    the commands of action i to its arguments, `apply[i](world, *arguments)` changes the world,
    `feedback[i](world, *arguments)` tells of it, `refresh[i]` numbers the actions whose commands it
    may change, and `touches_goal[i]` says whether it may change `won(world)`.
    """

    domain: Domain
    goal: Formula
    views: Mapping[str, tuple[str, ...]]
    fluents: frozenset[str]
    constants: tuple[str, ...]
    actions: tuple[str, ...]
    commands: tuple[Callable[[World], dict[str, tuple[int, ...]]], ...]
    apply: tuple[Callable[..., None], ...]
    feedback: tuple[Callable[..., str], ...]
    refresh: tuple[tuple[int, ...], ...]
    touches_goal: tuple[bool, ...]
    intro: Callable[[World], str]
    won: Callable[[World], bool]
    source: str


def build_program(domain: Domain, grammar: Grammar, goal: Formula) -> Program:
    """Compiles rules, texts and a goal; the words `$0`, `$1` of the goal stand for a game's own
    constants.

    Raises ValueError, naming the action or text, where they do not fit together.
    """
    writer = _Writer(domain, grammar)
    actions = tuple(domain.actions.values())
    reads: list[set[str]] = []
    for action in actions:
        if action.name not in grammar.commands:
            raise ValueError(
                f"The grammar has no texts for the action {action.name!r} of the domain."
            )
        writer.commands(action)
        reads.append(writer.take_reads())
    for action in actions:
        writer.feedback(action)
    writer.lines += ["def intro(world):", f"    return {writer.text((Call('intro'),), {})}", ""]
    writer.take_reads()
    writer.lines += ["def won(world):", f"    return {writer.test(goal, {})}", ""]
    goal_reads = writer.take_reads()
    # last: effects keep up all views that the code above reads
    writes = [writer.effects(action) for action in actions]
    source = "\n".join(writer.lines)
    functions: dict[str, Any] = {"NOTHING": _NOTHING, "listing": writer.listing}
    # written above from parsed rules: every name in it was checked
    exec(compile(source, "<the rules of ALFWorld>", "exec"), functions)

    def named(kind: str) -> tuple[Callable, ...]:
        return tuple(functions[f"{kind}_{action.name}"] for action in actions)

    return Program(
        domain=domain,
        goal=goal,
        views=MappingProxyType(
            {name: tuple(sorted(views)) for name, views in writer.views.items()}
        ),
        fluents=frozenset().union(*writes),
        constants=tuple(sorted(writer.constants)),
        actions=tuple(action.name for action in actions),
        commands=named("commands"),
        apply=named("apply"),
        feedback=named("feedback"),
        refresh=tuple(
            tuple(index for index, read in enumerate(reads) if read & write) for write in writes
        ),
        touches_goal=tuple(bool(goal_reads & write) for write in writes),
        intro=functions["intro"],
        won=functions["won"],
        source=source,
    )


Bound = dict[str, str]  # variable in scope -> its type


class _Writer:
    """Python source under way: `views` collects what it reads of every predicate, `lines` the
    functions.
    """

    def __init__(self, domain: Domain, grammar: Grammar):
        self._domain = domain
        self._grammar = grammar
        self._fluents = {
            effect.atom[0] for action in domain.actions.values() for effect in action.effects
        }
        self._reads: set[str] = set()
        self.views: dict[str, set[str]] = {}
        self.constants: set[str] = set()
        self.lines: list[str] = []
        empty, between, last = (
            self._fixed(name) for name in ("list_empty", "list_separator", "list_last_separator")
        )
        self._empty = empty

        def listing(words: Sequence[str]) -> str:
            return (
                between.join(words[:-1]) + last + words[-1]
                if len(words) > 1
                else words[0]
                if words
                else empty
            )

        self.listing = listing

    def take_reads(self) -> set[str]:
        """The predicates read by the code written since the last call."""
        reads, self._reads = self._reads, set()
        return reads

    # --- functions, one of each per action ---

    def commands(self, action: Action):
        """Writes what maps each command of an action that may be taken now to its arguments."""
        bound = {_variable(name): kind for name, kind in action.parameters.items()}
        command = self.text(self._grammar.commands[action.name], bound)
        arguments = "".join(f"{name}, " for name in bound)
        conditions = [action.precondition, *self._changes_something(action)]
        loops = self._loops([("and", *conditions)], {}, tuple(bound.items()))
        found = " | ".join(f"{{{command}: ({arguments}) {loop}}}" for loop in loops) or "{}"
        self.lines += [f"def commands_{action.name}(world):", f"    return {found}", ""]

    def feedback(self, action: Action):
        """Writes what tells of an action that was just taken."""
        bound = {_variable(name): kind for name, kind in action.parameters.items()}
        text = self.text(self._grammar.feedback[action.name], bound)
        self.lines += [
            f"def feedback_{action.name}({', '.join(['world', *bound])}):",
            f"    return {text}",
            "",
        ]

    def effects(self, action: Action) -> set[str]:
        """Writes what changes the facts; returns the predicates that it may change. Of a fact made
        false and true at once, true stays.
        """
        bound = {_variable(name): kind for name, kind in action.parameters.items()}
        tests: list[str] = []
        body: list[str] = []
        changed: set[str] = set()
        for effect in sorted(action.effects, key=lambda effect: effect.holds):
            name, *words = effect.atom
            lines: list[str] = []
            for predicate, add in ((name, effect.holds), ("not_" + name, not effect.holds)):
                if predicate in self.views:
                    changed.add(predicate)
                    lines += [
                        _update(view, [self._value(word, bound) for word in words], add)
                        for view in sorted(self.views[predicate])
                    ]
            if lines and effect.condition != ("and",):
                tests.append(f"    when_{len(tests)} = {self.test(effect.condition, bound)}")
                body.append(f"    if when_{len(tests) - 1}:")
                lines = ["    " + line for line in lines]
            body += ["    " + line for line in lines]
        self.lines += [
            f"def apply_{action.name}({', '.join(['world', *bound])}):",
            *tests,
            *(body or ["    pass"]),
            "",
        ]
        return changed

    def _changes_something(self, action: Action) -> list[Formula]:
        """The condition that an action is more than a repetition of what holds: the planner behind
        the original drops the others.

        Only such repetitions are found that follow from arguments being the same: going to where
          one is.
        """
        known = (
            action.precondition[1:]
            if action.precondition[:1] == ("and",)
            else (action.precondition,)
        )
        repeated: list[Formula] = []
        for effect in action.effects:
            same = [
                _equal(effect.atom, atom)
                for atom in known
                if effect.holds and atom[:1] == effect.atom[:1]
            ]
            if not effect.holds:
                same = [
                    _equal(effect.atom, other.atom)
                    for other in action.effects
                    if other.holds and other.atom[0] == effect.atom[0]
                ]
                same += [
                    _equal(effect.atom, atom[1])
                    for atom in known
                    if atom[0] == "not" and atom[1][0] == effect.atom[0]
                ]
            if not same or effect.condition != ("and",):
                return []
            repeated.append(("or", *same))
        return [("not", ("and", *repeated))] if repeated else []

    # --- formulas ---

    def test(self, formula: Formula, bound: Bound) -> str:
        """A Python expression for a formula whose free variables are all in scope."""
        match formula:
            case ("and", *parts):
                return self._joined(" and ", parts, bound, "True")
            case ("or", *parts):
                return self._joined(" or ", parts, bound, "False")
            case ("not", part):
                return f"not {self.test(part, bound)}"
            case ("=", left, right):
                return f"{self._value(left, bound)} == {self._value(right, bound)}"
            case ("exists", variables, part):
                new = {_variable(name): kind for name, kind in typed_names(variables).items()}
                loops = self._loops([part], bound, tuple(new.items()))
                return "(" + (" or ".join(f"any(True {loop})" for loop in loops) or "False") + ")"
            case ("forall", variables, part):
                return "not " + self.test(("exists", variables, ("not", part)), bound)
            case (name, *words):
                return self._fact(name, [self._value(word, bound) for word in words])
        raise ValueError(f"The formula {formula!r} is not understood.")

    def _joined(self, operator: str, parts: Sequence[Formula], bound: Bound, empty: str) -> str:
        return "(" + (operator.join(self.test(part, bound) for part in parts) or empty) + ")"

    def _loops(
        self, formulas: list[Formula], bound: Bound, new: tuple[tuple[str, str], ...]
    ) -> list[str]:
        """Clauses `for .. if ..` that visit each assignment of the variables `new` under which the
        formulas hold; one string per disjunct.

        Tests come as early as their variables are known; of the facts to loop over, first those
        that share a variable and that change.
        """
        waiting = [part for formula in formulas for part in _conjuncts(formula)]
        for part in waiting:
            if part[0] == "exists":  # its variables join the others
                others = [other for other in waiting if other is not part]
                more = tuple((_variable(name), kind) for name, kind in typed_names(part[1]).items())
                if any(name in bound or (name, kind) in new for name, kind in more):
                    continue  # a name used twice: tested below, in a scope of its own
                return self._loops([*others, part[2]], bound, (*new, *more))
        if any(kind not in self._domain.types for _, kind in new):
            # nothing is of that type: ALFWorld's `(?l - location, ?r - receptacle)` asks for a
            # "location," with a comma
            return []
        types = dict(new)
        scope = dict(bound)
        clauses: list[str] = []
        while True:
            for part in [part for part in waiting if _variables(part) <= scope.keys()]:
                waiting.remove(part)
                clauses.append(f"if {self.test(part, scope)}")
            if all(name in scope for name in types) and not waiting:
                break
            facts = [
                part
                for part in waiting
                if part[0] not in ("and", "or", "not", "exists", "forall", "=")
            ]
            if facts:
                fact = max(
                    facts,
                    key=lambda part: (
                        any(self._known(word, scope) for word in part[1:]),
                        part[0] in self._fluents,
                    ),
                )
                waiting.remove(fact)
                clauses.append(self._loop(fact, scope, types, in_order=False))
                continue
            choice = next((part for part in waiting if part[0] == "or"), None)
            if choice:
                rest = [
                    part
                    for formula in formulas
                    for part in _conjuncts(formula)
                    if part is not choice
                ]
                return [
                    loop for part in choice[1:] for loop in self._loops([part, *rest], bound, new)
                ]
            name = next((name for name in types if name not in scope), None)
            if name is None:
                raise ValueError(f"A variable of {waiting[0]!r} is declared nowhere.")
            scope[name] = types[name]
            self.views.setdefault(f"type_{types[name]}", set()).add(f"type_{types[name]}")
            clauses.append(f"for {name} in world.type_{types[name]}")
        return [_looped(clauses)]

    def _loop(
        self, fact: Formula, scope: Bound, types: Mapping[str, str], *, in_order: bool
    ) -> str:
        """A clause over the facts of one predicate, which takes its unknown variables into
        scope.
        """
        name, *words = fact
        declared = self._domain.predicates[name.removeprefix("not_")]
        known = [self._known(word, scope) for word in words]
        new = [_variable(word) for word, is_known in zip(words, known, strict=True) if not is_known]
        if len(set(new)) != len(new):
            raise ValueError(
                f"A fact about the same unknown thing twice, {fact!r}, is not supported."
            )
        order = (lambda text: f"sorted({text})") if in_order else (lambda text: text)
        if len(words) == 1:
            clause = f"for {new[0]} in {order(self._view(name, name))}"
        elif any(known):
            side = known.index(True)
            view, key = self._view(name, f"{name}_{side}"), self._value(words[side], scope)
            clause = f"for {new[0]} in {order(f'{view}.get({key}, NOTHING)')}"
        else:
            rows = order(self._view(name, f"{name}_0") + ".items()")
            clause = f"for {new[0]}, {new[1]}_s in {rows} for {new[1]} in {order(new[1] + '_s')}"
        for word, kind, is_known in zip(words, declared, known, strict=True):
            if not is_known:
                if _variable(word) not in types:
                    raise ValueError(f"The variable {word!r} of {fact!r} is declared nowhere.")
                if types[_variable(word)] not in (kind, "object"):
                    raise ValueError(
                        f"The predicate {name!r} is of type {kind!r} where {word!r} is of type"
                        f" {types[_variable(word)]!r}."
                    )
                scope[_variable(word)] = types[_variable(word)]
        return clause

    def _fact(self, name: str, values: list[str]) -> str:
        if len(values) == 1:
            return f"{values[0]} in {self._view(name, name)}"
        return f"{values[1]} in {self._view(name, name + '_0')}.get({values[0]}, NOTHING)"

    def _view(self, predicate: str, view: str) -> str:
        plain = predicate.removeprefix("not_")
        arguments = self._domain.predicates.get(plain)
        if arguments is None or not plain.isidentifier():
            raise ValueError(f"Undefined predicate {plain!r} in a text or rule.")
        if len(arguments) not in (1, 2):
            raise ValueError(
                f"The predicate {plain!r} has {len(arguments)} arguments: only one or two are"
                " supported."
            )
        self.views.setdefault(predicate, set()).add(view)
        self._reads.add(predicate)
        return f"world.{view}"

    def _known(self, word: str, scope: Bound) -> bool:
        return not _is_variable(word) or _variable(word) in scope

    def _value(self, word: str, scope: Bound) -> str:
        if not _is_variable(word):
            self.constants.add(word)
            return f"world.constants[{word!r}]"
        if _variable(word) not in scope:
            raise ValueError(f"The variable {word!r} is not known where it is used.")
        return _variable(word)

    # --- texts ---

    def text(self, parts: Sequence[Part], bound: Bound) -> str:
        """A Python expression for a text about the things in scope."""
        return " + ".join(self._part(part, bound) for part in parts) or "''"

    def _part(self, part: Part, bound: Bound) -> str:
        match part:
            case Text(text):
                return repr(text)
            case Show(terms):
                return " + ".join(self._term(term, bound) for term in terms)
            case Call(rule):
                return "world.task" if rule == TASK_RULE else self._rule(rule, bound)
            case Each(inner, given, types, as_list):
                clauses, scope = self._query(given, types, bound)
                word = self._part(inner, scope)
                if scope == bound:  # nothing to look for: the text once, or not at all
                    return (
                        f"({word} if {_tested(clauses)} else {self._empty if as_list else ''!r})"
                        if given
                        else f"({word})"
                    )
                joined = "listing" if as_list else "''.join"
                return f"{joined}([{word} {_looped(clauses)}])"

    def _term(self, term: tuple[str, str] | str, bound: Bound) -> str:
        if isinstance(term, str):
            return repr(term)
        variable, field = term
        if variable not in bound:
            raise ValueError(
                f"A text shows {variable!r}, which is none of {', '.join(bound) or 'nothing'}."
            )
        # every thing is "a", also "a apple 1"
        return f"world.name[{variable}]" if field == "name" else "'a'"

    def _rule(self, name: str, bound: Bound) -> str:
        alternatives = self._grammar.rules.get(name, ())
        text = ""
        for alternative in alternatives:
            if not alternative.given:
                return f"({text}{self.text(alternative.parts, bound)})"
            clauses, scope = self._query(alternative.given, alternative.types, bound)
            test = _tested(clauses) if scope == bound else f"any(True {_looped(clauses)})"
            text += f"{self.text(alternative.parts, bound)} if {test} else "
        raise ValueError(
            f"The rule {name!r} of the grammar is missing, or has no text for when none of its"
            " conditions holds."
        )

    def _query(
        self, given: Sequence[Formula], types: Mapping[str, str], bound: Bound
    ) -> tuple[list[str], Bound]:
        """Clauses over all matches, in the order of the ids, and what is in scope inside. Different
        variables are different things.
        """
        scope = dict(bound)
        clauses: list[str] = []
        for variable, kind in types.items():
            if bound.get(variable, kind) != kind:
                raise ValueError(
                    f"The grammar takes {variable!r} for a thing of type {kind!r}, the rules for"
                    f" one of type {bound[variable]!r}."
                )
        for fact in given:
            name, *words = fact
            if len(self._domain.predicates.get(name.removeprefix("not_"), ())) != len(words):
                raise ValueError(
                    f"The grammar asks for {fact!r}, which is no predicate of the domain with"
                    f" {len(words)} arguments."
                )
            new = [word for word in words if word not in scope]
            if not new:
                clauses.append(f"if {self._fact(name, words)}")
                continue
            others = dict(scope)
            clauses.append(
                self._loop((name, *("?" + word for word in words)), scope, types, in_order=True)
            )
            clauses += [
                f"if {word} != {other}"
                for word in new
                for other, kind in others.items()
                if kind == types[word]
            ]
        return clauses, scope

    def _fixed(self, name: str) -> str:
        alternatives = self._grammar.rules.get(name, ())
        if (
            not alternatives
            or alternatives[0].given
            or not all(isinstance(part, Text) for part in alternatives[0].parts)
        ):
            raise ValueError(f"The rule {name!r} of the grammar must be one fixed text.")
        return "".join(part.text for part in alternatives[0].parts if isinstance(part, Text))


def _update(view: str, values: list[str], add: bool) -> str:
    """A statement that adds a fact to one of its indexes, or takes it out."""
    if not view.endswith(("_0", "_1")):
        return f"world.{view}.{'add' if add else 'discard'}({values[0]})"
    key, value = values if view.endswith("_0") else reversed(values)
    if add:
        return f"world.{view}.setdefault({key}, set()).add({value})"
    return f"world.{view}.get({key}, set()).discard({value})"


def _looped(clauses: Sequence[str]) -> str:
    """The clauses as the tail of a comprehension, which must start with a loop."""
    return " ".join(
        clauses if clauses and clauses[0].startswith("for ") else ["for _ in (0,)", *clauses]
    )


def _tested(clauses: Sequence[str]) -> str:
    """Clauses that are all tests, as one test."""
    return " and ".join(clause.removeprefix("if ") for clause in clauses)


def _conjuncts(formula: Formula) -> list[Formula]:
    return (
        [inner for part in formula[1:] for inner in _conjuncts(part)]
        if formula[:1] == ("and",)
        else [formula]
    )


def _is_variable(word: str) -> bool:
    return word.startswith("?")


def _variable(word: str) -> str:
    """The Python name of `?o1`."""
    name = word.removeprefix("?") + "_"
    if not name.isidentifier():
        raise ValueError(f"The variable {word!r} is no plain name.")
    return name[:-1] if name[:-1] not in ("world", "listing") else name


def _variables(formula: Formula) -> set[str]:
    """The free variables of a formula."""
    if formula[0] in ("exists", "forall"):
        return _variables(formula[2]) - {_variable(name) for name in typed_names(formula[1])}
    found = set()
    for part in formula[1:]:
        found |= (
            _variables(part)
            if isinstance(part, tuple)
            else {_variable(part)}
            if _is_variable(part)
            else set()
        )
    return found


def _equal(left: Formula, right: Formula) -> Formula:
    """The condition under which two atoms of one predicate are the same fact."""
    return ("and", *(("=", a, b) for a, b in zip(left[1:], right[1:], strict=True) if a != b))
