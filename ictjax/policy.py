"""A Python function as the actor: a script, or a model behind an API. It stands where a rollout
expects a sampler and its tokenizer.
"""

import concurrent.futures
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

from ictjax.actions import parse_react
from ictjax.records import Message, ParseFailure
from ictjax.rollout import ObservationMessage
from ictjax.sampler import Generation, Request

Policy = Callable[[Sequence[Message], tuple[str, ...]], str]
"""Takes the conversation so far (the system prompt first, the newest observation last) and the
available actions; returns its reply.
"""

_WAIT_S = 0.005  # for a reply, before the environments are looked after again


class FunctionActor:
    """Lets `ictjax.rollout.rollout` play with a function: pass it as the sampler and as the chat
    tokenizer. A context manager.

    Conversations consist of messages where a sampler's consist of tokens. Calls run in threads, so
    a slow reply holds back no other episode. A call that raises, or returns no string, ends its own
    episode as FAILED with the reason; retries are the function's business.

    Args:
      function: called from several threads at once unless `threads` is 1.
      threads: calls under way at the same time.
      replies: "action": the reply is the action itself, unless it is in ReAct form; "react": it is
        read like a model's (`Thought:` and `Action:`), and a reply without an action counts as a
        parse failure.
    Raises:
      ValueError: an argument makes no sense.
    """

    def __init__(
        self, function: Policy, *, threads: int = 8, replies: Literal["action", "react"] = "action"
    ):
        if not callable(function):
            raise ValueError(
                "A policy is a function of (messages, actions) that returns a reply, got"
                f" {function!r}."
            )
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}.")
        if replies not in ("action", "react"):
            raise ValueError(f"replies must be 'action' or 'react', got {replies!r}.")
        self._function, self._replies = function, replies
        self._executor = concurrent.futures.ThreadPoolExecutor(
            threads, thread_name_prefix="ictjax-policy"
        )
        self._numbers = itertools.count()
        self._conversations: dict[int, list[Message]] = {}
        self._calls: dict[concurrent.futures.Future[str], int] = {}

    def __enter__(self) -> "FunctionActor":
        return self

    def __exit__(self, *exc: object) -> None:
        self.shut_down()

    def shut_down(self) -> None:
        """Starts no further call; calls under way end by themselves and are not waited for.
        Idempotent.
        """
        self._executor.shutdown(wait=False, cancel_futures=True)

    # --- in the place of ictjax.chat.ChatTokenizer ---

    stop_ids: tuple[int, ...] = ()

    def encode_start(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        return tuple(messages)

    def encode_turn(self, message: Message, *, stopped: bool) -> tuple[Message, ...]:
        return (message,)

    def decode(self, ids: Sequence[Message]) -> str:
        return "".join(message.content for message in ids)

    # --- in the place of ictjax.sampler.Sampler ---

    def open(self, ids: Sequence[Message]) -> int:
        number = next(self._numbers)
        self._conversations[number] = list(ids)
        return number

    def extend(self, conversation: int, ids: Sequence[Message]) -> None:
        self._conversations[conversation] += ids

    def generate(self, conversation: int, request: Request) -> None:
        """Asks for a reply; the request's limits and key are a sampler's and have no meaning
        here.
        """
        said = self._conversations[conversation]
        actions = said[-1].actions if isinstance(said[-1], ObservationMessage) else ()
        plain = tuple(Message(role=message.role, content=message.content) for message in said)
        self._calls[self._executor.submit(self._ask, plain, actions)] = conversation

    def close(self, conversation: int) -> None:
        del self._conversations[conversation]

    @property
    def idle(self) -> bool:
        return not self._calls

    def step(self) -> list[Generation]:
        """The replies that have come, in the order asked; waits a few milliseconds for the
        first.
        """
        done, _ = concurrent.futures.wait(
            self._calls, timeout=_WAIT_S, return_when=concurrent.futures.FIRST_COMPLETED
        )
        finished = []
        for call in [call for call in self._calls if call in done]:
            conversation = self._calls.pop(call)
            if conversation in self._conversations:  # else it was closed while the call ran
                finished.append(self._generation(conversation, call))
        return finished

    def _ask(self, messages: tuple[Message, ...], actions: tuple[str, ...]) -> str:
        reply = self._function(messages, actions)
        if not isinstance(reply, str):
            raise TypeError(f"it returned {type(reply).__name__} where a reply (str) was expected")
        if self._replies == "action" and isinstance(parse_react(reply), ParseFailure):
            return f"Action: {reply}"
        return reply

    def _generation(self, conversation: int, call: concurrent.futures.Future[str]) -> Generation:
        error = call.exception()
        if error is not None and not isinstance(error, Exception):
            raise error  # a thread was told to end the program
        text = (
            call.result()
            if error is None
            else f"The policy failed: {' '.join(f'{type(error).__name__}: {error}'.split())}."
        )
        reply = Message(role="assistant", content=text)
        if error is None:
            self._conversations[conversation].append(reply)
        ids: tuple = (reply,)  # a message for a token
        return Generation(
            conversation=conversation,
            ids=ids,
            logprobs=(),
            finish="stop" if error is None else "failed",
        )
