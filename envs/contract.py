"""The contract of an environment, as a test that it can run on itself: `python -m envs.contract
package.module:Class`.

Every rule below is one that training relies on: a game that breaks it gives wrong rewards, or ends
as FAILED in the middle of a run.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from envs import wire
from envs.api import Environment, Game, GameId, Observation, Outcome, PoolEvent, Step
from envs.pool import WorkerPool
from envs.registry import load_environment, nearest

SPLITS = ("train", "select", "test")
JUNK = (
    "",
    " \t",
    "\x00",
    "no such thing",
    "n\xe6\u2603\U0001f9ca \u202e",
    "\ud800",  # what a broken byte decodes to: no encoder takes it
    "one\ntwo",
    "\x1b[2J",
    "%s {0} \\",
    "x" * 10_000_000,
)

_MAX_JUNK_ANSWER = 100_000  # characters: an answer that repeats 10 MB would fill any context
_WAIT_S = 120.0
_MAX_ERROR_CHARS = 300


class ContractError(ValueError):
    """An environment breaks rules of the contract; `report` has all that was checked."""

    def __init__(self, report: "Report"):
        broken = [f"{v.rule} ({v.family}): {v.message}" for v in report.violations]
        rules = len({v.rule for v in report.violations})
        super().__init__(
            f"{report.environment} breaks {rules} rule{'s' * (rules > 1)} of the contract. "
            + " ".join(broken)
        )
        self.report = report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Violation:
    """One rule that one family breaks."""

    rule: str
    family: str
    message: str  # one sentence that names the game


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What was checked: how many comparisons stand behind each rule, what could not be checked, and
    what is broken.
    """

    environment: str
    families: tuple[str, ...]
    comparisons: Mapping[str, int]  # per rule
    notes: tuple[str, ...]
    violations: tuple[Violation, ...]
    seconds: float


class _Broken(Exception):
    """A rule is broken; the text says how."""


@dataclasses.dataclass(kw_only=True)
class _Case:
    """One family of one environment under test."""

    name: str  # of the environment, as a worker finds it
    options: Mapping[str, str]
    environment: Environment
    family: str
    num_games: int
    num_steps: int
    seed: int
    solve: Callable[[GameId], Sequence[str]] | None
    comparisons: int = 0  # of the rule that is being checked
    notes: list[str] = dataclasses.field(default_factory=list)

    def games(self, split: str = "train", count: int | None = None) -> list[GameId]:
        return list(
            self.environment.games(self.family, split)[: self.num_games if count is None else count]
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[Game]:
        game = self.environment.open(self.family)
        try:
            yield game
        finally:
            game.close()

    def equal(self, game: GameId, what: str, got: Any, expected: Any) -> None:
        """Compares two transcripts, or anything else."""
        self.comparisons += 1
        if got == expected:
            return
        at = ""
        if isinstance(got, list) and isinstance(expected, list):
            index = next(
                (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b),
                min(len(got), len(expected)),
            )
            at = f" at {f'action {index}' if index else 'the reset'}"
            got, expected = (
                transcript[index] if index < len(transcript) else "nothing"
                for transcript in (got, expected)
            )
            if isinstance(got, str) and isinstance(expected, str):
                same = next(
                    (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), 0
                )
                start = max(0, same - 30)
                got, expected = got[start : start + 80], expected[start : start + 80]
        raise _Broken(f"{game} {what}{at}: {_short(got)} where {_short(expected)} was expected")

    def require(self, game: GameId, holds: bool, message: str) -> None:
        self.comparisons += 1
        if not holds:
            raise _Broken(f"{game} {message}")


def check_environment(
    name: str,
    *,
    options: Mapping[str, str] = MappingProxyType({}),
    families: Sequence[str] = (),
    rules: Sequence[str] = (),
    num_games: int = 4,
    num_steps: int = 12,
    seed: int = 0,
    solve: Callable[[GameId], Sequence[str]] | None = None,
) -> Report:
    """Checks an environment against the contract.

    Args:
      name: short name or import path, see `envs.registry.load_environment`.
      options: keyword arguments of the environment.
      families: which to check; all by default.
      rules: which of `RULES` to check; all by default.
      num_games: games per family and split that are played.
      num_steps: actions per game, drawn from the actions it offers (a few words where it offers
        none).
      seed: of the drawn actions.
      solve: the actions that win a game. Without it, wins are checked only where drawn actions
        happen to win.
    Returns:
      What was checked, when no rule is broken.
    Raises:
      ContractError: a rule is broken; every broken rule is named with the game.
      ValueError: there is no such environment, family or rule.
    """
    started = time.monotonic()
    environment = load_environment(name, options)
    for family in families:
        if family not in environment.families:
            raise ValueError(
                f"Unknown family {family!r} of {name!r}: use some of"
                f" {nearest(family, environment.families)}."
            )
    for rule in rules:
        if rule not in RULES:
            raise ValueError(f"Unknown rule {rule!r}: use some of {', '.join(RULES)}.")
    if num_games < 2 or num_steps < 2:
        raise ValueError(
            f"num_games and num_steps must be at least 2, got {num_games} and {num_steps}."
        )
    violations, notes = [], []
    comparisons = dict.fromkeys(rules or RULES, 0)
    for family in families or environment.families:
        case = _Case(
            name=name,
            options=options,
            environment=environment,
            family=family,
            num_games=num_games,
            num_steps=num_steps,
            seed=seed,
            solve=solve,
        )
        for rule in comparisons:
            case.comparisons = 0
            try:
                RULES[rule](case)
            except _Broken as broken:
                violations.append(Violation(rule=rule, family=family, message=f"{broken}."))
            except Exception as error:
                raised = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_ERROR_CHARS]
                violations.append(
                    Violation(
                        rule=rule, family=family, message=f"a game of {family} raised {raised}."
                    )
                )
            comparisons[rule] += case.comparisons
        notes += case.notes
    report = Report(
        environment=name,
        families=tuple(families or environment.families),
        comparisons=comparisons,
        notes=tuple(notes),
        violations=tuple(violations),
        seconds=time.monotonic() - started,
    )
    if violations:
        raise ContractError(report)
    return report


