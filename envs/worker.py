"""A worker process of `envs.pool.WorkerPool`: plays many live games, one call at a time. Not
started by hand.

`python -m envs.worker REQUEST_FD ANSWER_FD MARKER_FD`. Its stdout and stderr are a log file, so
whatever a game prints cannot reach the protocol, which `envs.wire` describes. MARKER_FD is how a
dead or stuck worker says which game it was playing.
"""

import contextlib
import ctypes
import faulthandler
import io
import json
import mmap
import numbers
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

from envs import wire
from envs.api import Environment, Game, GameId, Observation, Step
from envs.registry import load_environment
from envs.strays import kill_strays

_READ_BYTES = 1 << 18
_FLUSH_S = 0.001  # answers wait at most this long for the rest of their batch
_ORPHAN_GRACE_S = 2.0  # a call that still runs when the parent is gone gets this long
_HEARTBEAT_S = 0.5
_LOCKED_GRACE_S = 2.0  # beyond the deadline, at which a parent that lives kills a worker
# a dying parent closes its pipes a moment before its children are given to another
_REPARENT_S = 0.2
_PR_SET_PDEATHSIG = 1  # of prctl
_MAX_RESETS = 5000  # a live game is opened anew after this many: NetHack leaks 2 kB per episode
_MAX_ERROR_CHARS = 300
_HOME = tempfile.gettempdir()  # the worker's own, as the pool named it


class LiveGames:
    """The live games of one worker, idle ones kept per family; at most `max_games` in all."""

    def __init__(self, environment: Environment, max_games: int):
        self._environment = environment
        self._max_games = max_games
        self._playing: dict[int, tuple[str, Game]] = {}
        self._idle: list[tuple[str, Game]] = []  # the longest idle first
        self._resets: dict[int, int] = {}  # id of a live game -> resets so far

    def take(self, ticket: int, family: str) -> Game:
        """A live game for an episode; one that the episode already has is thrown away."""
        self.discard(ticket)
        found = next((entry for entry in reversed(self._idle) if entry[0] == family), None)
        if found is not None:
            self._idle.remove(found)
            game = found[1]
            self._resets[id(game)] += 1
        else:
            if self._idle and len(self._playing) + len(self._idle) >= self._max_games:
                self._close(self._idle.pop(0)[1])
            game = self._environment.open(family)
            if not all(
                callable(getattr(game, name, None))
                for name in ("reset", "step", "state_hash", "close")
            ):
                raise TypeError(f"open returned {type(game).__name__} where a game was expected")
            self._resets[id(game)] = 1
        self._playing[ticket] = (family, game)
        return game

    def playing(self, ticket: int) -> Game:
        return self._playing[ticket][1]

    def release(self, ticket: int) -> None:
        """The episode is over: its game is kept for the next one of its family."""
        entry = self._playing.pop(ticket, None)
        if entry is None:
            return
        if self._resets[id(entry[1])] >= _MAX_RESETS:
            self._close(entry[1])
        else:
            self._idle.append(entry)

    def discard(self, ticket: int) -> None:
        """The episode's game raised: nobody should play it again."""
        entry = self._playing.pop(ticket, None)
        if entry is not None:
            self._close(entry[1])

    def close(self) -> None:
        for _, game in [*self._playing.values(), *self._idle]:
            self._close(game)
        self._playing.clear()
        self._idle.clear()

    def _close(self, game: Game) -> None:
        del self._resets[id(game)]
        try:
            game.close()
        except (
            BaseException
        ) as error:  # SystemExit too: a game that cannot be closed is gone all the same
            sys.stderr.write(f"closing a game raised {describe(error)}\n")


def describe(error: BaseException) -> str:
    """An exception in one line."""
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:  # one whose own text cannot be made
        text = type(error).__name__
    return wire.clean(
        text if len(text) <= _MAX_ERROR_CHARS else text[: _MAX_ERROR_CHARS - 3] + "..."
    )


