"""Many live games in worker processes that may crash, hang or be killed without anyone noticing but
`PoolStats`.
"""

import contextlib
import dataclasses
import functools
import math
import mmap
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from envs import wire
from envs.api import CannotGoOn, GameId, Observation, Outcome, PoolEvent, PoolStats, Step
from envs.placing import Held, Queue
from envs.registry import import_path
from envs.stopping import at_end
from envs.strays import kill_strays

MAX_ACTION_CHARS = 4000

_MAX_FAILURES = 2  # of one episode at one call
# after more, a worker gets one request at a time, so that its next death has a culprit
_MAX_CARELESS_DEATHS = 1
_MAX_DEATHS = 5  # of one worker in a row, without an answer between them
# after so many, before the next start: what killed them all may pass
_REST_S = {1: 0.0, 2: 0.1, 3: 1.0, 4: 5.0}
_MIN_STARTUP_S = 60.0  # imports on a busy machine are slow
_CLOSE_GRACE_S = 1.0
_LOG_CHECK_S = 1.0
_MAX_LOG_BYTES = 1 << 20
_TAIL_BYTES = 4096
_READ_BYTES = 1 << 18


class WorkerPool:
    """Implements `envs.api.Pool` with plain subprocesses. One thread only may use it, and no call
    but `poll` waits.

    Queued calls of all episodes travel in one write per worker, at the next `poll`: `poll(0.0)`
      starts them without waiting.

    A worker that dies, or makes no progress for `deadline_s` seconds, is killed and replaced, and
    its unfinished episodes are played again from (game id, actions), which nobody sees: each call
    of a replay has the same deadline, and each replayed observation has to equal the first one.
    Only the episode whose call was running counts as failing; one that fails twice at the same call
    ends with FAILED and the reason, and so does every later episode of a game whose reset did. A
    call that raises is a failure of its own episode alone.

    Args:
      environment: a short name or an import path, see `envs.registry.load_environment`.
      num_workers: processes; episodes go to the one with the fewest.
      max_live_games: bound on games in memory, over all workers; more episodes than that wait.
        Each place that becomes free goes first to those whose family has an idle game in that
        worker (`envs.placing`).
      deadline_s: seconds for one reset or one step. A hung call holds back the other episodes of
        its worker for that long.
      temp_root: where the pool makes the folder for its workers' temporary files (default: the
        system's); `close` removes that folder.
      options: keyword arguments for the environment.

    Raises:
      ValueError: an argument makes no sense, or a call names an episode that is not running.
      RuntimeError: a call after `close`.
      CannotGoOn: from `poll`, which then closes the pool, and from every later call: workers that
        cannot start, or die again and again.
    """

    def __init__(
        self,
        environment: str,
        *,
        num_workers: int = 2,
        max_live_games: int = 64,
        deadline_s: float = 20.0,
        temp_root: str | None = None,
        options: Mapping[str, str] = MappingProxyType({}),
    ):
        import_path(environment)
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}.")
        if max_live_games < num_workers:
            raise ValueError(
                f"max_live_games must be at least num_workers={num_workers} (one game per worker),"
                f" got {max_live_games}."
            )
        if not (math.isfinite(deadline_s) and deadline_s > 0):
            raise ValueError(f"deadline_s must be a positive number of seconds, got {deadline_s}.")
        if temp_root is not None and not os.path.isdir(temp_root):
            raise ValueError(
                f"temp_root must be an existing folder, got {temp_root!r}: create it, or leave it"
                " out."
            )
        self._deadline_s = float(deadline_s)
        self._counts = dict.fromkeys((field.name for field in dataclasses.fields(PoolStats)), 0)
        self._episodes: dict[int, _Episode] = {}
        self._num_tickets = 0
        self._queue = Queue(patience=max_live_games)  # of resets that wait for a live game
        self._unanswered: set[int] = set()  # tickets whose caller waits for an event
        self._events: list[PoolEvent] = []
        self._barred: dict[GameId, str] = {}  # games that cannot even be reset -> why
        self._closed_because = ""
        self._error = RuntimeError  # of calls after that
        try:
            self._folder = tempfile.mkdtemp(prefix="ictjax-pool-", dir=temp_root)
        except OSError as error:
            where = temp_root or "the system's temporary folder"
            raise ValueError(
                f"The worker pool cannot make a folder in {where} ({error.strerror}): free some"
                " space there, or name another in TMPDIR."
            ) from error
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        forget = at_end(functools.partial(_kill_all, self._workers, self._folder))
        # Runs once: at close, at garbage collection, or at interpreter exit.
        self._shut_down = weakref.finalize(
            self, _shut_down, self._workers, self._selector, self._folder, os.getpid(), forget
        )
        try:
            for index in range(num_workers):
                capacity = max_live_games // num_workers + (index < max_live_games % num_workers)
                setup = wire.Setup(
                    environment=environment,
                    options=dict(options),
                    sys_path=[os.path.abspath(path) for path in sys.path],
                    temp_root=self._folder,
                    parent_pid=os.getpid(),
                    deadline_s=self._deadline_s,
                    max_games=capacity,
                )
                self._workers.append(_Worker(index, capacity, setup, self._folder, self._selector))
            for worker in self._workers:
                self._start(worker)
        except BaseException:
            self._shut_down()
            raise

    def __enter__(self) -> "WorkerPool":
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def stats(self) -> PoolStats:
        """Counts since the pool was opened; readable after `close`."""
        return PoolStats(**self._counts)

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The processes that play now, one per worker: for those who watch them, or kill them to
        see what happens.
        """
        return tuple(worker.pid for worker in self._workers if worker.pid is not None)

    def reset(self, game: GameId, *, max_steps: int) -> int:
        """Queues the start of an episode and returns its ticket; at `max_steps` actions it ends
        with STEP_LIMIT.
        """
        self._check_open()
        if not isinstance(game, GameId):
            raise ValueError(f"A game is named by an envs.api.GameId, got {game!r}.")
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
        ticket = self._num_tickets
        self._num_tickets += 1
        episode = _Episode(ticket=ticket, game=game, max_steps=max_steps)
        self._episodes[ticket] = episode
        self._unanswered.add(ticket)
        if game in self._barred:
            self._end_failed(episode, self._barred[game])
        else:
            self._queue.add(ticket, game.family)
        return ticket

    def step(self, ticket: int, action: str) -> None:
        """Queues one action of a running episode (one at a time per ticket).

        Actions are cut to `MAX_ACTION_CHARS` and lone surrogates replaced; the observation then
        starts with a note that says so.
        """
        self._check_open()
        episode = self._episodes.get(ticket)
        if episode is None:
            raise ValueError(
                f"Ticket {ticket!r} names no running episode: it was never given out, has ended, or"
                " was released."
            )
        if ticket in self._unanswered:
            raise ValueError(
                f"Ticket {ticket} still waits for the answer to its last call: poll until it"
                " arrives."
            )
        if not isinstance(action, str):
            raise ValueError(f"An action is a string, got {type(action).__name__}.")
        self._unanswered.add(ticket)
        if episode.error:
            self._end_failed(episode, episode.error)
            return
        episode.action, episode.note = sanitize(action)
        if not episode.replaying:
            self._send_call(episode)

    def release(self, ticket: int) -> None:
        """Ends an episode early, or forgets a finished one; the live game is free again.
        Idempotent.
        """
        self._check_open()
        if not 0 <= ticket < self._num_tickets:
            raise ValueError(f"Ticket {ticket!r} was never given out.")
        if self._events:
            self._events = [event for event in self._events if event.ticket != ticket]
        episode = self._episodes.get(ticket)
        if episode is not None:
            self._forget(episode)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Answers that have arrived; waits up to `timeout_s` seconds for the first. Empty when none
        came.

        Returns at once when no call is waiting for an answer.
        """
        self._check_open()
        until = time.monotonic() + timeout_s
        while True:
            self._place_queued()
            for worker in self._workers:
                worker.flush()
            now = time.monotonic()
            wait_s = 0.0
            if self._unanswered and not self._events:
                wait_s = max(
                    0.0,
                    min(until, *(worker.deadline_at(self._deadline_s) for worker in self._workers))
                    - now,
                )
            self._exchange(wait_s)
            self._place_queued()
            for worker in self._workers:
                worker.flush()
            if self._events or not self._unanswered or time.monotonic() >= until:
                events, self._events = self._events, []
                return events

    def close(self) -> None:
        """Ends the workers and removes the temporary folder. Idempotent."""
        if not self._closed_because:
            self._closed_because = "was closed: open a new one"
        self._shut_down()

    def _check_open(self) -> None:
        if self._closed_because:
            raise self._error(f"The worker pool {self._closed_because}.")

    def _exchange(self, wait_s: float) -> None:
        """One round with the workers: what can be written and read, then the dead, then the
        stuck.
        """
        for key, mask in self._selector.select(wait_s):
            worker: _Worker = key.data
            if mask & selectors.EVENT_WRITE:
                worker.flush()
            if mask & selectors.EVENT_READ:
                worker.receive()
        for worker in self._workers:
            if worker.rests_until is not None:
                if time.monotonic() >= worker.rests_until:
                    self._restart(worker)
                continue
            try:
                for answer in wire.unpack_answers(worker.received):
                    self._take_answer(worker, answer)
            except ValueError:  # a game has written to the pipe: nothing behind it can be trusted
                self._replace(worker, "crashes", "its process garbled its answers")
                continue
            if worker.at_end:
                self._replace(worker, "crashes", f"its process {worker.wait()}")
            elif time.monotonic() >= worker.deadline_at(self._deadline_s):
                limit_s = (
                    self._deadline_s if worker.ready else max(self._deadline_s, _MIN_STARTUP_S)
                )
                self._replace(worker, "timeouts", f"it did not answer within {limit_s:g} s")
            else:
                worker.bound_log()

    def _take_answer(self, worker: "_Worker", answer: list[Any]) -> None:
        """Raises ValueError for an answer that nobody waits for."""
        ticket, kind, *content = answer
        if ticket == wire.NO_TICKET and not worker.ready:
            if kind == wire.UNUSABLE:
                self._break(f"cannot start its workers ({content[0]})")
            worker.ready = kind == wire.READY
            return
        episode = self._episodes.get(ticket)
        played = wire.REPLAYED if episode is not None and episode.replaying else wire.PLAYED
        if ticket not in worker.awaited or (episode and kind not in (wire.RAISED, played)):
            raise ValueError(f"The answer {kind!r} for ticket {ticket} is not waited for.")
        worker.settle(ticket)
        if episode is None:
            return  # released while the call ran
        if kind == wire.RAISED:
            self._fail(episode, f"it raised {content[0]}")
        elif kind == wire.REPLAYED:
            self._take_replay(episode, content[0])
        else:
            worker.deaths = 0
            self._take_step(episode, *content)

    def _take_step(self, episode: "_Episode", fields: list[Any], digest: str) -> None:
        step, state_hash = wire.decode_step(fields)
        if episode.action is None:
            self._counts["resets"] += 1
        else:
            self._counts["steps"] += 1
            episode.actions.append(episode.action)
            if step.outcome is None and len(episode.actions) >= episode.max_steps:
                step = dataclasses.replace(step, outcome=Outcome.STEP_LIMIT)
            if episode.note:
                step = dataclasses.replace(
                    step,
                    observation=dataclasses.replace(
                        step.observation, text=episode.note + step.observation.text
                    ),
                )
        episode.digests.append(digest)
        episode.action = None
        episode.failures = 0
        self._unanswered.discard(episode.ticket)
        self._events.append(PoolEvent(ticket=episode.ticket, step=step, state_hash=state_hash))
        if step.outcome is not None:
            self._forget(episode)

    def _take_replay(self, episode: "_Episode", digests: list[str]) -> None:
        episode.replaying = False
        if digests != episode.digests:
            pairs = zip(digests, episode.digests, strict=False)
            at = next((index for index, (new, old) in enumerate(pairs) if new != old), len(digests))
            where = f"action {at}" if at else "its reset"
            self._give_up(
                episode,
                f"The game {episode.game} is not deterministic: its replay differed from the first"
                f" play at {where}.",
            )
            return
        self._counts["replays"] += 1
        if episode.ticket in self._unanswered:
            self._send_call(episode)

    def _send_call(self, episode: "_Episode") -> None:
        """Sends the call that the episode's caller waits for."""
        if episode.action is None:
            _home(episode).send([wire.RESET, episode.ticket, str(episode.game)])
        else:
            _home(episode).send([wire.STEP, episode.ticket, episode.action])

    def _restore(self, episode: "_Episode") -> None:
        """Brings an episode whose live game is lost back to where it was."""
        episode.replaying = bool(episode.digests)
        if episode.replaying:
            _home(episode).send([wire.REPLAY, episode.ticket, str(episode.game), episode.actions])
        else:
            self._send_call(episode)

    def _fail(self, episode: "_Episode", reason: str) -> None:
        """The episode's own call raised, hung or killed its worker."""
        episode.failures += 1
        if episode.failures < _MAX_FAILURES:
            self._restore(episode)
            return
        call = (
            "a replay"
            if episode.replaying
            else f"action {len(episode.actions) + 1}"
            if episode.digests
            else "its reset"
        )
        error = f"The game {episode.game} failed {_MAX_FAILURES} times at {call}: {reason}."
        if not episode.digests:
            self._barred[episode.game] = error
        self._give_up(episode, error)

    def _give_up(self, episode: "_Episode", error: str) -> None:
        self._counts["quarantined"] += 1
        if episode.ticket in self._unanswered:
            self._end_failed(episode, error)
        else:  # nobody asked: the caller hears of it in answer to the next action
            episode.error = error
            self._detach(episode)

    def _end_failed(self, episode: "_Episode", error: str) -> None:
        step = Step(observation=Observation(text=""), outcome=Outcome.FAILED, error=error)
        self._events.append(PoolEvent(ticket=episode.ticket, step=step))
        self._forget(episode)

    def _forget(self, episode: "_Episode") -> None:
        del self._episodes[episode.ticket]
        self._unanswered.discard(episode.ticket)
        self._detach(episode)

    def _detach(self, episode: "_Episode") -> None:
        worker = episode.home
        if worker is None:
            self._queue.discard(episode.ticket, episode.game.family)
        else:
            worker.tickets.discard(episode.ticket)
            # a game that raised is closed; one that crashed went with its process
            worker.held.leave(episode.game.family, kept=not episode.failures)
            worker.send([wire.RELEASE, episode.ticket])
            episode.home = None

    def _place_queued(self) -> None:
        """Gives the free live games to the queued resets."""
        while self._queue:
            worker = max(self._workers, key=lambda candidate: candidate.held.room)
            if not worker.held.room:
                return
            episode = self._episodes[self._queue.pop(worker.held)]
            if episode.game in self._barred:
                self._end_failed(episode, self._barred[episode.game])
                continue
            episode.home = worker
            worker.tickets.add(episode.ticket)
            worker.held.take(episode.game.family)
            self._send_call(episode)

    def _replace(self, worker: "_Worker", counter: str, reason: str) -> None:
        """A worker is dead or stuck: end it, and let another restore its episodes."""
        self._counts[counter] += 1
        culprit = worker.culprit()
        worker.kill()
        tail = worker.tail()
        worker.deaths += 1
        # A suspect goes first: should it fail again, no innocent replay was in vain.
        lost = sorted(
            (self._episodes[ticket] for ticket in worker.tickets),
            key=lambda e: (e.ticket != culprit, -e.failures, e.ticket),
        )
        for episode in lost:
            if episode.ticket == culprit:
                self._fail(episode, reason + (_quoted(tail) if counter == "crashes" else ""))
                if episode.failures >= _MAX_FAILURES:
                    worker.deaths = 0
            else:
                self._restore(episode)
        self._rest(worker, f"{reason}{_quoted(tail)}")

    def _rest(self, worker: "_Worker", reason: str) -> None:
        """Lets a worker that died start again, later the more often it died."""
        if worker.deaths >= _MAX_DEATHS:
            self._break(
                f"lost the same worker {worker.deaths} times in a row; the last time {reason}"
            )
        worker.rests_until = time.monotonic() + _REST_S.get(worker.deaths, 0.0)
        if worker.deaths <= _MAX_CARELESS_DEATHS:
            self._restart(worker)

    def _restart(self, worker: "_Worker") -> None:
        try:
            worker.start()
        except OSError as error:  # no space, no memory, no file descriptors
            worker.deaths += 1
            self._rest(worker, f"it could not be started ({error.strerror or error})")

    def _start(self, worker: "_Worker") -> None:
        try:
            worker.start()
        except OSError as error:
            self._break(f"cannot start its workers ({error.strerror or error})")

    def _break(self, reason: str) -> None:
        self._closed_because = f"{reason}: remove the cause, then start again"
        self._error = CannotGoOn
        self.close()
        self._check_open()


