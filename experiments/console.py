"""What a run shows while it works: bars and a line of results on a terminal, plain lines
elsewhere.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from experiments.visible import visible

_PLAIN_EVERY_S = 30.0
# rich measures speed over the last half minute, in which an iteration may not end: no time left
_SPEED_S = 7 * 24 * 3600.0
_LARGE_BYTES = 2**30  # of a checkpoint, from which on reading it takes long enough to be shown


class Terminal(Console):
    """A console that shows text as it is, brackets and colons included, and marks what a terminal
    would obey. It leaves a closed pipe to `experiments.command.run_main`.
    """

    def __init__(self, **settings: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        """A text as it is printed, alone or in a table."""
        return super().render_str(visible(text), **settings)

    def on_broken_pipe(self) -> None:
        """Says what happened, where rich would end the program with exit code 1."""
        raise BrokenPipeError


class LiveProgress:
    """Follows a loop of iterations and the phases inside each; implements
    `ictjax.train.TrainProgress`. A context manager.
    """

    def __init__(self, what: str, *, done: int = 0, total: int, console: Console | None = None):
        self.console = console or Terminal()
        self._what, self._total = what, total
        self._bars: Progress | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<12}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bars = Progress(*columns, console=self.console, speed_estimate_period=_SPEED_S)
            self._whole: TaskID = self._bars.add_task(what, completed=done, total=total, note="")
            self._phase: TaskID = self._bars.add_task("", total=None, note="", visible=False)
        self._started = self._last_line = time.monotonic()
        self._done_at_start = self._done = done
        self._phase_name, self._phase_begun = "", (self._started, 0)

    def __enter__(self) -> "LiveProgress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def phase(self, name: str, finished: int, total: int) -> None:
        """Moves the phase bar; without a terminal, says at most every half minute where things
        stand.
        """
        begins = name != self._phase_name or finished <= 1
        now = time.monotonic()
        if begins:
            self._phase_name, self._phase_begun = name, (now, finished)
        if self._bars is not None:
            if begins:
                self._bars.reset(
                    self._phase,
                    description=f"  {name}",
                    total=total,
                    completed=finished,
                    visible=True,
                    note="",
                )
            else:
                self._bars.update(self._phase, total=total, completed=finished)
        elif now - self._last_line > _PLAIN_EVERY_S:
            self._last_line = now
            begun, before = self._phase_begun
            left_s = (now - begun) / max(finished - before, 1) * (total - finished)
            about = f"  about {left_s / 60:.1f} min left" if finished > before else ""
            self.console.print(f"  {name} {finished}/{total}{about}")

    def reading(self, finished: int, total: int) -> None:
        """How far a checkpoint is read, in bytes."""
        self.phase("reading weights, MiB", finished >> 20, total >> 20)

    def iteration(self, number: int, total: int, metrics: dict[str, Any]) -> None:
        """Books a finished iteration and shows its results."""
        self.advance(number, iteration_line(metrics))

    def one_more(self, note: str) -> None:
        """Books one more of the total as finished, with a few words on it."""
        self.advance(self._done + 1, note)

    def advance(self, number: int, note: str) -> None:
        """Books `number` of the total as finished, with a few words on the last one."""
        self._done = number
        left_s = (
            (time.monotonic() - self._started)
            / max(number - self._done_at_start, 1)
            * (self._total - number)
        )
        if self._bars is not None:
            self._bars.update(self._whole, completed=number, note=visible(note))
            self._bars.update(self._phase, visible=False)
        else:
            self._last_line = time.monotonic()
            line = f"{self._what} {number}/{self._total}  {note}  about {left_s / 60:.1f} min left"
            self.console.print(line, soft_wrap=True)


def iteration_line(metrics: dict[str, Any]) -> str:
    """The few numbers of an iteration that people watch, every failure that occurred, and why most
    of the failed games did.
    """
    shown = [f"reward {_number(metrics['reward'])}"]
    shown += [
        f"{name} {_number(metrics[f'reward_{name}'])}"
        for name in ("replay", "fresh")
        if metrics[f"reward_{name}"] is not None
    ]
    shown.append(f"KL {_number(metrics['kl'])}")
    shown += [
        f"{name} {count}/{total}"
        for name, count, total in (
            ("malformed", metrics["malformed_candidates"], metrics["candidates"]),
            ("truncated", metrics["reflector_failures"]["truncated"], metrics["candidates"]),
            ("actor malformed", sum(metrics["actor_failures"].values()), metrics["turns"]),
            ("failed games", metrics["failed_episodes"], metrics["episodes"]),
        )
        if count
    ]
    shown += [
        f"{name} {count:.0f}"
        for name, count in (
            ("cut contexts", metrics["cut_contexts"]),
            ("skipped steps", metrics["skipped"]),
            ("refill rounds", metrics.get("refill_rounds", 0)),
            ("groups thrown away", metrics.get("refill_thrown_away", 0)),
        )
        if count
    ]
    if metrics["error"]:
        shown.append(f"({metrics['error']})")
    return "  ".join(shown)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@contextlib.contextmanager
def reading_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """The `progress` callback of `load_checkpoint`: on a terminal, a bar on stderr while a large
    checkpoint is read, gone afterwards.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        bar = bars.add_task(what, total=None, visible=False)
        yield lambda done, total: bars.update(
            bar, completed=done, total=total, visible=total >= _LARGE_BYTES
        )


@contextlib.contextmanager
def counting_bar(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Gives a function of (done, total) for work that takes long before there is anything to show:
    a bar with the time left while it runs; without a terminal, a line at most every half minute.
    On stderr, unless a console is given.
    """
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    started = last_line = console.get_time()
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=_SPEED_S,
    ) as bars:
        bar = bars.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            nonlocal last_line
            bars.update(bar, completed=done, total=total)
            now = console.get_time()
            if not console.is_terminal and now - last_line > _PLAIN_EVERY_S and 0 < done < total:
                last_line = now
                left_s = (now - started) / done * (total - done)
                line = f"{what} {done:,}/{total:,}  about {left_s / 60:.1f} min left"
                console.print(line, highlight=False, soft_wrap=True, markup=False)

        yield advance
