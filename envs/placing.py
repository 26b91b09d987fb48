"""Which episode of those that wait gets a free place of a worker: one whose family has an idle game
there, for to open a game costs several times what a reset does.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable


class Held:
    """What a worker has opened, as its pool knows it: `envs.worker.LiveGames` keeps the games
    themselves, by the same rules; one that it closes after many resets is idle here, which costs an
    opening.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._playing: Counter[str] = Counter()  # by family
        # of a family, when each of its games became idle, the longest idle first
        self._idle: dict[str, deque[int]] = {}
        self._num_left = 0

    @property
    def room(self) -> int:
        """How many more episodes fit."""
        return self._capacity - self._playing.total()

    def has_idle(self, family: str) -> bool:
        """Whether an episode of a family would find its game open."""
        return family in self._idle

    def num_open(self, family: str) -> int:
        """Games of a family, played and idle."""
        return self._playing[family] + len(self._idle.get(family, ()))

    def take(self, family: str) -> None:
        """An episode begins: in the game of its family that is idle for the shortest time, or in a
        new one, for which the longest idle of all is closed where there are too many.
        """
        if family in self._idle:
            self._remove(family, deque.pop)
        elif self._idle and self._playing.total() + self._count_idle() >= self._capacity:
            self._remove(min(self._idle, key=lambda name: self._idle[name][0]), deque.popleft)
        self._playing[family] += 1

    def leave(self, family: str, *, kept: bool = True) -> None:
        """An episode has ended; its game is idle, unless it raised and was closed."""
        self._playing[family] -= 1
        if kept:
            self._idle.setdefault(family, deque()).append(self._num_left)
            self._num_left += 1

    def forget_idle(self) -> None:
        """The process is another one, where nothing is open yet."""
        self._idle.clear()

    def _count_idle(self) -> int:
        return sum(map(len, self._idle.values()))

    def _remove(self, family: str, pop: Callable[[deque[int]], int]) -> None:
        pop(self._idle[family])
        if not self._idle[family]:
            del self._idle[family]


class Queue:
    """Tickets of episodes that wait, by family. Within a family the oldest goes first. The oldest
    of all is passed over at most `patience` times, so that every ticket gets a place in the end.
    """

    def __init__(self, patience: int):
        self._patience = patience
        self._passed = 0  # times since the oldest of all became that
        self._waiting: dict[str, OrderedDict[int, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, ticket: int, family: str) -> None:
        """One more waits; its ticket has to be greater than those before."""
        self._waiting.setdefault(family, OrderedDict())[ticket] = None

    def discard(self, ticket: int, family: str) -> None:
        """Takes a ticket out that no longer wants a place; nothing happens if it does not wait."""
        tickets = self._waiting.get(family, {})
        if ticket in tickets:
            if ticket == min(map(self._oldest, self._waiting)):
                self._passed = 0
            self._remove(ticket, family)

    def pop(self, held: Held) -> int:
        """The ticket that gets a place of a worker. Raises ValueError if nobody waits."""
        first = min(self._waiting, key=self._oldest)
        chosen = first if self._passed >= self._patience else self._suited(held)
        self._passed = 0 if chosen == first else self._passed + 1
        ticket = self._oldest(chosen)
        self._remove(ticket, chosen)
        return ticket

    def _suited(self, held: Held) -> str:
        """The family that waits longest of those with an idle game; if there is none, the one that
        would have the fewest open games, with one more, for each of its episodes that wait.
        """
        idle = [family for family in self._waiting if held.has_idle(family)]
        if idle:
            return min(idle, key=self._oldest)
        return min(
            self._waiting,
            key=lambda family: (
                (held.num_open(family) + 1) / len(self._waiting[family]),
                self._oldest(family),
            ),
        )

    def _oldest(self, family: str) -> int:
        return next(iter(self._waiting[family]))

    def _remove(self, ticket: int, family: str) -> None:
        del self._waiting[family][ticket]
        if not self._waiting[family]:
            del self._waiting[family]
