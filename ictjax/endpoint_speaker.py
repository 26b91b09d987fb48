"""Any OpenAI-compatible chat endpoint as a speaker: a hosted model, or a server of your own."""

import collections
import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ictjax.call_speaker import Answer, CallFailed, CallSpeaker, Question
from ictjax.config import EndpointConfig
from ictjax.extras import install
from ictjax.speaker import Finish

_MAX_WAIT_S = 60.0  # between two tries, also where the server asks for more
_MAX_BODY_BYTES = 16 * 2**20
_MAX_ERROR_BYTES = 64 * 2**10
_MAX_SHOWN = 300  # characters of a server's error
_SEED_BITS = 31  # what servers take
_FINISHES: Mapping[str | None, Finish] = {"stop": Finish.STOP, "length": Finish.LENGTH}


class EndpointSpeaker(CallSpeaker):
    """Implements `ictjax.speaker.Speaker` with the package `openai` (the extra `api`).

    A call is tried again after 408, 409, 429, 5xx, a time-out or a cut connection, with waits that
    double, or that the server asks for; one that fails for good is a failed reply, which ends its
    own episode only. Greedy replies are asked for at temperature 0, which few servers make repeat
    themselves. The key is read from the environment and cut out of every message.

    Args:
      config: where, and how.
      model: its name at the endpoint; empty for the only one that the endpoint lists.

    Raises:
      ValueError: `openai` is not installed, the URL is missing, the key cannot be sent, or the
        model is left open where the endpoint does not list exactly one.
    """

    def __init__(self, config: EndpointConfig, model: str = ""):
        if not config.url:
            raise ValueError(
                "endpoint.url is empty: give a base URL, such as http://localhost:8000/v1."
            )
        try:
            import openai  # optional, and slow to import
        except ImportError:
            raise ValueError(
                f"To talk to {config.url} the package openai is needed: in the clone, run"
                f" `{install('api')}`."
            ) from None
        self._openai, self._config = openai, config
        self._key = _key(config.key_variable)
        self._client = openai.OpenAI(
            base_url=config.url,
            api_key=self._key or "none",  # servers of one's own ask for none
            timeout=config.timeout_s,
            max_retries=0,  # retries live here, where bodies are read
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [self._check]}),
        )
        self._lock = threading.Lock()  # of the counts, which all threads add to
        self._usage = collections.Counter[str](retries=0, prompt_tokens=0, reply_tokens=0)
        self._over = threading.Event()
        tries = config.max_retries + 1
        super().__init__(
            self._call,
            threads=config.concurrency,
            deadline_s=tries * (config.timeout_s + _MAX_WAIT_S) + _MAX_WAIT_S,
        )
        try:
            self.model = model or self._only_model()
        except BaseException:
            self.shut_down()
            raise

    def shut_down(self) -> None:
        """Starts no further call or try, and closes the connections. Idempotent."""
        super().shut_down()
        self._over.set()
        self._client.close()

    @property
    def stats(self) -> Mapping[str, int | float]:
        """Those of `CallSpeaker`, and `retries`, `prompt_tokens`, `reply_tokens` (as the server
        counts them; 0 where it does not) and `cost` (by the configured prices).
        """
        with self._lock:
            usage = dict(self._usage)
        cost = (
            usage["prompt_tokens"] * self._config.input_price
            + usage["reply_tokens"] * self._config.output_price
        ) / 1e6
        return {**super().stats, **usage, "cost": cost}

    def _call(self, question: Question) -> Answer:
        limits, config = question.limits, self._config
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {"role": message.role, "content": message.content} for message in question.messages
            ],
            "temperature": limits.temperature,
            "top_p": limits.top_p,
            config.tokens_parameter: limits.max_tokens,
        }
        if config.seeded:
            request["seed"] = question.key[0] >> (32 - _SEED_BITS)
        if limits.stop:
            request["stop"] = list(limits.stop)
        # not OpenAI's own: most servers of other models know them
        further = {"top_k": limits.top_k, "min_p": limits.min_p}
        if any(further.values()):
            request["extra_body"] = {name: value for name, value in further.items() if value}
        create = self._client.chat.completions.with_streaming_response.create
        for number in range(config.max_retries + 1):
            try:
                return self._answer_in(self._body(lambda: create(**request)))
            except _TryAgain as error:
                if number == config.max_retries:
                    tries = f" (after {number + 1} tries)" if number else ""
                    raise CallFailed(f"{error}{tries}") from None
                with self._lock:
                    self._usage["retries"] += 1
                wait_s = config.first_wait_s * 2**number * random.uniform(0.75, 1.0)
                if self._over.wait(min(max(wait_s, error.wait_s), _MAX_WAIT_S)):
                    raise CallFailed("the speaker was shut down") from None
        raise AssertionError("the last try returns or raises")

    def _body(self, request: Callable[[], contextlib.AbstractContextManager[Any]]) -> bytes:
        """The whole body of an answer. Raises _TryAgain, or CallFailed."""
        until_s = time.monotonic() + self._config.timeout_s
        with self._errors(), request() as response:
            body = self._read(response, _MAX_BODY_BYTES, until_s)
        if len(body) > _MAX_BODY_BYTES:
            raise CallFailed(f"the answer is longer than {_MAX_BODY_BYTES >> 20} MiB")
        return body

    def _read(self, response: Any, enough: int, until_s: float) -> bytes:
        """A body, not much further than is enough; a slow one does not hold the thread for ever."""
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > enough:
                break
            if time.monotonic() > until_s:
                raise _TryAgain(f"no whole answer within {self._config.timeout_s:g} s")
        return bytes(body)

    def _check(self, response: Any) -> None:
        """Called once the headers are there: `openai` would read the body of an error to an end
        that may never come.
        """
        code = response.status_code
        if code < 400:
            return
        until_s = time.monotonic() + self._config.timeout_s
        message = _message(self._read(response, _MAX_ERROR_BYTES, until_s))
        text = f"HTTP {code}: {self._shown(message)}"
        if code in (408, 409, 429) or code >= 500:
            asked = response.headers.get("retry-after", "")
            raise _TryAgain(text, float(asked) if asked.isdecimal() else 0.0)
        hint = f" ({self._key_state})" if code in (401, 403) else ""
        raise CallFailed(text + hint)

    def _answer_in(self, body: bytes) -> Answer:
        try:
            data = json.loads(body)
            choice = data["choices"][0]
            content, ended = choice["message"].get("content"), choice.get("finish_reason")
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            raise CallFailed(
                f"no chat completion: {self._shown(body.decode(errors='replace'))}"
            ) from None
        with self._lock:
            self._usage.update(_counts(data.get("usage")))
        if content is None:
            content = ""
        if not isinstance(content, str) or ended not in (*_FINISHES, None):
            raise CallFailed(self._shown(f"no whole text: it ended with {ended!r}"))
        return Answer(content, _FINISHES.get(ended, Finish.STOP))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What the libraries raise becomes _TryAgain, without the key."""
        try:
            yield
        except (_TryAgain, CallFailed):
            raise
        except self._openai.APIConnectionError as error:  # time-outs included
            cause = f" ({error.__cause__})" if str(error.__cause__ or "") else ""
            raise _TryAgain(self._shown(f"{error}{cause}")) from None
        except Exception as error:  # a cut connection, in the words of the library below
            raise _TryAgain(self._shown(f"{type(error).__name__}: {error}")) from None

    def _only_model(self) -> str:
        where = f"{self._config.url} ({self._key_state})"
        try:
            body = self._body(self._client.models.with_streaming_response.list)
            names = sorted(str(model["id"]) for model in json.loads(body)["data"])
        except (_TryAgain, CallFailed, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where} does not list its models ({self._shown(str(error))}): name one."
            ) from None
        if len(names) != 1:
            listed = self._shown(", ".join(names[:8]) or "none")
            raise ValueError(f"{where} has {len(names)} models ({listed}): name one.")
        return names[0]

    @property
    def _key_state(self) -> str:
        return f"{self._config.key_variable} is {'set' if self._key else 'not set'}"

    def _shown(self, text: str) -> str:
        """A server's words in one line, without the key."""
        text = " ".join(text.split()) or "(nothing)"
        return (text.replace(self._key, "***") if self._key else text)[:_MAX_SHOWN]


class _TryAgain(Exception):
    """A failure that may pass. `wait_s`: what the server asked for."""

    def __init__(self, text: str, wait_s: float = 0.0):
        super().__init__(text)
        self.wait_s = wait_s


def _key(variable: str) -> str:
    """The key in an environment variable; empty where there is none.

    Raises:
      ValueError: it is no key: libraries would print it where they say so.
    """
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{variable} holds characters that no key has (spaces, line breaks, letters beyond"
            " ASCII): set it to the key alone."
        )
    return key


def _counts(usage: Any) -> dict[str, int]:
    """What a server says it has read and written; what makes no sense counts as nothing."""
    named = {"prompt_tokens": "prompt_tokens", "reply_tokens": "completion_tokens"}
    said = usage if isinstance(usage, dict) else {}
    counts = {ours: said.get(theirs) for ours, theirs in named.items()}
    return {name: n for name, n in counts.items() if isinstance(n, int) and n > 0}


def _message(body: bytes) -> str:
    """What a server says about an error."""
    with contextlib.suppress(LookupError, RecursionError, TypeError, ValueError):
        message = json.loads(body)["error"]["message"]
        if isinstance(message, str):
            return message
    return body.decode(errors="replace")
