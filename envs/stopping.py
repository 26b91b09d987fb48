"""How a program that SIGINT or SIGTERM asks to end gets there: a flag that loops look at, and a
thread that ends the process where nobody does.

No handler raises in the middle of something: exceptions vanish in callbacks of the garbage
collector and of asyncio, and whatever they hit leaves halves behind. The one exception is a wait
for a key.

    with armed() as program:          # before heavy imports
        with unwinding():             # here `check` is called, so an end waits for it
            for step in work:
                check()               # raises Stopped
                with held():          # here nothing but a second signal ends the process
                    save()

Outside of `armed`, and in other threads, the functions below do nothing. A system that takes a
machine away sends SIGTERM first, which is all the notice that is needed.
"""

import contextlib
import contextvars
import os
import select
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from envs.terminals import draws_anew

GRACE_S = 4.0  # until an end that waits for a `check` is forced
_CLEANING_S = 2.0  # for killing children and removing unfinished files
_POLL_S = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked the program to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Program:
    """A program whose signals are answered here; made by `armed`."""

    def __init__(self) -> None:
        self.remedy = "start it again."  # how to go on, the end of the last sentence
        self.number: int | None = None  # the signal that asked it to end
        self._unwinding = 0  # sections that end by themselves once they are asked to
        self._held = 0  # sections that must not be cut off
        self._waits_for_key = False
        self._raised = False
        self._ending = False
        self._lock = threading.Lock()  # of `_ending`, `_held` and what follows
        self._cleaners: dict[int, Callable[[], None]] = {}
        self._num_cleaners = 0
        self._disarmed = threading.Event()
        self._pipe = os.pipe()
        for fd in self._pipe:
            os.set_blocking(fd, False)
        self._terminal = termios.tcgetattr(0) if os.isatty(0) else None
        # daemon: a program that ends by an exception does not wait for it
        self._watcher = threading.Thread(target=self._watch, name="ictjax-signals", daemon=True)
        self._before = {number: signal.signal(number, self._noted) for number in _SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._watcher.start()

    def disarm(self) -> None:
        """Gives the signals back."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._disarmed.set()
        self._watcher.join()
        for fd in self._pipe:
            os.close(fd)

    def check(self) -> None:
        """Raises Stopped, again at every call, once a signal has come."""
        if self.number is not None:
            self._park_if_ending()
            self._raised = True
            raise Stopped(self.number)

    @contextlib.contextmanager
    def unwinding(self) -> Iterator[None]:
        """See the function of this name."""
        self._unwinding += 1
        try:
            yield
        finally:
            self._unwinding -= 1

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """See the function of this name."""
        self._park_if_ending()
        with self._lock:
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1

    @contextlib.contextmanager
    def waiting_for_key(self) -> Iterator[None]:
        """See the function of this name."""
        with self.unwinding():
            try:
                self._waits_for_key = True
                self.check()
                yield
            finally:
                self._waits_for_key = False

    def add_cleaner(self, clean: Callable[[], None]) -> Callable[[], None]:
        """See `at_end`."""
        with self._lock:
            number, self._num_cleaners = self._num_cleaners, self._num_cleaners + 1
            self._cleaners[number] = clean

        def forget() -> None:
            self._cleaners.pop(number, None)

        return forget

    def end(self, exit_code: int) -> None:
        """Ends the process, after what was printed is out; never returns.

        The interpreter is not taken apart: threads in which XLA still compiles would crash it.
        """
        with self._lock:
            forced, self._ending = self._ending, True
        if forced:
            threading.Event().wait()  # for the watcher to end the process
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        self._clean()
        os._exit(exit_code)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        del frame
        # the watcher notes it too, and sooner where the main thread is busy
        if self.number is None:
            self.number = number
        if self._waits_for_key:
            self._waits_for_key = False
            self.check()

    def _watch(self) -> None:
        while (number := self._next_signal()) is None:
            if self._disarmed.is_set():
                return
        if self.number is None:
            self.number = number
        until = time.monotonic() + GRACE_S
        knocked = False
        while not self._disarmed.is_set():
            again = self._next_signal()
            if again is None and self._waits_for_key and not knocked:
                # readline misses a signal that comes just before it waits
                knocked = True
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                self._next_signal()
            with self._lock:
                forced = again is not None or not self._waits(until)
                by_main, self._ending = self._ending, self._ending or forced
            if forced:
                if not by_main:
                    forcing = threading.Thread(target=self._force, args=(number,), daemon=True)
                    forcing.start()
                    forcing.join(_CLEANING_S)
                os._exit(128 + number)

    def _waits(self, until: float) -> bool:
        """Whether the main thread may end the process by itself."""
        if self._held:
            return True
        by_itself = self._ending or self._raised or self._unwinding > 0
        return by_itself and time.monotonic() < until

    def _next_signal(self) -> int | None:
        """The next of the signals that end a program; None where none comes in a moment."""
        if not select.select([self._pipe[0]], [], [], _POLL_S)[0]:
            return None
        (byte,) = os.read(self._pipe[0], 1)
        return byte if byte in _SIGNALS else None

    def _force(self, number: int) -> None:
        """Says why, cleans up and ends the process while the main thread is anywhere."""
        words = f"\nictjax: stopped by {signal.Signals(number).name}; {self.remedy}\n"
        with contextlib.suppress(OSError):
            os.write(2, words.encode())
        self._clean()
        if self._terminal is not None:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(0, termios.TCSANOW, self._terminal)
        for fd in (1, 2):
            with contextlib.suppress(OSError):
                if os.isatty(fd) and draws_anew():
                    os.write(fd, b"\x1b[?25h")  # bars hide the cursor
        os._exit(128 + number)

    def _clean(self) -> None:
        for clean in reversed(list(self._cleaners.values())):
            with contextlib.suppress(Exception):  # the others have to be called
                clean()

    def _park_if_ending(self) -> None:
        """Leaves the rest to the thread that ends the process."""
        if self._ending:
            threading.Event().wait()


_PROGRAM: contextvars.ContextVar[Program | None] = contextvars.ContextVar("program", default=None)


@contextlib.contextmanager
def armed() -> Iterator[Program]:
    """Answers SIGINT and SIGTERM while inside; the main thread only. Inside another `armed` it is
    that one.
    """
    program = _PROGRAM.get()
    if program is not None:
        yield program
        return
    program = Program()
    token = _PROGRAM.set(program)
    try:
        yield program
    finally:
        _PROGRAM.reset(token)
        program.disarm()


def check() -> None:
    """Raises `Stopped` once the program was asked to end."""
    program = _PROGRAM.get()
    if program is not None:
        program.check()


def unwinding() -> contextlib.AbstractContextManager[None]:
    """While inside, an end waits up to `GRACE_S` seconds for the next `check`; it is immediate
    elsewhere.
    """
    program = _PROGRAM.get()
    return contextlib.nullcontext() if program is None else program.unwinding()


def held() -> contextlib.AbstractContextManager[None]:
    """While inside, only a second signal ends the process: what is unfinished would be lost."""
    program = _PROGRAM.get()
    return contextlib.nullcontext() if program is None else program.held()


def waiting_for_key() -> contextlib.AbstractContextManager[None]:
    """While inside, a signal raises `Stopped` at once, as nothing but a key would end the wait."""
    program = _PROGRAM.get()
    return contextlib.nullcontext() if program is None else program.waiting_for_key()


def at_end(clean: Callable[[], None]) -> Callable[[], None]:
    """Has `clean` called if the process ends before its owner could: it kills children or removes
    an unfinished file. Runs in any thread, so it touches nothing that the owner may be using.

    Returns:
      What the owner calls once it has cleaned up itself.
    """
    program = _PROGRAM.get()
    return _nothing if program is None else program.add_cleaner(clean)


def _nothing() -> None:
    pass
