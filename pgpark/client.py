"""Clients: a connection that runs the calls of calls/, sync or async, and waits for outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import TypeVar

import psycopg
from psycopg.rows import DictRow

from pgpark import calls
from pgpark.database import connect, connect_async
from pgpark.errors import DatabaseError, translated
from pgpark.models import Message, Part
from pgpark.patience import Patience
from pgpark.streaming import stream, stream_async

T = TypeVar("T")

_LISTEN, _UNLISTEN = 'listen "pgpark.mailbox"', 'unlisten "pgpark.mailbox"'


class Client:
    """A synchronous client: `with Client(dsn) as park: park.run(calls.submit("gpu", {...}, units=8))`.

    Each call is a transaction of its own. To submit inside a transaction of yours, use `calls.run_on(connection, ...)`.
    poll: for a DSN that leads to a pooler in transaction mode: prepare no statements, and look each second instead of
    listening. Raises the errors of pgpark.errors.
    """

    def __init__(self, dsn: str, *, poll: bool = False) -> None:
        self._dsn, self._poll = dsn, poll
        self.connection: psycopg.Connection[DictRow] = connect(dsn, prepare=not poll)

    def run(self, call: calls.Call[T]) -> T:
        """Runs one call and returns its result."""
        return calls.run_on(self.connection, call)

    def wait(self, task_id: int, timeout: float | None = None) -> Message | None:
        """Waits for the outcome of a task, woken by notification; None after `timeout` seconds."""
        patience = Patience(timeout, self._poll)
        try:
            if not self._poll:
                self.connection.execute(_LISTEN)
            try:
                while True:
                    timers = self.run(calls.maintain())  # a deadline must end the wait even where no worker lives
                    message = self.run(calls.result(task_id))
                    if message is not None or patience.over:
                        return message
                    for notice in self.connection.notifies(timeout=patience.pause(timers)):
                        if notice.payload == str(task_id):
                            break
            finally:
                if not self._poll and not self.connection.closed:
                    self.connection.execute(_UNLISTEN)
        except psycopg.Error as error:
            raise translated(error) from error

    def stream(self, task_id: int, timeout: float | None = None) -> Iterator[Part | Message]:
        """Yields the parts of a task, those that are kept and then those that come, and last its outcome, a Message.

        A late client gets what is kept. A part with another `attempt` than the one before begins anew: the task was
        tried again, and what came before counts no more. Ends without a Message after `timeout` seconds (None: never),
        and where there is no such task, or its message was acknowledged. Uses a connection of its own; a connection
        that is lost raises DatabaseError.
        """
        return stream(self._dsn, task_id, timeout, self._poll)

    def close(self) -> None:
        """Closes the connection."""
        self.connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio: `async with AsyncClient(dsn) as park: await park.run(calls.submit(...))`."""

    def __init__(self, dsn: str, *, poll: bool = False) -> None:
        self._dsn, self._poll = dsn, poll
        self._connection: psycopg.AsyncConnection[DictRow] | None = None
        self._lock = asyncio.Lock()

    async def run(self, call: calls.Call[T]) -> T:
        """Runs one call and returns its result."""
        if self._connection is None:
            raise DatabaseError("this client is not open; use: async with AsyncClient(dsn) as park")
        async with self._lock:
            return await calls.run_on_async(self._connection, call)

    async def wait(self, task_id: int, timeout: float | None = None) -> Message | None:
        """Waits for the outcome of a task, on a connection of its own; None after `timeout` seconds."""
        patience = Patience(timeout, self._poll)
        try:
            async with await connect_async(self._dsn, prepare=not self._poll) as connection:
                if not self._poll:
                    await connection.execute(_LISTEN)
                while True:
                    timers = await calls.run_on_async(connection, calls.maintain())
                    message = await calls.run_on_async(connection, calls.result(task_id))
                    if message is not None or patience.over:
                        return message
                    async for notice in connection.notifies(timeout=patience.pause(timers)):
                        if notice.payload == str(task_id):
                            break
        except psycopg.Error as error:
            raise translated(error) from error

    def stream(self, task_id: int, timeout: float | None = None) -> AsyncIterator[Part | Message]:
        """The same as Client.stream, to be used with `async for`."""
        return stream_async(self._dsn, task_id, timeout, self._poll)

    async def __aenter__(self) -> AsyncClient:
        self._connection = await connect_async(self._dsn, prepare=not self._poll)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None
