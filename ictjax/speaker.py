"""Whoever answers: conversations of messages, replies in text. What a rollout, a reflector and an
evaluation know of a model, a Python function or an API.

    conversation = speaker.open([Message(role="system", content="You play.")])
    speaker.hear(conversation, Message(role="user", content="You see a door."), ("open", "wait"))
    speaker.ask(conversation, Limits(max_tokens=100, temperature=0.0), key)
    while not (replies := speaker.step()): ...
    speaker.close(conversation)

Tokens, caches, threads and connections are the speaker's own business. Speakers:
`ictjax.model_speaker`, `ictjax.function_speaker`, `ictjax.endpoint_speaker`.
"""

import dataclasses
import enum
import inspect
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from ictjax.keys import Key
from ictjax.records import Message

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# English text has more characters than this per token, so an estimate stays within a budget.
_CHARS_PER_TOKEN = 3
MAX_REPLY_CHARS = 2**20
"""A longer reply is cut here, and counts as cut off by `Limits.max_tokens`."""


class Finish(enum.StrEnum):
    """How a reply ended."""

    STOP = "stop"  # the speaker was done
    LENGTH = "length"  # cut off by `Limits.max_tokens`
    CONTEXT = "context"  # cut off, or not begun: the conversation is full
    FAILED = "failed"  # there is no reply; `Reply.error` says why


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How a reply may be drawn. Speakers that cannot follow one of these leave it out."""

    max_tokens: int
    temperature: float  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # of the likeliest token's probability; 0: off
    stop: tuple[str, ...] = ()  # texts that end the reply, and are not part of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished reply. It is part of its conversation from now on, unless it failed."""

    conversation: int
    text: str
    finish: Finish
    error: str = ""  # one sentence, where it failed
    # What training needs, where the speaker has tokens: those before the reply, the reply's exactly
    # as sampled (the stop token included), and the log-probabilities of the latter.
    prompt_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    weights_step: int | None = None  # of the learner whose weights said this, where one trains them

    @property
    def truncated(self) -> bool:
        """Whether a limit ended it."""
        return self.finish in (Finish.LENGTH, Finish.CONTEXT)


class Speaker(Protocol):
    """Holds conversations. A context manager; used by one thread.

    Nothing blocks for long: calls note what is wanted, `step` works on it for a moment.
    """

    def open(self, messages: Sequence[Message]) -> int:
        """Starts a conversation with these messages, the system prompt first where there is one;
        returns its number.
        """
        ...

    def hear(self, conversation: int, message: Message, actions: Sequence[str] = ()) -> None:
        """Adds a message.

        Args:
          conversation: an open one that is not waiting for a reply.
          message: what is said to the speaker.
          actions: what it may do now, for speakers that are no language model; the message lists
            them or not.
        """
        ...

    def ask(self, conversation: int, limits: Limits, key: Key) -> None:
        """Asks for a reply to all that was heard; after a failed one it may be asked again. Equal
        keys draw equal noise, where the speaker has a say in that.

        Raises:
          ValueError: the conversation is not open, or waits for a reply already.
        """
        ...

    def step(self) -> list[Reply]:
        """Works on what was asked, and returns the replies that have finished: none, if none has
        within milliseconds (one dispatch, for a model).
        """
        ...

    def fork(self, conversation: int) -> int:
        """Starts a conversation with the same messages so far; returns its number."""
        ...

    def close(self, conversation: int) -> None:
        """Ends a conversation; a reply under way is dropped."""
        ...

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do until something is asked."""
        ...

    def repeats(self, limits: Limits) -> bool:
        """Whether equal conversations get equal replies under these limits, whatever the key."""
        ...

    def num_tokens(self, said: Sequence[Message] | str) -> int:
        """The size in tokens of a conversation with these messages, or of a text by itself: exact
        where the speaker has a tokenizer, else an estimate that is rather too high.
        """
        ...

    @property
    def stats(self) -> Mapping[str, int | float]:
        """Counts since it was made, for the record of a run."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


_MEMBERS = (*(name for name in vars(Speaker) if not name.startswith("_")), "__enter__", "__exit__")


def is_speaker(value: object) -> "TypeIs[Speaker]":
    """Whether it is one, by what its class and itself hold; no property of it is read."""
    return not isinstance(value, type) and all(
        inspect.getattr_static(value, name, None) is not None for name in _MEMBERS
    )


def estimate_tokens(said: Sequence[Message] | str) -> int:
    """The size of a conversation or a text where no tokenizer is at hand: three characters are a
    token.
    """
    texts = [said] if isinstance(said, str) else [message.content for message in said]
    return math.ceil(sum(map(len, texts)) / _CHARS_PER_TOKEN)
