"""`pgpark worker --metrics-port`: what Prometheus reads of a worker, and of its pool.

GET /metrics has the worker's own numbers and, unless it is told not to, those that park_metrics tells of its pool; GET
/health says that the worker has begun and its process answers, and asks nobody. Needs prometheus-client (the extra
`gateway`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST

from pgpark import calls
from pgpark.database import connect
from pgpark.errors import BadInputError, PgparkError, one_line
from pgpark.metrics import pool_text, worker_text

if TYPE_CHECKING:
    from pgpark.worker import Worker

log = logging.getLogger("pgpark.worker")
_PATIENCE_SECS = 4.0  # that a scrape waits for the database; Prometheus gives up after ten
_FRESH_SECS = 1.0  # scrapes closer together than this share an answer of the database
_CLIENT_SECS = 10.0  # that a client may say nothing


@contextlib.contextmanager
def serving(worker: Worker, host: str, port: int, pool: PoolNumbers | None = None) -> Iterator[int]:
    """Serves a worker's metrics over HTTP, from threads; yields the port. pool: whose numbers it tells beside its own.

    Raises BadInputError if it cannot listen there.
    """
    try:
        server = _Server(host, port, functools.partial(_Handler, worker, pool))
    except OSError as error:
        raise BadInputError(f"cannot serve metrics on {host}, port {port}: {error.strerror or error}") from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class PoolNumbers:
    """The numbers of a pool, asked of the database when they are wanted, by one at a time and at most once a second."""

    def __init__(self, dsn: str, pool: str) -> None:
        self._dsn, self._pool = dsn, pool
        self._lock = threading.Lock()
        self._question: _Question | None = None
        self._complained = False

    def text(self) -> bytes:
        """They as Prometheus reads them; empty if the database does not tell them in time."""
        with self._lock:
            question = self._question
            if question is None or question.is_over():
                question = self._question = _Question(self._dsn, self._pool)
                question.start()
        question.join(_PATIENCE_SECS)
        if question.answer is None and not self._complained:
            log.warning("no metrics of pool %s: %s", self._pool, question.trouble)
        self._complained = question.answer is None
        return question.answer or b""


class _Question(threading.Thread):
    """One look at the database, on a connection of its own. A daemon: a database that hangs keeps no worker."""

    def __init__(self, dsn: str, pool: str) -> None:
        super().__init__(name="metrics of the pool", daemon=True)
        self._dsn, self._pool = dsn, pool
        self._asked_at = time.monotonic()
        self.answer: bytes | None = None
        self.trouble = f"no answer of the database within {_PATIENCE_SECS:g} s"

    def is_over(self) -> bool:
        return not self.is_alive() and time.monotonic() - self._asked_at >= _FRESH_SECS

    def run(self) -> None:
        try:
            with contextlib.closing(connect(self._dsn, prepare=False)) as connection:
                self.answer = pool_text(calls.run_on(connection, calls.metrics(self._pool)))
        except PgparkError as error:
            self.trouble = one_line(error)


class _Server(ThreadingHTTPServer):
    """A thread for each scrape."""

    request_queue_size = 128  # of five, the sixth of a crowd would come in after seconds, a probe among them

    def __init__(self, host: str, port: int, handler: Any) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        super().__init__((host, port), handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's looks our own name up, which may take seconds
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, *_: Any) -> None:
        log.debug("a scrape ended early", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_SECS

    def __init__(self, worker: Worker, pool: PoolNumbers | None, *given: Any) -> None:
        self._worker, self._pool = worker, pool
        super().__init__(*given)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            text = worker_text(self._worker) + (self._pool.text() if self._pool is not None else b"")
            self._answer(200, text, CONTENT_TYPE_LATEST)
        elif path == "/health":
            begun = self._worker.begun  # one that ends because there is no pool for it was never well
            self._answer(200 if begun else 503, b"alive\n" if begun else b"it has not begun yet\n")
        else:
            self._answer(404, b"there are /metrics and /health\n")

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "pgpark"

    def log_message(self, *_: Any) -> None:
        pass
