"""What is shown while long work runs."""

import contextlib
import io

import pytest
from rich.console import Console

from envs.fake import FakeEnvironment
from experiments import manifest
from experiments.console import LiveProgress, counting_bar
from experiments.presets import PRESETS


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


def test_work_whose_parts_take_minutes_has_a_time_left(clock):
    console = terminal(clock, is_one=True)
    progress = LiveProgress("training", total=4, console=console)
    for number in (1, 2):
        clock.now += 600.0
        progress.advance(number, "")
    (task, _) = progress._bars.tasks
    assert task.time_remaining == 1200.0


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
        "counting 8/10  about 0.7 min left",
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
