"""One live, re-seedable MiniHack game, driven key by key at the level of NLE.

Stock `env.step` is bypassed: it loses the messages before a `--More--` (and the rewards that hang
on them), overwrites the last screen, counts its own step limit and cannot pick one object out of
several. Here the task's own events are checked after every single key, so that success is what
MiniHack defines (reward > 0.5, or the staircase where that is the task), and nothing else of the
stock step is used. The stock penalty of -0.01 for keys that pass no time is left out: an action
pays 1 for success and 0 otherwise.
"""

import dataclasses
import hashlib
import logging
import re
import warnings

import numpy as np

from envs.api import GameId, Observation, Outcome, Step
from envs.minihack.families import TASKS, check_family

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import pkg_resources  # noqa: F401  (minihack needs it; setuptools 82 dropped it)
    except ImportError as error:
        raise ImportError(
            "minihack needs pkg_resources, which setuptools 82 removed: install 'setuptools<82'."
        ) from error
    try:
        import gymnasium
        import minihack  # noqa: F401  (registers the tasks)
        from minihack.base import MH_FULL_ACTIONS
        from nle import nethack
    except ImportError as error:
        raise ImportError(
            f"The MiniHack environment needs the packages minihack and nle>=1.3 ({error}): install"
            " ictjax again."
        ) from error

from envs.minihack import text as rendering
from envs.minihack import verbs
from envs.minihack.view import DIRECTIONS, Item, Thing, View, read_cells, read_here, read_items

_COMMANDS = nethack.Command
_STEP_KEYS = dict(zip(DIRECTIONS, (ord(c) for c in "kjlhuynb"), strict=True))
_TARGET_KEYS = {**_STEP_KEYS, "self": ord("."), "down": ord(">"), "up": ord("<")}
_VERB_KEYS = {
    "fight": int(_COMMANDS.FIGHT),
    "kick": int(_COMMANDS.KICK),
    "open": int(_COMMANDS.OPEN),
    "close": int(_COMMANDS.CLOSE),
    "untrap": int(_COMMANDS.UNTRAP),
    "pickup": int(_COMMANDS.PICKUP),
    "drop": int(_COMMANDS.DROP),
    "eat": int(_COMMANDS.EAT),
    "quaff": int(_COMMANDS.QUAFF),
    "read": int(_COMMANDS.READ),
    "wield": int(_COMMANDS.WIELD),
    "wear": int(_COMMANDS.WEAR),
    "takeoff": int(_COMMANDS.TAKEOFF),
    "puton": int(_COMMANDS.PUTON),
    "remove": int(_COMMANDS.REMOVE),
    "apply": int(_COMMANDS.APPLY),
    "zap": int(_COMMANDS.ZAP),
    "throw": int(_COMMANDS.THROW),
    "pray": int(_COMMANDS.PRAY),
    "search": int(_COMMANDS.SEARCH),
    "wait": ord("."),
    "up": ord("<"),
    "down": ord(">"),
}
_ESC, _SPACE, _ENTER, _LOOK = 27, ord(" "), 13, int(_COMMANDS.LOOK)
_MAX_KEYS = 300  # keys one action may take before the game is called stuck
_RECYCLE_AFTER = 5000  # episodes: NLE leaks about 2 kB each
# The greeting, and the phase of the moon that `fix_moon_phase` pins: they say nothing about the
# game.
_BANNER = re.compile(
    r"^((?:Hello|Salutations) Agent, welcome to NetHack!|You are a |You are lucky!|Full moon"
    r" tonight)"
)
# NLE ships no rumours file, so what an artifact would whisper becomes an internal complaint.
_FAULTS = re.compile(
    r"rumors|^Program in disorder|^\(?Saving and reloading|^Report (?:the|this|these)|whispers:?$"
)
_SUGGESTED = re.compile(r"\[(.*?) or \?\*\]|\[(.*?)\]")
_FLOOR_FOOD = re.compile(r"There (?:is|are) (.+?) here; eat (?:it|one)\?")
_DRINK_FROM = re.compile(r"Drink from the (\w+)\?")


