"""What is shown while long work runs."""

import contextlib
import io
import re
import sys

import pytest
from rich.console import Console
from rich.text import Text

from envs.alfworld import FAMILIES
from envs.fake import FakeEnvironment
from experiments import manifest
from experiments.arms import ARMS
from experiments.console import (
    LiveProgress,
    Terminal,
    counting_bar,
    iteration_line,
    reading_bar,
    time_left,
)
from experiments.presets import PRESETS
from tests.test_watch import record


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def terminal(clock, *, is_one):
    return Console(file=io.StringIO(), force_terminal=is_one, get_time=clock, width=120)


def shown(progress):
    """The rows that a terminal shows now, without the blanks at their ends."""
    rows = progress.console.render_lines(progress._bars.get_renderable(), pad=False)
    return ["".join(segment.text for segment in row).rstrip() for row in rows]


def test_work_whose_parts_take_minutes_has_a_time_left(clock):
    console = terminal(clock, is_one=True)
    progress = LiveProgress("training", total=4, console=console)
    assert shown(progress)[-1].endswith("0/4 0:00:00 left -:--:--")
    for number, left in ((1, "0:30:00"), (2, "0:20:00")):
        clock.now += 600.0
        progress.advance(number, "")
        assert shown(progress)[-1].endswith(f"{number}/4 0:{number}0:00 left {left}")
    clock.now += 60.0
    assert shown(progress)[-1].endswith("2/4 0:21:00 left 0:19:00")


def test_an_iteration_tells_the_time_left_by_the_time_it_took_not_by_what_came_before(clock):
    console = terminal(clock, is_one=True)
    progress = LiveProgress("iterations", total=4, console=console)
    clock.now += 3600.0  # programs are compiled
    progress.iteration(1, 4, metrics())
    assert shown(progress)[-1].endswith("1/4 1:00:00 left 0:05:00")  # three times 100 seconds


EVERYTHING = {
    "failed_episodes": 12,
    "episodes": 1024,
    "cut_contexts": 3,
    "skipped": 1.0,
    "refill_rounds": 2,
    "refill_thrown_away": 5,
    "error": "the worker of a game ended: " + "no such file, " * 19,
}


def metrics(**more):
    """Of an iteration that took 100 seconds."""
    return (
        record(1) | {"failed_episodes": 0, "episodes": 20, "cut_contexts": 0, "skipped": 0} | more
    )


