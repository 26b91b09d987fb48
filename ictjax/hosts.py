"""Several hosts that train one run together: each plays its share of the games, all of them know
all of the results.

Every host runs the same program on the same configuration, and decides the same from the same
data; what differs is which episodes it plays, which replies it samples, and that the first alone
writes. An update runs on the devices of all hosts at once.

What the first one writes lies in a folder that all see; or, where a run is kept at an address, each
host has a copy of its own, which `exchange` brings up to date whenever they meet.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from envs.api import CannotGoOn, Refusal

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MAX_SHOWN = 100  # characters of what the transport says
_TOLD = "The other hosts were told, as far as they are there."
# What XLA says of a host that is gone, in the words of its transports.
_LOST = re.compile(
    "gloo|connection|peer|unavailable|coordination|heartbeat|deadline|barrier|socket", re.IGNORECASE
)
_LEAST_BYTES = (
    1024  # of a message; longer ones are padded to a power of two: few sizes, compiled once
)


class HostLost(CannotGoOn):
    """Another host ended, or is not reached any more."""


class HostFailed(CannotGoOn):
    """Another host could not do its part, and has said why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Which host this is, and how many there are.

    Args:
      index: of this host, from 0.
      count: of all hosts.
      exchange: where each has a copy of the run of its own: on the first host it sends what is new,
        on the others it fetches that, and it raises ValueError where it cannot; None where all see
        one folder.
    """

    index: int = 0
    count: int = 1
    exchange: Callable[[], None] | None = None

    @property
    def first(self) -> bool:
        """Whether this host is the one that writes."""
        return self.index == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """This host's part of the work: neighbours stay together, as they often share a prompt."""
        bounds = [len(items) * index // self.count for index in range(self.count + 1)]
        return items[bounds[self.index] : bounds[self.index + 1]]

    def together(
        self,
        items: Sequence[_Item],
        work: Callable[[Sequence[_Item]], Sequence[_Result]],
        write: Callable[[_Result], str],
        read: Callable[[str], _Result],
    ) -> list[_Result]:
        """The results of all items, in their order, of which every host works out its share.

        Args:
          items: the same on every host.
          work: gives a result for each of some items.
          write: a result as JSON.
          read: the result back from it.

        Raises:
          HostFailed: another host could not do its share, with what it said.
        """
        if self.count == 1:
            return list(work(items))
        with self.told():
            mine = list(work(self.share(items)))
        answers = self._answers({"results": [write(result) for result in mine]})
        results: list[_Result] = []
        for index, answer in enumerate(answers):
            results += mine if index == self.index else map(read, answer["results"])
        return results

    def agree(self, value: _Item) -> _Item:
        """What the first host says; `value` is JSON. All wait for it. Raises HostFailed where one
        could not do what came before (see `told`).
        """
        return self.all_say(value)[0]

    def all_say(self, value: _Item) -> list[_Item]:
        """What every host says, by its index; `value` is JSON. Waits and raises as `agree`."""
        if self.count == 1:
            return [value]
        return [answer["value"] for answer in self._answers({"value": value})]

    @property
    def own_copies(self) -> bool:
        """Whether what the first host writes is not seen by the others before they meet."""
        return self.exchange is not None

    def meet(self) -> None:
        """Waits for all hosts; each sees then what the first one has written.

        Raises:
          ValueError: what is to be seen could not be sent, or fetched.
          HostFailed: by another host, with what it said.
        """
        if self.exchange is None:
            self.agree(None)
            return
        for mine in (self.first, not self.first):  # the first one changes nothing while others read
            if mine:
                with self.told():
                    self.exchange()
            if self.count > 1:
                self._answers({})

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Raises HostLost where what all compute together fails because others are gone."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            said = filter(_LOST.search, (str(error), str(error.__cause__)))
            own_words = isinstance(error, CannotGoOn | Refusal)
            if self.count == 1 or own_words or (reason := next(said, None)) is None:
                raise
            raise HostLost(
                f"Another of the {self.count} hosts ended or is not reached any more"
                f" ({' '.join(reason.split())[:_MAX_SHOWN]}): see what it said, and start all"
                " again with the same flags; they go on from the last checkpoint."
            ) from error

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Around what each host does for itself and may fail at alone: the others, who come to the
        next meeting (`meet`, `agree` or `together`), end there with what this one could not do.
        Where all meet within, they do so in the same order. Within, they compute nothing together:
        devices that wait for this host's would be sent its words instead.
        """
        try:
            yield
        except HostFailed:  # the others have heard it too
            raise
        except Exception as error:
            self._tell(error)
            raise

    @contextlib.contextmanager
    def told_until(self) -> Iterator[Callable[[], None]]:
        """`told` up to the call of what it yields, by which all wait for each other: behind it they
        compute together. Where it is never called, to the end.
        """
        together = False

        def wait() -> None:
            nonlocal together
            together = True
            self.agree(None)

        try:
            yield wait
        except Exception as error:
            if not together and not isinstance(error, HostFailed):
                self._tell(error)
            raise

    def _tell(self, error: Exception) -> None:
        """Once, where one such block stands within another."""
        if self.count > 1 and _TOLD not in getattr(error, "__notes__", ()):
            error.add_note(_TOLD)
            self._everyone({"error": " ".join(str(error).split()) or type(error).__name__})

    def _answers(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """What every host says. Raises HostFailed where one could not do its part."""
        answers = self._everyone(message)
        for index, answer in enumerate(answers):
            if "error" in answer:
                raise HostFailed(f"Host {index} of {self.count} cannot go on: {answer['error']}")
        return answers

    def _everyone(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        data = np.frombuffer(json.dumps(message).encode(), np.uint8)
        try:
            sizes = _gathered(np.int64(len(data))).reshape(-1)
            room = max(_LEAST_BYTES, 1 << int(sizes.max() - 1).bit_length())
            rows = _gathered(np.pad(data, (0, room - len(data)))).reshape(self.count, room)
        except Exception as error:
            error.add_note(_TOLD)  # in vain: some are gone, and the next word would not arrive
            raise
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def is_common(error: Exception) -> bool:
    """Whether other hosts end with this one, each in its own time: they were told of this error, or
    it is of a kind that all of them find.
    """
    told = _TOLD in getattr(error, "__notes__", ())
    return told or isinstance(error, CannotGoOn | Refusal)


def _gathered(array: np.ndarray | np.int64) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(array))


ALONE = Hosts()


def these_hosts() -> Hosts:
    """Those that `jax.distributed` has brought together; one where it was not asked to."""
    return Hosts(index=jax.process_index(), count=jax.process_count())
