"""A pool as an object: its calls as methods, waiting for results, and workers. Made by `build_pools` (pools.py)."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from typing_extensions import Self, TypeVar

from pgpark import calls
from pgpark.binding import Fetch, OfPool, Plain, Submit, SubmitMany, Types
from pgpark.calls import Call
from pgpark.errors import BadInputError, DatabaseError, translated
from pgpark.executors import FunctionExecutor, load_handler
from pgpark.models import Message, Part, PoolInfo, PoolStats
from pgpark.patience import POLL_SECS
from pgpark.streaming import stream, stream_async
from pgpark.transactions import (
    AsyncTransaction,
    Transaction,
    require_transaction,
    run_within,
    run_within_async,
)
from pgpark.waiting import Listener
from pgpark.worker import Worker, WorkerSettings, default_name

T = TypeVar("T")
NewPayload = TypeVar("NewPayload")
NewResult = TypeVar("NewResult")
PayloadT = TypeVar("PayloadT", default=Any)
ResultT = TypeVar("ResultT", default=Any)


@dataclass(frozen=True)
class Database:
    """Where the calls of a pool go: its DSN, connections, the listener for outcomes, and what keeps it all open.

    poll: the DSN leads to a pooler in transaction mode, behind which nothing is prepared and nothing heard.

    None of it outlives a fork: two processes would talk on one connection, and the listener's thread is gone.
    """

    dsn: str
    connections: ConnectionPool[Any] | AsyncConnectionPool[Any]
    listener: Listener
    opened: object
    poll: bool = False
    pid: int = field(default_factory=os.getpid)

    def require_own_process(self) -> None:
        """Raises DatabaseError in a process that was forked since the pools were built."""
        if os.getpid() != self.pid:
            raise DatabaseError("these pools were built before a fork; build them in each process")


def _stats(pool: str) -> Call[PoolStats]:
    """The numbers of the pool."""
    return calls.stats(pool).then(lambda rows: rows[0])


def _info(pool: str) -> Call[PoolInfo]:
    """The pool: its state, its config as it was given, and its settings with every default filled in."""
    return calls.pools(pool).then(lambda rows: rows[0])


def _pause(pool: str) -> Call[None]:
    """Starts nothing more; tasks are still accepted."""
    return calls.set_pool_state(pool, "paused")


def _resume(pool: str) -> Call[None]:
    """Accepts and starts tasks again."""
    return calls.set_pool_state(pool, "active")


def _drain(pool: str) -> Call[None]:
    """Accepts nothing more; what is there goes on."""
    return calls.set_pool_state(pool, "draining")


def _disable(pool: str) -> Call[None]:
    """Neither accepts nor starts anything."""
    return calls.set_pool_state(pool, "disabled")


class BasePool(Generic[PayloadT, ResultT]):
    """The calls of a pool, each described once in calls/. Methods raise the errors of pgpark.errors."""

    submit = Submit(calls.submit)
    submit_many = SubmitMany(calls.submit_many)
    fetch = Fetch(calls.fetch_of)
    ack = Plain(calls.ack)
    cancel = Plain(calls.cancel)
    status = Plain(calls.status)
    stats = OfPool(_stats)
    info = OfPool(_info)
    explain = OfPool(calls.explain)
    llm_units = OfPool(calls.llm_units)
    prune = OfPool(calls.prune)
    maintain = OfPool(calls.maintain)
    pause = OfPool(_pause)
    resume = OfPool(_resume)
    drain = OfPool(_drain)
    disable = OfPool(_disable)

    def __init__(
        self, name: str, database: Database, types: Types[PayloadT, ResultT] | None = None, transaction: Any = None
    ) -> None:
        self.name = name
        self.types: Types[PayloadT, ResultT] = types or Types()
        self._database = database
        self._transaction = transaction

    @abstractmethod
    def run(self, call: Call[Any]) -> Any:
        """Runs a call on the database of this pool, or in the transaction that it is bound to."""

    def worker(
        self,
        handler: str | Callable[..., Any],
        *,
        units: int | None = None,
        concurrency: int = 8,
        name: str | None = None,
        listen: bool | None = None,
        poll_secs: float | None = None,
        grace_secs: float = 30.0,
    ) -> Worker:
        """A worker for this pool: `pool.worker(handler).run()` works until SIGTERM.

        handler: a function, async or plain, or "module:function"; it gets the payload, validated where its first
        argument is annotated with a pydantic model, and returns the result. The settings are those of WorkerSettings;
        pools that poll have workers that do.
        Raises BadInputError when there is no such handler.
        """
        poll = self._database.poll
        settings = WorkerSettings(
            self._database.dsn,
            self.name,
            name or default_name(),
            units,
            concurrency,
            listen=not poll if listen is None else listen,
            poll_secs=poll_secs if poll_secs is not None else POLL_SECS if poll else 30.0,
            grace_secs=grace_secs,
        )
        function = load_handler(handler) if isinstance(handler, str) else handler
        return _PoolWorker(settings, FunctionExecutor(function), self._database)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class _PoolWorker(Worker):
    """A worker that keeps the database of its pool open."""

    def __init__(self, settings: WorkerSettings, executor: FunctionExecutor, database: Database) -> None:
        super().__init__(settings, executor)
        self._database = database


class Pool(BasePool[PayloadT, ResultT]):
    """A pool for synchronous programs; safe to use from many threads at once. Each call is a transaction of its own,
    on a connection that is shared; `on` makes it part of the caller's."""

    def on(self, transaction: Transaction) -> Self:
        """This pool inside the caller's own transaction, which commits or rolls back: `pool.on(session).submit(...)`.

        transaction: a psycopg Connection, or a SQLAlchemy Session or Connection with any Postgres driver.
        Raises BadInputError for anything else.
        """
        require_transaction(transaction, asynchronous=False)
        return type(self)(self.name, self._database, self.types, transaction)

    def typed(self, payload: type[NewPayload], result: type[NewResult]) -> Pool[NewPayload, NewResult | None]:
        """This pool with payloads and results of these types, for instance pydantic models.

        submit takes a payload of its type, or a mapping that is validated into it (BadInputError); messages of
        completed tasks have a payload of the type of results (BadResultError).
        """
        return Pool(self.name, self._database, Types(payload, result), self._transaction)

    def result(self, task_id: int | None, timeout: float | None = None) -> Message[ResultT] | None:
        """The outcome of a task: waits for it, woken by notification, for at most `timeout` seconds; then None.

        Inside the caller's transaction (`on`) it looks once. Raises BadResultError, DatabaseError, and BadInputError
        for the task_id None of a task that was refused.
        """
        message, task_id = None, _accepted(task_id)
        if self._transaction is None and (timeout is None or timeout > 0):
            self._database.require_own_process()
            message = self._database.listener.wait(task_id, timeout)
        message = message or self.run(calls.result(task_id))
        return None if message is None else self.types.decode(message)

    def stream(self, task_id: int | None, timeout: float | None = None) -> Iterator[Part | Message[ResultT]]:
        """The parts of a task that are kept, then those that come, and last its outcome; see Client.stream.

        On a connection of its own. Raises BadResultError, DatabaseError.
        """
        for item in stream(self._database.dsn, _accepted(task_id), timeout, self._database.poll):
            yield item if isinstance(item, Part) else self.types.decode(item)

    def run(self, call: Call[T]) -> T:
        """Runs a call on the database of this pool, or in the transaction that it is bound to."""
        if self._transaction is not None:
            return run_within(self._transaction, call)
        self._database.require_own_process()
        assert isinstance(self._database.connections, ConnectionPool)
        with _translating(), self._database.connections.connection() as connection:
            return calls.run_on(connection, call)