LONGEST_FAMILY = max((*FAMILIES, "locked_door_fixed"), key=len)
LONGEST_ARM = f"{max(ARMS, key=len)}@endpoint"
SCREENS = {
    "train": ("iterations", "reading weights, MiB", 14530, 15234, iteration_line(metrics(**EVERYTHING))),
    "collect": ("iterations", "games before training", 11999, 12000, ""),
    "evaluate": (
        "evaluation",
        "reflections of 84 loops",
        1007,
        1008,
        f"{LONGEST_ARM} on {LONGEST_FAMILY} (run 4): 100.0 % of test games won",
    ),
    "deletions": (
        "deletions",
        f"{LONGEST_FAMILY} without sentences",
        9999,
        10000,
        f"{LONGEST_FAMILY}: 120 sentences left out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("command", SCREENS)
def test_count_and_times_are_whole_under_the_longest_note(clock, command, width):
    what, phase, finished, total, note = SCREENS[command]
    console = Terminal(
        file=io.StringIO(), force_terminal=True, get_time=clock, width=width, height=24
    )
    progress = LiveProgress(what, total=1200, console=console)
    clock.now += 11 * 3600.0 + 59
    progress.advance(1100, note)
    progress.phase(phase, 0, total)
    clock.now += 3600.0
    progress.phase(phase, finished, total)
    rows = shown(progress)
    assert max(map(len, rows)) <= width
    *said, whole, part = (" ".join(row.split()) for row in rows)
    assert whole.endswith(" 1100/1200 12:00:59 left 0:00:05")
    assert re.search(rf" {finished}/{total} 1:00:00 left 0:0\d:\d\d$", part)
    assert whole.startswith(what) and part.startswith(phase[:9])
    assert "━" in whole and "━" in part
    assert " ".join(said).split() == note.split()  # nothing of it is cut


def test_a_count_on_a_terminal_has_a_time_left(clock):
    console = terminal(clock, is_one=True)
    with counting_bar("counting", console) as advance:
        for done in (1, 2):
            clock.now += 60.0
            advance(done, 10)
        clock.now += 0.2
    assert "counting" in console.file.getvalue()
    assert "0:08:00" in console.file.getvalue()


def test_a_count_elsewhere_is_a_line_every_half_minute(clock):
    console = terminal(clock, is_one=False)
    with counting_bar("counting", console) as advance:
        for done in range(1, 11):
            clock.now += 20.0
            advance(done, 10)
    assert console.file.getvalue().splitlines() == [
        "counting 2/10  about 2.7 min left",
        "counting 4/10  about 2.0 min left",
        "counting 6/10  about 1.3 min left",
        "counting 8/10  about 40 s left",
    ]


def test_a_short_count_says_nothing(capsys):
    with counting_bar("counting") as advance:
        advance(1, 2)
        advance(2, 2)
    assert capsys.readouterr() == ("", "")


def test_the_listing_of_families_has_a_bar(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def bar(what):
        yield lambda done, total: seen.append((what, done, total))

    monkeypatch.setattr(manifest, "counting_bar", bar)
    settings = PRESETS["fake-tiny"].task.environment
    manifest.games_sha256(settings, FakeEnvironment())
    parts = 2 * len((*settings.train_families, *settings.heldout_families))
    assert seen == [("finding games", done, parts) for done in range(parts)]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0 s"),
        (1.4, "1 s"),
        (59.4, "59 s"),
        (59.6, "1.0 min"),
        (61.0, "1.0 min"),
        (5400.0, "90.0 min"),
    ],
)
def test_less_than_a_minute_is_said_in_seconds(seconds, said):
    assert time_left(seconds) == f"about {said} left"


def test_a_long_phase_elsewhere_says_the_time_that_is_left_from_where_it_began(clock):
    console = terminal(clock, is_one=False)
    progress = LiveProgress("training", total=4, console=console)
    progress.phase("games", 100, 200)  # a part of them was played in another life
    for done in (110, 120):
        clock.now += 60.0
        progress.phase("games", done, 200)
    assert console.file.getvalue().splitlines() == [
        "  games 110/200  about 9.0 min left",
        "  games 120/200  about 8.0 min left",
    ]


@pytest.mark.parametrize("width", [80, 60])
def test_a_count_with_a_long_name_is_whole(clock, width):
    """A plan compiles, and a file of chats with a long name is encoded."""
    for what in ("compiling", f"encoding {'[b]chats[/b] of games, ' * 4}.jsonl"):
        console = Console(
            file=io.StringIO(), force_terminal=True, get_time=clock, width=width, color_system=None
        )
        with counting_bar(what, console) as advance:
            for done in (99_998, 99_999):
                clock.now += 60.0
                advance(done, 100_000)
            clock.now += 1.0
        (row,) = {
            row.rstrip()
            for row in re.split(r"[\n\r]|\x1b\[[^A-Za-z]*[A-Za-z]", console.file.getvalue())
            if "99999/100000" in row
        }
        assert re.search(r" 99999/100000 0:02:01 left 0:01:00$", row) and len(row) <= width
        assert row.startswith(what[:12])  # brackets are text


def test_elsewhere_an_iteration_is_one_line_with_dead_groups_and_seconds(clock):
    console = terminal(clock, is_one=False)
    progress = LiveProgress("iterations", total=4, console=console, screen=None)
    progress.iteration(1, 4, metrics(dead_groups=0))
    assert console.file.getvalue() == (
        "iterations 1/4  reward 0.100  replay 0.100  KL 0.002  dead groups 0  malformed 2/8"
        "  truncated 1/8  actor malformed 3/100"
        "  seconds: contexts 60.0, rewards 30.0, update 10.0  about 5.0 min left\n"
    )


def test_a_screen_stands_above_the_bars_and_is_drawn_once_for_an_iteration(clock):
    console = terminal(clock, is_one=True)
    seen, drawn = [], []

    def screen(number, of_iteration):
        seen.append((number, of_iteration.get("reward")))

        def draw(console, rows):
            drawn.append((console.width, rows))
            return Text("\n".join(f"row {row}" for row in range(99)))

        return draw

    with LiveProgress("iterations", done=3, total=9, console=console, screen=screen) as progress:
        progress.iteration(4, 9, metrics(reward=0.5))
        for game in range(50):
            progress.phase("rewards", game, 50)
        rows = shown(progress)
    assert seen == [(3, None), (4, 0.5)]
    assert drawn == [(120, 18), (120, 18)]
    assert rows[:18] == [f"row {row}" for row in range(18)]
    assert rows[18].startswith("iterations") and rows[19].startswith("  rewards")
    console.size = (60, 12)
    assert len(shown(progress)) == 11  # and one for the cursor
    assert drawn[2:] == [(60, 9)]
    console.size = (60, 8)  # too few for a page: the line of the iteration
    assert shown(progress)[0].startswith("reward 0.500  replay 0.100")
    console.size = (60, 2)
    assert [row.split()[0] for row in shown(progress)] == ["iterations", "rewards"]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(
    "error",
    [ValueError("Line 3 is torn"), PermissionError(13, "Not yours"), KeyError("x"), TypeError("y")],
)
def test_a_screen_that_cannot_be_made_does_not_end_the_training(clock, error, drawn):
    def fail(*_):
        raise error

    def screen(number, metrics):
        return fail if drawn else fail()

    progress = LiveProgress(
        "iterations", total=4, console=terminal(clock, is_one=True), screen=screen
    )
    with progress:
        progress.iteration(1, 4, metrics())
        text = " ".join(shown(progress))
    known = isinstance(error, (OSError, ValueError))
    assert "reward 0.100" in text
    assert f"no more can be shown: {error if known else repr(error)}" in text
    assert "1/4" in text


@pytest.mark.parametrize("term", ["dumb", "unknown", "xterm"])
def test_a_terminal_that_draws_nothing_anew_gets_lines(term):
    console = Terminal(file=io.StringIO(), force_terminal=True, _environ={"TERM": term})
    with LiveProgress("iterations", total=2, console=console) as progress:
        progress.iteration(1, 2, metrics())
    lines = [row for row in console.file.getvalue().splitlines() if "iterations 1/2" in row]
    assert bool(lines) == (term != "xterm")


class FakeTty(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("term", ["dumb", "unknown", "xterm"])
def test_a_count_on_a_terminal_that_draws_nothing_anew_is_lines(monkeypatch, clock, term):
    """On stderr, as commands count that have no console at hand."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("rich.console.monotonic", clock)
    monkeypatch.setattr("sys.stderr", FakeTty())
    with counting_bar("counting") as advance:
        for done in range(1, 5):
            clock.now += 20.0
            advance(done, 10)
    shown = sys.stderr.getvalue()
    lines = "counting 2/10  about 2.7 min left\ncounting 4/10  about 2.0 min left\n"
    assert (shown == lines) == (term != "xterm")
    assert ("\x1b" in shown) == (term == "xterm")


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_checkpoint_that_is_read_has_a_bar_where_one_can_be_drawn(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stderr", FakeTty())
    with reading_bar("reading weights") as progress:
        progress(2**30, 2**31)
    assert ("reading weights" in sys.stderr.getvalue()) == (term == "xterm")
    assert ("\x1b" in sys.stderr.getvalue()) == (term == "xterm")
