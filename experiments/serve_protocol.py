"""What clients of `ictjax serve` may send, and what they are sent: OpenAI's chat completions, as
far as a model in our sampler can follow them. What it cannot is refused by name, never left out.

Format: https://platform.openai.com/docs/api-reference/chat
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from ictjax.config import MIN_P, TEMPERATURE, TOP_P, check_stop
from ictjax.ranges import Range, shown
from ictjax.records import Message, writable

MAX_BIAS_IDS = 300
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
_BIAS = Range(-100, 100)
_SEED = Range(-(2**63), 2**64)
_TOKENS = Range(1, 2**31)
_TOP_K = Range(0, 2**31)
_TOP_LOGPROBS = Range(0, MAX_TOP_LOGPROBS)
_ROLES = {role: role for role in ("system", "user", "assistant")} | {"developer": "system"}

# Fields that say nothing of the reply.
_IDLE = frozenset(
    "metadata parallel_tool_calls prompt_cache_key prompt_cache_retention safety_identifier"
    " user".split()
)
# Fields that are not followed, with the values that ask for nothing.
_REFUSED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# The same of a message.
_REFUSED_OF_MESSAGES = frozenset("annotations audio function_call name refusal tool_calls".split())


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
      status: of HTTP.
      message: one sentence, with the remedy; like `param`, it may repeat what the client sent.
      param: the field that is wrong.
      code: for programs.
      retry_s: after how long it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ):
        super().__init__(writable(message))
        self.param = None if param is None else writable(param)
        self.status, self.code, self.retry_s = status, code, retry_s

    @property
    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


class ChatRequest(NamedTuple):
    """What a client asks for."""

    model: str
    messages: tuple[Message, ...]
    num_choices: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: tuple[str, ...]
    bias: dict[int, float]
    seed: int | None
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool


class Token(NamedTuple):
    """A sampled token as clients see it."""

    text: str
    logprob: float  # under the model itself: at temperature 1, before bias and truncation
    in_bytes: bytes | None  # also of a part of a character, where they are known
    # the likeliest ones in its place, the likeliest first; none unless asked for
    likeliest: tuple["Token", ...] = ()


class Choice(NamedTuple):
    """One finished reply."""

    text: str
    finish: str  # "stop" or "length"
    num_tokens: int  # the stop token included
    tokens: tuple[Token, ...]  # without it; empty unless asked for


def read_chat(body: bytes) -> ChatRequest:
    """Reads the body of a request. Raises ApiError."""
    try:
        return _read(body)
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply: send an object.") from None


def _read(body: bytes) -> ChatRequest:
    fields = _Fields(_json_object(body))
    for name in fields.given:
        if name not in _READ and name not in _IDLE:
            _check_refused(name, fields.given[name])
    options = _Fields(fields.take("stream_options", {}, _mapping), "stream_options.")
    tokens = {
        name: fields.number(name, None, _TOKENS, int)
        for name in ("max_completion_tokens", "max_tokens")
    }
    limits = {value for value in tokens.values() if value is not None}
    if len(limits) > 1:
        _refuse("max_tokens", "differs from max_completion_tokens: give one of them")
    stream = fields.take("stream", False, _flag)
    logprobs = fields.take("logprobs", False, _flag)
    top_logprobs = fields.number("top_logprobs", 0, _TOP_LOGPROBS, int)
    if top_logprobs and not logprobs:
        _refuse("top_logprobs", "is for logprobs = true: give both, or leave it out")
    if options.given and not stream:
        _refuse("stream_options", "is for stream = true: leave it out")
    return ChatRequest(
        model=fields.take("model", None, _text),
        messages=fields.take("messages", None, _messages),
        num_choices=fields.number("n", 1, Range(1, MAX_CHOICES), int),
        max_tokens=next(iter(limits), None),
        temperature=fields.number("temperature", 1.0, TEMPERATURE, float),
        top_p=fields.number("top_p", 1.0, TOP_P, float),
        top_k=fields.number("top_k", 0, _TOP_K, int),
        min_p=fields.number("min_p", 0.0, MIN_P, float),
        stop=fields.take("stop", (), _stop),
        bias=fields.take("logit_bias", {}, _bias),
        seed=fields.number("seed", None, _SEED, int),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=options.take("include_usage", False, _flag),
    )


_READ = frozenset(ChatRequest._fields) - {"num_choices", "bias", "include_usage"} | {
    "n",
    "logit_bias",
    "max_completion_tokens",
    "stream_options",
}


class _Fields:
    """The fields of an object that are given: null is the same as nothing."""

    def __init__(self, given: Mapping[str, Any], place: str = ""):
        self.given = {name: value for name, value in given.items() if value is not None}
        self._place = place

    def take(self, name: str, default: Any, read: Callable[[str, Any], Any]) -> Any:
        """What `read` makes of a field; the default where it is not given, unless that is None."""
        if name in self.given:
            return read(self._place + name, self.given[name])
        if default is None:
            _refuse(self._place + name, "is missing")
        return default

    def number(self, name: str, default: Any, allowed: Range, kind: type) -> Any:
        """A number in its range."""
        value = self.given.get(name, default)
        kinds = int if kind is int else (int, float)
        if value is not default and (
            isinstance(value, bool) or not isinstance(value, kinds) or value not in allowed
        ):
            words = f"a whole number {allowed}" if kind is int else str(allowed)
            _refuse(self._place + name, f"must be {words}, got {shown(value)}")
        return value


def _refuse(param: str, fault: str) -> NoReturn:
    raise ApiError(400, f"{param} {fault}.", param=param, code="invalid_value")


def _json_object(body: bytes) -> Mapping[str, Any]:
    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        data = json.loads(body, parse_constant=no_number)
    except ValueError as error:
        detail = " ".join(str(error).split())[:200]
        raise ApiError(
            400, f"The body is not JSON ({detail}): send an object.", code="invalid_json"
        ) from None
    if not isinstance(data, dict):
        raise ApiError(400, "The body is JSON, but no object: send one.", code="invalid_json")
    return data


def _check_refused(name: str, value: object) -> None:
    if name not in _REFUSED:
        raise ApiError(
            400,
            f"{shown(name)} is not known here: leave it out.",
            param=name[:100],
            code="unknown_parameter",
        )
    # 0 and False are equal
    if not any(
        value == off and isinstance(value, bool) == isinstance(off, bool) for off in _REFUSED[name]
    ):
        raise ApiError(
            400,
            f"{name} is not supported by this server: leave it out.",
            param=name,
            code="unsupported_parameter",
        )


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        _refuse(name, f"must be an object, got {shown(value)}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(name, f"must be true or false, got {shown(value)}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(name, f"must be a text, got {shown(value)}")
    return value


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stop = [value] if isinstance(value, str) else value
    if not isinstance(stop, list):
        _refuse(name, f"must be a text or a list of texts, got {shown(value)}")
    for index, text in enumerate(stop):
        _text(f"{name}[{index}]", text)
    try:
        check_stop(name, stop)
    except ValueError as error:
        raise ApiError(400, str(error), param=name, code="invalid_value") from None
    return tuple(stop)


def _bias(name: str, value: Any) -> dict[int, float]:
    bias = {}
    for number, added in _mapping(name, value).items():
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            _refuse(name, f"must have ids of tokens for keys, got {shown(number)}")
        one = _Fields({number: added}, f"{name}.")
        bias[int(number)] = one.number(number, None, _BIAS, float)
    if len(bias) > MAX_BIAS_IDS:
        _refuse(name, f"holds {len(bias)} ids: give {MAX_BIAS_IDS} at most")
    return {number: added for number, added in bias.items() if added}


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _refuse(name, "must be a list of at least one message")
    return tuple(_message(f"{name}[{index}]", item) for index, item in enumerate(value))


def _message(place: str, value: Any) -> Message:
    fields = _Fields(_mapping(place, value), f"{place}.")
    for name in fields.given:
        if name not in ("role", "content") and fields.given[name] != []:
            known = name in _REFUSED_OF_MESSAGES
            _refuse(
                f"{place}.{name[:100]}",
                f"is not {'supported by this server' if known else 'known here'}: leave it out",
            )
    role = fields.take("role", None, _text)
    if role not in _ROLES:
        _refuse(f"{place}.role", f"must be one of {', '.join(_ROLES)}, got {shown(role)}")
    return Message(role=_ROLES[role], content=fields.take("content", None, _content))


def _content(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse(name, f"must be a text or a list of parts, got {shown(value)}")
    texts = []
    for index, part in enumerate(value):
        place = f"{name}[{index}]"
        fields = _Fields(_mapping(place, part), f"{place}.")
        kind = fields.take("type", None, _text)
        if kind != "text":
            _refuse(f"{place}.type", f"must be text, the only kind of part here, got {shown(kind)}")
        texts.append(fields.take("text", None, _text))
    return "".join(texts)


class Answers:
    """The bodies of the answers to one request.

    Args:
      number: of the request, unlike any other.
      model: the name it asked for.
      prompt_tokens: in its messages.
    """

    def __init__(self, number: str, model: str, prompt_tokens: int, asked: ChatRequest):
        self._base = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": model}
        self._prompt_tokens, self._asked = prompt_tokens, asked

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer in one piece."""
        return {
            **self._base,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.tokens),
                    "finish_reason": choice.finish,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": self._usage(choice.num_tokens for choice in choices),
        }

    def beginning(self, index: int) -> bytes:
        """The first event of a choice."""
        return self._event(index, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, index: int, text: str, tokens: Sequence[Token]) -> bytes:
        """An event with more of a choice."""
        return self._event(index, {"content": text}, tokens)

    def end(self, index: int, finish: str) -> bytes:
        """The last event of a choice."""
        return self._event(index, {}, finish=finish)

    def last(self, num_tokens: Sequence[int]) -> bytes:
        """What follows the choices: the usage, if it was asked for, and the end of the stream."""
        usage = {**self._chunk, "choices": [], "usage": self._usage(num_tokens)}
        return (event(usage) if self._asked.include_usage else b"") + b"data: [DONE]\n\n"

    @property
    def _chunk(self) -> dict[str, Any]:
        return {**self._base, "object": "chat.completion.chunk"}

    def _event(
        self,
        index: int,
        delta: Mapping[str, Any],
        tokens: Sequence[Token] = (),
        finish: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish,
        }
        usage = {"usage": None} if self._asked.include_usage else {}
        return event({**self._chunk, "choices": [choice], **usage})

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        content = [
            {
                **_weighed(token),
                "top_logprobs": [_weighed(likely) for likely in token.likeliest],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _usage(self, num_tokens: Iterable[int]) -> dict[str, int]:
        completion = sum(num_tokens)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
        }


def _weighed(token: Token) -> dict[str, Any]:
    in_bytes = None if token.in_bytes is None else list(token.in_bytes)
    return {"token": token.text, "logprob": token.logprob, "bytes": in_bytes}


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