def play_script(game: Game, game_id: GameId, actions: Sequence[str]) -> list[str]:
    """The transcript of one episode, an encoded step per call, the reset and its state hash first;
    it ends with the episode.
    """
    transcript = [wire.encode_step(Step(observation=game.reset(game_id)), game.state_hash())]
    for action in actions:
        step = game.step(action)
        transcript.append(wire.encode_step(step))
        if step.outcome is not None:
            break
    return transcript


def _names(case: _Case) -> None:
    """Unknown families, splits and foreign ids are refused by a ValueError; observations and steps
    have the right types.
    """
    first = case.games()[0]
    missing = "no such family"
    for what, call in (
        ("games of an unknown family", lambda: case.environment.games(missing, "train")),
        ("games of an unknown split", lambda: case.environment.games(case.family, "no such split")),
        ("open of an unknown family", lambda: case.environment.open(missing)),
    ):
        case.require(first, _refuses(call), f"has an environment whose {what} raises no ValueError")
    with case.open() as game:
        for field in ("env", "family"):
            foreign = dataclasses.replace(first, **{field: "another"})
            case.require(
                foreign,
                _refuses(lambda foreign=foreign: game.reset(foreign)),
                "is of another environment or family, and is played",
            )
        observation = game.reset(first)
        case.require(
            first,
            _is_observation(observation),
            f"starts with {_short(observation)}, not with an Observation of text and actions",
        )
        step = game.step(_actions_of(observation)[0])
        case.require(
            first,
            isinstance(step, Step) and _is_observation(step.observation),
            f"answers an action with {_short(step)}",
        )
        digest = game.state_hash()
        case.require(
            first,
            isinstance(digest, str) and bool(digest),
            f"has the state hash {_short(digest)}, not a hex digest",
        )


