"""The thread of `ictjax serve` that samples: whoever asks joins at the next dispatch, and nobody
waits for another's reply to end.
"""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from experiments.serve_protocol import Token
from ictjax.chat import ChatTokenizer
from ictjax.reply_text import PART, ReplyText
from ictjax.sampler import Generation, Request, Sampler, Tops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A model that answers: a base, or a base with an adapter."""

    sampler: Sampler
    chat: ChatTokenizer
    max_len: int  # tokens of a conversation
    max_top_k: int  # the largest top_k
    max_top_logprobs: int  # of these, how many it can report


class Piece(NamedTuple):
    """More of a choice; the last one has a finish."""

    choice: int
    text: str
    tokens: tuple[Token, ...]  # of the text; empty unless asked for
    finish: str | None = None
    num_tokens: int = 0  # of the whole choice, once it is finished


class Failure(NamedTuple):
    """There will be no more pieces."""

    reason: str
    status: int = 500  # of HTTP


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """Choices that answer the same messages.

    `tell` is called from the sampling thread, once with each piece.
    """

    model: str
    prompt_ids: tuple[int, ...]
    requests: tuple[Request, ...]  # one for each choice
    stop: tuple[str, ...]
    by_pieces: bool  # else each choice in one piece
    with_tokens: bool
    tell: Callable[[Piece | Failure], None]


@dataclasses.dataclass(eq=False)
class _Choice:
    job: Job
    index: int
    text: ReplyText
    num_chars: int = 0  # told
    num_ids: int = 0  # told


class SamplerThread:
    """Samples for everyone, in one thread; a context manager. `ask` and `cancel` may be called from
    any thread and return at once.
    """

    def __init__(self, models: Mapping[str, Served]):
        self._models = models
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._choices: dict[str, dict[int, _Choice]] = {name: {} for name in models}
        self._over = False
        self._refusal: Failure | None = None  # of everything, once the end has begun
        self._thread = threading.Thread(target=self._run, name="ictjax-sampler", daemon=True)
        self.error: BaseException | None = None
        """What ended the thread, where that was not asked for."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends what is under way and the thread."""

        def end() -> None:
            self._over = True

        self.cut("the server was shut down")
        self._calls.put(end)
        self._thread.join()

    def ask(self, job: Job) -> None:
        """Has a job answered; it is told what comes of it."""
        self._calls.put(lambda: self._start(job))

    def cancel(self, job: Job) -> None:
        """Ends a job, which is told nothing more; nothing happens if it has ended."""
        self._calls.put(lambda: self._end(job))

    def cut(self, reason: str) -> None:
        """Ends all jobs, also those that are asked from now on; they are told why."""
        self._calls.put(lambda: self._cut(reason))

    def _run(self) -> None:
        while not self._over:
            try:
                self._take_calls()
                for name, served in self._models.items():
                    if self.error is None and not served.sampler.idle:
                        self._step(name, served)
            except BaseException as error:  # whoever waits must be told, and the server end
                self.error = self.error or error
                self._refusal = Failure("the sampler failed")
                for job in self._jobs():
                    job.tell(self._refusal)

    def _take_calls(self) -> None:
        """Waits for one where there is nothing else to do."""
        busy = any(not served.sampler.idle for served in self._models.values())
        with contextlib.suppress(queue.Empty):
            self._calls.get(block=not busy or self.error is not None)()
            while not self._over:
                self._calls.get_nowait()()

    def _start(self, job: Job) -> None:
        if self._refusal is not None:
            job.tell(self._refusal)
            return
        served = self._models[job.model]
        sampler, choices = served.sampler, self._choices[job.model]
        try:
            first = sampler.open(job.prompt_ids)
            numbers = [first, *(sampler.fork(first) for _ in job.requests[1:])]
            for index, number in enumerate(numbers):
                choices[number] = _Choice(job, index, ReplyText(served.chat.decode, job.stop))
            for number, request in zip(numbers, job.requests, strict=True):
                ends = choices[number].text.read
                sampler.generate(number, dataclasses.replace(request, ends=ends))
        except ValueError as error:  # what the sampler refuses costs nobody else a reply
            self._end(job)
            job.tell(Failure(str(error), 400))

    def _jobs(self) -> set[Job]:
        return {choice.job for choices in self._choices.values() for choice in choices.values()}

    def _end(self, job: Job) -> None:
        choices = self._choices[job.model]
        for number in [number for number, choice in choices.items() if choice.job is job]:
            self._models[job.model].sampler.close(number)
            del choices[number]

    def _cut(self, reason: str) -> None:
        self._refusal = Failure(reason, 503)
        for job in self._jobs():
            self._end(job)
            job.tell(self._refusal)

    def _step(self, name: str, served: Served) -> None:
        choices = self._choices[name]
        for generation in served.sampler.step():
            choice = choices.pop(generation.conversation)
            served.sampler.close(generation.conversation)
            self._finish(choice, generation, served.chat)
        for number, choice in choices.items():
            if choice.job.by_pieces:
                self._go_on(choice, number, served)

    def _finish(self, choice: _Choice, generation: Generation, chat: ChatTokenizer) -> None:
        ids = list(generation.ids)
        said = ids[:-1] if ids and ids[-1] in chat.stop_ids else ids
        tokens = self._tokens(
            choice, said, generation.logprobs, generation.top_logprobs, len(said), chat
        )
        choice.job.tell(
            Piece(
                choice.index,
                self._more(choice, choice.text.text, chat),
                tokens,
                "stop" if generation.finish == "stop" else "length",
                len(ids),
            )
        )

    def _go_on(self, choice: _Choice, number: int, served: Served) -> None:
        shown = choice.text.shown
        if len(shown) == choice.num_chars:
            return
        tokens: tuple[Token, ...] = ()
        if choice.job.with_tokens:
            ids = served.sampler.sampled(number)
            logprobs = served.sampler.sampled_logprobs(number)
            fit = choice.text.num_kept(ids, len(shown))
            tops = served.sampler.sampled_top_logprobs(number)
            tokens = self._tokens(choice, ids, logprobs, tops, fit, served.chat)
        choice.job.tell(Piece(choice.index, self._more(choice, shown, served.chat), tokens))

    def _more(self, choice: _Choice, text: str, chat: ChatTokenizer) -> str:
        """What of a text was not told yet; the first piece has what the template began with."""
        opened = "" if choice.num_chars or not text else chat.opened
        more, choice.num_chars = opened + text[choice.num_chars :], len(text)
        return more

    def _tokens(
        self,
        choice: _Choice,
        ids: Sequence[int],
        logprobs: Sequence[float],
        tops: Sequence[Tops],
        end: int,
        chat: ChatTokenizer,
    ) -> tuple[Token, ...]:
        """The tokens up to `end` that were not told yet."""
        if not choice.job.with_tokens:
            return ()
        start, choice.num_ids = choice.num_ids, max(end, choice.num_ids)
        return tuple(
            _token(
                chat,
                ids[max(index - 1, 0) : index],
                ids[index],
                logprobs[index],
                tops[index] if tops else (),
            )
            for index in range(start, end)
        )


def _token(
    chat: ChatTokenizer, before: Sequence[int], number: int, logprob: float, tops: Tops
) -> Token:
    """Each text is what the token adds to that of the one before it, for the blanks between words;
    of a likely token that adds nothing, as the end of the reply, it is its name. A token that ends
    or begins within a character has marks for that in its text, and its bytes.
    """
    start = len(chat.decode(before))

    def token(other: int, weight: float, *, named: bool = True) -> Token:
        alone, text = chat.spelled(other), chat.decode([*before, other])[start:]
        if PART in alone + text:
            return Token(alone, weight, chat.part_bytes(other))
        text = text or (alone if named else "")
        return Token(text, weight, text.encode())

    likeliest = tuple(token(*likely) for likely in tops)
    return token(number, logprob, named=False)._replace(likeliest=likeliest)
