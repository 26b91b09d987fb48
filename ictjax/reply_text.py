"""The text of a reply while it is sampled: what of it can be shown already, and where one of the
texts that end it begins.
"""

from collections.abc import Callable, Sequence

PART = "\ufffd"
"""Decoders write it for a part of a character."""


class ReplyText:
    """Reads the ids of one reply as they are sampled; `read` fits `ictjax.sampler.Request.ends`.

    Nothing of a stop string is ever shown: the text ends where the first one begins (of several
    that overlap, the first to be complete, however many ids come at once), and of a text that may
    still become one the beginning is held back. The conversation keeps the tokens that end
    before the stop string begins. Of a token that holds both the end of the text and the beginning
    of the stop string the former is shown, and nothing is kept.

    Only new ids are decoded, behind those of the read before, so that blanks between words are as
    in the whole text.

    Args:
      decode: ids -> text.
      stop: the texts that end the reply, none of them empty.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, tuple(stop)
        self._start, self._end = 0, 0  # of the ids that were read last
        self._settled = ""  # the text of all ids up to `_end`
        self._places: list[tuple[int, int, int]] = [(0, 0, 0)]  # `_start`, `_end`, characters
        self.text = ""
        """Of all ids that were read, up to where a stop string begins."""
        self.stopped = False
        """A stop string ended the reply."""

    def read(self, ids: Sequence[int]) -> int | None:
        """Takes all ids of the reply so far, those of the last call first.

        Returns:
          How many are kept, once a stop string ended the reply; else None.
        """
        text = self._settled + self._text(ids, self._start, self._end, len(ids))
        longest = max(map(len, self._stop), default=1)
        found = [
            (place + len(stop), place)
            for stop in self._stop
            if (place := text.find(stop, max(0, len(self._settled) - longest))) >= 0
        ]
        if not text.endswith(PART):
            self._start, self._end, self._settled = self._end, len(ids), text
            self._places.append((self._start, self._end, len(text)))
        self.text = text
        if not found:
            return None
        self.text, self.stopped = text[: min(found)[1]], True
        return self.num_kept(ids, len(self.text))

    @property
    def shown(self) -> str:
        """The beginning of the text that is certain while the reply goes on."""
        if self.stopped:
            return self.text
        text = self.text.rstrip(PART)
        held = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        )
        return text[: len(text) - max(held, default=0)]

    def num_kept(self, ids: Sequence[int], num_chars: int) -> int:
        """How many of the ids, at most, hold no more than the first characters of the text."""
        start, end, chars = max(place for place in self._places if place[2] <= num_chars)
        kept, room = end, self.text[chars:num_chars]
        for number in range(end + 1, len(ids) + 1):
            if room.startswith(self._text(ids, start, end, number)):
                kept = number
        return kept

    def _text(self, ids: Sequence[int], start: int, end: int, stop: int) -> str:
        """What ids[end:stop] add to the text of ids[start:end]."""
        return self._decode(ids[start:stop])[len(self._decode(ids[start:end])) :]
