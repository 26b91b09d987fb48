"""The console of one NetHack game: keys in, screens and messages out.

Stock `env.step` is bypassed: it loses the messages before a `--More--` (and the rewards that hang
on them), overwrites the last screen, counts its own step limit and cannot pick one object out of
several. Here the task's own events are checked after every single key, so that success is what
MiniHack defines (reward > 0.5, or the staircase where that is the task), and nothing else of the
stock step is used.
"""

import dataclasses
import logging
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import warnings
from typing import Any

import numpy as np

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
        from gymnasium.envs.registration import load_env_creator
        from minihack.base import HACKDIR, LIB_DIR, MH_FULL_ACTIONS, PATH_DAT_DIR
        from nle import nethack
    except ImportError as error:
        raise ImportError(
            f"The MiniHack environment needs the packages minihack and nle>=1.3 ({error}): install"
            " ictjax again."
        ) from error

MAX_KEYS = 300  # keys one action may take before the game is called stuck
_MAX_FOLDER_BYTES = 450  # NetHack keeps names of files in 512
ESC, SPACE, ENTER = 27, ord(" "), 13

_LOOK = int(nethack.Command.LOOK)
_MAX_LOOK_KEYS = 20
# NLE ships no rumours file, so what an artifact would whisper becomes an internal complaint.
_FAULTS = re.compile(
    r"rumors|^Program in disorder|^\(?Saving and reloading|^Report (?:the|this|these)|whispers:?$"
)
_WINDOW_END = re.compile(r"--More--|\(end\)|\(\d+ of \d+\)")
_PAGE_OF = re.compile(r"\((\d+) of (\d+)\)")


