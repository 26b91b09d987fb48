"""What all benchmarks share: the order in which designs take turns, ratios, and the record of
results.

Absolute numbers belong to a machine and its load; ratios travel better. So every ratio is the
median, over repetitions, of two rates taken right after one another: the designs take turns inside
each repetition, in an order that rotates, after one untimed round of everything.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Result(NamedTuple):
    """One table: `rows` are its lines by column name (the first names the design), `notes` the
    sentences below it.

    `speedup` is the rate of the row divided by that of the design `peer` (see `ratio`), where
    something was timed.
    """

    title: str
    peer: str | None
    rows: list[dict[str, Any]]
    notes: list[str]


Note = Callable[[str], None]  # says what is being measured
Design = Callable[[], tuple[float, Any]]  # runs once; seconds that count, and a result


def interleave(
    designs: Mapping[str, Design], repetitions: int, note: Note
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every design in each repetition, and the result of its untimed first run.

    Each repetition runs all designs, starting with another one each time, so that a machine that
    slows down slows all of them.
    """
    names, first = list(designs), {}
    for name in names:
        note(f"{name}: first run")
        first[name] = designs[name]()[1]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        for index in range(len(names)):
            name = names[(repetition + index) % len(names)]
            note(f"{name}: {repetition + 1} of {repetitions}")
            seconds[name].append(designs[name]()[0])
    return seconds, first


def ratio(seconds: Mapping[str, Sequence[float]], design: str, peer: str) -> float:
    """How many times faster a design is than a peer: the median over repetitions."""
    return statistics.median(
        theirs / ours for ours, theirs in zip(seconds[design], seconds[peer], strict=True)
    )


def fastest_threads(run: Callable[[], Any]) -> str:
    """Gives PyTorch one thread or one for every core, whichever runs faster here: on a busy machine
    two threads that wait for each other can take eight times as long as one. Says which.
    """
    import torch  # an optional package, needed here only

    seconds = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}, reverse=True):
        torch.set_num_threads(threads)
        run()
        start = time.perf_counter()
        run()
        seconds[threads] = time.perf_counter() - start
    fastest = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(fastest)
    return f"{fastest} of {max(seconds)} threads, its faster choice here"


class Stopwatch:
    """Seconds of the parts of a run that count."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
