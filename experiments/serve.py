"""Models behind an OpenAI-compatible endpoint: `ictjax serve`.

One process: the main thread speaks HTTP, one thread samples, one encodes. The model and its
adapters have a sampler each, of the same weights: their caches are their own.
"""

import asyncio
import contextlib
import http.client
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping

import jax
import uvicorn
from rich.console import Console

from envs.stopping import Stopped, check, held
from experiments.commands.serve import KEY_VARIABLE, ServeArgs, main
from experiments.console import Terminal, counting_bar
from experiments.held_model import held_model, read_weights, with_flags
from experiments.memory import check_fits, sampler_uses
from experiments.presets import adapter_folder, model_folder
from experiments.serve_app import Api, Limits
from experiments.serve_protocol import MAX_BIAS_IDS, MAX_TOP_LOGPROBS
from experiments.serve_thread import SamplerThread, Served
from ictjax.chat import ChatTokenizer
from ictjax.config import SamplerConfig
from ictjax.models.config import ModelConfig
from ictjax.models.lora import with_adapter
from ictjax.models.peft import load_adapter
from ictjax.sampler import Sampler

_MAX_LEN = 8192
_MAX_TOP_K = 256
_PAGE_SIZE = 128
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_BACKLOG = 2048  # clients that are not let in yet
_TICK_S = 0.1
_CLOSING_S = 5  # beyond the grace period, for clients to take what they are sent
_ABORTED_S = 10  # beyond that, for what they asked to end


def serve(args: ServeArgs, adapters: Mapping[str, str]) -> None:
    """Serves until a signal asks for the end, or answers one question of its own.

    Args:
      args: the flags.
      adapters: folders by name.

    Raises:
      ValueError: a model, an adapter, an address or a key that cannot be used.
    """
    console, key = Terminal(), _key()
    with (
        contextlib.closing(_bound(args)) as listener,
        _open_models(args, adapters, console) as models,
        SamplerThread(models) as thread,
        contextlib.closing(Api(models, thread, _limits(args, key))) as api,
    ):
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if not key and args.host not in _LOOPBACK:
            console.print(
                f"Whoever reaches {url} may use it: set {KEY_VARIABLE} to ask for a key.",
                soft_wrap=True,
            )
        server = HttpServer(api, thread, grace_s=args.grace_s)

        listener.listen(_BACKLOG)
        console.print(f"Serving {', '.join(models)} at {url}/v1", soft_wrap=True)

        async def run() -> None:
            serving = asyncio.create_task(server.serve([listener]))
            try:
                for name in models if args.check else ():
                    answer = await asyncio.to_thread(_ask, name, host, port, key)
                    console.print(answer, soft_wrap=True)
            finally:
                server.should_exit |= args.check
                await serving

        with held():
            asyncio.run(run())
        if thread.error is not None:
            raise thread.error


class HttpServer(uvicorn.Server):
    """Uvicorn for an `Api`, which ends gracefully when `envs.stopping` says so, when `should_exit`
    is set, or when the sampling thread has failed: nothing new is taken, replies under way may go
    on for a while and are cut then.
    """

    def __init__(self, api: Api, thread: SamplerThread, *, grace_s: float):
        super().__init__(
            uvicorn.Config(
                api.app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(grace_s) + _CLOSING_S + _ABORTED_S,
            )
        )
        self._api, self._thread, self._grace_s = api, thread, grace_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """They are `envs.stopping`'s."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until the end."""
        ending = asyncio.create_task(self._end_gracefully())
        try:
            await super().serve(sockets)
        finally:
            self.should_exit = True
            await ending

    async def _end_gracefully(self) -> None:
        with contextlib.suppress(Stopped):
            while not self.should_exit and self._thread.error is None:
                check()
                await asyncio.sleep(_TICK_S)
        self._api.draining = self.should_exit = True
        until_s = time.monotonic() + self._grace_s
        while self._api.num_replies and time.monotonic() < until_s and self._thread.error is None:
            await asyncio.sleep(_TICK_S)
        self._thread.cut("the server is shutting down")
        until_s = time.monotonic() + _CLOSING_S
        while self.server_state.connections and time.monotonic() < until_s:
            await asyncio.sleep(_TICK_S)
        # who takes nothing, or never ends to ask
        for client in list(self.server_state.connections):
            client.transport.abort()