def execute(games: LiveGames, request: list[Any], on_call: Callable[[], None]) -> str:
    """Plays one request and returns its answer as JSON; `on_call` runs before every call of a game.
    Never raises.
    """
    kind, ticket = request[0], request[1]
    try:
        if kind == wire.STEP:
            on_call()
            encoded, ended = play_step(games.playing(ticket), request[2])
        else:
            game_id = GameId.parse(request[2])
            on_call()
            game = games.take(ticket, game_id.family)
            encoded, ended = play_reset(game, game_id), False
        if kind == wire.REPLAY:
            digests = [wire.digest(encoded)]
            for action in request[3]:
                on_call()
                encoded, ended = play_step(games.playing(ticket), action)
                digests.append(wire.digest(encoded))
                if ended:
                    break
            return f'[{ticket},"{wire.REPLAYED}",{json.dumps(digests)}]'
        if ended:
            games.release(ticket)
        return f'[{ticket},"{wire.PLAYED}",{encoded},"{wire.digest(encoded)}"]'
    except BaseException as error:  # SystemExit too: no game may end the worker of its siblings
        games.discard(ticket)
        return f'[{ticket},"{wire.RAISED}",{json.dumps(describe(error))}]'


def play_reset(game: Game, game_id: GameId) -> str:
    """Starts a game; its first step as `wire.encode_step` writes it. Raises TypeError or ValueError
    for what no game may return, and whatever the game raises.
    """
    observation = game.reset(game_id)
    if not isinstance(observation, Observation):
        raise TypeError(
            f"reset returned {type(observation).__name__} where an Observation was expected"
        )
    state_hash = game.state_hash()
    if not isinstance(state_hash, str):
        raise TypeError(
            f"state_hash returned {type(state_hash).__name__} where a string was expected"
        )
    step = Step(observation=observation)
    _check_step("reset", step, len(state_hash))
    return wire.encode_step(step, state_hash)


def play_step(game: Game, action: str) -> tuple[str, bool]:
    """Plays an action; the step as `wire.encode_step` writes it, and whether it ends the episode.
    Raises as `play_reset` does.
    """
    step = game.step(action)
    if not isinstance(step, Step):
        raise TypeError(f"step returned {type(step).__name__} where a Step was expected")
    _check_step("step", step)
    return wire.encode_step(step), step.outcome is not None


def _check_step(call: str, step: Step, more_chars: int = 0) -> None:
    observation = step.observation
    if not isinstance(observation, Observation):
        raise TypeError(
            f"{call} returned the observation {observation!r} where an Observation was expected"
        )
    for what, text in (("text", observation.text), ("error", step.error)):
        if not isinstance(text, str):
            raise TypeError(f"{call} returned the {what} {text!r} where a string was expected")
    if not isinstance(observation.actions, tuple | list):
        raise TypeError(
            f"{call} returned {type(observation.actions).__name__} where a tuple of actions was"
            " expected"
        )
    try:
        actions = "".join(observation.actions)  # the fastest way to look at all of them
    except TypeError:
        raise TypeError(f"{call} returned actions that are no strings") from None
    num_chars = sum(
        map(len, (observation.text, observation.actions, actions, step.error)), start=more_chars
    )
    if num_chars > wire.MAX_STEP_CHARS:
        raise ValueError(
            f"{call} returned {num_chars:,} characters where at most {wire.MAX_STEP_CHARS:,} are"
            " taken"
        )
    reward = step.reward
    if not isinstance(step.reward, numbers.Real):
        raise TypeError(f"{call} returned the reward {step.reward!r} where a number was expected")
    # not the other way round: nan is neither less nor more
    if not abs(reward) <= wire.MAX_REWARD:
        raise ValueError(
            f"{call} returned the reward {str(reward)[:20]} where a number from"
            f" {-wire.MAX_REWARD:g} to {wire.MAX_REWARD:g} was expected"
        )


def serve(
    games: LiveGames,
    requests: list[Any],
    buffer: bytearray,
    request_fd: int,
    answer_fd: int,
    marker: memoryview,
) -> bool:
    """Answers requests, first `requests`, then what arrives behind `buffer`; True when told to end,
    False when the parent is gone.
    """
    calls = 0
    ticket = 0

    def on_call() -> None:
        nonlocal calls
        calls += 1
        marker[wire.CALLS] = calls
        marker[wire.RUNNING] = ticket + 1

    while True:
        answers: list[str] = []
        num_chars = 0
        flush_at = time.monotonic() + _FLUSH_S
        for request in requests:
            ticket = request[1]
            if request[0] == wire.RELEASE:
                games.release(ticket)
                continue
            if request[0] == wire.CLOSE:
                return True
            answers.append(execute(games, request, on_call))
            marker[wire.RUNNING] = 0
            num_chars += len(answers[-1])
            now = time.monotonic()
            if now >= flush_at or num_chars > wire.FLUSH_BYTES:
                send(answer_fd, answers)
                answers = []
                num_chars = 0
                flush_at = now + _FLUSH_S
        if answers:
            send(answer_fd, answers)
        chunk = os.read(request_fd, _READ_BYTES)
        if not chunk:
            return False
        buffer += chunk
        requests = wire.unpack(buffer)


