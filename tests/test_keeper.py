"""When a run is saved, by a checkpointer that only notes what it is asked to do."""

import contextlib

import pytest

from ictjax.keeper import Keeper


class Noting:
    def __init__(self):
        self.asked = []
        self.failed = None

    def save(self, step, state, host, *, score):
        self.asked.append(("save", step, state, host, score))

    def wait(self):
        self.asked.append("wait")
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed


def run(keeper, iterations, rewards=None):
    """What the training loop does."""
    for number in iterations:
        keeper.let_go()
        keeper.settle()
        keeper.finish(number, f"state {number}", {"iteration": number}, (rewards or {}).get(number))


def saved(noting):
    return [entry[1] for entry in noting.asked if entry != "wait"]


def test_multiples_and_the_last_are_saved_each_before_more_is_recorded():
    noting = Noting()
    with Keeper(noting, every=2, last=5) as keeper:
        run(keeper, range(1, 6))
    assert saved(noting) == [2, 4, 5]
    assert [entry if entry == "wait" else entry[1] for entry in noting.asked] == [
        *("wait", "wait", 2, "wait", "wait", 4, "wait", 5, "wait")
    ]
    assert noting.asked[2] == ("save", 2, "state 2", {"iteration": 2}, None)


def test_whatever_ends_a_run_the_last_finished_iteration_is_saved_and_written():
    noting = Noting()
    with contextlib.suppress(KeyError), Keeper(noting, every=4, last=9) as keeper:
        run(keeper, range(1, 4))
        raise KeyError
    assert saved(noting) == [3] and noting.asked[-1] == "wait"
    noting = Noting()
    with contextlib.suppress(KeyError), Keeper(noting, every=4, last=9) as keeper:
        run(keeper, range(1, 4))
        keeper.let_go()  # its arrays are gone
        raise KeyError
    assert saved(noting) == []


@pytest.mark.parametrize("finished", [2, 3])
def test_a_write_that_failed_is_told_before_the_next_iteration_is_recorded(finished):
    noting = Noting()
    with Keeper(noting, every=2, last=9) as keeper:
        run(keeper, range(1, finished + 1))
        noting.failed = ValueError("disk")
        with pytest.raises(ValueError, match="disk"):
            keeper.settle()


def test_the_score_is_the_mean_reward_of_the_last_five_iterations_of_any_life():
    noting = Noting()
    with Keeper(noting, every=2, last=4, rewards=[9.0, 1.0, None, 2.0, 3.0]) as keeper:
        run(keeper, range(1, 5), {1: 4.0, 2: None, 3: 5.0, 4: 6.0})
    # None, 2, 3, 4, None; then 4, None, 5, 6 behind the 3
    assert [entry[4] for entry in noting.asked if entry != "wait"] == [3.0, 4.5]


def test_the_time_that_saves_took_is_told_once(monkeypatch):
    noting, clock = Noting(), iter([0.0, 0.0, 1.0, 5.0, 10.0, 12.0, 20.0, 20.0])
    monkeypatch.setattr("ictjax.keeper.time.perf_counter", lambda: next(clock))
    keeper = Keeper(noting, every=2, last=9)
    assert keeper.settle() == 0.0
    keeper.finish(2, "state", {})  # 4 s to copy
    assert keeper.settle() == 6.0  # and 2 s for the disk
    keeper.finish(3, "state", {})
    assert keeper.settle() == 0.0
