"""A server that falls silent although the connection stands: a proxy that hangs, a firewall that has forgotten it. Who
waits for its answer is cut off, and connects again. A peer that is really gone is noticed by TCP (database.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import psycopg

from pgpark import calls
from pgpark.database import options

T = TypeVar("T")

_SERVER_SHARE = 0.8
_LATE_SECS = 1.0
_BOUND = (
    "select set_config(name, %(ms)s::text, false) from pg_settings"
    " where name = 'statement_timeout' and setting::int not between 1 and %(ms)s"
)


def longest(dsn: str) -> float | None:
    """Seconds that a server may take for an answer: `tcp_user_timeout` of the DSN (milliseconds), which is how long it
    may take to confirm what was sent to it, or else its default here. None: any time (0 in the DSN).

    Raises DatabaseError for a DSN that cannot be read.
    """
    default = options(dsn).get("tcp_user_timeout")
    given = psycopg.conninfo.conninfo_to_dict(dsn).get("tcp_user_timeout", default)
    try:
        return max(int(str(given)), 0) / 1000 or None
    except ValueError:  # connecting will say so
        return None


async def run_on_async(connection: psycopg.AsyncConnection[Any], call: calls.Call[T], secs: float | None) -> T:
    """calls.run_on_async, but the connection is cut off when its server does not answer in time."""
    with bounded(connection, secs):
        return await calls.run_on_async(connection, call)


def run_on(connection: psycopg.Connection[Any], call: calls.Call[T], secs: float) -> T:
    """calls.run_on, likewise."""
    with _bounded(connection, secs):
        return calls.run_on(connection, call)


async def bound_server_async(connection: psycopg.AsyncConnection[Any], secs: float) -> None:
    """Makes the server give up a statement somewhat earlier than its client does: one that waited there for a lock
    would go on, and claim for nobody. Not through a pooler, where the next client would inherit it."""
    with bounded(connection, secs):
        await connection.execute(_BOUND, {"ms": int(secs * 1000 * _SERVER_SHARE)})


def bound_server(connection: psycopg.Connection[Any], secs: float) -> None:
    """The same for a synchronous connection."""
    with _bounded(connection, secs):
        connection.execute(_BOUND, {"ms": int(secs * 1000 * _SERVER_SHARE)})


@contextlib.contextmanager
def bounded(connection: psycopg.AsyncConnection[Any], secs: float | None) -> Iterator[None]:
    """An answer is expected meanwhile: the connection is cut off after so many seconds without one."""
    if secs is None:
        yield
        return
    loop = asyncio.get_running_loop()
    handle: asyncio.TimerHandle

    def look() -> None:
        nonlocal handle
        if _has_sent(connection):  # it is we who are late: something held up the loop
            handle = loop.call_later(_LATE_SECS, look)
        else:
            _cut(connection)

    handle = loop.call_later(secs, look)
    try:
        yield
    finally:
        handle.cancel()


@contextlib.contextmanager
def _bounded(connection: psycopg.Connection[Any], secs: float) -> Iterator[None]:
    timer = threading.Timer(secs, _cut, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # so that it does not cut what has the descriptor next


def _has_sent(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether something of the server's is there to be read."""
    with contextlib.suppress(OSError, psycopg.Error):
        look = select.poll()
        look.register(connection.fileno(), select.POLLIN)
        return bool(look.poll(0))
    return False


def _cut(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Ends it below libpq, whose state belongs to who waits: that one sees the end of the stream. From any thread."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
