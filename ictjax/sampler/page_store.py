"""Which pages a conversation holds, and who waits when there are too few: memory follows the tokens
that are held.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ictjax.sampler.page_pool import ROOT, PagePool, chained
from ictjax.sampler.row_store import MIN_COPIED_TOKENS, RowDevice


class PageDevice(RowDevice, Protocol):
    """What is asked of `programs.Programs`; rows are pages, those of the first copy of the weights
    first.
    """

    @property
    def rows_per_shard(self) -> int: ...
    def take_row(self, row: int) -> Any: ...
    def put_row(self, row: int, content: Any) -> None: ...


@dataclasses.dataclass(eq=False, slots=True)
class _Seat:
    """A conversation in a slot, which is a number here and no memory."""

    tokens: np.ndarray  # grows in place
    age: int  # smaller is older
    shard: int  # the copy of the weights that it works on
    names: list[bytes] = dataclasses.field(default_factory=list)  # of its full pages, when asked
    pages: list[int] = dataclasses.field(default_factory=list)  # in the pool of its shard
    cached: int = 0  # tokens in its pages, or in what is kept of them
    resident: bool = False  # its pages are in the pool
    tail: Any = None  # of a suspended one: the content of its last page, if that is not full


class PageStore:
    """Conversations in pages that they take as they grow.

    A conversation begins with the full pages of its prefix that anybody holds or has held, by
    reference, and with a copy of a page that begins as its next one does. What it writes it writes
    to pages of its own, so that no page changes under another conversation.

    A conversation starts when the pages of its tokens are there beside what those that compute now
    still need. When pages run out while they grow, the youngest conversation waits: it is suspended
    and gives up its pages, first of all one that has nothing to compute. What nobody else keeps of
    it is copied to the host before it is overwritten, and comes back unchanged. The oldest
    conversation with something to compute can have every page, and the pool holds at least one
    conversation of full length: somebody always goes on.

    Args:
      device: where the pages are.
      size: positions of a page.
    """

    def __init__(self, device: PageDevice, size: int) -> None:
        self._device, self._size = device, size
        self._pools = self._empty_pools()
        self._seats: dict[int, _Seat] = {}
        self._ages = itertools.count()
        self._host: dict[bytes, Any] = {}  # contents of pages, by their names
        self._awaited = collections.Counter[bytes]()  # names of the pages of suspended ones
        self._counts = collections.Counter[str]()

    def place(self, free: Sequence[int], tokens: np.ndarray, length: int) -> int:
        """Gives a conversation a free slot, of the copy of the weights with most free slots; the
        arguments are those of `RowStore.place`. Its pages come with `admit`.
        """
        del length
        per_shard = self._device.slots_per_shard
        idle = collections.Counter(slot // per_shard for slot in free)
        slot = max(free, key=lambda slot: idle[slot // per_shard])
        self._seats[slot] = _Seat(tokens, next(self._ages), slot // per_shard)
        return slot

    def release(self, slot: int) -> None:
        """Ends the conversation of a slot; its pages are kept until others need them."""
        seat = self._seats.pop(slot)
        if seat.resident:
            self._give_up(seat)
        else:
            self._await(seat, -1)

    def cached(self, slot: int) -> int:
        """Tokens of its conversation that need not be computed any more."""
        return self._seats[slot].cached

    def write(self, slot: int, cached: int) -> None:
        """Notes that the first `cached` tokens of its conversation are in its pages now."""
        seat = self._seats[slot]
        while seat.cached < cached:
            index, start = divmod(seat.cached, self._size)
            end = min(cached, (index + 1) * self._size)
            self._fill(seat, seat.pages[index], index, start, end - index * self._size)
            seat.cached = end

    def shorten(self, slot: int, cached: int) -> None:
        """Notes that only the first `cached` tokens of its conversation, which is resident, are
        still of it. A page that is cut through is given up, for others may have begun with all of
        it: its tokens are computed again.
        """
        seat, kept = self._seats[slot], cached // self._size
        self._release_from(seat, kept)
        del seat.names[kept:]
        seat.cached = kept * self._size

    def admit(self, working: Mapping[int, int]) -> Iterable[int]:
        """Brings in who waits and fits, the oldest first; returns the slots whose pages are there.

        Args:
          working: the number of tokens of every conversation that has something to compute, by
            slot.
        """
        for shard in range(self._device.num_shards):
            oldest = sorted(
                (seat.age, slot)
                for slot in working
                if (seat := self._seats[slot]).shard == shard and not seat.resident
            )
            for _, slot in oldest:
                # Nobody is left who could go on and make room: then those that have nothing to
                # compute do.
                while not self._fits(slot, working):
                    residents = list(self._residents(shard))
                    if any(other in working for other in residents):
                        break
                    self._suspend(max(residents, key=lambda other: self._seats[other].age))
                else:
                    self._bring(self._seats[slot], working[slot])
                    continue
                break
        return [slot for slot in working if self._seats[slot].resident]

    def reserve(
        self, ends: Mapping[int, int], working: Mapping[int, int], busy: Container[int] = ()
    ) -> Iterable[int]:
        """Gives conversations pages up to these positions, the oldest first, and returns those of
        them that have them; the others have to wait. Others may be suspended, but none of `busy`,
        which a dispatch that runs may give more tokens.
        """
        ready = []
        for slot in sorted(ends, key=lambda slot: self._seats[slot].age):
            seat = self._seats[slot]
            pool = self._pools[seat.shard]
            while seat.resident and pool.available < self._missing(seat, ends[slot]):
                victim = self._victim(seat, working, busy)
                if victim is None:
                    break
                self._suspend(victim)
            else:
                if seat.resident:
                    for _ in range(self._missing(seat, ends[slot])):
                        self._grow(seat)
                    ready.append(slot)
        return ready

    def pages(self, slot: int) -> Sequence[int]:
        """Of a conversation, in the order of its positions; of those of its copy of the weights."""
        return self._seats[slot].pages

    def forget(self) -> None:
        """No page holds anything any more. Nobody may use one."""
        self._counts = self.counts
        self._pools = self._empty_pools()

    @property
    def counts(self) -> collections.Counter[str]:
        """What happened so far."""
        evictions = sum(pool.evictions for pool in self._pools)
        return self._counts + collections.Counter(evictions=evictions)

    @property
    def held(self) -> tuple[int, int]:
        """Tokens in the pages that open conversations hold, and the bytes of these; what several
        share counts once.
        """
        return (
            sum(pool.num_tokens for pool in self._pools),
            sum(pool.num_used for pool in self._pools) * self._device.row_bytes,
        )

    def _empty_pools(self) -> list[PagePool]:
        return [
            PagePool(
                self._device.rows_per_shard, self._size, functools.partial(self._evicted, shard)
            )
            for shard in range(self._device.num_shards)
        ]

    def _row(self, shard: int, page: int) -> int:
        return shard * self._device.rows_per_shard + page

    def _residents(self, shard: int) -> Iterator[int]:
        return (slot for slot, seat in self._seats.items() if seat.shard == shard and seat.resident)

    def _name(self, seat: _Seat, index: int) -> bytes:
        """Of its full page `index`; -1: of what is before the first."""
        while len(seat.names) <= index:
            start = len(seat.names) * self._size
            parent = seat.names[-1] if seat.names else ROOT
            seat.names.append(chained(parent, seat.tokens[start : start + self._size]))
        return seat.names[index] if index >= 0 else ROOT

    def _missing(self, seat: _Seat, end: int) -> int:
        """Pages that it lacks to hold so many positions."""
        return max(-(-end // self._size) - len(seat.pages), 0)

    def _fits(self, slot: int, working: Mapping[int, int]) -> bool:
        """Whether the pages of its tokens are there, beside those of all tokens of the residents
        and one more for each.
        """
        seat = self._seats[slot]
        pool = self._pools[seat.shard]
        found = self._found(seat, working[slot])
        free = pool.available - sum(page is not None and pool.is_kept(page) for page in found)
        fresh = self._missing(seat, working[slot]) - sum(page is not None for page in found)
        growth = sum(
            1 + self._missing(self._seats[other], working.get(other, 0))
            for other in self._residents(seat.shard)
        )
        return free >= fresh + growth

    def _found(self, seat: _Seat, length: int) -> list[int | None]:
        """The full pages that it needs no more than to take, None for others. The last token of a
        new conversation is always computed: its reply starts from there.
        """
        pool = self._pools[seat.shard]
        known = seat.cached or length - 1
        return [pool.find(self._name(seat, index)) for index in range(known // self._size)]

    def _bring(self, seat: _Seat, length: int) -> None:
        """Makes it resident, with what is known of its tokens. Where the device fails, it has no
        pages and waits on.
        """
        try:
            self._gather(seat, length)
            if seat.cached:
                self._bring_back(seat)
            else:
                self._begin(seat, length)
        except BaseException:
            self._release_from(seat, 0)
            raise
        seat.resident = True

    def _begin(self, seat: _Seat, length: int) -> None:
        full = len(seat.pages) * self._size
        seat.cached = full + self._copy_tail(seat, min(length - 1 - full, self._size))
        self._counts["reused_tokens"] += seat.cached

    def _bring_back(self, seat: _Seat) -> None:
        if rest := seat.cached % self._size:
            index, page = len(seat.pages), self._grow(seat)
            self._device.put_row(self._row(seat.shard, page), seat.tail)
            self._fill(seat, page, index, 0, rest)
            seat.tail = None
        self._await(seat, -1)

    def _gather(self, seat: _Seat, length: int) -> None:
        """Gives it the full pages that are known, up to one that nobody has."""
        pool = self._pools[seat.shard]
        found = collections.deque(self._found(seat, length))
        # first all of them, so that nothing below can evict one
        for page in found:
            if page is not None:
                pool.take(page)
        try:
            while found and (found[0] is not None or self._fetch(seat)):
                page = found.popleft()
                if page is not None:
                    seat.pages.append(page)
        finally:
            for page in found:
                if page is not None:
                    pool.release(page)

    def _grow(self, seat: _Seat) -> int:
        """One more page of its own, empty."""
        page = self._pools[seat.shard].allocate()
        seat.pages.append(page)
        return page

    def _fetch(self, seat: _Seat) -> bool:
        """Gives it its next full page from the host, or from another copy of the weights, if either
        has it.
        """
        index = len(seat.pages)
        name = self._name(seat, index)
        holders = [
            (shard, page)
            for shard, pool in enumerate(self._pools)
            if (page := pool.find(name)) is not None
        ]
        if name not in self._host and not holders:
            return False
        target = self._grow(seat)
        if holders:
            self._copy(*holders[0], seat.shard, target)
        else:
            self._device.put_row(self._row(seat.shard, target), self._host[name])
        self._fill(seat, target, index, 0, self._size)
        return True

    def _copy_tail(self, seat: _Seat, count: int) -> int:
        """Copies the page that begins with most of the next `count` tokens; returns with how
        many.
        """
        index = len(seat.pages)
        tokens = seat.tokens[index * self._size : index * self._size + count]
        nearest = [
            (*pool.nearest(self._name(seat, index - 1), tokens)[::-1], shard)
            for shard, pool in enumerate(self._pools)
        ]
        same, page, shard = max(nearest, key=lambda one: (one[0], one[2] == seat.shard))
        source = self._pools[shard]
        if same < MIN_COPIED_TOKENS:
            return 0
        source.take(page)
        try:
            if not self._pools[seat.shard].available:
                return 0
            target = self._grow(seat)
            self._copy(shard, page, seat.shard, target)
            self._fill(seat, target, index, 0, same)
        finally:
            source.release(page)
        return same

    def _copy(self, source: int, page: int, shard: int, target: int) -> None:
        self._device.copy_row(self._row(source, page), self._row(shard, target))
        self._counts["row_copies"] += 1

    def _fill(self, seat: _Seat, page: int, index: int, start: int, end: int) -> None:
        first = index * self._size
        self._pools[seat.shard].fill(
            page,
            self._name(seat, index - 1),
            start,
            seat.tokens[first + start : first + end],
            self._name(seat, index) if end == self._size else None,
        )

    def _victim(self, needy: _Seat, working: Mapping[int, int], busy: Container[int]) -> int | None:
        """Whom to suspend for an older one: the youngest that has nothing to compute, else the
        youngest.
        """
        others = [
            (slot not in working, seat.age, slot)
            for slot in self._residents(needy.shard)
            if (seat := self._seats[slot]) is not needy
            and slot not in busy
            and (slot not in working or seat.age > needy.age)
        ]
        return max(others)[2] if others else None

    def _suspend(self, slot: int) -> None:
        seat = self._seats[slot]
        if seat.cached % self._size:
            last = seat.pages[seat.cached // self._size]
            seat.tail = self._device.take_row(self._row(seat.shard, last))
        self._await(seat, 1)
        self._give_up(seat)
        self._counts["suspensions"] += 1

    def _give_up(self, seat: _Seat) -> None:
        """Releases its pages, the last first: a prefix is evicted after what follows it."""
        self._release_from(seat, 0)
        seat.resident = False

    def _release_from(self, seat: _Seat, index: int) -> None:
        for page in reversed(seat.pages[index:]):
            self._pools[seat.shard].release(page)
        del seat.pages[index:]

    def _await(self, seat: _Seat, change: int) -> None:
        """Notes that one more or one less suspended conversation needs its full pages."""
        for index in range(seat.cached // self._size):
            name = self._name(seat, index)
            self._awaited[name] += change
            if not self._awaited[name]:
                del self._awaited[name]
                self._host.pop(name, None)

    def _evicted(self, shard: int, page: int, name: bytes) -> None:
        if name in self._awaited and name not in self._host:
            self._host[name] = self._device.take_row(self._row(shard, page))