def send(answer_fd: int, answers: list[str]) -> None:
    """Writes one frame with all answers; blocks while the parent is busy elsewhere."""
    data = memoryview(wire.frame(f"[{','.join(answers)}]"))
    while data:
        data = data[os.write(answer_fd, data) :]


def _end_with_parent(request_fd: int, setup: wire.Setup) -> None:
    """Ends a worker whose parent is gone even while a game hangs, and what its games started."""
    poll = select.poll()
    poll.register(request_fd, 0)  # hang-up alone; data is the main thread's
    # A game that hangs inside a C call and keeps the interpreter's lock stops this thread too. The
    # timer's runs without the lock.
    limit_s = setup.deadline_s + _LOCKED_GRACE_S
    faulthandler.dump_traceback_later(limit_s, exit=True)
    while not poll.poll(1000 * _HEARTBEAT_S):
        faulthandler.dump_traceback_later(limit_s, exit=True)
    faulthandler.cancel_dump_traceback_later()
    time.sleep(_ORPHAN_GRACE_S)
    _remove_if_orphan(setup)
    _kill_group()
    os._exit(1)


def _wake_with_parent() -> None:
    """Has the kernel continue this process when its parent dies: a stopped one would never notice
    that it has to end.

    Killing it would be as easy, but no worker would be left to remove the pool's folder, and "the
    parent dies" means the thread that started the worker.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def _kill_group() -> None:
    """Ends this process and what its games started; in a group of others, nobody."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


class _Log(io.RawIOBase):
    """What games print: a full disk is no reason to fail one."""

    name = "log"

    def __init__(self, fd: int):
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            os.write(self._fd, data)
        return len(data)


def _remove_if_orphan(setup: wire.Setup) -> None:
    """Removes the pool's folder, and ends what games started apart, when its owner no longer can; a
    parent that merely replaces this worker is still there.
    """
    if os.getppid() != setup.parent_pid:
        kill_strays(_HOME)
        shutil.rmtree(setup.temp_root, ignore_errors=True)


def main(argv: list[str]) -> int:
    _wake_with_parent()
    request_fd, answer_fd, marker_fd = (int(value) for value in argv)
    for fd in (request_fd, answer_fd, marker_fd):
        os.set_inheritable(fd, False)  # a child of a game must not keep the pipe open
    sys.stdout = io.TextIOWrapper(_Log(1), errors="backslashreplace", write_through=True)
    sys.stderr = io.TextIOWrapper(_Log(2), errors="backslashreplace", write_through=True)
    marker = memoryview(mmap.mmap(marker_fd, wire.MARKER_BYTES)).cast("Q")
    buffer = bytearray()
    requests: list[Any] = []
    while not requests:
        chunk = os.read(request_fd, _READ_BYTES)
        if not chunk:
            return 0
        buffer += chunk
        requests = wire.unpack(buffer)
    setup = wire.Setup(**requests.pop(0))
    sys.path.extend(path for path in setup.sys_path if path not in sys.path)
    threading.Thread(target=_end_with_parent, args=(request_fd, setup), daemon=True).start()
    try:
        environment = load_environment(setup.environment, setup.options)
    except BaseException as error:
        send(answer_fd, [f'[{wire.NO_TICKET},"{wire.UNUSABLE}",{json.dumps(describe(error))}]'])
        return 1
    send(answer_fd, [f'[{wire.NO_TICKET},"{wire.READY}"]'])
    games = LiveGames(environment, setup.max_games)
    try:
        told = serve(games, requests, buffer, request_fd, answer_fd, marker)
    except BrokenPipeError:
        told = False
    games.close()
    if not told:
        time.sleep(_REPARENT_S)
        _remove_if_orphan(setup)
        _kill_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
