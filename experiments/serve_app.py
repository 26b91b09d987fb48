"""The HTTP side of `ictjax serve`: who may ask, how much, and how answers get back. Nothing here
blocks: what takes time is done by the sampling thread and by one that encodes.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hmac
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from experiments.serve_protocol import Answers, ApiError, ChatRequest, Choice, event, read_chat
from experiments.serve_thread import Failure, Job, Piece, SamplerThread, Served
from ictjax import keys
from ictjax import sampler as samplers

_HUNG_UP = 499  # as nginx calls it; nobody reads it
_BODY_S = 60.0  # for a client to send its request
_RETRY_S = 1
_Answer = TypeVar("_Answer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may take."""

    max_replies: int  # under way and waiting, of all clients together
    max_body_bytes: int
    key: str = ""  # that clients must send; empty: none
    hosts: tuple[str, ...] = ()  # names of this server that clients may use; empty: any


class Api:
    """The endpoints over the models of a sampling thread."""

    def __init__(self, models: Mapping[str, Served], thread: SamplerThread, limits: Limits):
        self._models, self._thread, self._limits = models, thread, limits
        # one thread: tokenizers are not made for several
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, "ictjax-encoder")
        self.num_replies = 0
        """Under way and waiting."""
        self.draining = False
        """Set it: nothing new is taken."""
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._list),
                Route("/v1/models/{name:path}", self._one),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={
                ApiError: _api_error,
                ClientDisconnect: _hung_up,
                HTTPException: _http_error,
                Exception: _fault,
            },
        )

    def close(self) -> None:
        """Ends the thread that encodes."""
        self._encoder.shutdown(cancel_futures=True)

    async def _health(self, request: Request) -> Response:
        self._check_host(request)
        if self._thread.error is not None or self.draining:
            status = "failed" if self._thread.error is not None else "shutting down"
            return JSONResponse({"status": status}, 503)
        return JSONResponse({"status": "ok"})

    async def _list(self, request: Request) -> Response:
        self._admit(request)
        return JSONResponse({"object": "list", "data": [_model(name) for name in self._models]})

    async def _one(self, request: Request) -> Response:
        self._admit(request)
        name = request.path_params["name"]
        self._served(name)
        return JSONResponse(_model(name))

    async def _chat(self, request: Request) -> Response:
        self._admit(request)
        if self.draining or self._thread.error is not None:
            raise ApiError(503, "The server is shutting down: ask another.", retry_s=_RETRY_S)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # browsers send others to any server, without asking it
            raise ApiError(415, "Send the body as Content-Type: application/json.")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._room(1))
            body = await self._body(request)
            loop = asyncio.get_running_loop()
            asked, prompt_ids = await loop.run_in_executor(self._encoder, self._read, body)
            stack.enter_context(self._room(asked.num_choices - 1))
            pieces: asyncio.Queue[Piece | Failure] = asyncio.Queue()

            def tell(piece: Piece | Failure) -> None:
                with contextlib.suppress(
                    RuntimeError
                ):  # the loop has ended, and with it the client
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)

            job = self._job(asked, prompt_ids, tell)
            self._thread.ask(job)
            stack.callback(self._thread.cancel, job)
            answers = Answers(secrets.token_hex(12), asked.model, len(prompt_ids), asked)
            if asked.stream:
                events = _events(pieces, answers, asked.num_choices)
                return _EventStream(events, stack.pop_all().close)
            choices = await _unless_gone(request, _choices(pieces, asked.num_choices))
            return JSONResponse(answers.whole(choices))

    def _check_host(self, request: Request) -> None:
        """The name of a web page may lead to this machine: it then stands in the header."""
        host = request.headers.get("host", "").rpartition("@")[2]
        name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host
        name = name if name.startswith("[") else name.partition(":")[0]
        if self._limits.hosts and name.lower() not in self._limits.hosts:
            raise ApiError(
                403,
                "This server answers to the address that it was started with only: use that, or set"
                " ICTJAX_API_KEY where it runs.",
            )

    def _admit(self, request: Request) -> None:
        self._check_host(request)
        if not self._limits.key:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._limits.key.encode())
        if kind.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
            )

    @contextlib.contextmanager
    def _room(self, num_replies: int) -> Iterator[None]:
        most = self._limits.max_replies
        if self.num_replies + num_replies > most:
            raise ApiError(
                429,
                f"The server has {self.num_replies} of at most {most} replies under way: try again"
                " later.",
                code="rate_limit_exceeded",
                retry_s=_RETRY_S,
            )
        self.num_replies += num_replies
        try:
            yield
        finally:
            self.num_replies -= num_replies

    async def _body(self, request: Request) -> bytes:
        most, body = self._limits.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(_BODY_S):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise ApiError(
                            413,
                            f"The request has more than {most} bytes: send fewer or shorter"
                            " messages.",
                            code="request_too_large",
                        )
        except TimeoutError:
            raise ApiError(
                408, f"The request did not come within {_BODY_S:g} s: send it again."
            ) from None
        return bytes(body)

    def _read(self, body: bytes) -> tuple[ChatRequest, tuple[int, ...]]:
        """In the thread that encodes."""
        asked = read_chat(body)
        served = self._served(asked.model)
        if asked.num_choices > self._limits.max_replies:
            raise ApiError(
                400,
                f"n is {asked.num_choices}, more than the {self._limits.max_replies} replies that"
                " this server has under way at most.",
                param="n",
                code="invalid_value",
            )
        if asked.top_k > served.max_top_k:
            raise ApiError(
                400,
                f"top_k is {asked.top_k}: this server looks at the {served.max_top_k} likeliest"
                " tokens at most.",
                param="top_k",
                code="invalid_value",
            )
        num_ids = served.chat.vocab_size
        if outside := [number for number in asked.bias if number >= num_ids]:
            raise ApiError(
                400,
                f"logit_bias names the token {outside[0]}: {asked.model} has the tokens 0 to"
                f" {num_ids - 1}.",
                param="logit_bias",
                code="invalid_value",
            )
        try:
            prompt_ids = served.chat.encode_start(asked.messages)
        except ValueError as error:  # the template refuses them
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None
        if len(prompt_ids) >= served.max_len:
            raise ApiError(
                400,
                f"The messages have {len(prompt_ids)} tokens, and a conversation with"
                f" {asked.model} has room for {served.max_len}, the reply included: shorten them.",
                param="messages",
                code="context_length_exceeded",
            )
        return asked, prompt_ids

    def _served(self, name: str) -> Served:
        if name not in self._models:
            raise ApiError(
                404,
                f"There is no model {name[:100]!r} here: use one of {', '.join(self._models)}.",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    def _job(
        self,
        asked: ChatRequest,
        prompt_ids: tuple[int, ...],
        tell: Callable[[Piece | Failure], None],
    ) -> Job:
        served = self._models[asked.model]
        root = keys.root_key(secrets.randbits(63) if asked.seed is None else asked.seed)
        requests = tuple(
            samplers.Request(
                max_new_tokens=min(asked.max_tokens or served.max_len, served.max_len),
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                min_p=asked.min_p,
                stop_ids=served.chat.stop_ids,
                bias=asked.bias,
                key=keys.as_array(keys.fold(root, "choice", index)),
                logprobs_of="model" if asked.logprobs else "sampling",
                top_logprobs=min(asked.top_logprobs, served.max_top_logprobs),
            )
            for index in range(asked.num_choices)
        )
        return Job(
            model=asked.model,
            prompt_ids=prompt_ids,
            requests=requests,
            stop=asked.stop,
            by_pieces=asked.stream,
            with_tokens=asked.logprobs,
            tell=tell,
        )


class _EventStream(StreamingResponse):
    """Events, and what is to be done when they end or the client has gone."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _events(
    pieces: asyncio.Queue[Piece | Failure], answers: Answers, num_choices: int
) -> AsyncIterator[bytes]:
    for index in range(num_choices):
        yield answers.beginning(index)
    num_tokens = []
    while len(num_tokens) < num_choices:
        piece = await pieces.get()
        if isinstance(piece, Failure):  # the status is sent already
            yield event(_failed(piece).body)
            return
        if piece.text or piece.tokens:
            yield answers.piece(piece.choice, piece.text, piece.tokens)
        if piece.finish is not None:
            num_tokens.append(piece.num_tokens)
            yield answers.end(piece.choice, piece.finish)
    yield answers.last(num_tokens)


async def _choices(pieces: asyncio.Queue[Piece | Failure], num_choices: int) -> list[Choice]:
    found: dict[int, Choice] = {}
    while len(found) < num_choices:
        piece = await pieces.get()
        if isinstance(piece, Failure):
            raise _failed(piece)
        assert piece.finish is not None  # a choice comes in one piece
        found[piece.choice] = Choice(piece.text, piece.finish, piece.num_tokens, piece.tokens)
    return [found[index] for index in range(num_choices)]


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, _Answer]) -> _Answer:
    """The answer, unless the client hangs up first. Raises ClientDisconnect."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ictjax"}


def _failed(failure: Failure) -> ApiError:
    return ApiError(failure.status, f"There is no reply: {failure.reason}.")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_s is None else {"Retry-After": str(error.retry_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def _hung_up(request: Request, error: Exception) -> Response:
    return Response(status_code=_HUNG_UP)


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the router: no such path, or not by this method."""
    assert isinstance(error, HTTPException)
    words = (
        f"{request.method} {request.url.path[:100]}: {error.detail}; there are POST"
        " /v1/chat/completions, GET /v1/models, GET /v1/models/NAME and GET /health."
    )
    return JSONResponse(ApiError(error.status_code, words).body, error.status_code, error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    """Nobody is told details; the log has them."""
    return JSONResponse(ApiError(500, "The server failed.").body, 500)
