"""Waiting for outcomes: one listening connection per process and database, however many wait.

A thread holds the connection, hands outcomes to whoever waits for them, sync or async, and runs the timers while
somebody waits, since a deadline must end a wait even where no worker lives. A notification is a hint that can get lost,
so that all are looked up again now and then, in one query.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import random
import re
import selectors
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import psycopg
from psycopg.rows import DictRow

from pgpark import calls
from pgpark.database import connect
from pgpark.errors import BadInputError, DatabaseError, NotMigratedError, PgparkError, one_line
from pgpark.models import Message
from pgpark.patience import SHORTEST_PAUSE_SECS, between_looks

log = logging.getLogger("pgpark.waiting")

Answer: TypeAlias = "Message | PgparkError"
Deliver: TypeAlias = Callable[[Answer], None]

_LISTEN = 'listen "pgpark.mailbox"'
_TASK_ID = re.compile("[0-9]{1,18}")  # anybody may send notifications
_FIRST_RETRY_SECS, _LONGEST_RETRY_SECS = 0.1, 5.0
_CLOSE_SECS = 5.0


class Listener:
    """Waits for the outcomes of one database; made by `listening`."""

    def __init__(self, dsn: str, poll: bool = False) -> None:
        self._dsn, self._poll = dsn, poll
        self._backstop_secs = between_looks(poll)
        self._lock = threading.Lock()
        self._waiting: dict[int, list[Deliver]] = {}  # by task id
        self._fresh: set[int] = set()  # who has come since the last look
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._hear, self._poke = os.pipe()
        os.set_blocking(self._hear, False)
        os.set_blocking(self._poke, False)

    def wait(self, task_id: int, timeout: float | None = None) -> Message | None:
        """The outcome of a task, or None after `timeout` seconds. Raises NotMigratedError, DatabaseError."""
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        with self._waiting_for(task_id, answers.put):
            try:
                return _message(answers.get(timeout=timeout))
            except queue.Empty:
                return None

    async def wait_async(self, task_id: int, timeout: float | None = None) -> Message | None:
        """The same for asyncio."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()

        def arrived(value: Answer) -> None:
            if not answer.done():
                answer.set_result(value)

        def deliver(value: Answer) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(arrived, value)

        with self._waiting_for(task_id, deliver):
            try:
                return _message(await asyncio.wait_for(answer, timeout))
            except asyncio.TimeoutError:
                return None

    def close(self) -> None:
        """Ends the connection; whoever still waits gets a DatabaseError."""
        with self._lock:
            self._closing.set()
            thread = self._thread
        self._wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_SECS)
        self._fail(DatabaseError("the pools were closed while somebody waited for a result"))
        if thread is None or not thread.is_alive():
            os.close(self._hear)
            os.close(self._poke)

    @contextlib.contextmanager
    def _waiting_for(self, task_id: int, deliver: Deliver) -> Iterator[None]:
        with self._lock:
            if self._closing.is_set():
                raise DatabaseError("these pools are closed")
            self._waiting.setdefault(task_id, []).append(deliver)
            self._fresh.add(task_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pgpark-listener", daemon=True)
                self._thread.start()
        self._wake()
        try:
            yield
        finally:
            with self._lock:
                others = [other for other in self._waiting.get(task_id, ()) if other is not deliver]
                if others:
                    self._waiting[task_id] = others
                else:
                    self._waiting.pop(task_id, None)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        retry_secs = _FIRST_RETRY_SECS
        while not self._closing.is_set():
            try:
                with contextlib.closing(connect(self._dsn, prepare=not self._poll)) as connection:
                    if not self._poll:
                        connection.execute(_LISTEN)
                    retry_secs = _FIRST_RETRY_SECS
                    self._serve(connection)
            except (BadInputError, NotMigratedError) as error:
                self._fail(error)
            except (PgparkError, psycopg.Error, OSError) as error:
                log.warning("not listening for outcomes, trying again: %s", one_line(error))
            except Exception as error:
                log.exception("not listening for outcomes, trying again")
                self._fail(DatabaseError(f"waiting failed: {one_line(error)}"))
            if not self._closing.is_set():
                self._closing.wait(retry_secs * random.uniform(0.5, 1))
                retry_secs = min(retry_secs * 2, _LONGEST_RETRY_SECS)

    def _serve(self, connection: psycopg.Connection[DictRow]) -> None:
        """Delivers until closed. Raises when the connection is lost."""
        # Due at once: something may have come while nobody listened.
        timers_at = backstop_at = timers_ran = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(self._hear, selectors.EVENT_READ)
            while not self._closing.is_set():
                # Also what came with the answers to our own statements.
                noticed = [notice.payload for notice in connection.notifies(timeout=0)]
                with self._lock:
                    fresh, self._fresh = self._fresh, set()
                    told = {int(text) for text in noticed if _TASK_ID.fullmatch(text)}
                    wanted = fresh | (self._waiting.keys() & told)
                    waiting = list(self._waiting)
                now = time.monotonic()
                if fresh:  # whose deadline may be sooner than all that we know of
                    timers_at = min(timers_at, timers_ran + SHORTEST_PAUSE_SECS)
                if waiting and now >= backstop_at:
                    backstop_at = now + self._backstop_secs
                    wanted.update(waiting)
                if wanted:
                    self._look(connection, wanted)
                if waiting and now >= timers_at:
                    due_in = calls.run_on(connection, calls.maintain()).due_in_secs
                    timers_ran = time.monotonic()
                    timers_at = timers_ran + max(self._backstop_secs if due_in is None else due_in, SHORTEST_PAUSE_SECS)
                elif not wanted:
                    self._sleep(selector, min(timers_at, backstop_at) - now if waiting else None)

    def _look(self, connection: psycopg.Connection[DictRow], task_ids: Iterable[int]) -> None:
        for message in calls.run_on(connection, calls.results(list(task_ids))):
            self._deliver(message.task_id, message)

    def _sleep(self, selector: selectors.BaseSelector, seconds: float | None) -> None:
        for key, _ in selector.select(None if seconds is None else max(seconds, 0)):
            if key.fd == self._hear:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._hear, 4096)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is awake anyway; gone: closed
            os.write(self._poke, b"!")

    def _deliver(self, task_id: int, answer: Answer) -> None:
        with self._lock:
            delivers = self._waiting.pop(task_id, [])
        for deliver in delivers:
            deliver(answer)

    def _fail(self, error: PgparkError) -> None:
        for task_id in list(self._waiting):
            self._deliver(task_id, error)


# By process (there may be forks), DSN, and whether it polls; with its users.
_listeners: dict[tuple[int, str, bool], tuple[Listener, int]] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def listening(dsn: str, poll: bool = False) -> Iterator[Listener]:
    """The listener of this process for a database; closed when its last user leaves. It connects at the first wait."""
    key = (os.getpid(), dsn, poll)
    with _guard:
        listener, users = _listeners.get(key, (None, 0))
        listener = listener or Listener(dsn, poll)
        _listeners[key] = (listener, users + 1)
    try:
        yield listener
    finally:
        with _guard:
            _, users = _listeners[key]
            if users > 1:
                _listeners[key] = (listener, users - 1)
            else:
                del _listeners[key]
        if users == 1:
            listener.close()


def _message(answer: Answer) -> Message:
    if isinstance(answer, PgparkError):
        raise answer
    return answer