@dataclasses.dataclass(slots=True, kw_only=True)
class _Episode:
    """One running episode, with what it takes to play it again."""

    ticket: int
    game: GameId
    max_steps: int
    home: "_Worker | None" = None  # None while queued
    actions: list[str] = dataclasses.field(default_factory=list)  # answered
    # of the reset and of each action in `actions`
    digests: list[str] = dataclasses.field(default_factory=list)
    action: str | None = None  # asked for and not answered yet; None during the reset
    note: str = ""  # on what was done to `action`
    replaying: bool = False
    failures: int = 0  # in a row, at the current call
    error: str = ""  # why the next call will be answered with FAILED


class _Worker:
    """One worker process and, after its death, the next one in its place."""

    def __init__(
        self,
        index: int,
        capacity: int,
        setup: wire.Setup,
        folder: str,
        selector: selectors.BaseSelector,
    ):
        self.held = Held(capacity)
        self.tickets: set[int] = set()  # episodes that live here
        self.deaths = 0  # in a row
        self.rests_until: float | None = None  # when the next process is started; None: one runs
        self.awaited: set[int] = set()  # tickets with a request that is not answered
        self._outbox: list[Any] = []
        self._name = f"worker-{index}"
        self._setup = setup
        self._folder = Path(folder)
        self._selector = selector
        self._num_starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts a process, which is sent what was queued before."""
        self._num_starts += 1
        self.held.forget_idle()
        self._home = self._folder / f"{self._name}-{self._num_starts}"
        # given: what is the child's alone once it runs
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as given:
            self._home.mkdir()
            self._log_fd = os.open(
                self._folder / f"{self._name}.log",
                os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND,
                0o600,
            )
            undo.callback(os.close, self._log_fd)
            marker_fd = _shared_memory(self._folder / f"{self._name}.marker", wire.MARKER_BYTES)
            given.callback(os.close, marker_fd)
            self._map = mmap.mmap(marker_fd, wire.MARKER_BYTES)
            undo.callback(self._map.close)
            request_fd, self._request_fd = os.pipe()
            given.callback(os.close, request_fd)
            undo.callback(os.close, self._request_fd)
            self._answer_fd, answer_fd = os.pipe()
            given.callback(os.close, answer_fd)
            undo.callback(os.close, self._answer_fd)
            child_fds = (request_fd, answer_fd, marker_fd)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "envs.worker", *map(str, child_fds)],
                stdin=subprocess.DEVNULL,
                stdout=self._log_fd,
                stderr=self._log_fd,
                env=_worker_environ(str(self._home)),
                pass_fds=child_fds,
                # Ctrl-C is the parent's; and one kill reaches what a game started
                start_new_session=True,
            )
            undo.pop_all()
        os.set_blocking(self._request_fd, False)
        os.set_blocking(self._answer_fd, False)
        self._marker = memoryview(self._map).cast("Q")
        self._log_checked_at = time.monotonic()
        self.received = bytearray()
        self.ready = False
        self.at_end = False
        self._num_received = 0
        self._progress: tuple[int, ...] = ()
        self._progress_at = time.monotonic()
        self._unsent = bytearray(wire.pack([dataclasses.asdict(self._setup)]))
        # the only ticket whose request was sent, when they are sent one by one
        self._alone: int | None = None
        self._writes = False
        self.rests_until = None
        self._selector.register(self._answer_fd, selectors.EVENT_READ, self)
        self.flush()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def send(self, request: list[Any]) -> None:
        """Queues a request until `flush`."""
        self._outbox.append(request)
        if request[0] != wire.RELEASE:
            self.awaited.add(request[1])

    def flush(self) -> None:
        """Writes as much as the pipe takes; the selector does the rest."""
        if self._process is None:
            return
        sendable = self._sendable()
        if sendable:
            self._unsent += wire.pack(self._outbox[:sendable])
            del self._outbox[:sendable]
        try:
            while self._unsent:
                del self._unsent[: os.write(self._request_fd, self._unsent)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent.clear()  # dead: the end of its answers says so
        if bool(self._unsent) != self._writes:
            self._writes = not self._writes
            if self._writes:
                self._selector.register(self._request_fd, selectors.EVENT_WRITE, self)
            else:
                self._selector.unregister(self._request_fd)

    def settle(self, ticket: int) -> None:
        """The answer for a ticket has come."""
        self.awaited.discard(ticket)
        if ticket == self._alone:
            self._alone = None

    def _sendable(self) -> int:
        """How many requests of the outbox may be sent now: all, unless the worker died too often
        for unknown reasons.
        """
        if self.deaths <= _MAX_CARELESS_DEATHS:
            return len(self._outbox)
        if not self.ready or self._alone is not None:
            return 0
        for index, request in enumerate(self._outbox):
            if request[0] in (wire.RESET, wire.STEP, wire.REPLAY):
                self._alone = request[1]
                return index + 1
        return len(self._outbox)

    def receive(self) -> None:
        """Reads what is there into `received`; sets `at_end` when the worker has closed its
        pipe.
        """
        # a flood is read a part at a time, so that a frame without end is seen before it fills
        # the memory
        until = len(self.received) + wire.MAX_FRAME_BYTES
        try:
            while chunk := os.read(self._answer_fd, _READ_BYTES):
                self.received += chunk
                self._num_received += len(chunk)
                if len(self.received) > until:
                    return
        except BlockingIOError:
            return
        self.at_end = True

    def deadline_at(self, deadline_s: float) -> float:
        """When the worker counts as stuck unless it makes progress, or its rest is over; infinity
        while nothing is asked of it.
        """
        if self.rests_until is not None:
            return self.rests_until
        if self.ready and not self.awaited:
            return math.inf
        # The clock starts when a look finds progress. The first look at a worker that was idle
        # always does: its last answer. So the time that the caller spends elsewhere never counts.
        progress = (self._marker[wire.RUNNING], self._marker[wire.CALLS], self._num_received)
        if progress != self._progress:
            self._progress = progress
            self._progress_at = time.monotonic()
        return self._progress_at + (deadline_s if self.ready else max(deadline_s, _MIN_STARTUP_S))

    def culprit(self) -> int | None:
        """The ticket whose call is, or was at the time of death, running, as far as one can
        know.
        """
        running = self._marker[wire.RUNNING] - 1
        return running if running in self.awaited else self._alone

    def wait(self) -> str:
        """How a process that has closed its pipe ended."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"died of {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"

    def stop(self) -> None:
        """Asks the process to end, by a last request and by closing the pipe."""
        if self._process is not None and self._request_fd >= 0:
            self._outbox = [] if self._unsent else [[wire.CLOSE, wire.NO_TICKET]]
            self.flush()
            if self._writes:
                self._selector.unregister(self._request_fd)
                self._writes = False
            os.close(self._request_fd)
            self._request_fd = -1

    def kill(self, grace_s: float = 0.0) -> None:
        """Ends the process and all it started, at the latest after `grace_s` seconds; frees
        everything but the log.
        """
        if self._process is None:
            return
        if grace_s > 0:
            self.stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of the group is gone
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        kill_strays(str(self._home))
        self.stop()
        self._process = None
        self._selector.unregister(self._answer_fd)
        os.close(self._answer_fd)
        self._marker.release()
        self._map.close()
        self._tail = self._read_tail()
        os.close(self._log_fd)
        self.awaited.clear()
        self._outbox.clear()
        shutil.rmtree(self._home, ignore_errors=True)

    def tail(self) -> str:
        """The end of what the last killed process printed."""
        return self._tail

    def bound_log(self) -> None:
        """Keeps a talkative game from filling the disk."""
        now = time.monotonic()
        if now - self._log_checked_at >= _LOG_CHECK_S:
            self._log_checked_at = now
            if os.fstat(self._log_fd).st_size > _MAX_LOG_BYTES:
                os.ftruncate(self._log_fd, 0)

    def _read_tail(self) -> str:
        size = os.fstat(self._log_fd).st_size
        return os.pread(self._log_fd, _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(
            "utf-8", "replace"
        )


def _home(episode: _Episode) -> _Worker:
    assert episode.home is not None, f"ticket {episode.ticket} has no live game yet"
    return episode.home


def _shut_down(
    workers: list[_Worker],
    selector: selectors.BaseSelector,
    folder: str,
    owner_pid: int,
    forget: Callable[[], None],
) -> None:
    if os.getpid() != owner_pid:
        return  # a fork of the owner's process: the workers are not its own
    for worker in workers:
        worker.stop()
    until = time.monotonic() + _CLOSE_GRACE_S
    for worker in workers:
        worker.kill(grace_s=max(0.0, until - time.monotonic()))
    selector.close()
    shutil.rmtree(folder, ignore_errors=True)
    forget()


def _kill_all(workers: list[_Worker], folder: str) -> None:
    """What is left to do when the process ends while somebody may be using the pool."""
    for worker in workers:
        if worker.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)
    kill_strays(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _shared_memory(path: Path, size: int) -> int:
    """A file of zeros to be mapped by two processes: in memory where the system can, so that no
    full disk is in the way.
    """
    fd = (
        os.memfd_create(path.name)
        if hasattr(os, "memfd_create")
        else os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    )
    try:
        os.write(fd, bytes(size))
    except OSError:
        os.close(fd)
        raise
    return fd


def _worker_environ(temp_folder: str) -> dict[str, str]:
    """The parent's environment, with this package importable, temporary files in one place, and
    equal hashes in all workers.
    """
    environ = dict(os.environ)
    package_root = str(Path(__file__).resolve().parent.parent)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, environ.get("PYTHONPATH"))))
    environ["PYTHONHASHSEED"] = "0"
    for name in ("TMPDIR", "TEMP", "TMP"):
        environ[name] = temp_folder
    return environ


def sanitize(action: str) -> tuple[str, str]:
    """An action that every game can be given, and a note on what was changed."""
    note = ""
    if len(action) > MAX_ACTION_CHARS:
        note += (
            f"(Your action had {len(action)} characters: only the first {MAX_ACTION_CHARS} were"
            " used.)\n"
        )
        action = action[:MAX_ACTION_CHARS]
    cleaned = wire.clean(action)
    if cleaned != action:
        note += "(Your action held invalid characters: they were replaced by '?'.)\n"
    return cleaned, note


def _quoted(tail: str) -> str:
    """The last printed line, as the end of a sentence."""
    lines = tail.strip().splitlines()
    return f" (its last printed line: {lines[-1].strip()[:200]!r})" if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
