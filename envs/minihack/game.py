"""One re-seedable MiniHack game as text: what an agent types goes through the interpreter to the
console, and what the console then shows becomes the next observation.

The stock penalty of -0.01 for keys that pass no time is left out: an action pays 1 for success and
0 otherwise.
"""

import dataclasses
import hashlib
import re

from envs.api import GameId, Observation, Outcome, Step
from envs.minihack.console import MAX_KEYS, Console, build, nethack
from envs.minihack.families import GYM_IDS, check_family
from envs.minihack.interpreter import Played, play_command
from envs.minihack.text import STYLES, render, render_end
from envs.minihack.verbs import ACTIONS, Command, parse
from envs.minihack.view import (
    DIRECTIONS,
    Position,
    Thing,
    View,
    read_cells,
    read_here,
    read_items,
)

_RECYCLE_AFTER = 5000  # episodes: NLE leaks about 2 kB each
# The greeting, and the phase of the moon that `console.build` pins: they say nothing about the
# game.
_BANNER = re.compile(
    r"^((?:Hello|Salutations) Agent, welcome to NetHack!|You are a |You are lucky!|Full moon"
    r" tonight)"
)
_TAKEN = re.compile(r"^[A-Za-z] - ")


@dataclasses.dataclass(kw_only=True, slots=True)
class _Episode:
    """What a game knows between a reset and the next one."""

    console: Console
    kit: dict[str, int]  # the glyphs of the starting kit by letter
    state_hash: str
    layout_hash: str
    locked: set[Position]  # doors that are known to be locked
    view: View
    # The text shows what differs from it; None shows all, as after a reset.
    previous: View | None = None
    final: Step | None = None  # the step that ended the episode


class MiniHackGame:
    """A live game of one family; implements `envs.api.Game`. `style` is one of
    `envs.minihack.text`.
    """

    def __init__(self, family: str, *, style: str):
        if style not in STYLES:
            raise ValueError(f"Unknown text style {style!r}; the styles are: {', '.join(STYLES)}.")
        self._family = check_family(family)
        self._style = style
        self._env = build(GYM_IDS[self._family])
        self._closed = False
        self._num_episodes = 0
        self._episode: _Episode | None = None

    def reset(self, game: GameId) -> Observation:
        """Starts the game whose key is a seed. Raises ValueError for an id of another environment
        or family, or a key that is no seed.
        """
        if game.env != "minihack" or game.family != self._family:
            raise ValueError(f"{game} is not a game of minihack|{self._family}.")
        if not game.key.isdecimal() or int(game.key) >= 2**31:
            raise ValueError(
                f"The key of a MiniHack game is a seed from 0 to {2**31 - 1}, got {game.key!r}."
            )
        self._check_open()
        if self._num_episodes >= _RECYCLE_AFTER:
            self._env.close()
            self._env = build(GYM_IDS[self._family])
            self._num_episodes = 0
        self._num_episodes += 1
        self._episode = _start(Console(self._env, int(game.key)))
        return self._observe(self._episode)

    def step(self, action: str) -> Step:
        """Plays one action. What cannot be read or resolved costs a step, passes no game time, and
        is explained in the text. Raises ValueError before the first reset and after `close`.
        """
        episode = self._current()
        if episode.final is not None:
            return dataclasses.replace(episode.final, reward=0.0)
        self._check_open()
        console = episode.console
        command = parse(action)
        console.begin()
        played = (
            play_command(command, episode.view, console)
            if isinstance(command, Command)
            else Played(notes=(command,))
        )
        if console.success:
            return self._finish(episode, Outcome.SUCCESS)
        if console.over:
            return self._finish(episode, Outcome.DEATH)
        if console.open_prompt():
            return self._finish(
                episode,
                Outcome.FAILED,
                f"The game still asks {console.message()!r} after {MAX_KEYS} keys for the action"
                f" {action!r}.",
            )
        _remember_locks(episode, played.direction)
        everything = isinstance(command, Command) and command.verb == "inventory"
        episode.previous = None if everything else episode.view
        episode.view = _look(
            console, episode.kit, episode.locked, messages=console.pages, notes=played.notes
        )
        return Step(observation=self._observe(episode))

    def state_hash(self) -> str:
        """Of the glyphs, the position and the pack after the last reset; "" before the first."""
        return self._episode.state_hash if self._episode else ""

    def layout_hash(self) -> str:
        """Of the glyphs and the position only: equal first screens, whatever the starting kit."""
        return self._episode.layout_hash if self._episode else ""

    def close(self) -> None:
        """Ends the game and removes its temporary folder."""
        if not self._closed:
            self._closed = True
            self._env.close()

    def raw(self) -> View:
        """The visible state as data, for scripted players. Raises ValueError before the first
        reset.
        """
        return self._current().view

    def _current(self) -> _Episode:
        if self._episode is None:
            raise ValueError("This game was never reset: call reset first.")
        return self._episode

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("This game is closed: open another one.")

    def _observe(self, episode: _Episode) -> Observation:
        return Observation(
            text=render(episode.view, episode.previous, self._style), actions=ACTIONS
        )

    def _finish(self, episode: _Episode, outcome: Outcome, error: str = "") -> Step:
        text = render_end(episode.console.pages, outcome, episode.view, self._style)
        episode.final = Step(
            observation=Observation(text=text),
            reward=float(outcome is Outcome.SUCCESS),
            outcome=outcome,
            error=error,
        )
        return episode.final


