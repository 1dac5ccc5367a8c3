"""A real HTTP server for callbacks, which answers as a test tells it to."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """What arrived; header names are in lower case."""

    path: str
    headers: dict[str, str]
    body: Any

    @property
    def task_id(self) -> int:
        return int(self.body["task_id"])


# What a server does with a request: a status, headers beside it, or one of HANG_UP, TRUNCATE, NONSENSE.
Answer = int | tuple[int, dict[str, str]] | str
HANG_UP, TRUNCATE, NONSENSE, FLOOD = "hang up", "truncate", "nonsense", "flood"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""


class Receiver:
    """Listens on a port of its own. `answer` decides, for each request, what happens; a request is in `arrived` once it
    was read and before it is answered."""

    def __init__(self, answer: Callable[[Request], Answer] = lambda _: 200) -> None:
        self.answer = answer
        self.arrived: list[Request] = []
        self.connections = 0
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self.port = 0
        self._server: _Server | None = None
        self.open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def tasks(self) -> Counter[int]:
        return Counter(request.task_id for request in list(self.arrived))

    def open(self) -> None:
        """Listens, on the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), self._handler())
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Connections are refused from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        request = Request(handler.path, {k.lower(): v for k, v in handler.headers.items()}, json.loads(body))
        with self._lock:
            self.arrived.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = self.answer(request)
        finally:
            with self._lock:
                self._at_once -= 1
        if self._server is None:  # closed meanwhile
            answer = HANG_UP
        if isinstance(answer, str):
            self._misbehave(handler, answer)
            return
        status, headers = answer if isinstance(answer, tuple) else (answer, {})
        handler.send_response(status)
        for name, value in ({"Content-Length": "2"} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"ok")

    def _misbehave(self, handler: BaseHTTPRequestHandler, how: str) -> None:
        handler.close_connection = True
        if how == HANG_UP:  # with a reset, as a process that is killed leaves it
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        elif how == TRUNCATE:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")
        elif how == FLOOD:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + bytes(1_000_000))
        else:
            auth = handler.headers.get("Authorization", "")
            handler.wfile.write(f"nonsense, and what you sent: {auth}\r\n\r\n".encode())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                receiver.connections += 1

            def do_POST(self) -> None:
                receiver._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
