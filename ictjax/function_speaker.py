"""A Python function as a speaker: a script, a person at a prompt, or a model behind any API."""

from collections.abc import Callable, Sequence
from typing import Literal

from ictjax.actions import parse_react
from ictjax.call_speaker import Answer, CallSpeaker, Question
from ictjax.records import Message, ParseFailure

Function = Callable[[Sequence[Message], tuple[str, ...]], str]
"""Takes the conversation so far (the system prompt first, the newest message last) and the actions
that came with the newest message; returns its reply.
"""


class FunctionSpeaker(CallSpeaker):
    """Implements `ictjax.speaker.Speaker` with a function, called in threads: a slow reply holds
    back no other conversation.

    A call that raises, or returns no string, is a failed reply with the reason, which ends its own
    episode only; retries are the function's business.

    Args:
      function: called from several threads at once unless `threads` is 1.
      threads: calls under way at the same time.
      replies: "text": the reply is what the function returns. "action": it returns an action, which
        is put into the form that actors answer in (`Action: ...`), unless it is there already.
      deadline_s: of one call; a later answer is not waited for.

    Raises:
      ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        function: Function,
        *,
        threads: int = 8,
        replies: Literal["text", "action"] = "text",
        deadline_s: float = 600.0,
    ):
        if not callable(function):
            raise ValueError(
                "A speaker needs a function of (messages, actions) that returns a reply, got"
                f" {function!r}."
            )
        if replies not in ("text", "action"):
            raise ValueError(f"replies must be 'text' or 'action', got {replies!r}.")
        self._function, self._replies = function, replies
        super().__init__(self._call, threads=threads, deadline_s=deadline_s)

    def _call(self, question: Question) -> Answer:
        reply = self._function(question.messages, question.actions)
        if not isinstance(reply, str):
            raise TypeError(f"it returned {type(reply).__name__} where a reply (str) was expected")
        if self._replies == "action" and isinstance(parse_react(reply), ParseFailure):
            return Answer(f"Action: {reply}")
        return Answer(reply)