def _splits(case: _Case) -> None:
    """Splits are disjoint, by id and by initial state; every split has games of this family, each
    once.
    """
    seen: dict[GameId, str] = {}
    states: dict[str, GameId] = {}
    with case.open() as live:
        for split in SPLITS:
            games = case.environment.games(case.family, split)
            if not games:
                raise _Broken(f"the split {split} has no games")
            for game in games:
                belongs = isinstance(game, GameId) and (game.env, game.family) == (
                    case.environment.name,
                    case.family,
                )
                case.require(
                    game, belongs, f"is listed as a game of {case.environment.name}|{case.family}"
                )
                case.require(
                    game, game not in seen, f"stands in the splits {seen.get(game)} and {split}"
                )
                seen[game] = split
            for game in games[: case.num_games]:
                live.reset(game)
                other = states.setdefault(live.state_hash(), game)
                same = seen[other] == split
                case.require(
                    game,
                    same,
                    f"({split}) has the same initial state as {other} ({seen[other]}): divide the"
                    " splits by state",
                )


def _order(case: _Case) -> None:
    """The games of a split come in the same order every time, also in a newly built environment."""
    other = load_environment(case.name, case.options)
    for split in SPLITS:
        games = list(case.environment.games(case.family, split))
        for again in (case.environment, other):
            case.equal(
                games[0],
                f"leads the split {split}, whose order changes",
                [*map(str, again.games(case.family, split))],
                [*map(str, games)],
            )


def _determinism(case: _Case) -> None:
    """The same id gives the same texts on a used and on a fresh game, and while another game is
    played in between.
    """
    games = case.games()
    with case.open() as live, case.open() as other:
        for game, neighbour in zip(games, [*games[1:], games[0]], strict=True):
            actions = _script(case, game)
            expected = play_script(live, game, actions)
            case.equal(game, "differs the second time", play_script(live, game, actions), expected)
            with case.open() as fresh:
                case.equal(
                    game,
                    "differs on a freshly opened game",
                    play_script(fresh, game, actions),
                    expected,
                )
            interleaved = [wire.encode_step(Step(observation=live.reset(game)), live.state_hash())]
            other.reset(neighbour)
            for action in actions[: len(expected) - 1]:
                other.step(action)
                interleaved.append(wire.encode_step(live.step(action)))
            case.equal(
                game, f"differs while {neighbour} is played beside it", interleaved, expected
            )


def _fresh(case: _Case) -> None:
    """A reset in the middle of an episode, or after its end, leaves nothing of it behind; a batch
    holds different games.
    """
    games = case.games(count=2 * case.num_games)
    half = len(games) // 2
    digests = []
    with case.open() as live:
        for game in games:
            with case.open() as unused:
                expected = play_script(unused, game, actions := _script(case, game))
            case.equal(
                game,
                "differs on a live game that has played another one",
                play_script(live, game, actions),
                expected,
            )
            digests.append(live.state_hash())
            live.reset(games[0])
            for action in actions[:2]:
                live.step(action)
    distinct = len(set(digests))
    case.require(
        games[0],
        distinct > half,
        f"and the {len(games) - 1} games after it have only {distinct} different initial states",
    )


def _state_hash(case: _Case) -> None:
    """The hash names the initial state: equal for equal ids, the same until the next reset,
    different for most ids.
    """
    games = case.games(count=2 * case.num_games)
    with case.open() as live, case.open() as other:
        digests = []
        for game in games:
            actions = _script(case, game)
            live.reset(game)
            digest = live.state_hash()
            other.reset(game)
            case.equal(
                game, "has another state hash on another live game", other.state_hash(), digest
            )
            if live.step(actions[0]).outcome is None:
                live.step(actions[1])
            case.equal(game, "has another state hash after some actions", live.state_hash(), digest)
            digests.append(digest)
    distinct = len(set(digests))
    case.require(
        games[0],
        distinct > len(games) // 2,
        f"and the {len(games) - 1} games after it have only {distinct} different state hashes",
    )