def _ask(name: str, host: str, port: int, key: str) -> str:
    """One question to a model of the server, as a client asks it."""
    question = {
        "model": name,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    started_s = time.monotonic()
    with contextlib.closing(http.client.HTTPConnection(host, port)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(question), headers)
        response = connection.getresponse()
        body = json.loads(response.read())
    if response.status != 200:
        raise ValueError(f"{name} does not answer: {body['error']['message']}")
    text = body["choices"][0]["message"]["content"]
    number = body["usage"]["completion_tokens"]
    return f"{name} answered {number} tokens in {time.monotonic() - started_s:.1f} s: {text!r}"


@contextlib.contextmanager
def _open_models(
    args: ServeArgs, adapters: Mapping[str, str], console: Console
) -> Iterator[Mapping[str, Served]]:
    """The base, and the base with each adapter."""
    folder = pathlib.Path(model_folder(args.model, "--model"))
    model = held_model(folder, args.held)
    chat = ChatTokenizer(folder, thinking=args.thinking)
    sizes = with_flags(_sizes(args, model, chat), args.held)
    weights, cache, *packed = sampler_uses("model", model, sizes)
    check_fits(
        "Weights and caches",
        [weights, *packed, *[cache] * (1 + len(adapters))],
        "Give fewer --num-conversations, adapters, or a smaller --max-len.",
    )
    base = read_weights(folder, model)
    weights_of = {args.name: base}
    for name, place in adapters.items():
        lora, adapter = load_adapter(adapter_folder(place, f"--adapter {name}="), model)
        weights_of[name] = with_adapter(lora, base, adapter)
    with contextlib.ExitStack() as stack:
        samplers = {
            name: stack.enter_context(
                Sampler(model, each, sizes, chat.pad_id, unused=chat.unused(model.vocab_size))
            )
            for name, each in weights_of.items()
        }
        if args.warmup:
            programs = [program for sampler in samplers.values() for program in sampler.programs()]
            with counting_bar("compiling", console) as advance:
                for done, compile_one in enumerate(programs):
                    advance(done, len(programs))
                    compile_one()
        yield {
            name: Served(
                sampler=sampler,
                chat=chat,
                max_len=sizes.max_len,
                max_top_k=sizes.max_top_k,
                max_top_logprobs=sizes.max_top_logprobs,
            )
            for name, sampler in samplers.items()
        }


def _sizes(args: ServeArgs, model: ModelConfig, chat: ChatTokenizer) -> SamplerConfig:
    max_len = args.max_len or min(model.max_positions, _MAX_LEN)
    page_size = args.page_size
    if page_size is None:
        page_size = 0 if jax.default_backend() == "cpu" else min(_PAGE_SIZE, max_len)
    return SamplerConfig(
        num_slots=args.num_conversations,
        max_len=max_len,
        extend_buckets=tuple(sorted({min(size, max_len) for size in (64, 512)})),
        row_buckets=tuple(sorted({1, args.num_conversations})),
        decode_steps=8,
        max_top_k=min(_MAX_TOP_K, model.vocab_size),
        max_stop_ids=max(4, len(chat.stop_ids)),
        max_bias_ids=MAX_BIAS_IDS,
        max_top_logprobs=min(MAX_TOP_LOGPROBS, model.vocab_size),
        page_size=page_size,
    )


def _limits(args: ServeArgs, key: str) -> Limits:
    local = not key and args.host in _LOOPBACK
    return Limits(
        max_replies=args.max_replies,
        max_body_bytes=args.max_request_kib * 1024,
        key=key,
        hosts=_LOOPBACK if local else (),
    )


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{KEY_VARIABLE} holds characters that no key has (spaces, line breaks, letters beyond"
            " ASCII): set it to the key alone."
        )
    return key


def _bound(args: ServeArgs) -> socket.socket:
    """A socket of the address, on which nothing listens yet."""
    with contextlib.ExitStack() as opened:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                args.host, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except (OSError, UnicodeError) as error:  # names of hosts have short parts
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise ValueError(
                f"--host {args.host} --port {args.port} cannot be listened at ({reason}): name an"
                " address of this machine, and a port that is free (0: any)."
            ) from error
        opened.pop_all()
        return listener


if __name__ == "__main__":
    main()
