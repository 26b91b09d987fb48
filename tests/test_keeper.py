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
        self.check()

    def check(self):
        failed, self.failed = self.failed, None
        if failed is not None:
            raise failed


def run(keeper, iterations, rewards=None):
    """What the training loop does."""
    for number in iterations:
        keeper.let_go()
        keeper.settle(number)
        keeper.finish(number, f"state {number}", {"iteration": number}, (rewards or {}).get(number))


def saved(noting):
    return [entry[1] for entry in noting.asked if entry != "wait"]


def test_multiples_and_the_last_are_saved_each_after_the_one_before_is_complete():
    noting = Noting()
    with Keeper(noting, every=2, last=5) as keeper:
        run(keeper, range(1, 6))
    assert saved(noting) == [2, 4, 5]
    assert [entry if entry == "wait" else "save" for entry in noting.asked] == [
        "wait",
        "save",
    ] * 3 + ["wait"]
    assert noting.asked[1] == ("save", 2, "state 2", {"iteration": 2}, None)


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


@pytest.mark.parametrize("number", [3, 4])
def test_a_write_that_failed_is_told_before_the_next_iteration_is_recorded(number):
    noting = Noting()
    with (
        pytest.raises(ValueError, match="disk"),
        Keeper(noting, every=2, last=9) as keeper,
    ):
        run(keeper, range(1, number))
        noting.failed = ValueError("disk")
        keeper.settle(number)


def test_the_score_is_the_mean_reward_of_the_last_five_iterations_of_any_life():
    noting = Noting()
    with Keeper(noting, every=2, last=4, rewards=[9.0, 1.0, None, 2.0, 3.0]) as keeper:
        run(keeper, range(1, 5), {1: 4.0, 2: None, 3: 5.0, 4: 6.0})
    # None, 2, 3, 4, None; then 4, None, 5, 6 behind the 3
    assert [entry[4] for entry in noting.asked if entry != "wait"] == [3.0, 4.5]


def test_the_time_that_saves_took_is_told_once(monkeypatch):
    noting, clock = Noting(), iter([0.0, 0.0, 1.0, 5.0, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr("ictjax.keeper.time.perf_counter", lambda: next(clock))
    keeper = Keeper(noting, every=2, last=9)
    assert keeper.settle(2) == 0.0
    keeper.finish(2, "state", {})  # 4 s
    assert keeper.settle(3) == 4.0
    keeper.finish(3, "state", {})
    assert keeper.settle(4) == 2.0  # it waited
    keeper.finish(4, "state", {})
    assert keeper.settle(5) == 0.5