class AsyncPool(BasePool[PayloadT, ResultT]):
    """The same for asyncio: every call is awaited."""

    def on(self, transaction: AsyncTransaction) -> Self:
        """This pool inside the caller's own transaction: a psycopg AsyncConnection, or a SQLAlchemy AsyncSession or
        AsyncConnection. Raises BadInputError for anything else."""
        require_transaction(transaction, asynchronous=True)
        return type(self)(self.name, self._database, self.types, transaction)

    def typed(self, payload: type[NewPayload], result: type[NewResult]) -> AsyncPool[NewPayload, NewResult | None]:
        """This pool with payloads and results of these types; as Pool.typed."""
        return AsyncPool(self.name, self._database, Types(payload, result), self._transaction)

    async def result(self, task_id: int | None, timeout: float | None = None) -> Message[ResultT] | None:
        """The outcome of a task; as Pool.result."""
        message, task_id = None, _accepted(task_id)
        if self._transaction is None and (timeout is None or timeout > 0):
            self._database.require_own_process()
            message = await self._database.listener.wait_async(task_id, timeout)
        message = message or await self.run(calls.result(task_id))
        return None if message is None else self.types.decode(message)

    async def stream(self, task_id: int | None, timeout: float | None = None) -> AsyncIterator[Part | Message[ResultT]]:
        """The parts of a task as they come, then its outcome, for `async for`; as Pool.stream."""
        database = self._database
        parts = stream_async(database.dsn, _accepted(task_id), timeout, database.poll)
        async with contextlib.aclosing(parts) as items:
            async for item in items:
                yield item if isinstance(item, Part) else self.types.decode(item)

    async def run(self, call: Call[T]) -> T:
        """Runs a call on the database of this pool, or in the transaction that it is bound to."""
        if self._transaction is not None:
            return await run_within_async(self._transaction, call)
        self._database.require_own_process()
        assert isinstance(self._database.connections, AsyncConnectionPool)
        with _translating():
            async with self._database.connections.connection() as connection:
                return await calls.run_on_async(connection, call)


def _accepted(task_id: int | None) -> int:
    """The id of a task; there is none where submitting was refused, and nobody should wait for that."""
    if task_id is None:
        raise BadInputError("task_id is None: the task was refused, its `reason` says why")
    return task_id


@contextlib.contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:  # no connection to be had
        raise translated(error) from error