def build(task: str) -> Any:
    """The live NLE environment of a MiniHack task, for any number of consoles, one after another;
    to be closed by the caller. Raises ValueError when the name of the temporary folder is too long,
    OSError when the level cannot be put in place there.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _MAX_FOLDER_BYTES:
        raise ValueError(
            f"NetHack plays in no folder whose name has more than {_MAX_FOLDER_BYTES} bytes, like"
            f" {folder}: name another in TMPDIR."
        )
    from envs.minihack import levels  # noqa: F401  (registers ours; only who plays needs them)

    logging.getLogger("nle").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = gymnasium.spec(task)
        stock: Any = load_env_creator(str(spec.entry_point))
        task_type = type(stock.__name__, (stock,), {"_patch_nhdat": _put_level})
        return gymnasium.make(
            dataclasses.replace(spec, entry_point=task_type),
            fix_moon_phase=True,
            actions=tuple(MH_FULL_ACTIONS),
            max_episode_steps=10**9,
            disable_env_checker=True,
        ).unwrapped


def _put_level(env: Any, level: str) -> None:
    """Compiles a level, given as text or as the name of a file of the package, into the data of the
    environment's game.

    The stock way is a shell script that splits the name of the temporary folder at blanks, expands
    its wildcards, and whose failures nobody looks at: NetHack then plays its own dungeon. Raises
    OSError.
    """
    home = pathlib.Path(env.nethack._vardir)
    library = home / "lib"
    if not library.is_dir():
        shutil.copytree(LIB_DIR, library)
    source = library / "mylevel.des"
    if level.endswith(".des"):
        shutil.copyfile(pathlib.Path(PATH_DAT_DIR) / level, source)
    else:
        source.write_text(level, encoding="utf-8")
    _run("lev_comp", source.name, folder=library)
    source.unlink()
    names = sorted(path.name for path in library.iterdir())
    _run("dlb", "cf", "nhdat", *names, folder=library)
    (library / "nhdat").replace(home / "nhdat")


def _run(tool: str, *arguments: str, folder: pathlib.Path) -> None:
    """Runs a tool of NetHack's in a folder. Raises OSError when it fails."""
    done = subprocess.run(
        [str(pathlib.Path(HACKDIR) / tool), *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = " ".join(f"{done.stdout} {done.stderr}".split())[-200:]
        raise OSError(
            f"NetHack's {tool} could not write a level in {folder} ({said}): free some space there,"
            " or name another folder in TMPDIR"
        )


class Console:
    """One game of a seed, on an environment that `build` made and that plays no other game
    meanwhile.
    """

    def __init__(self, env: Any, seed: int):
        self._env = env
        self._seed = seed
        self._index_of = {name: index for index, name in enumerate(env._observation_keys)}
        self._action_of_key = {int(action): index for index, action in enumerate(env.actions)}
        self._history: list[int] = []  # all keys so far
        self._checkpoint = 0  # how many of them came before the running action
        self._keys_used = 0  # by the running action
        self._pages: list[str] = []
        self._observation: tuple[np.ndarray, ...] = self._restart()
        self._done = self._success = False

    def _restart(self) -> tuple[np.ndarray, ...]:
        """The first screen of the seed's game."""
        # Seeds hold for the next reset only. A stale action would be scored against the new
        # episode.
        self._env._previous_action = self._env._previous_obs = None
        self._env.seed(self._seed, self._seed, reseed=False)
        self._env.reset()
        return self._env.last_observation

    # --- reading ---

    @property
    def success(self) -> bool:
        """Whether the task is solved."""
        return self._success

    @property
    def over(self) -> bool:
        """Whether the game has ended, in success or in death."""
        return self._done or self._success

    @property
    def stuck(self) -> bool:
        """Whether the running action has used up its keys."""
        return self._keys_used >= MAX_KEYS

    @property
    def pages(self) -> tuple[str, ...]:
        """What the game has said since `begin`, sentence by sentence."""
        return tuple(self._pages)

    def arrays(self) -> dict[str, np.ndarray]:
        """What NLE shows now, by its own names."""
        return {name: self._observation[index] for name, index in self._index_of.items()}

    def array(self, name: str) -> np.ndarray:
        """One of `arrays`."""
        return self._observation[self._index_of[name]]

    def message(self) -> str:
        """The message line: what the game says, or the question that it asks."""
        return bytes(self.array("message")).split(b"\0", 1)[0].decode("latin-1").strip()

    def window(self) -> list[str]:
        """The lines of a text window or menu that covers part of the map; empty when there is
        none.
        """
        rows = self._rows()
        for index, row in enumerate(rows):
            found = _WINDOW_END.search(row)
            if found and not (index == 0 and found.start() > 0 and row[: found.start()].strip()):
                return [
                    line[found.start() :].rstrip()
                    for line in rows[:index]
                    if line[found.start() :].strip()
                ]
        return []

    def more_pages(self) -> bool:
        """Whether the menu that is shown has another page."""
        found = _PAGE_OF.search("\n".join(self._rows()))
        return found is not None and found.group(1) != found.group(2)

    def waits(self) -> bool:
        """Whether the game waits for a page to be turned."""
        return bool(self.array("internal")[3])

    def asks(self) -> bool:
        """Whether the game asks a question that one key answers."""
        return bool(self.array("internal")[1])

    def open_prompt(self) -> bool:
        """Whether the game waits for anything but a command."""
        return self.waits() or self.asks() or self._asks_line()

    def _asks_line(self) -> bool:
        return bool(self.array("internal")[2])

    def _rows(self) -> list[str]:
        return [bytes(row).decode("latin-1") for row in self.array("tty_chars")]

    # --- keys ---

    def begin(self) -> None:
        """A new action starts: its pages, its keys, and where `rewind` goes back to."""
        self._pages = []
        self._keys_used = 0
        self._checkpoint = len(self._history)

    def press(self, key: int) -> None:
        """Sends one key and lets the task look at the result; nothing once the game is over."""
        if self.over:
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

    def settle(self) -> None:
        """Turns pages until the game waits for a command or asks a question."""
        while not self.over and not self.stuck:
            if self.waits():
                self._keep()
                self.press(SPACE)
            elif self._asks_line():  # naming a thing: nothing to gain
                self.press(ESC)
            else:
                break
        if not self.over and not self.asks():
            self._keep()

    def _keep(self) -> None:
        """Stores what the game says now."""
        if self.waits() and not self.message():
            window = self.window()
            # other windows (lists of attributes) tell nothing of the task
            if len(window) > 1 and window[0].startswith("Things that"):
                self._pages.append(f"{window[0]} {', '.join(window[1:])}.")
            return
        self._pages += [line for line in _lines(self.message()) if not _FAULTS.search(line)]

    def rewind(self) -> None:
        """Undoes the keys of the running action: the game is deterministic, so it starts again and
        replays all earlier keys.
        """
        del self._history[self._checkpoint :]
        self._observation = self._restart()
        for key in self._history:
            self._observation, self._done = self._env.nethack.step(key)
        self._env.last_observation = self._observation
        self._pages.clear()

    def look(self) -> list[str]:
        """What the game's look command (`:`) tells, line by line. It passes no time, unless the
        hero is blind and feels around.
        """
        lines: list[str] = []
        self._history.append(_LOOK)
        self._observation, self._done = self._env.nethack.step(_LOOK)
        for _ in range(_MAX_LOOK_KEYS):
            if not self.waits():
                break
            lines += _lines(self.message()) or self.window()
            self._history.append(SPACE)
            self._observation, _ = self._env.nethack.step(SPACE)
        lines += _lines(self.message())
        self._env.last_observation = self._observation
        return lines


def _lines(message: str) -> list[str]:
    """The sentences of one message window; NetHack joins short ones with two spaces."""
    return [part.strip() for part in re.split(r"  +|\n", message) if part.strip()]
