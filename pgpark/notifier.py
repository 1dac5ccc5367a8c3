"""The delivery loop: takes callbacks that are due from the outbox, posts them, and reports what came of it.

Thin by design: what is due, where it goes, when it is tried again and when it is given up is decided by the SQL
functions (sql/functions/callbacks.sql). One coroutine (`_conduct`) does all the talking to the database; deliveries run
beside it and leave their answers for its next round. Any number of loops may run at once; one that dies loses its
callbacks to the others when their leases lapse.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import email.utils
import http
import logging
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
from psycopg.rows import DictRow

from pgpark import calls, silence
from pgpark.database import connect, connect_async, require_migrated
from pgpark.errors import BadInputError, DatabaseError, NotMigratedError, PgparkError, one_line
from pgpark.models import Callback

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("pgpark.notifier")

_MOST_AT_ONCE = 100
_ANSWER_KEPT = 65_536  # bytes of an answer that are read, so that its connection can serve again
_SHORTEST_PAUSE_SECS = 0.05
_FIRST_RETRY_SECS, _LONGEST_RETRY_SECS = 0.1, 5.0

# The libraries below log whole URLs, and on DEBUG what a receiver answers, which may repeat the secret it was sent.
_LIBRARY_LOGS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))
_delivering = contextvars.ContextVar("_delivering", default=False)


def _not_ours(_record: logging.LogRecord) -> bool:
    """A filter for their loggers: passes on what others do with these libraries in this process."""
    return not _delivering.get()


@dataclass(frozen=True)
class NotifierSettings:
    """pool: deliver only for this one (None: for all). concurrency: most deliveries at once for one pool, so that a
    slow receiver holds up no other. listen: wait for notifications; else look every `poll_secs`. poll_secs: how often
    to look all the same."""

    dsn: str
    pool: str | None = None
    concurrency: int = 10
    listen: bool = True
    poll_secs: float = 30.0


@dataclass(frozen=True)
class _Answer:
    """What came of a delivery; `status` is None if there was no answer."""

    status: int | None
    error: str | None = None
    retry_after_secs: float | None = None


class Notifier:
    """Delivers callbacks until it is asked to stop."""

    def __init__(self, settings: NotifierSettings, told: Callable[[str], None] = lambda _word: None) -> None:
        """told: gets what park_callback_done says of each delivery."""
        self._settings = settings
        self._told = told
        self._deliveries: dict[asyncio.Task[_Answer], Callback] = {}  # until their answer is written
        self._wake = asyncio.Event()
        self._stopping = False
        self._hurried = asyncio.Event()
        self._silence = silence.longest(settings.dsn)

    def run(self) -> None:
        """Works until SIGTERM, SIGINT or SIGHUP; call from the main thread. Raises the errors of `serve`."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(kind, self.stop)
        await self.serve()

    async def serve(self) -> None:
        """Works until `stop` is called and what is under way has ended.

        Raises UnknownPoolError, NotMigratedError or DatabaseError when it cannot start. A connection that is lost later
        is made again.
        """
        await asyncio.to_thread(self._check)
        listening = asyncio.create_task(self._listen()) if self._settings.listen else None
        log.info(
            "notifier delivers callbacks of %s", f"pool {self._settings.pool}" if self._settings.pool else "all pools"
        )
        hurried = asyncio.create_task(self._hurried.wait())
        async with _http_client() as client:
            conducting = asyncio.create_task(self._keep_conducting(client))
            try:
                await asyncio.wait({conducting, hurried}, return_when=asyncio.FIRST_COMPLETED)
                if conducting.done():
                    conducting.result()
            finally:
                for job in (conducting, hurried, listening, *self._deliveries):
                    if job is not None:
                        job.cancel()
        log.info("notifier has stopped")

    def stop(self) -> None:
        """Takes no more and lets what is under way end. A second call: leaves it, for another loop to repeat."""
        if self._stopping:
            self._hurried.set()
        else:
            log.info("stopping: %d deliveries are under way", len(self._deliveries))
        self._stopping = True
        self._wake.set()

    def _check(self) -> None:
        """Raises what makes working impossible from the start."""
        with contextlib.closing(connect(self._settings.dsn, prepare=self._settings.listen)) as connection:
            require_migrated(connection)
            calls.run_on(connection, calls.pools(self._settings.pool))
            calls.run_on(connection, calls.callbacks_due())

    # -- the talking ---------------------------------------------------------------------------------------------

    async def _keep_conducting(self, client: httpx.AsyncClient) -> None:
        retry_secs = _FIRST_RETRY_SECS
        lost = False
        while True:
            try:
                async with await connect_async(self._settings.dsn, prepare=self._settings.listen) as connection:
                    if lost:
                        log.info("connected to the database again")
                    retry_secs = _FIRST_RETRY_SECS
                    await self._conduct(connection, client)
                return
            except (BadInputError, NotMigratedError):
                raise
            except (PgparkError, psycopg.Error, OSError) as error:
                lost = True
                log.warning("lost the database, trying again: %s", one_line(error))
            if self._stopping and not self._deliveries:
                return
            await asyncio.sleep(retry_secs * random.uniform(0.5, 1))
            retry_secs = min(retry_secs * 2, _LONGEST_RETRY_SECS)

    async def _conduct(self, connection: psycopg.AsyncConnection[DictRow], client: httpx.AsyncClient) -> None:
        """Rounds of: write answers, take what is due, sleep. Returns when the loop has stopped and all is written."""
        while True:
            earliest = time.monotonic() + _SHORTEST_PAUSE_SECS
            self._wake.clear()
            await self._write_answers(connection)
            if self._stopping and not self._deliveries:
                return
            pause = None if self._stopping else await self._take(connection, client)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)
            if not (self._stopping or self._answered()):  # so many rounds a second, however many notifications come
                await asyncio.sleep(max(earliest - time.monotonic(), 0))

    async def _take(self, connection: psycopg.AsyncConnection[DictRow], client: httpx.AsyncClient) -> float:
        """Starts deliveries while some are due and may start. Returns the seconds until the next round."""
        while True:
            under_way = Counter(callback.pool for callback in self._deliveries.values())
            started = 0
            pause = self._settings.poll_secs
            for row in await silence.run_on_async(connection, calls.callbacks_due(), self._silence):
                free = min(self._settings.concurrency - under_way[row.pool], _MOST_AT_ONCE - len(self._deliveries))
                if self._settings.pool not in (None, row.pool) or free < 1:
                    continue
                if row.due_in_secs > 0:
                    pause = min(pause, row.due_in_secs)
                    continue
                pause = 0  # unless something starts, somebody else holds what is due: look again soon
                for callback in await silence.run_on_async(connection, calls.callbacks(row.pool, free), self._silence):
                    self._start(callback, client)
                    started += 1
            if not started:
                return max(pause, _SHORTEST_PAUSE_SECS)

    async def _write_answers(self, connection: psycopg.AsyncConnection[DictRow]) -> None:
        """Writes what is ready; a delivery stays in our hands until its answer is written."""
        for job in self._answered():
            callback, answer = self._deliveries[job], job.result()
            word = await silence.run_on_async(
                connection,
                calls.callback_done(
                    callback.callback_id, callback.attempt, answer.status, answer.error, answer.retry_after_secs
                ),
                self._silence,
            )
            del self._deliveries[job]
            self._told(word)
            log.log(
                {"delivered": logging.DEBUG, "retry": logging.INFO}.get(word, logging.WARNING),
                "callback %d of task %d, attempt %d, to %s: %s",
                callback.callback_id,
                callback.task_id,
                callback.attempt,
                _host(callback.url),
                _said(word, answer),
            )

    def _answered(self) -> list[asyncio.Task[_Answer]]:
        return [job for job in self._deliveries if job.done()]

    async def _listen(self) -> None:
        """Turns notifications into wake-ups."""
        while True:
            try:
                async with await connect_async(self._settings.dsn) as connection:
                    await connection.execute('listen "pgpark.callback"')
                    self._wake.set()  # something may have come while nobody listened
                    async for notice in connection.notifies():
                        if self._settings.pool in (None, notice.payload):
                            self._wake.set()
            except (DatabaseError, psycopg.Error, OSError) as error:
                log.warning("not listening, trying again: %s", one_line(error))
            await asyncio.sleep(_LONGEST_RETRY_SECS * random.uniform(0.1, 0.5))

    # -- the delivering ------------------------------------------------------------------------------------------

    def _start(self, callback: Callback, client: httpx.AsyncClient) -> None:
        job = asyncio.create_task(_deliver(client, callback))
        self._deliveries[job] = callback
        job.add_done_callback(lambda _job: self._wake.set())


