"""Which episode gets a free place: those whose family has an idle game; and all do in the end."""

import os
import random
import signal
from collections import Counter

import pytest

from envs.api import GameId, Outcome
from envs.fake import FakeEnvironment
from envs.placing import Held, Queue
from envs.pool import WorkerPool
from envs.worker import LiveGames

GAME = GameId(env="fake", family="lamp", key="0")


class Opener:
    """An environment that counts what it opens."""

    def __init__(self):
        self.opened = Counter()
        self._fake = FakeEnvironment()

    def open(self, family):
        self.opened[family] += 1
        return self._fake.open("lamp")


def played(capacity, families, rng, *, rounds, queue=Queue):
    """Plays rounds of episodes of random lengths in the live games of one worker; returns how many
    games each round opened.
    """
    opener = Opener()
    games, held = LiveGames(opener, capacity), Held(capacity)
    queue = queue(patience=capacity)
    ticket, opened = 0, []
    for _ in range(rounds):
        before = opener.opened.total()
        of = {}
        for family in families:
            queue.add(ticket, family)
            of[ticket] = family
            ticket += 1
        ends = {}
        while queue or ends:
            while queue and held.room:
                chosen = queue.pop(held)
                held.take(of[chosen])
                games.take(chosen, of[chosen])
                ends[chosen] = rng.random()
            first = min(ends, key=ends.get)
            for other in ends:
                ends[other] -= ends[first]
            del ends[first]
            held.leave(of[first])
            games.release(first)
            for family in set(families):
                names = [name for name, _ in [*games._playing.values(), *games._idle]]
                assert held.num_open(family) == names.count(family)
        opened.append(opener.opened.total() - before)
    return opened


class InOrder(Queue):
    """First come, first served."""

    def _suited(self, held):
        return min(self._waiting, key=self._oldest)


def test_few_games_are_opened_again_and_the_pool_knows_which_are_open():
    families = [name for name in "abcdefg" for _ in range(36)]
    first, *later = played(64, families, random.Random(0), rounds=4)
    in_order = played(64, families, random.Random(0), rounds=4, queue=InOrder)
    assert 64 <= first < 128 and max(later) < 70
    assert min(in_order) > 150


def test_the_pool_knows_what_is_open_also_where_episodes_come_one_by_one():
    rng, opener = random.Random(0), Opener()
    games, held, queue = LiveGames(opener, 6), Held(6), Queue(patience=6)
    of, playing = {}, []
    for ticket in range(3000):
        of[ticket] = rng.choice("abcd")
        queue.add(ticket, of[ticket])
        while playing and (not held.room or rng.random() < 0.6):
            ended = playing.pop(rng.randrange(len(playing)))
            raised = rng.random() < 0.1
            held.leave(of[ended], kept=not raised)
            (games.discard if raised else games.release)(ended)
        while queue and held.room:
            chosen = queue.pop(held)
            held.take(of[chosen])
            games.take(chosen, of[chosen])
            playing.append(chosen)
        idle = Counter(name for name, _ in games._idle)
        assert all(held.has_idle(family) == bool(idle[family]) for family in "abcd")
        names = Counter(name for name, _ in games._playing.values()) + idle
        assert all(held.num_open(family) == names[family] for family in "abcd")
    assert opener.opened.total() < 2500


def test_a_pool_takes_no_game_for_idle_that_raised_or_went_with_its_process():
    def play(pool, action):
        ticket = pool.reset(GAME, max_steps=2)
        for _ in range(3):
            (event,) = pool.poll(20.0)
            if event.step.outcome is not None:
                return event.step.outcome
            pool.step(ticket, action)

    with WorkerPool("fake", num_workers=1, options={"raise_on": "jump"}) as pool:
        (worker,) = pool._workers
        assert play(pool, "jump") is Outcome.FAILED
        assert worker.held.num_open("lamp") == 0
        assert play(pool, "look") is Outcome.STEP_LIMIT
        assert worker.held.num_open("lamp") == 1 and worker.held.has_idle("lamp")
        two = [pool.reset(GAME, max_steps=2) for _ in range(2)]
        answered = []
        while len(answered) < 2:
            answered += pool.poll(20.0)
        for ticket in two:
            pool.release(ticket)
        assert worker.held.num_open("lamp") == 2
        os.kill(*pool.worker_pids, signal.SIGKILL)
        ticket = pool.reset(GAME, max_steps=2)
        while not pool.poll(20.0):
            pass
        pool.release(ticket)
        assert worker.held.num_open("lamp") == 1


def test_idle_games_are_played_first_and_new_families_share_the_rest():
    held, queue = Held(4), Queue(patience=100)
    for ticket, family in enumerate("aaaabb"):
        queue.add(ticket, family)
    order = []
    while held.room:
        order.append(queue.pop(held))
        held.take("aaaabb"[order[-1]])
    assert order == [0, 4, 1, 2]
    assert held.room == 0 and held.num_open("a") == 3
    held.leave("b")
    assert held.has_idle("b") and queue.pop(held) == 5


def test_the_oldest_is_passed_over_so_often_and_no_more():
    held, queue = Held(2), Queue(patience=3)
    held.take("b")
    held.leave("b")
    queue.add(0, "a")
    for ticket in range(1, 9):
        queue.add(ticket, "b")
    order = []
    for _ in range(9):
        order.append(queue.pop(held))
        family = "a" if order[-1] == 0 else "b"
        held.take(family)
        held.leave(family)
    assert order == [1, 2, 3, 0, 4, 5, 6, 7, 8]
    assert not queue


def test_what_is_released_waits_no_more_and_another_becomes_the_oldest():
    held, queue = Held(2), Queue(patience=1)
    for ticket, family in enumerate("abab"):
        queue.add(ticket, family)
    held.take("b")
    held.leave("b")
    assert queue.pop(held) == 1
    queue.discard(0, "a")
    queue.discard(0, "a")
    queue.discard(7, "none")
    assert queue.pop(held) == 3  # passed over once; but that was another one
    assert queue.pop(held) == 2
    assert not queue
    with pytest.raises(ValueError):
        queue.pop(held)


def test_a_process_that_is_gone_takes_its_idle_games_with_it():
    held = Held(3)
    held.take("a")
    held.take("b")
    held.leave("b")
    held.forget_idle()
    assert (held.num_open("a"), held.num_open("b"), held.room) == (1, 0, 2)
