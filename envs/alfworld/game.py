"""One live, re-seedable ALFWorld game: `envs.api.Game` over the engine of choice.

Engines: "python" (`envs.alfworld.engine`, the default) and "textworld" (`envs.alfworld.stock`, the
original, hundreds of times slower, one per process). Styles: "full" is the official wording, with
the admissible commands as `Observation.actions`; "short" and "compact" are
`envs.alfworld.short.ShortText` and `envs.alfworld.compact.CompactText` over it, without a list of
actions. Modules that only one engine or style needs are imported when it
is asked for.
"""

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from envs.alfworld.engine import Answer, CompiledGame, compile_game
from envs.api import GameId, Observation, Outcome, Step

ENGINES = ("python", "textworld")
STYLES = ("full", "short", "compact")


def playable(game: GameId, content: Mapping[str, Any]) -> CompiledGame:
    """The compiled game. Raises ValueError, naming the game, when its content is damaged or of
    another version.
    """
    try:
        return compile_game(content)
    except ValueError as error:
        raise ValueError(f"The game {game} cannot be played: {error}") from error


class AlfworldGame:
    """A live game of one family; implements `envs.api.Game`. `load` gives the content of the game
    file behind a key, or raises ValueError; `compiled`, if given, the game compiled from it
    (`playable` is the default), so that games which share it compile a replayed one once.

    `names` is what the short style calls verbs and tasks (`envs.alfworld.short.renaming`).

    With engine="textworld" a pool needs `max_live_games` equal to `num_workers`: a second game in
    one process raises RuntimeError.
    """

    def __init__(
        self,
        family: str,
        load: Callable[[str], Mapping[str, Any]],
        *,
        style: str = "full",
        engine: str = "python",
        compiled: Callable[[GameId], CompiledGame] | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ):
        if style not in STYLES:
            raise ValueError(f"Unknown text style {style!r}; the styles are: {', '.join(STYLES)}.")
        if engine not in ENGINES:
            raise ValueError(
                f"Unknown ALFWorld engine {engine!r}; the engines are: {', '.join(ENGINES)}."
            )
        self._family = family
        self._load = load
        self._compile = compiled or (lambda game: playable(game, load(game.key)))
        self._names = names
        self._compact_text = (
            importlib.import_module("envs.alfworld.compact").CompactText
            if style == "compact"
            else None
        )
        self._short_text = (
            importlib.import_module("envs.alfworld.short").ShortText if style == "short" else None
        )
        self._stock = (
            importlib.import_module("envs.alfworld.stock").StockEngine()
            if engine == "textworld"
            else None
        )
        self._live = None
        self._compiled: CompiledGame | None = None
        self._compact = self._short = None
        self._answer = Answer("", (), False)

    def reset(self, game: GameId) -> Observation:
        """Starts the game. The text holds the welcome, the room and the task. Raises ValueError for
        an id of another environment or family.
        """
        if game.env != "alfworld" or game.family != self._family:
            raise ValueError(f"{game} is no game of the family 'alfworld|{self._family}'.")
        self._compiled = self._compile(game)
        self._live = (
            self._stock.load(self._load(game.key)) if self._stock else self._compiled.start()
        )
        self._answer = self._live.reset()
        if self._compact_text:
            self._compact = self._compact_text(self._answer.text, self._answer.commands)
        if self._short_text:
            self._short = self._short_text(self._answer, self._live.step, self._names)
        return self._observation()

    def step(self, action: str) -> Step:
        """Plays one action. After the win the last answer is repeated, without another reward."""
        if self._live is None:
            raise ValueError("This ALFWorld game was never reset, or is closed: call reset first.")
        was_won = self._answer.won
        if self._short:
            self._answer = self._short.play(action)
        else:
            command = self._compact.command(action) if self._compact else action
            self._answer = self._live.step(command)
            if self._compact and not was_won:
                self._compact.update(command, self._answer.text, self._answer.commands)
        won = self._answer.won
        return Step(
            observation=self._observation(),
            reward=float(won and not was_won),
            outcome=Outcome.SUCCESS if won else None,
        )

    def official(self) -> Answer:
        """What the official environment shows now, whatever the style: for scripted players. Raises
        ValueError before the first reset.
        """
        if self._live is None:
            raise ValueError("This ALFWorld game was never reset, or is closed: call reset first.")
        return self._answer

    def state_hash(self) -> str:
        """Of names, places, facts and task after the last reset, the same for both engines and both
        styles; "" before the first.
        """
        return self._compiled.state_hash if self._compiled else ""

    def close(self) -> None:
        """Frees the game, and the stock engine where it is in use."""
        self._live = self._compiled = self._compact = self._short = None
        if self._stock:
            self._stock.close()
            self._stock = None

    def _observation(self) -> Observation:
        if shown := self._compact or self._short:
            return Observation(text=shown.text)
        return Observation(text=self._answer.text, actions=self._answer.commands)
