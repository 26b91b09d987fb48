"""A function that calls and waits, as a loop that wishes."""

import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from experiments.wishes import Steps, Wish

_Result = TypeVar("_Result")


class _Left(BaseException):
    """Nobody meets the wishes any more. No Exception, which libraries catch and try again after."""


def in_turns(work: Callable[[Callable[[Wish], Any]], _Result]) -> Steps[_Result]:
    """Runs a function in a thread; what it wishes for is yielded here. Either it runs or whoever
    meets its wishes, never both, so that nothing has to be locked.

    Args:
      work: is given a function that waits until a wish is met, and says by what. Where the
        generator is closed before, that function raises something that is no Exception.

    Returns:
      What the function returned; what it raised is raised.
    """
    wished: queue.SimpleQueue[Wish | None] = queue.SimpleQueue()
    met: queue.SimpleQueue[Any] = queue.SimpleQueue()
    result: concurrent.futures.Future[_Result] = concurrent.futures.Future()

    def wish(wanted: Wish) -> Any:
        wished.put(wanted)
        answer = met.get()
        if answer is _Left:
            met.put(_Left)  # for whoever wishes on
            raise _Left
        return answer

    def run() -> None:
        try:
            result.set_result(work(wish))
        except BaseException as error:
            result.set_exception(error)
        finally:
            wished.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (wanted := wished.get()) is not None:
            met.put((yield wanted))
    finally:
        met.put(_Left)
        thread.join()
    return result.result()
