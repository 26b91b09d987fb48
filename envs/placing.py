"""Which episode of those that wait gets a free place of a worker: one whose family has an idle game
there, for to open a game costs several times what a reset does.
"""

from collections import Counter, OrderedDict


class Held:
    """What a worker has opened, as its pool knows it: `envs.worker.LiveGames` keeps the games
    themselves. A game that raised is closed there and idle here; that costs an opening.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._playing: Counter[str] = Counter()  # by family
        self._idle: list[str] = []  # families, the longest idle first

    @property
    def room(self) -> int:
        """How many more episodes fit."""
        return self.capacity - self._playing.total()

    def has_idle(self, family: str) -> bool:
        """Whether an episode of a family would find its game open."""
        return family in self._idle

    def num_open(self, family: str) -> int:
        """Games of a family, played and idle."""
        return self._playing[family] + self._idle.count(family)

    def take(self, family: str) -> None:
        """An episode begins."""
        if family in self._idle:
            self._idle.remove(family)
        elif self._playing.total() + len(self._idle) >= self.capacity:
            del self._idle[0]
        self._playing[family] += 1

    def leave(self, family: str) -> None:
        """An episode has ended."""
        self._playing[family] -= 1
        self._idle.append(family)

    def forget_idle(self) -> None:
        """The process is gone, and with it what was open."""
        self._idle.clear()


class Queue:
    """Tickets of episodes that wait, by family. Within a family the oldest goes first, and nobody
    is passed over more than `patience` times by younger ones once all who are older have gone.
    """

    def __init__(self, patience: int):
        self._patience = patience
        self._passed = 0  # times since the oldest of all became that
        self._waiting: dict[str, OrderedDict[int, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, ticket: int, family: str) -> None:
        """Tickets grow."""
        self._waiting.setdefault(family, OrderedDict())[ticket] = None

    def discard(self, ticket: int, family: str) -> None:
        """It was released, if it waits at all."""
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
        """The family that waits longest of those with an idle game; if there is none, the one with
        the fewest open games for those who wait.
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
