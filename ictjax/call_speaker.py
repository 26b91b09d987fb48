"""Speakers whose replies come from calls that block: threads make them, and one that fails, or
never ends, costs its own reply only.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import NamedTuple, Self

from ictjax.actions import after_thinking
from ictjax.keys import Key
from ictjax.records import Message, writable
from ictjax.speaker import MAX_REPLY_CHARS, Finish, Limits, Reply, estimate_tokens

_NO_ANSWER = "(no answer)"  # of a thought alone: many servers refuse an empty message
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


class CallFailed(Exception):
    """There is no answer, for a reason that its text states in full."""


@dataclasses.dataclass(eq=False, slots=True)
class _Call:
    conversation: int
    question: Question
    answer: Future[Answer] = dataclasses.field(default_factory=Future[Answer])
    started_s: float | None = None  # by time.monotonic, once a thread works on it


@dataclasses.dataclass(eq=False, slots=True)
class _Conversation:
    messages: list[Message]
    actions: tuple[str, ...] = ()


class CallSpeaker:
    """Implements `ictjax.speaker.Speaker` by calling a function in threads.

    A reply longer than `ictjax.speaker.MAX_REPLY_CHARS` is cut. The thoughts before a reply
    (`ictjax.actions.after_thinking`) are not repeated to the function in later turns.

    Args:
      answer: is given a question; called from several threads at once unless `threads` is 1. What
        it raises is the error of its reply: a `CallFailed` by its text, anything else by its name
        too.
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
        self._unheard: list[_Call] = []  # under way, for conversations that were closed
        self._asked: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads = threads
        self._num_started = 0  # threads, without those that were left alone
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
        for call in self._under_way.values():
            call.answer.cancel()  # unless it has begun
        self._conversations.clear()
        self._under_way.clear()
        self._unheard.clear()
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
        call = self._under_way[conversation] = _Call(conversation, question)
        if self._num_started < min(self._threads, len(self._under_way) + len(self._unheard)):
            self._num_started += 1
            self._start_thread()
        self._asked.put(call)

    def step(self) -> list[Reply]:
        """The replies that have come, in the order asked; waits milliseconds for the first."""
        calls = list(self._under_way.values())
        concurrent.futures.wait(
            [call.answer for call in calls],
            timeout=_WAIT_S,
            return_when=concurrent.futures.FIRST_COMPLETED,
        )
        self._give_up_late_calls()
        return [self._reply(call) for call in calls if call.answer.done()]

    def fork(self, conversation: int) -> int:
        parent = self._settled(conversation)
        number = self.open(parent.messages)
        self._conversations[number].actions = parent.actions
        return number

    def close(self, conversation: int) -> None:
        """Ends a conversation; a call that has begun goes on, and nobody hears of it."""
        self._open_one(conversation)
        del self._conversations[conversation]
        call = self._under_way.pop(conversation, None)
        if call is not None and not call.answer.cancel():
            self._unheard.append(call)

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

    def _open_one(self, conversation: int) -> _Conversation:
        if conversation not in self._conversations:
            raise ValueError(
                f"Conversation {conversation} is not open: it was closed, or never opened."
            )
        return self._conversations[conversation]

    def _settled(self, conversation: int) -> _Conversation:
        if conversation in self._under_way:
            raise ValueError(
                f"Conversation {conversation} waits for a reply: step until it is there."
            )
        return self._open_one(conversation)

    def _start_thread(self) -> None:
        # A daemon: a call that never returns must not keep the program from ending.
        threading.Thread(target=self._work, name="ictjax-speaker", daemon=True).start()

    def _work(self) -> None:
        while (call := self._asked.get()) is not None:
            if not call.answer.set_running_or_notify_cancel():
                continue  # nobody wants it any more
            call.started_s = time.monotonic()
            try:
                self._make(call)
            except concurrent.futures.InvalidStateError:
                return  # it was given up, and another thread has taken this one's place

    def _make(self, call: _Call) -> None:
        try:
            answer = self._answer(call.question)
        except BaseException as error:
            call.answer.set_exception(error)
        else:
            call.answer.set_result(answer)

    def _give_up_late_calls(self) -> None:
        self._unheard = [call for call in self._unheard if not call.answer.done()]
        begun_s = time.monotonic() - self._deadline_s
        for call in (*self._under_way.values(), *self._unheard):
            if call.started_s is None or call.started_s >= begun_s:
                continue
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # it is there
                call.answer.set_exception(TimeoutError(f"no answer within {self._deadline_s:g} s"))
                self._start_thread()

    def _reply(self, call: _Call) -> Reply:
        del self._under_way[call.conversation]
        self._counts["calls"] += 1
        error = call.answer.exception()
        if error is None:
            answer = call.answer.result()
            text = writable(answer.text[:MAX_REPLY_CHARS])
            finish = Finish.LENGTH if len(answer.text) > MAX_REPLY_CHARS else answer.finish
            said = Message(role="assistant", content=_kept(text))
            self._conversations[call.conversation].messages.append(said)
            return Reply(conversation=call.conversation, text=text, finish=finish)
        if not isinstance(error, Exception):
            raise error  # a thread was told to end the program
        self._counts["failures"] += 1
        kind = "" if isinstance(error, CallFailed) else f"{type(error).__name__}: "
        what = writable(" ".join(f"{kind}{error}".split()))
        return Reply(conversation=call.conversation, text="", finish=Finish.FAILED, error=what)


def _kept(text: str) -> str:
    """What later turns see of a reply: as chat templates have it, not the thoughts before it."""
    answer = after_thinking(text)
    return text if answer == text else (answer or "").strip() or _NO_ANSWER