def _processes(case: _Case) -> None:
    """Another process, with another PYTHONHASHSEED and another working folder, lists the same games
    and tells the same texts.
    """
    games = case.games()
    scripts = [(game, _script(case, game)) for game in games]
    request = {
        "environment": case.name,
        "options": dict(case.options),
        "sys_path": [os.path.abspath(path) for path in sys.path],
        "family": case.family,
        "scripts": [[str(game), actions] for game, actions in scripts],
    }
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    environ = {**os.environ, "PYTHONHASHSEED": "4242"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from envs.contract import _answer; _answer()"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environ,
        cwd=os.sep,
        timeout=_WAIT_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if done.returncode or not lines:
        complaint = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise _Broken(
            f"another process could not play {games[0]}: it ended with exit code {done.returncode}"
            f" and {_short(complaint)}"
        )
    answer = json.loads(lines[-1].removeprefix(_ANSWER))
    for split in SPLITS:
        listed = [str(game) for game in case.environment.games(case.family, split)]
        case.equal(
            games[0],
            f"is of the split {split}, whose order differs in another process",
            answer["games"][split],
            listed,
        )
    with case.open() as live:
        for (game, actions), other in zip(scripts, answer["transcripts"], strict=True):
            case.equal(game, "differs in another process", other, play_script(live, game, actions))


_ANSWER = "envs.contract answers "


def _answer() -> None:
    """The other process of `_processes`: reads the request from stdin and writes a line of JSON."""
    request = json.load(sys.stdin)
    sys.path.extend(path for path in request["sys_path"] if path not in sys.path)
    environment = load_environment(request["environment"], request["options"])
    games = {
        split: [str(game) for game in environment.games(request["family"], split)]
        for split in SPLITS
    }
    live = environment.open(request["family"])
    transcripts = [
        play_script(live, GameId.parse(game), actions) for game, actions in request["scripts"]
    ]
    live.close()
    sys.stdout.write(f"\n{_ANSWER}{json.dumps({'games': games, 'transcripts': transcripts})}\n")


def _replay(case: _Case) -> None:
    """Games whose worker is killed in the middle go on in another one with the same texts."""
    games = case.games()
    scripts = {game: _script(case, game) for game in games}
    with case.open() as live:
        expected = {game: play_script(live, game, scripts[game]) for game in games}
    with WorkerPool(case.name, num_workers=1, options=case.options) as pool:
        tickets = {pool.reset(game, max_steps=10**6): game for game in games}
        got: dict[GameId, list[str]] = {game: [] for game in games}
        killed = False
        waiting = set(tickets)
        while waiting:
            for event in _wait(pool, len(waiting)):
                game = tickets[event.ticket]
                if event.step.outcome is Outcome.FAILED:
                    raise _Broken(event.step.error.removesuffix("."))
                got[game].append(wire.encode_step(event.step, event.state_hash))
            waiting = {
                ticket for ticket, game in tickets.items() if len(got[game]) < len(expected[game])
            }
            if (
                not killed
                and len(got[games[0]]) > min(len(texts) for texts in expected.values()) // 2
            ):
                killed = True
                for pid in pool.worker_pids:
                    os.kill(pid, signal.SIGKILL)
            for ticket in waiting:
                game = tickets[ticket]
                pool.step(ticket, scripts[game][len(got[game]) - 1])
        for game in games:
            case.equal(game, "differs after its worker was killed", got[game], expected[game])
        if not pool.stats.replays:
            case.notes.append(
                f"replay ({case.family}): every game ended before its worker could be killed; more"
                " steps would help."
            )


def _outcome(case: _Case) -> None:
    """Rewards and outcomes agree, on the step that earns them; after the end the outcome repeats
    and earns nothing.
    """
    ends = dict.fromkeys(Outcome, 0)
    with case.open() as live:
        for split in SPLITS:
            for game in case.games(split):
                scripts = [_script(case, game, steps=4 * case.num_steps)]
                if case.solve is not None:
                    scripts.append(list(case.solve(game)))
                for number, actions in enumerate(scripts):
                    end = _check_episode(case, live, game, actions)
                    if end is not None:
                        ends[end] += 1
                    case.require(
                        game,
                        not number or end is Outcome.SUCCESS,
                        f"is not won by the actions that should solve it (outcome: {end})",
                    )
    if not ends[Outcome.SUCCESS]:
        case.notes.append(
            f"outcome ({case.family}): no game was won, so wins are not checked; give `solve`."
        )


def _check_episode(case: _Case, live: Game, game: GameId, actions: Sequence[str]) -> Outcome | None:
    live.reset(game)
    for number, action in enumerate(actions, 1):
        step = live.step(action)
        where = f"at action {number} ({_short(action)})"
        case.require(
            game,
            step.outcome is None or isinstance(step.outcome, Outcome),
            f"has the outcome {step.outcome!r} {where}",
        )
        number = isinstance(step.reward, int | float) and abs(step.reward) <= wire.MAX_REWARD
        case.require(
            game,
            number,
            f"has the reward {_short(step.reward)} {where}, no number from {-wire.MAX_REWARD:g} to"
            f" {wire.MAX_REWARD:g}",
        )
        case.require(
            game,
            step.outcome is not Outcome.STEP_LIMIT,
            f"has a step limit of its own {where}: the pool sets limits",
        )
        case.require(
            game,
            step.outcome is not Outcome.FAILED or bool(step.error),
            f"failed {where} without an error",
        )
        if step.outcome is Outcome.SUCCESS:
            case.require(game, step.reward > 0, f"is won {where} with the reward {step.reward}")
        elif step.outcome is not None:
            case.require(
                game,
                step.reward <= 0,
                f"ends as {step.outcome} {where} with the reward {step.reward}",
            )
        if step.outcome is None:
            continue
        for _ in range(2):
            again = live.step(action)
            case.equal(
                game,
                "has another outcome when it is played on after its end",
                again.outcome,
                step.outcome,
            )
            case.equal(game, "is rewarded again after its end", float(again.reward), 0.0)
        return step.outcome
    return None


def _junk(case: _Case) -> None:
    """Whatever a model may write is answered by a text: it never raises, wins nothing and is not
    repeated at length.
    """
    game = case.games()[0]
    with case.open() as live:
        for junk in JUNK:
            live.reset(game)
            try:
                step = live.step(junk)
            except Exception as error:
                raise _Broken(
                    f"{game} raised {type(error).__name__} on the action {_short(junk)}"
                ) from error
            good = isinstance(step, Step) and _is_observation(step.observation)
            case.require(
                game,
                good and bool(step.observation.text.strip()),
                f"answers the action {_short(junk)} without a text",
            )
            case.require(
                game,
                len(step.observation.text) < _MAX_JUNK_ANSWER,
                f"repeats the action {_short(junk)} at length",
            )
            case.require(
                game, step.outcome is not Outcome.SUCCESS, f"is won by the action {_short(junk)}"
            )
            case.require(
                game,
                step.outcome is not Outcome.FAILED,
                f"fails on the action {_short(junk)}: {step.error}",
            )
        expected = [_play_junk(live, game), _play_junk(live, game)]
        case.equal(game, "answers junk differently the second time", expected[1], expected[0])


def _play_junk(live: Game, game: GameId) -> list[str]:
    return play_script(live, game, [junk for junk in JUNK if len(junk) < 1000])


def _close(case: _Case) -> None:
    """A game can be closed twice, before its first reset too, and closing one leaves the others
    alone.
    """
    game = case.games()[0]
    unused, closed, other = (case.environment.open(case.family) for _ in range(3))
    expected = play_script(other, game, _script(case, game))
    closed.reset(game)
    for live in (unused, unused, closed, closed):
        try:
            live.close()
        except Exception as error:
            raise _Broken(
                f"{game} raised {type(error).__name__} when it was closed, or closed again"
            ) from error
    case.equal(
        game,
        "differs after another live game was closed",
        play_script(other, game, _script(case, game)),
        expected,
    )
    other.close()


RULES: Mapping[str, Callable[[_Case], None]] = MappingProxyType(
    {
        "names": _names,
        "splits": _splits,
        "order": _order,
        "determinism": _determinism,
        "fresh": _fresh,
        "state_hash": _state_hash,
        "processes": _processes,
        "replay": _replay,
        "outcome": _outcome,
        "junk": _junk,
        "close": _close,
    }
)


def _script(case: _Case, game: GameId, steps: int | None = None) -> list[str]:
    """Actions for a game, drawn by its id from what it offers along the way; a game that ends early
    has a short script.
    """
    rng = random.Random(f"{case.seed} {game}")
    actions = []
    with case.open() as live:
        observation = live.reset(game)
        for _ in range(case.num_steps if steps is None else steps):
            actions.append(rng.choice(_actions_of(observation)))
            step = live.step(actions[-1])
            if step.outcome is not None:
                break
            observation = step.observation
    return [*actions, *actions[:1]] if len(actions) < 2 else actions


def _actions_of(observation: Observation) -> Sequence[str]:
    return observation.actions or (
        "look",
        "wait",
        "inventory",
        "go north",
        "go east",
        "go south",
        "go west",
    )


def _wait(pool: WorkerPool, count: int) -> list[PoolEvent]:
    events: list[PoolEvent] = []
    until = time.monotonic() + _WAIT_S
    while len(events) < count:
        if time.monotonic() > until:
            raise _Broken(f"the pool gave no answer within {_WAIT_S:g} s")
        events += pool.poll(1.0)
    return events


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except ValueError:
        return True
    except Exception:
        return False
    return False


def _is_observation(value: object) -> bool:
    return (
        isinstance(value, Observation)
        and isinstance(value.text, str)
        and isinstance(value.actions, tuple)
        and all(isinstance(action, str) and action for action in value.actions)
    )


def _short(value: object) -> str:
    text = (
        repr(value)
        if not isinstance(value, str) or len(value) < 1000
        else repr(value[:40]) + f" ({len(value)} characters)"
    )
    return text if len(text) <= 160 else text[:157] + "..."


def demand(rule: str) -> str:
    """What a rule demands, in one line."""
    return " ".join((RULES[rule].__doc__ or "").split())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: exit code 0 when all rules hold, 1 when one is broken, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m envs.contract",
        description="Checks an environment against the contract of envs.api.",
    )
    parser.add_argument("environment", help="short name, or package.module:Class")
    parser.add_argument("--families", nargs="*", default=[], help="which to check (default: all)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the environment; may be given again",
    )
    parser.add_argument(
        "--rules", nargs="*", default=[], help=f"some of {', '.join(RULES)} (default: all)"
    )
    parser.add_argument(
        "--games",
        type=int,
        default=4,
        help="games per family and split that are played (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=12, help="actions per game (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the drawn actions (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    violations: tuple[Violation, ...] = ()
    try:
        pairs = [option.partition("=") for option in args.option]
        if bad := [
            option for option, (_, equals, _) in zip(args.option, pairs, strict=True) if not equals
        ]:
            raise ValueError(f"--option takes KEY=VALUE, got {bad[0]!r}.")
        report = check_environment(
            args.environment,
            options={key: value for key, _, value in pairs},
            families=args.families,
            rules=args.rules,
            num_games=args.games,
            num_steps=args.steps,
            seed=args.seed,
        )
    except ContractError as error:
        report, violations = error.report, error.report.violations
    except ValueError as error:
        sys.stderr.write(f"ictjax: {error}\n")
        return 2
    broken = {violation.rule for violation in violations}
    for rule, count in report.comparisons.items():
        state = "BROKEN" if rule in broken else "holds "
        sys.stdout.write(f"{rule:12} {state} {count:6} comparisons   {demand(rule)}\n")
    for violation in violations:
        sys.stdout.write(f"\n{violation.rule} ({violation.family}): {violation.message}\n")
    for note in report.notes:
        sys.stdout.write(f"note: {note}\n")
    verdict = (
        f"breaks {len(broken)} of {len(report.comparisons)} rules"
        if broken
        else f"keeps all {len(report.comparisons)} rules"
    )
    sys.stdout.write(
        f"{report.environment} {verdict}: {len(report.families)}"
        f" {'families' if len(report.families) > 1 else 'family'}, {report.seconds:.1f} s.\n"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
