"""Which row of a cache of slots holds what: a row for each conversation, of max_len positions."""

import collections
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

# A shorter common prefix is cheaper to compute again than to copy from another row.
MIN_COPIED_TOKENS = 16


class RowDevice(Protocol):
    """What is asked of `programs.Programs`."""

    @property
    def num_shards(self) -> int: ...
    @property
    def slots_per_shard(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    def copy_row(self, source: int, target: int) -> None: ...


class RowStore:
    """Conversations in rows of their own; a row keeps its tokens when its conversation ends.

    Args:
      device: where the rows are.
      num_slots: of them.
      max_len: positions of each.
    """

    def __init__(self, device: RowDevice, num_slots: int, max_len: int) -> None:
        self._device = device
        self._tokens = np.zeros((num_slots, max_len), np.int32)
        self._lengths = np.zeros(num_slots, np.int32)
        self._seated: dict[int, np.ndarray] = {}  # the tokens of the conversation of a slot
        self.counts = collections.Counter[str]()

    def place(self, free: Sequence[int], tokens: np.ndarray, length: int) -> int:
        """Gives a conversation a free slot, with the longest prefix of its tokens that any row
        holds; best is a free row that holds it already.

        Args:
          free: slots, longest free first.
          tokens: of the conversation, which grows in this array.
          length: how many there are now.
        """
        wanted, per_shard = length - 1, self._device.slots_per_shard
        same = self._tokens[:, :wanted] == tokens[None, :wanted]
        same &= np.arange(wanted)[None] < self._lengths[:, None]
        prefixes = (
            np.where(same.all(axis=1), wanted, same.argmin(axis=1))
            if wanted
            else np.zeros(len(same), int)
        )
        source = int(prefixes.argmax())
        # Else one of the copy of the weights with most free slots: a dispatch takes as long as its
        # fullest copy.
        idle = collections.Counter(slot // per_shard for slot in free)
        slot = max(
            free, key=lambda slot: (prefixes[slot] == prefixes[source], idle[slot // per_shard])
        )
        reused = int(prefixes[slot])
        if slot != source and prefixes[source] >= max(MIN_COPIED_TOKENS, reused + 1):
            self._device.copy_row(source, slot)
            self.counts["row_copies"] += 1
            reused = int(prefixes[source])
        self._tokens[slot, :reused] = tokens[:reused]
        self._lengths[slot] = reused
        self._seated[slot] = tokens
        self.counts["reused_tokens"] += reused
        return slot

    def release(self, slot: int) -> None:
        """Ends the conversation of a slot."""
        del self._seated[slot]

    def cached(self, slot: int) -> int:
        """Tokens of its conversation that are in the cache."""
        return int(self._lengths[slot])

    def write(self, slot: int, cached: int) -> None:
        """Notes that the first `cached` tokens of its conversation are in the cache now."""
        new = slice(self._lengths[slot], cached)
        self._tokens[slot, new] = self._seated[slot][new]
        self._lengths[slot] = cached

    def shorten(self, slot: int, cached: int) -> None:
        """Notes that only the first `cached` tokens of its conversation are still of it."""
        self._lengths[slot] = cached

    def admit(self, working: Mapping[int, int]) -> Iterable[int]:
        """Slots that can take part in a dispatch, of those with so many tokens that have something
        to compute: all.
        """
        return working

    def reserve(
        self, ends: Mapping[int, int], working: Mapping[int, int], busy: Container[int] = ()
    ) -> Iterable[int]:
        """Those of the slots that have room up to these positions: all."""
        del working, busy
        return ends

    def pages(self, slot: int) -> Sequence[int]:
        """Of a slot: none."""
        del slot
        return ()

    def forget(self) -> None:
        """The cache holds nothing any more."""
        self._lengths[:] = 0

    @property
    def held(self) -> tuple[int, int]:
        """Tokens that open conversations have in the cache, and the bytes set apart for them."""
        tokens = sum(int(self._lengths[slot]) for slot in self._seated)
        return tokens, len(self._seated) * self._device.row_bytes
