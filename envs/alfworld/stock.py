"""The stock engine (TextWorld with fast-downward), as `alfworld.agents.environment.AlfredTWEnv`
sets it up, without an expert: the oracle.

It plays ONE game per process: its parsers and its planner are process-wide, and it is not
thread-safe. A second open engine is refused. Its unbounded cache of logic objects is emptied with
every game, `sys.argv` is put back, and the planner's library (34 MB, which the original copies and
loads anew for every environment) is loaded once per process. Importing this module imports
TextWorld, tatsu and fast-downward; nothing else of `envs` does.
"""

import contextlib
import copy
import functools
import json
import os
import pathlib
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from envs.alfworld.engine import Answer

_FIELDS = ("pddl_domain", "grammar", "pddl_problem", "walkthrough", "solvable")
_open_engines: list["StockEngine"] = []


@contextlib.contextmanager
def _quiet_import():
    """alfworld makes a folder for its data and sets ALFWORLD_DATA when it is imported: let it do so
    in a folder that goes away.
    """
    before = os.environ.get("ALFWORLD_DATA")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ALFWORLD_DATA"] = folder
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("ALFWORLD_DATA", None)
            else:
                os.environ["ALFWORLD_DATA"] = before


try:
    with _quiet_import():
        import fast_downward
        import mementos.core
        import textworld
        import textworld.logic
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
        from textworld.envs.pddl import textgen
        from textworld.gym.envs.textworld_batch import TextworldBatchGymEnv
except ImportError as error:
    raise ImportError(
        f"The stock ALFWorld engine needs the packages alfworld and textworld[pddl] ({error}):"
        " install ictjax again."
    ) from error


class StockEngine:
    """The stock environment; a context manager. `load` gives a live game that lasts until the next
    `load`.

    `cached` keeps what the original works out again and again with the same result: the translation
    of the present game from PDDL, the text of every command of it (which depends on constant facts
    alone), parsed queries and texts. `envs.alfworld.differential --stock plain` plays without.
    Raises RuntimeError when the process has an open one already.
    """

    def __init__(self, *, cached: bool = False):
        if _open_engines:
            raise RuntimeError(
                "The stock ALFWorld engine plays one game per process: close the open one first, or"
                " use engine='python'."
            )
        self._cached = cached
        self._folder = tempfile.TemporaryDirectory(prefix="alfworld-stock-")
        self._file = pathlib.Path(self._folder.name) / "game.tw-pddl"
        self._env: Any = None
        _open_engines.append(self)

    def __enter__(self) -> "StockEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, game: Mapping[str, Any]) -> "StockGame":
        """Loads the content of a `game.tw-pddl`, in seconds."""
        _forget()
        with self._file.open("w") as file:
            json.dump({field: game[field] for field in _FIELDS if field in game}, file)
        with self._contained():
            if self._env is None:
                infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
                wrappers: Any = [AlfredDemangler(shuffle=False), AlfredInfos]
                self._env = TextworldBatchGymEnv(
                    [str(self._file)], infos, batch_size=1, asynchronous=False, wrappers=wrappers
                )
            self._env.batch_env.load([str(self._file)])
            if self._cached:
                logic = self._planner._logic
                logic.grammar.derive = _keep_commands(
                    logic.grammar.derive, {action.template for action in logic.actions.values()}
                )
        return StockGame(self)

    def reset(self) -> Answer:
        """Starts the loaded game."""
        with self._contained():
            texts, infos = self._env.batch_env.reset()
        return Answer(texts[0], tuple(infos["admissible_commands"][0]), bool(infos["won"][0]))

    def step(self, command: str) -> tuple[Answer, float, bool]:
        """Plays one command; also gives the score, which is cumulative, and whether the game is
        done.
        """
        with self._contained():
            texts, scores, dones, infos = self._env.batch_env.step([command])
        return (
            Answer(texts[0], tuple(infos["admissible_commands"][0]), bool(infos["won"][0])),
            float(scores[0]),
            bool(dones[0]),
        )

    def close(self) -> None:
        """Frees the game and removes the temporary folder; the planner's library stays for the next
        engine. Idempotent.
        """
        if self not in _open_engines:
            return
        _open_engines.remove(self)
        self._env = None
        _forget()
        self._folder.cleanup()

    @property
    def _planner(self) -> Any:
        """The innermost environment, a PddlEnv."""
        return self._env.batch_env.envs[0].unwrapped

    @contextlib.contextmanager
    def _contained(self):
        """Keeps the traces of a load or reset inside: the original sets `sys.argv`, leaves files
        open, and copies its library every time.
        """
        argv = sys.argv
        originals = (
            fast_downward.load_lib,
            fast_downward.pddl2sas,
            textgen.Rule,
            textgen._parse_and_convert,
        )
        fast_downward.load_lib = _library
        if self._cached:
            fast_downward.pddl2sas, textgen.Rule, textgen._parse_and_convert = (
                _last_translation,
                _RULE,
                _parsed,
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                yield
        finally:
            sys.argv = argv
            (
                fast_downward.load_lib,
                fast_downward.pddl2sas,
                textgen.Rule,
                textgen._parse_and_convert,
            ) = originals


def _forget():
    mementos.core._memento_cache.clear()
    for kept in (_parsed_query, _parsed_text, _last_translation):
        kept.cache_clear()


class StockGame:
    """The loaded game of a StockEngine, with the interface of `envs.alfworld.engine.LiveGame`."""

    def __init__(self, engine: StockEngine):
        self._engine = engine
        self.score = 0.0  # the original's, cumulative: 1 from the win on
        self.done = False

    def reset(self) -> Answer:
        """Starts the game."""
        self.score, self.done = 0.0, False
        return self._engine.reset()

    def step(self, command: str) -> Answer:
        """Plays one command. After the win the last answer is repeated."""
        answer, self.score, self.done = self._engine.step(command)
        return answer


# --- what `cached` keeps ---

_translate, _parse = fast_downward.pddl2sas, textgen._parse_and_convert
_library = functools.cache(fast_downward.load_lib)  # one for the process: unloading it crashes


@functools.lru_cache(maxsize=2)  # the present game, once to play it and once to plan
def _last_translation(domain: str, problem: str, verbose: bool = False, optimize: bool = False):
    return _translate(domain, problem, verbose=verbose, optimize=optimize)


_parsed_query = functools.lru_cache(maxsize=1024)(textworld.logic.Rule.parse_conjunctive_query)
# all that the texts need of the class
_RULE: Any = types.SimpleNamespace(parse_conjunctive_query=_parsed_query)


@functools.lru_cache(maxsize=1024)
def _parsed_text(text: str, **options: Any):
    return _parse(text, **options)


def _parsed(text: str, **options: Any):
    # the original hangs a context on each symbol
    return copy.deepcopy(_parsed_text(text, **options))


def _keep_commands(derive: Callable[..., str], templates: set[str]) -> Callable[..., str]:
    """`derive` with the results for command templates kept, by action and arguments."""
    kept: dict[tuple, str] = {}

    def derive_once(start: str, context: Mapping[str, Any]) -> str:
        if start not in templates:
            return derive(start, context)
        key = (start, *(variable.name for variable in context["mapping"].values()))
        if key not in kept:
            kept[key] = derive(start, context)
        return kept[key]

    return derive_once
