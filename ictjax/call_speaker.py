"""Speakers whose replies come from calls that block: threads make them, and one that fails, or
never ends, costs its own reply only.
"""

import collections
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from ictjax.keys import Key
from ictjax.records import Message
from ictjax.speaker import Finish, Limits, Reply, estimate_tokens

_WAIT_S = 0.005  # for a reply, before the caller looks after its environments again


class Question(NamedTuple):
    """What a call answers."""

    messages: tuple[Message, ...]
    actions: tuple[str, ...]  # given with the last message
    limits: Limits
    key: Key


class Answer(NamedTuple):
    """What a call returns."""

    text: str
    finish: Finish = Finish.STOP


@dataclasses.dataclass(eq=False, slots=True)
class _Call:
    conversation: int
    question: Question
    started_s: float | None = None  # by time.monotonic, once a thread works on it
    answer: Answer | None = None
    error: BaseException | None = None
    ended: bool = False  # known to the thread that uses the speaker


@dataclasses.dataclass(eq=False, slots=True)
class _Conversation:
    messages: list[Message]
    actions: tuple[str, ...] = ()
    call: _Call | None = None


class CallSpeaker:
    """Implements `ictjax.speaker.Speaker` by calling a function in threads.

    Args:
      answer: is given a question; called from several threads at once unless `threads` is 1. What
        it raises is the error of its reply.
      threads: calls under way at the same time.
      deadline_s: of one call, from when it begins. A thread cannot be killed: one that is over its
        deadline is left alone, and another takes its place.

    Raises:
      ValueError: an argument makes no sense.
    """

    def __init__(self, answer: Callable[[Question], Answer], *, threads: int, deadline_s: float):
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}.")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s must be above 0 seconds, got {deadline_s}.")
        self._answer, self._deadline_s = answer, deadline_s
        self._next = 0
        self._conversations: dict[int, _Conversation] = {}
        self._under_way: dict[int, _Call] = {}  # by conversation, in the order asked
        self._asked: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._threads = threads
        self._num_started = 0  # threads that are at work or wait for it
        self._counts = collections.Counter[str](calls=0, failures=0)
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shut_down()

    def shut_down(self) -> None:
        """Starts no further call; calls under way end by themselves and are not waited for.
        Idempotent.
        """
        self._closed = True
        self._conversations.clear()
        self._under_way.clear()
        for _ in range(self._num_started):
            self._asked.put(None)
        self._num_started = 0

    def open(self, messages: Sequence[Message]) -> int:
        if self._closed:
            raise ValueError("The speaker is shut down: make another.")
        number, self._next = self._next, self._next + 1
        self._conversations[number] = _Conversation(messages=list(messages))
        return number

    def hear(self, conversation: int, message: Message, actions: Sequence[str] = ()) -> None:
        found = self._settled(conversation)
        found.messages.append(message)
        found.actions = tuple(actions)

    def ask(self, conversation: int, limits: Limits, key: Key) -> None:
        found = self._settled(conversation)
        question = Question(tuple(found.messages), found.actions, limits, key)
        found.call = self._under_way[conversation] = _Call(conversation, question)
        if self._num_started < min(self._threads, len(self._under_way)):
            self._start_thread()
        self._asked.put(found.call)

    def step(self) -> list[Reply]:
        """The replies that have come, in the order asked; waits milliseconds for the first."""
        self._gather()
        self._give_up_late_calls()
        return [self._reply(call) for call in list(self._under_way.values()) if call.ended]

    def fork(self, conversation: int) -> int:
        parent = self._settled(conversation)
        number = self.open(parent.messages)
        self._conversations[number].actions = parent.actions
        return number

    def close(self, conversation: int) -> None:
        """Ends a conversation; a call under way goes on, and nobody hears of it."""
        del self._conversations[conversation]
        self._under_way.pop(conversation, None)

    @property
    def idle(self) -> bool:
        return not self._under_way

    def repeats(self, limits: Limits) -> bool:
        """Nobody knows whether a function or an API would answer twice the same."""
        return False

    def num_tokens(self, said: Sequence[Message] | str) -> int:
        """An estimate, rather too high."""
        return estimate_tokens(said)

    @property
    def stats(self) -> Mapping[str, int | float]:
        """`calls` that were answered or failed, and `failures` among them."""
        return dict(self._counts)

    def _settled(self, conversation: int) -> _Conversation:
        found = self._conversations[conversation]
        if found.call is not None:
            raise ValueError(
                f"Conversation {conversation} waits for a reply: step until it is there."
            )
        return found

    def _start_thread(self) -> None:
        self._num_started += 1
        # A daemon: a call that never returns must not keep the program from ending.
        threading.Thread(target=self._work, name="ictjax-speaker", daemon=True).start()

    def _work(self) -> None:
        while (call := self._asked.get()) is not None:
            call.started_s = time.monotonic()
            try:
                call.answer = self._answer(call.question)
            except BaseException as error:
                call.error = error
            self._done.put(call)

    def _gather(self) -> None:
        """Marks the calls that have ended; waits for the first."""
        if not self._under_way:
            return
        with contextlib.suppress(queue.Empty):
            self._done.get(timeout=_WAIT_S).ended = True
            while True:
                self._done.get_nowait().ended = True

    def _give_up_late_calls(self) -> None:
        now_s = time.monotonic()
        for conversation, call in self._under_way.items():
            if call.ended or call.started_s is None or now_s - call.started_s <= self._deadline_s:
                continue
            late = TimeoutError(f"no answer within {self._deadline_s:g} s")
            # Another record than the thread's, which may still write to its own.
            self._under_way[conversation] = dataclasses.replace(call, error=late, ended=True)
            self._num_started -= 1
            self._start_thread()  # in the place of the one that is stuck

    def _reply(self, call: _Call) -> Reply:
        del self._under_way[call.conversation]
        conversation = self._conversations[call.conversation]
        conversation.call = None
        self._counts["calls"] += 1
        if call.error is not None:
            if not isinstance(call.error, Exception):
                raise call.error  # a thread was told to end the program
            self._counts["failures"] += 1
            what = " ".join(f"{type(call.error).__name__}: {call.error}".split())
            return Reply(conversation=call.conversation, text="", finish=Finish.FAILED, error=what)
        assert call.answer is not None
        conversation.messages.append(Message(role="assistant", content=call.answer.text))
        return Reply(
            conversation=call.conversation, text=call.answer.text, finish=call.answer.finish
        )