async def _deliver(client: httpx.AsyncClient, callback: Callback) -> _Answer:
    """Posts a callback. Whatever goes wrong is an answer too; none of their texts repeats what was sent or received."""
    import httpx

    _delivering.set(True)
    try:
        return await asyncio.wait_for(_post(client, callback), callback.timeout_secs)
    except (asyncio.TimeoutError, httpx.TimeoutException):
        return _Answer(None, f"no whole answer within {callback.timeout_secs:g} s")
    except httpx.ConnectError as error:
        return _Answer(None, _clean(f"cannot connect: {one_line(error)}"))
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError):
        return _Answer(None, "the URL cannot be used; correct mailbox.notifier.base_url of the pool")
    except httpx.TransportError as error:
        return _Answer(None, f"the connection broke before the whole answer was there ({type(error).__name__})")
    except Exception as error:  # a loop that ends for one callback would hold up all the others
        return _Answer(None, f"cannot be sent ({type(error).__name__})")


async def _post(client: httpx.AsyncClient, callback: Callback) -> _Answer:
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(callback.task_id)}
    if callback.auth_header is not None:
        headers["Authorization"] = callback.auth_header.get_secret_value()
    async with client.stream("POST", callback.url, content=callback.body.encode(), headers=headers) as response:
        received = 0
        async for chunk in response.aiter_raw():
            received += len(chunk)
            if received > _ANSWER_KEPT:
                break
    status = response.status_code
    retry_after = _seconds(response.headers.get("Retry-After"))
    return _Answer(status, None if response.is_success else _phrase(status), retry_after)


