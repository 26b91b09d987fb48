"""What a run shows while it works: on a terminal bars, and above them what came of it so far; plain
lines elsewhere.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressBar,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Column
from rich.text import Text

from envs.terminals import draws_anew
from experiments.visible import visible

_PLAIN_EVERY_S = 30.0
# rich measures speed over the last half minute, in which an iteration may not end: no time left
_SPEED_S = 7 * 24 * 3600.0
_LARGE_BYTES = 2**30  # of a checkpoint, from which on reading it takes long enough to be shown
_RECENT = 5  # iterations that the time left is told by
_PHASES = ("contexts", "candidates", "rewards", "refill", "update", "checkpoint")
_MOST_ROWS = 20  # of a terminal that are used
_FEWEST_ROWS = 6  # above the bars; a page in less says less than a line
_BESIDE_BAR = 60  # columns for name, count and times; what is more is the bar's

Draw = Callable[[Console, int], RenderableType]
"""Draws something for a console, in at most so many rows."""

Screen = Callable[[int, Mapping[str, Any]], Draw]
"""Called with the last iteration, when its files are written, and its metrics (none before the
first that is followed); gives what draws how the run goes. What either raises is shown, and ends
nothing.
"""


class Terminal(Console):
    """A console that shows text as it is, brackets and colons included, and marks what a terminal
    would obey. It leaves a closed pipe to `experiments.command.run_main`. A terminal that cannot
    draw anything anew (TERM=dumb) is none to it.
    """

    def __init__(self, **settings: Any):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **settings})

    @property
    def is_terminal(self) -> bool:
        """Whether bars can be drawn."""
        return super().is_terminal and draws_anew(self._environ)

    def render_str(self, text: str, **settings: Any) -> Text:
        """A text as it is printed, alone or in a table."""
        return super().render_str(visible(text), **settings)

    def on_broken_pipe(self) -> None:
        """Says what happened, where rich would end the program with exit code 1."""
        raise BrokenPipeError


class LiveProgress:
    """Follows a loop of iterations and the phases inside each; implements
    `ictjax.train.TrainProgress`. A context manager.

    Args:
      what: the iterations are called.
      done: of them, before.
      total: of them.
      console: by default a terminal.
      screen: shown above the bars of a terminal with enough rows, in place of the line of the last
        iteration.
    """

    def __init__(
        self,
        what: str,
        *,
        done: int = 0,
        total: int,
        console: Console | None = None,
        screen: Screen | None = None,
    ):
        self.console = console or Terminal()
        self._what, self._total, self._screen = what, total, screen
        self._bars: _Bars | None = None
        if self.console.is_terminal:
            self._bars = _Bars(
                *_columns(self.console, _LeftColumn(table_column=Column(no_wrap=True))),
                console=self.console,
                refresh_per_second=4,
            )
            self._whole: TaskID = self._bars.add_task(what, completed=done, total=total)
            self._phase: TaskID = self._bars.add_task("", total=None, visible=False)
        self._started = self._last_line = time.monotonic()
        self._done_at_start = self._done = done
        self._phase_name, self._phase_begun = "", (self._started, 0)
        self._iterations: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=_RECENT)

    def __enter__(self) -> "LiveProgress":
        if self._bars is not None:
            if self._screen is not None:
                self._bars.above = self._above(self._done, "", {})
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
        begun, before = self._phase_begun
        left_s = None
        if finished > before:
            left_s = (now - begun) / (finished - before) * (total - finished)
        if self._bars is not None:
            if begins:
                self._bars.reset(
                    self._phase,
                    description=f"  {name}",
                    total=total,
                    completed=finished,
                    visible=True,
                    ends=None,
                )
            else:
                self._bars.update(self._phase, total=total, completed=finished, ends=_end(left_s))
        elif now - self._last_line > _PLAIN_EVERY_S:
            self._last_line = now
            about = "" if left_s is None else f"  {time_left(left_s)}"
            self.console.print(f"  {name} {finished}/{total}{about}")

    def reading(self, finished: int, total: int) -> None:
        """How far a checkpoint is read, in bytes."""
        self.phase("reading weights, MiB", finished >> 20, total >> 20)

    def iteration(self, number: int, total: int, metrics: dict[str, Any]) -> None:
        """Books a finished iteration and shows its results."""
        self._iterations.append(metrics)
        left_s = seconds_left(self._iterations, self._total - number)
        self._advance(number, iteration_line(metrics), left_s, metrics)

    def one_more(self, note: str) -> None:
        """Books one more of the total as finished, with a few words on it."""
        self.advance(self._done + 1, note)

    def advance(self, number: int, note: str) -> None:
        """Books `number` of the total as finished, with a few words on the last one."""
        self._advance(number, note)

    def _advance(
        self,
        number: int,
        note: str,
        left_s: float | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        self._done = number
        if left_s is None:
            left_s = (
                (time.monotonic() - self._started)
                / max(number - self._done_at_start, 1)
                * (self._total - number)
            )
        if self._bars is not None:
            self._bars.above = self._above(number, note, metrics)
            self._bars.update(self._phase, visible=False)
            self._bars.update(self._whole, completed=number, ends=_end(left_s), refresh=True)
        else:
            self._last_line = time.monotonic()
            line = f"{self._what} {number}/{self._total}  {note}  {time_left(left_s)}"
            self.console.print(line, soft_wrap=True)

    def _above(self, number: int, note: str, metrics: Mapping[str, Any] | None) -> "_Above":
        draw = None
        if self._screen is not None and metrics is not None:
            try:
                draw = self._screen(number, metrics)
            except Exception as error:  # whatever is wrong with what is shown, training goes on
                note = f"{note}  {_no_more(error)}"
        return _Above(note, draw)


def _no_more(error: Exception) -> str:
    said = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
    return f"(no more can be shown: {said})"


def _end(left_s: float | None) -> float | None:
    """When what takes so many seconds more ends, by the clock of this module."""
    return None if left_s is None else time.monotonic() + left_s


class _Bars(Progress):
    """Bars, below whatever is put above them."""

    above: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above
        yield from super().get_renderables()


class _Above:
    """What stands above two bars: what `draw` draws where there are rows for it, else a note.
    Rendered once for a size of the terminal, as bars are drawn anew several times a second.
    """

    def __init__(self, note: str, draw: Draw | None):
        self._note, self._draw = Text(visible(note)), draw
        self._size: tuple[int, int] | None = None
        self._lines: list[list[Segment]] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        size = (console.width, console.height)
        if self._size != size:
            rows = max(min(_MOST_ROWS, console.height - 1) - 2, 0)
            draw = self._draw if rows >= _FEWEST_ROWS else None
            whole = options.update(height=None)
            try:
                drawn = self._note if draw is None else draw(console, rows)
                lines = console.render_lines(drawn, whole, pad=False)
            except Exception as error:  # as in `LiveProgress._above`
                note = self._note.plain
                lines = console.render_lines(
                    Text(visible(f"{note}  {_no_more(error)}")), whole, pad=False
                )
            self._size, self._lines = size, lines[:rows]
        for line in self._lines:
            yield from line
            yield Segment.line()


def _columns(console: Console, left: ProgressColumn) -> tuple[ProgressColumn, ...]:
    """Of bars: where a terminal is narrow, bar and name give way, never count and times."""
    return (
        _NameColumn(),
        _BarColumn(console),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("left"),
        left,
    )


class _NameColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{visible(task.description):<12}", no_wrap=True, overflow="ellipsis")


class _BarColumn(BarColumn):
    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def render(self, task: Task) -> ProgressBar:
        self.bar_width = max(6, min(40, self._console.width - _BESIDE_BAR))
        return super().render(task)


class _LeftColumn(ProgressColumn):
    """The time until `ends`, a field of the task."""

    def render(self, task: Task) -> Text:
        ends = task.fields.get("ends")
        text = "-:--:--"
        if ends is not None:
            minutes, seconds = divmod(round(max(ends - time.monotonic(), 0.0)), 60)
            text = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        return Text(text, style="progress.remaining")


def iteration_line(metrics: Mapping[str, Any]) -> str:
    """The few numbers of an iteration that people watch, every failure that occurred, and why most
    of the failed games did, and where its time went.
    """
    shown = [f"reward {_number(metrics['reward'])}"]
    shown += [
        f"{name} {_number(metrics[f'reward_{name}'])}"
        for name in ("replay", "fresh")
        if metrics[f"reward_{name}"] is not None
    ]
    shown.append(f"KL {_number(metrics['kl'])}")
    if "dead_groups" in metrics:
        shown.append(f"dead groups {metrics['dead_groups']}")
    shown += [
        f"{name} {count}/{total}"
        for name, count, total in (
            ("malformed", metrics["malformed_candidates"], metrics["candidates"]),
            ("truncated", metrics["reflector_failures"]["truncated"], metrics["candidates"]),
            ("actor malformed", sum(metrics["actor_failures"].values()), metrics["turns"]),
        )
        if count
    ]
    shown += mishaps(metrics)
    if times := phase_seconds(metrics):
        shown.append(f"seconds: {', '.join(f'{name} {spent:.1f}' for name, spent in times)}")
    return "  ".join(shown)


def mishaps(metrics: Mapping[str, Any]) -> list[str]:
    """What went wrong in an iteration or had to be done again, a few words each."""
    shown = []
    if failed := metrics.get("failed_episodes"):
        shown.append(f"failed games {failed}/{metrics.get('episodes', '?')}")
    shown += [
        f"{name} {count:.0f}"
        for name, count in (
            ("cut contexts", metrics.get("cut_contexts")),
            ("skipped steps", metrics.get("skipped")),
            ("refill rounds", metrics.get("refill_rounds")),
            ("groups thrown away", metrics.get("refill_thrown_away")),
        )
        if count
    ]
    if error := metrics.get("error"):
        shown.append(f"({error})")
    return shown


def phase_seconds(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The phases of an iteration, each with the seconds that it took."""
    times = metrics.get("time") or {}
    return [(name, times[f"{name}_s"]) for name in _PHASES if f"{name}_s" in times]


def seconds_left(iterations: Sequence[Mapping[str, Any]], missing: int) -> float | None:
    """How long so many more iterations take, if they take as long as the last few; None where no
    time of these is known.

    Args:
      iterations: their metrics, each with its "time".
      missing: how many are to come.
    """
    recent = [
        sum(seconds for name, seconds in record["time"].items() if name.endswith("_s"))
        for record in list(iterations)[-_RECENT:]
        if record.get("time")
    ]
    return sum(recent) / len(recent) * missing if recent else None


def time_left(seconds: float) -> str:
    """90.0 -> about 1.5 min left; below a minute in seconds: about 45 s left."""
    rounded = round(seconds)
    return f"about {rounded} s left" if rounded < 60 else f"about {seconds / 60:.1f} min left"


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
    console = Terminal(stderr=True)
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
    a bar with the time left while it runs; without a terminal that can draw one, a line at most
    every half minute.
    On stderr, unless a console is given.
    """
    console = console or Terminal(stderr=True)
    columns = _columns(console, TimeRemainingColumn(table_column=Column(no_wrap=True)))
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
                line = f"{what} {done:,}/{total:,}  {time_left(left_s)}"
                console.print(line, highlight=False, soft_wrap=True, markup=False)

        yield advance
