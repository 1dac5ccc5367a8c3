"""A server that falls silent although the connection stands: a proxy that hangs, a firewall that has forgotten it. Who
waits for its answer is cut off, and connects again. A peer that is really gone is noticed by TCP (database.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import psycopg

from pgpark import calls
from pgpark.database import options

T = TypeVar("T")

_SERVER_SHARE = 0.8


def longest(dsn: str) -> float | None:
    """Seconds that a server may take for an answer: `tcp_user_timeout` of the DSN (milliseconds), which is how long it
    may take to confirm what was sent to it, or else its default here. None: any time (0 in the DSN)."""
    given = psycopg.conninfo.conninfo_to_dict(dsn).get("tcp_user_timeout", options(dsn).get("tcp_user_timeout"))
    return int(str(given)) / 1000 or None


async def run_on_async(connection: psycopg.AsyncConnection[Any], call: calls.Call[T], secs: float | None) -> T:
    """calls.run_on_async, but the connection is cut off when its server does not answer in time."""
    with bounded(connection, secs):
        return await calls.run_on_async(connection, call)


async def bound_server(connection: psycopg.AsyncConnection[Any], secs: float) -> None:
    """Makes the server give up a statement somewhat earlier than its client does: one that waited there for a lock
    would go on, and claim for nobody. Not through a pooler, where the next client would inherit it."""
    await connection.execute(
        "select set_config(name, %(ms)s::text, false) from pg_settings"
        " where name = 'statement_timeout' and setting::int not between 1 and %(ms)s",
        {"ms": int(secs * 1000 * _SERVER_SHARE)},
    )


def run_on(connection: psycopg.Connection[Any], call: calls.Call[T], secs: float) -> T:
    """calls.run_on, likewise."""
    timer = threading.Timer(secs, _cut, [connection])
    timer.start()
    try:
        return calls.run_on(connection, call)
    finally:
        timer.cancel()


@contextlib.contextmanager
def bounded(connection: psycopg.AsyncConnection[Any], secs: float | None) -> Iterator[None]:
    """An answer is expected meanwhile: the connection is cut off after so many seconds."""
    handle = None if secs is None else asyncio.get_running_loop().call_later(secs, _cut, connection)
    try:
        yield
    finally:
        if handle is not None:
            handle.cancel()


def _cut(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Ends it below libpq, whose state belongs to who waits: that one sees the end of the stream. From any thread."""
    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