class MiniHackGame:
    """A live game of one family; implements `envs.api.Game`. `style` is "full" (for language
    models) or "compact" (for tiny word-level models).
    """

    def __init__(self, family: str, *, style: str):
        if style not in rendering.STYLES:
            raise ValueError(
                f"Unknown text style {style!r}; the styles are: {', '.join(rendering.STYLES)}."
            )
        self._family = check_family(family)
        self._style = style
        self._env = None
        self._episodes = self._keys_used = 0
        self._direction: str | None = None
        self._final: Step | None = None
        self._view: View | None = None
        self._start: dict[str, int] = {}
        self._locked: set[tuple[int, int]] = set()
        self._hashes = ("", "")
        self._build()

    def _build(self):
        logging.getLogger("nle").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = gymnasium.make(
                TASKS[self._family],
                fix_moon_phase=True,
                actions=tuple(MH_FULL_ACTIONS),
                max_episode_steps=10**9,
                disable_env_checker=True,
            )
        self._env = made.unwrapped
        self._keys = list(self._env._observation_keys)
        self._action_of_key = {int(action): index for index, action in enumerate(self._env.actions)}

    # --- the interface of envs.api.Game ---

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
        if self._env is None:
            raise ValueError("This game is closed: open another one.")
        if self._episodes >= _RECYCLE_AFTER:
            self._env.close()
            self._build()
            self._episodes = 0
        self._episodes += 1
        self._seed = int(game.key)
        self._history: list[int] = []
        self._restart()
        self._success = self._done = False
        self._final = None
        self._locked.clear()
        arrays = self._arrays()
        self._start = {}
        self._pages: list[str] = []
        self._keys_used = 0
        self._settle()
        # What autopickup took on the first square is no part of the starting kit.
        taken = {line[0] for line in self._pages if re.match(r"^[A-Za-z] - ", line)}
        for letter, glyph in zip(arrays["inv_letters"], arrays["inv_glyphs"], strict=True):
            if letter and chr(letter) not in taken:
                self._start[chr(letter)] = int(glyph)
        messages = [line for line in self._pages if not _BANNER.match(line)]
        layout = hashlib.sha256()
        layout.update(self._arrays()["glyphs"].tobytes())
        layout.update(self._arrays()["blstats"][:2].tobytes())
        whole = layout.copy()
        whole.update(self._arrays()["inv_strs"].tobytes())
        self._view = self._look(tuple(messages), ())
        self._hashes = (whole.hexdigest(), layout.hexdigest())
        self._previous: View | None = None
        return self._observe()

    def _restart(self):
        """Brings the live environment to the start of the seed's game."""
        env = self._env
        # Seeds hold for the next reset only. A stale action would be scored against the new
        # episode.
        env._previous_action = env._previous_obs = None
        env.seed(self._seed, self._seed, reseed=False)
        env.reset()
        self._observation = env.last_observation

    def _rewind(self):
        """Undoes the keys of the running action: the game is deterministic, so it starts again and
        replays all earlier keys.
        """
        del self._history[self._checkpoint :]
        self._restart()
        for key in self._history:
            self._observation, self._done = self._env.nethack.step(key)
        self._env.last_observation = self._observation
        self._pages.clear()

    def step(self, action: str) -> Step:
        """Plays one action. What cannot be read or resolved costs a step, passes no game time, and
        is explained in the text.
        """
        if self._view is None:
            raise ValueError("This game was never reset: call reset first.")
        if self._final is not None:
            return dataclasses.replace(self._final, reward=0.0)
        command = verbs.parse(action)
        self._pages, self._notes = [], []
        if isinstance(command, str):
            self._notes.append(command)
        else:
            self._play(command)
        if self._done and not self._success:
            return self._finish(Outcome.DEATH)
        if self._success:
            return self._finish(Outcome.SUCCESS)
        if self._open_prompt():
            return self._finish(
                Outcome.FAILED,
                f"The game still asks {self._message()!r} after {_MAX_KEYS} keys for the action"
                f" {action!r}.",
            )
        self._previous = self._view
        self._remember_locks(command)
        self._view = self._look(tuple(self._pages), tuple(self._notes))
        if isinstance(command, verbs.Command) and command.verb == "inventory":
            self._previous = None
        return Step(observation=self._observe())

    def state_hash(self) -> str:
        """Of the glyphs, the position and the pack after the last reset."""
        return self._hashes[0]

    def layout_hash(self) -> str:
        """Of the glyphs and the position only: equal first screens, whatever the starting kit."""
        return self._hashes[1]

    def close(self) -> None:
        """Ends the game and removes its temporary folder."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def raw(self) -> View:
        """The visible state as data, for scripted players. Raises ValueError before the first
        reset.
        """
        if self._view is None:
            raise ValueError("This game was never reset: call reset first.")
        return self._view

    # --- text ---

    def _observe(self) -> Observation:
        return Observation(
            text=rendering.render(self.raw(), self._previous, self._style), actions=verbs.ACTIONS
        )

    def _finish(self, outcome: Outcome, error: str = "") -> Step:
        text = rendering.render_end(tuple(self._pages), outcome, self.raw(), self._style)
        self._final = Step(
            observation=Observation(text=text),
            reward=float(outcome is Outcome.SUCCESS),
            outcome=outcome,
            error=error,
        )
        return self._final

    # --- reading NLE ---

    def _arrays(self) -> dict[str, np.ndarray]:
        return dict(zip(self._keys, self._observation, strict=True))

    def _array(self, key: str) -> np.ndarray:
        return self._observation[self._keys.index(key)]

    def _message(self) -> str:
        return bytes(self._array("message")).split(b"\0", 1)[0].decode("latin-1").strip()

    def _window(self) -> list[str]:
        """The lines of a text window or menu that covers part of the map; empty when there is
        none.
        """
        rows = [bytes(row).decode("latin-1") for row in self._array("tty_chars")]
        for index, row in enumerate(rows):
            found = re.search(r"--More--|\(end\)|\(\d+ of \d+\)", row)
            if found and not (index == 0 and found.start() > 0 and row[: found.start()].strip()):
                return [
                    line[found.start() :].rstrip()
                    for line in rows[:index]
                    if line[found.start() :].strip()
                ]
        return []

    def _waits(self) -> bool:
        return bool(self._array("internal")[3])

    def _asks(self) -> bool:
        return bool(self._array("internal")[1])

    def _asks_line(self) -> bool:
        return bool(self._array("internal")[2])

    def _open_prompt(self) -> bool:
        return self._waits() or self._asks() or self._asks_line()

    # --- keys ---

    def _press(self, key: int):
        """Sends one key and lets the task look at the result."""
        if self._done or self._success:
            return
        env = self._env
        env._previous_obs, env._previous_action = env.last_observation, self._action_of_key.get(key)
        self._history.append(key)
        self._observation, self._done = env.nethack.step(key)
        self._keys_used += 1
        env.last_observation = self._observation
        if self._done:
            return
        status = env._is_episode_end(self._observation)
        reward = (
            env.reward_manager.collect_reward()
            if env.reward_manager is not None
            else float(status == env.StepStatus.TASK_SUCCESSFUL)
        )
        if status == env.StepStatus.TASK_SUCCESSFUL and reward > 0.5:
            self._success = True
            # The message that proves the success must be kept, whatever page it stands on.
            self._keep()

    def _keep(self):
        """Stores what the game says now."""
        if self._waits() and not self._message():
            window = self._window()
            # other windows (lists of attributes) tell nothing of the task
            if len(window) > 1 and window[0].startswith("Things that"):
                self._pages.append(f"{window[0]} {', '.join(window[1:])}.")
            return
        self._pages += [line for line in _lines(self._message()) if not _FAULTS.search(line)]

    def _settle(self):
        """Turns pages until the game waits for a command or asks a question."""
        while not self._done and not self._success and self._keys_used < _MAX_KEYS:
            if self._waits():
                self._keep()
                self._press(_SPACE)
            elif self._asks_line():  # naming a thing: nothing to gain
                self._press(_ESC)
            else:
                break
        if not self._done and not self._success and not self._asks():
            self._keep()

    def _play(self, command: verbs.Command):
        verb = command.verb
        self._keys_used = 0
        self._command, self._direction, self._item = command, None, None
        self._checkpoint = len(self._history)
        if verb in ("look", "inventory"):
            if verb == "look":
                self._notes.append("You look around.")
            return
        direction = command.direction
        if direction is not None and direction not in _TARGET_KEYS:
            direction = self._neighbour(direction)
            if direction is None:
                return
        if verb in ("go", "far") and direction not in DIRECTIONS:
            self._notes.append(
                f"{verb} needs one of the eight directions, got {direction!r}; stairs are taken"
                " with up and down."
            )
            return
        if verb in ("open", "close", "kick", "fight", "untrap") and direction in (
            "self",
            "up",
            "down",
        ):
            self._notes.append(f"{verb} needs one of the eight directions, got {direction!r}.")
            return
        self._direction = direction
        item = None
        if verb in ("apply", "zap", "throw", "drop") or (
            command.item is not None and verb not in ("pickup", "eat", "quaff")
        ):
            item = self._resolve_item(verb, command.item)
            if item is None:
                return
            if verb == "throw" and direction is None:
                self._notes.append(f"throw needs a direction, for example: throw {item.noun} east.")
                return
        self._item = item
        if verb == "pickup":
            self._pick_up(command.item)
            return
        if verb == "go" and direction is not None:
            self._press(_STEP_KEYS[direction])
        elif verb == "far" and direction is not None:
            self._press(ord(chr(_STEP_KEYS[direction]).upper()))
        else:
            self._press(_VERB_KEYS[verb])
            # a prefix key, which waits for a move without asking
            if verb == "fight" and direction is not None:
                self._press(_STEP_KEYS[direction])
        self._answer_all()

    def _neighbour(self, noun: str) -> str | None:
        """The direction of the one neighbour cell that shows `noun` ("door", "goblin"); leaves a
        note otherwise.
        """
        x, y = self._view.position
        found = []
        for word, (dx, dy) in DIRECTIONS.items():
            thing = self._view.cell((x + dx, y + dy))
            if (
                thing is not None
                and thing.kind not in ("floor", "wall")
                and verbs.matches(noun, noun=thing.noun, name=thing.name)
            ):
                found.append(word)
        if len(found) == 1:
            return found[0]
        if found:
            self._notes.append(
                f"Which {noun}? There is one {', one '.join(found)}: name a direction."
            )
        else:
            self._notes.append(f"{noun!r} is no direction and no such thing is next to you.")
        return None

    def _resolve_item(self, verb: str, wanted: str | None) -> Item | None:
        """The item meant, before any key is sent; leaves a note and returns None when that is
        unclear.
        """
        items = self.raw().items
        if wanted is None:
            wands = [item for item in items if verb == "zap" and item.noun == "wand"]
            if len(wands) == 1:
                return wands[0]
            self._notes.append(
                f"{verb} needs an item: {verbs.listing(wands or list(items))}."
                if items
                else f"You have nothing to {verb}."
            )
            return None
        found = verbs.find_item(wanted, items, "")
        if isinstance(found, str):
            self._notes.append(found)
            return None
        return found

    def _answer_all(self):
        """Answers questions while they have one meaning and leaves the others with the safe answer
        and a note.
        """
        self._settle()
        while self._asks() and not self._done and not self._success and self._keys_used < _MAX_KEYS:
            keys = self._answer(self._message())
            if not keys:  # the command was undone
                return
            for key in keys:
                self._press(key)
            self._settle()

    def _answer(self, question: str) -> tuple[int, ...]:
        command, verb = self._command, self._command.verb
        if question.startswith("What do you want to"):
            return self._answer_item(question)
        if "direction?" in question:
            direction = self._direction
            if direction is None and verb == "apply":
                direction = self._only_door()
            if direction is None:
                # No answer would waste the charge of a wand or horn, so the whole command is
                # undone.
                self._rewind()
                words = f"{verb} {self._item.noun}" if self._item else verb
                self._notes.append(f"{words} needs a direction here, for example: {words} east.")
                return ()
            return (_TARGET_KEYS[direction],)
        if found := _FLOOR_FOOD.search(question):
            name = re.sub(r"^(?:an?|the|\d+) ", "", found.group(1))
            wanted = command.item
            if verb == "eat" and (
                wanted is None
                or wanted in ("here", "it")
                or verbs.matches(wanted, noun=name.split()[-1], name=name)
            ):
                return (ord("y"),)
            return (ord("n"),)
        if found := _DRINK_FROM.search(question):
            wanted = command.item
            if verb == "quaff" and (wanted is None or wanted in ("here", "it", found.group(1))):
                return (ord("y"),)
            return (ord("n"),)
        if "Right or Left?" in question:
            return (ord("r"),)
        if any(
            part in question
            for part in ("sure you want to pray?", "nlock it?", "Improvise?", "Continue?")
        ):
            return (ord("y"),)
        if "eally attack" in question:
            if verb == "fight":
                return (ord("y"),)
            self._notes.append("It is peaceful, so you do not attack it; fight DIRECTION would.")
            return (_ESC,)
        self._notes.append(f"The game asked {question!r}; the answer was no.")
        return (ord("n") if "[yn" in question else _ESC,)

    def _answer_item(self, question: str) -> tuple[int, ...]:
        """Answers "What do you want to wield? [- abf or ?*]": the named item, or the only one
        offered.
        """
        verb, wanted = self._command.verb, self._command.item
        if self._item is not None:
            return (ord(self._item.letter),)
        suggested = _expand(question)
        if wanted is not None and wanted not in ("here", "it"):
            found = verbs.find_item(wanted, self._view.items, suggested)
            if isinstance(found, str):
                self._notes.append(found)
                return (_ESC,)
            return (ord(found.letter),)
        offered = [item for item in self._view.items if item.letter in suggested]
        if len(offered) == 1 and wanted is None:
            return (ord(offered[0].letter),)
        if offered:
            self._notes.append(f"{verb} what? You could name one of: {verbs.listing(offered)}.")
        else:
            self._notes.append(f"You have nothing to {verb}.")
        return (_ESC,)

    def _only_door(self) -> str | None:
        x, y = self._view.position
        doors = []
        for word, (dx, dy) in DIRECTIONS.items():
            thing = self._view.cell((x + dx, y + dy))
            if thing is not None and thing.kind == "closed":
                doors.append(word)
        return doors[0] if len(doors) == 1 else None

    def _pick_up(self, wanted: str | None):
        """Picks up what lies here, out of a menu when there are several objects. Without a name:
        everything.
        """
        here = [thing for thing in self._view.here if thing.kind == "object"]
        if wanted in ("here", "it", "all", "everything"):
            wanted = None
        if not here and wanted is not None and not self._view.blind:
            self._notes.append(f"There is no {wanted} here.")
            return
        if not here:
            self._press(int(_COMMANDS.PICKUP))
            self._answer_all()
            return
        if wanted is not None:
            found = [
                thing for thing in here if verbs.matches(wanted, noun=thing.noun, name=thing.name)
            ]
            exact = [thing for thing in found if thing.name.lower() == wanted.lower()]
            found = exact or found
            if not found:
                self._notes.append(
                    f"There is no {wanted} here. Here is:"
                    f" {', '.join(thing.name for thing in here)}."
                )
                return
            if len({thing.name for thing in found}) > 1:
                self._notes.append(
                    f"Which {wanted}? Here is: {', '.join(thing.name for thing in found)}."
                )
                return
            names = {thing.name for thing in found}
        else:
            names = {thing.name for thing in here}
        self._press(int(_COMMANDS.PICKUP))
        self._settle_menu(names)
        self._answer_all()

    def _settle_menu(self, names: set[str]):
        """Marks the lines of a pick-up menu that bear one of the names, on every page, and
        confirms.
        """
        from_menu = re.compile(r"^([A-Za-z]) - (.+)$")
        for _ in range(20):
            window = self._window() if self._waits() and not self._message() else []
            if not any(from_menu.match(line) for line in window):
                return
            rows = "\n".join(bytes(row).decode("latin-1") for row in self._array("tty_chars"))
            pages = re.search(r"\((\d+) of (\d+)\)", rows)
            for line in window:
                found = from_menu.match(line)
                if found and rendering.plain_name(found.group(2)) in names:
                    self._press(ord(found.group(1)))
            if pages and pages.group(1) != pages.group(2):
                self._press(ord(">"))
                continue
            self._press(_ENTER)
            return

    # --- memory ---

    def _remember_locks(self, command: verbs.Command | str):
        """A closed door is known to be locked from the moment the game says so."""
        if isinstance(command, str) or command.verb == "inventory":
            return
        text = " ".join(self._pages)
        direction = self._direction
        if direction not in DIRECTIONS:
            return
        dx, dy = DIRECTIONS[direction]
        x, y = int(self._array("blstats")[0]), int(self._array("blstats")[1])
        door = (x + dx, y + dy)
        if "This door is locked" in text or "door is locked" in text or "WHAMM" in text:
            self._locked.add(door)
        elif "unlock" in text or "picking the lock" in text:
            self._locked.discard(door)

    def _look(self, messages: tuple[str, ...], notes: tuple[str, ...]) -> View:
        """Reads the state. The game's look command (`:`) passes no time; it is left out when blind,
        where feeling around does.
        """
        arrays = self._arrays()
        blstats = arrays["blstats"]
        condition = int(blstats[nethack.NLE_BL_CONDITION])
        position = (int(blstats[0]), int(blstats[1]))
        blind = bool(condition & nethack.BL_MASK_BLIND)
        cells = read_cells(arrays)
        for door in list(self._locked):
            if cells.get(door) is not None and cells[door].kind == "closed":
                cells[door] = Thing(
                    noun="locked door", name="locked door", kind="closed", position=door
                )
            else:
                self._locked.discard(door)
        items = read_items(arrays, self._start)
        width = arrays["chars"].shape[1]
        screen = bytes(arrays["chars"]).decode("latin-1")
        rows = tuple(screen[start : start + width] for start in range(0, len(screen), width))
        lines: list[str] = []
        if not blind:
            kept, self._pages = self._pages, []
            self._keys_used = 0
            self._history.append(_LOOK)
            self._observation, self._done = self._env.nethack.step(_LOOK)
            while self._waits() and self._keys_used < 20:
                lines += _lines(self._message()) or self._window()
                self._keys_used += 1
                self._history.append(_SPACE)
                self._observation, _ = self._env.nethack.step(_SPACE)
            lines += _lines(self._message())
            self._env.last_observation = self._observation
            self._pages = kept
        return View(
            position=position,
            cells=cells,
            here=read_here(lines, position),
            items=items,
            messages=messages,
            notes=notes,
            hp=int(blstats[nethack.NLE_BL_HP]),
            max_hp=int(blstats[nethack.NLE_BL_HPMAX]),
            depth=int(blstats[nethack.NLE_BL_DEPTH]),
            turn=int(blstats[nethack.NLE_BL_TIME]),
            floating=bool(condition & nethack.BL_MASK_LEV),
            blind=blind,
            rows=rows,
        )


def _lines(message: str) -> list[str]:
    """The sentences of one message window; NetHack joins short ones with two spaces."""
    return [part.strip() for part in re.split(r"  +|\n", message) if part.strip()]


def _expand(question: str) -> str:
    """The letters a question offers: "[- a-ce or ?*]" -> "abce"."""
    found = _SUGGESTED.search(question)
    letters = (found.group(1) or found.group(2) or "") if found else ""
    return re.sub(
        r"([A-Za-z])-([A-Za-z])",
        lambda m: "".join(chr(c) for c in range(ord(m.group(1)), ord(m.group(2)) + 1)),
        letters,
    )
