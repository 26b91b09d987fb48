"""Which page of a pool holds what, and who uses it: counted references, prefixes that can be found
again, and the order in which unused ones are given up.
"""

import collections
import hashlib
from collections.abc import Callable

import numpy as np

ROOT = b""  # the name of no pages at all


def chained(parent: bytes, tokens: np.ndarray) -> bytes:
    """The name of a full page: of its tokens and all before them, so that equal names mean equal
    keys and values.
    """
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()


class PagePool:
    """The pages of one copy of the weights. Every page is free, or used by some conversations, or
    kept for whoever begins with its tokens, until one is needed and none is free.

    As in vLLM (https://arxiv.org/abs/2309.06180, automatic prefix caching): only full pages are
    shared. A page that is partly filled can be copied.

    Args:
      num_pages: of the pool.
      size: positions of a page.
      evicted: is told the page and its name before a full page is given up.
    """

    def __init__(self, num_pages: int, size: int, evicted: Callable[[int, bytes], None]) -> None:
        self._size, self._evicted = size, evicted
        self._tokens = np.zeros((num_pages, size), np.int32)
        self._filled = np.zeros(num_pages, np.int32)
        self._users = np.zeros(num_pages, np.int32)
        self._parents: list[bytes] = [ROOT] * num_pages  # the name of the page before
        self._names: list[bytes | None] = [None] * num_pages  # of full pages
        self._by_name: dict[bytes, int] = {}
        self._by_parent: dict[bytes, set[int]] = {}  # of all pages that hold tokens
        self._free = collections.deque(range(num_pages))
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()  # oldest first
        self.evictions = 0

    @property
    def available(self) -> int:
        """Pages that can be allocated."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Pages that conversations use."""
        return len(self._users) - self.available

    @property
    def num_tokens(self) -> int:
        """Positions filled in these."""
        return int(self._filled[self._users > 0].sum())

    def find(self, name: bytes) -> int | None:
        """The full page of this name."""
        return self._by_name.get(name)

    def is_kept(self, page: int) -> bool:
        """True for a page that nobody uses."""
        return page in self._kept

    def nearest(self, parent: bytes, tokens: np.ndarray) -> tuple[int, int]:
        """The page behind `parent` that begins with the most of these tokens, and how many; any
        page and 0 where none does.
        """
        pages = sorted(self._by_parent.get(parent, ()))
        if not pages or not len(tokens):
            return 0, 0
        same = self._tokens[pages, : len(tokens)] == tokens[None]
        same &= np.arange(len(tokens))[None] < self._filled[pages, None]
        counts = np.where(same.all(axis=1), len(tokens), same.argmin(axis=1))
        best = int(counts.argmax())
        return pages[best], int(counts[best])

    def take(self, page: int) -> None:
        """One more user of a page that holds something."""
        self._users[page] += 1
        self._kept.pop(page, None)

    def allocate(self) -> int:
        """An empty page with one user, if need be instead of the page that nobody has used for
        longest.
        """
        if not self._free:
            page = next(iter(self._kept))
            name = self._names[page]
            if name is not None and self._by_name.get(name) == page:
                self._evicted(page, name)
            del self._kept[page]  # last: where that fails, it is kept
            self._empty(page)
            self.evictions += 1
        page = self._free.popleft()
        self._users[page] = 1
        return page

    def release(self, page: int) -> None:
        """One user less. Without any, a page is kept if it holds what no other page is kept
        for.
        """
        self._users[page] -= 1
        if self._users[page]:
            return
        name = self._names[page]
        if not self._filled[page] or (
            name is not None and self._by_name.setdefault(name, page) != page
        ):
            self._empty(page)
        else:
            self._kept[page] = None

    def fill(
        self, page: int, parent: bytes, start: int, tokens: np.ndarray, name: bytes | None
    ) -> None:
        """Notes what is written to a page from position `start` of it on.

        Args:
          page: used by one conversation only.
          parent: the name of the page before it.
          start: its positions that are filled already.
          tokens: of the new positions.
          name: of the page, if it is full now.
        """
        assert self._users[page] == 1 and start == self._filled[page]
        self._tokens[page, start : start + len(tokens)] = tokens
        self._filled[page] = start + len(tokens)
        self._parents[page] = parent
        self._by_parent.setdefault(parent, set()).add(page)
        if name is not None:
            self._names[page] = name
            self._by_name.setdefault(name, page)

    def _empty(self, page: int) -> None:
        name, parent = self._names[page], self._parents[page]
        if name is not None and self._by_name.get(name) == page:
            del self._by_name[name]
        if self._filled[page]:
            siblings = self._by_parent[parent]
            siblings.remove(page)
            if not siblings:
                del self._by_parent[parent]
        self._names[page], self._filled[page] = None, 0
        self._free.append(page)