def _start(console: Console) -> _Episode:
    """The episode that begins on a console which was never used."""
    at_first = console.arrays()
    console.settle()
    # What autopickup took on the first square is no part of the starting kit.
    taken = {line[0] for line in console.pages if _TAKEN.match(line)}
    kit = {
        chr(letter): int(glyph)
        for letter, glyph in zip(at_first["inv_letters"], at_first["inv_glyphs"], strict=True)
        if letter and chr(letter) not in taken
    }
    layout = hashlib.sha256()
    layout.update(console.array("glyphs").tobytes())
    layout.update(console.array("blstats")[:2].tobytes())
    whole = layout.copy()
    whole.update(console.array("inv_strs").tobytes())
    messages = tuple(line for line in console.pages if not _BANNER.match(line))
    locked: set[Position] = set()
    return _Episode(
        console=console,
        kit=kit,
        state_hash=whole.hexdigest(),
        layout_hash=layout.hexdigest(),
        locked=locked,
        view=_look(console, kit, locked, messages=messages, notes=()),
    )


def _remember_locks(episode: _Episode, direction: str | None) -> None:
    """A closed door is known to be locked from the moment the game says so."""
    if direction not in DIRECTIONS:
        return
    text = " ".join(episode.console.pages)
    dx, dy = DIRECTIONS[direction]
    x, y = _position(episode.console)
    door = (x + dx, y + dy)
    if "door is locked" in text or "WHAMM" in text:
        episode.locked.add(door)
    elif "unlock" in text or "picking the lock" in text:
        episode.locked.discard(door)


def _look(
    console: Console,
    kit: dict[str, int],
    locked: set[Position],
    *,
    messages: tuple[str, ...],
    notes: tuple[str, ...],
) -> View:
    """Reads the state; forgets the locked doors that are no longer closed."""
    arrays = console.arrays()
    blstats = arrays["blstats"]
    condition = int(blstats[nethack.NLE_BL_CONDITION])
    position = _position(console)
    # The game's look command passes no time; it is left out when blind, where feeling around does.
    blind = bool(condition & nethack.BL_MASK_BLIND)
    cells = read_cells(arrays)
    for door in list(locked):
        if door in cells and cells[door].kind == "closed":
            cells[door] = Thing(
                noun="locked door", name="locked door", kind="closed", position=door
            )
        else:
            locked.discard(door)
    items = read_items(arrays, kit)
    width = arrays["chars"].shape[1]
    screen = bytes(arrays["chars"]).decode("latin-1")
    return View(
        position=position,
        cells=cells,
        here=() if blind else read_here(console.look(), position),
        items=items,
        messages=messages,
        notes=notes,
        hp=int(blstats[nethack.NLE_BL_HP]),
        max_hp=int(blstats[nethack.NLE_BL_HPMAX]),
        turn=int(blstats[nethack.NLE_BL_TIME]),
        floating=bool(condition & nethack.BL_MASK_LEV),
        blind=blind,
        rows=tuple(screen[start : start + width] for start in range(0, len(screen), width)),
    )


def _position(console: Console) -> Position:
    x, y = console.array("blstats")[:2].tolist()
    return x, y
