import threading

import pytest

from experiments import wishes
from experiments.turns import in_turns


def loop(work):
    """As loops are: what is in turns is part of one."""
    return (yield from in_turns(work))


def wanted(number):
    return wishes.Play([number])


def running():
    return threading.active_count()


def test_what_a_function_waits_for_is_wished_in_order_and_its_result_returned():
    steps = loop(lambda wish: [wish(wanted(n)) for n in range(3)])
    assert [next(steps), steps.send("a"), steps.send(None)] == [wanted(0), wanted(1), wanted(2)]
    with pytest.raises(StopIteration) as ended:
        steps.send("c")
    assert ended.value.value == ["a", None, "c"]


def test_functions_of_many_loops_wait_for_their_own_wishes():
    loops = [loop(lambda wish, n=n: wish(wanted(n)) + wish(wanted(10 + n))) for n in range(4)]
    assert [next(steps) for steps in loops] == [wanted(n) for n in range(4)]
    assert [steps.send(n) for n, steps in reversed([*enumerate(loops)])] == [
        wanted(10 + n) for n in (3, 2, 1, 0)
    ]
    results = []
    for n, steps in enumerate(loops):
        with pytest.raises(StopIteration) as ended:
            steps.send(100 * n)
        results.append(ended.value.value)
    assert results == [0, 101, 202, 303]


def test_what_a_function_raises_is_raised_before_and_after_its_wishes():
    def at_once(wish):
        raise KeyError("at once")

    def later(wish):
        raise KeyError(wish(wanted(0)))

    with pytest.raises(KeyError, match="at once"):
        next(loop(at_once))
    steps = loop(later)
    next(steps)
    with pytest.raises(KeyError, match="later"):
        steps.send("later")


def test_a_loop_that_is_closed_ends_its_function_even_where_that_tries_again():
    before, seen = running(), []

    def stubborn(wish):
        for _ in range(3):
            try:
                wish(wanted(0))
            except Exception:  # as optimisers do
                seen.append("caught")
            finally:
                seen.append("left")

    steps = loop(stubborn)
    next(steps)
    assert running() == before + 1
    steps.close()
    assert (running(), seen) == (before, ["left"])

    def deaf(wish):
        for _ in range(3):
            try:
                wish(wanted(0))
            except BaseException:
                seen.append("deaf")

    steps = loop(deaf)
    next(steps)
    steps.close()
    assert (running(), seen[1:]) == (before, ["deaf"] * 3)
