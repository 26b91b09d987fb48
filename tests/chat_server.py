"""A small chat endpoint on this machine, which answers every request as a script says: well, badly,
or never.
"""

import email.message
import http.server
import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[[Handler], None]  # writes to the connection


class ChatServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves /v1/chat/completions and /v1/models on the loopback; a context manager.

    Args:
      script: is given the number of a chat request (from 0) and its fields; returns how to answer.
      models: the names that are listed; or how to answer when they are asked for.
    """

    block_on_close = True  # handlers end when their connections do
    daemon_threads = False
    request_queue_size = 64

    def __init__(
        self,
        script: Callable[[int, dict[str, Any]], Answer],
        models: Sequence[str] | Answer = ("only",),
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.models = script, models
        self.lock, self.over = threading.Lock(), threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[email.message.Message] = []
        self.times_s: list[float] = []  # when each request came
        self.busy, self.peak = 0, 0  # requests being answered, and the most of them at once
        self.connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self.over.set()
        self.shutdown()
        self._thread.join()
        with self.lock:
            for connection in self.connections:
                hang_up(connection)
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hangs up in the middle of an answer is part of the tests."""


class _Handler(Handler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def setup(self):
        super().setup()
        with self.server.lock:
            self.server.connections.add(self.connection)

    def finish(self):
        with self.server.lock:
            self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        models = self.server.models
        if callable(models):
            models(self)
        else:
            listed = [{"id": name, "object": "model"} for name in models]
            sends({"object": "list", "data": listed})(self)

    def do_POST(self):
        server = self.server
        fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(fields)
            server.headers.append(self.headers)
            server.times_s.append(time.monotonic())
            server.busy += 1
            server.peak = max(server.peak, server.busy)
        try:
            if self.path != "/v1/chat/completions":
                sends({"error": {"message": f"no {self.path}"}}, status=404)(self)
            else:
                server.script(number, fields)(self)
        finally:
            with server.lock:
                server.busy -= 1


def completion(text: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    """The body of a chat completion, with 7 tokens in the prompt and 3 in the reply."""
    return {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 0,
        "model": "only",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": text, **message},
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def says(text: Any, finish: Any = "stop", **message: Any) -> Answer:
    """A good reply."""
    return sends(completion(text, finish, **message))


def sends(body: Any, status: int = 200, **headers: str) -> Answer:
    """Any JSON, or bytes as they are; header names are written with underscores."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def answer(handler):
        _head(handler, status, {"Content-Length": str(len(data)), **headers})
        handler.wfile.write(data)

    return answer


def refuses(status: int, message: str = "not now", **headers: str) -> Answer:
    """An error in the form of the API."""
    return sends({"error": {"message": message}}, status, **headers)


def cuts_the_line(handler: Handler) -> None:
    """Before a byte of the answer."""
    hang_up(handler.connection)
    handler.close_connection = True


def cuts_the_body(handler: Handler) -> None:
    """Half a reply, and then nothing."""
    data = json.dumps(completion("half")).encode()
    _head(handler, 200, {"Content-Length": str(len(data))})
    handler.wfile.write(data[: len(data) // 2])
    hang_up(handler.connection)
    handler.close_connection = True


def endless(status: int, wait_s: float = 0.0) -> Answer:
    """A body without an end: fast, or a byte now and then."""

    def answer(handler):
        _head(handler, status, {"Connection": "close"})
        handler.close_connection = True
        while not handler.server.over.wait(wait_s):
            handler.wfile.write(b" " if wait_s else b" " * 2**16)

    return answer


def never(handler: Handler) -> None:
    """Listens, and says nothing."""
    handler.server.over.wait()
    handler.close_connection = True


def hang_up(connection: socket.socket) -> None:
    """Ends a connection at once, whoever still reads from it."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was first


def _head(handler: Handler, status: int, headers: Mapping[str, str]) -> None:
    handler.send_response(status)
    for name, value in {"Content_Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