def _http_client() -> httpx.AsyncClient:
    """Made here because the import takes a tenth of a second, which no other command should pay."""
    import httpx

    from pgpark import __version__

    for name in _LIBRARY_LOGS:
        logging.getLogger(name).addFilter(_not_ours)
    return httpx.AsyncClient(
        headers={"User-Agent": f"pgpark/{__version__}", "Accept-Encoding": "identity"},
        timeout=None,  # _deliver bounds the whole exchange
        follow_redirects=False,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
    )


def _phrase(status: int) -> str:
    try:
        return f"HTTP {status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status}"


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, in seconds or as a date (RFC 9110, 10.2.3); None for one that cannot be read."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None


def _said(word: str, answer: _Answer) -> str:
    meaning = {
        "delivered": "delivered",
        "retry": "will be tried again",
        "dead": "given up; see pgpark notifier list",
        "unknown": "came too late, another attempt is under way or it is gone",
    }.get(word, word)
    return f"{answer.error}; {meaning}" if answer.error else meaning


def _host(url: str) -> str:
    """Of a URL, what may be logged."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return "?"


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\0", "")


class NotifierThread:
    """Runs a notifier for the pool of a worker while the pool has one, in a thread and an event loop of its own, so
    that a handler that blocks the worker's loop does not hold up callbacks. `follow` is called from one thread."""

    def __init__(self, settings: NotifierSettings, told: Callable[[str], None] = lambda _word: None) -> None:
        self._settings = settings
        self._told = told
        self._thread: threading.Thread | None = None
        self._stop: Any = lambda: None
        self._ended = False

    def follow(self, pool_settings: Mapping[str, Any]) -> None:
        """Starts or stops delivering, as the settings of the pool say now."""
        wanted = bool(pool_settings["mailbox"].get("notifier")) and not self._ended
        running = self._thread is not None and self._thread.is_alive()
        if wanted and not running:
            self._thread = threading.Thread(target=self._run, name="pgpark-notifier", daemon=True)
            self._thread.start()
        elif running and not wanted:
            self._stop()
            self._stop = lambda: None  # once: a second call would not wait for what is under way

    def end(self, patience_secs: float) -> None:
        """Takes no more callbacks and waits so long for those under way."""
        self._ended = True
        self._stop()
        if self._thread is not None:
            self._thread.join(patience_secs)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # the next heartbeat starts it again
            log.warning("notifier: %s", one_line(error))

    async def _serve(self) -> None:
        loop, notifier = asyncio.get_running_loop(), Notifier(self._settings, self._told)

        def stop() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has stopped already
                loop.call_soon_threadsafe(notifier.stop)

        self._stop = stop
        if not self._ended:
            await notifier.serve()
