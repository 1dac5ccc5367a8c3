"""A connection of a worker, and what goes over it: outcomes, claims, or both in one round trip and one transaction.

Not which outcomes, nor when: that is worker.py.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg.rows import DictRow, TupleRow, tuple_row
from psycopg.types.json import Jsonb

from pgpark import silence
from pgpark.calls import Call
from pgpark.errors import BadInputError, ConflictError, one_line, translated
from pgpark.models import ClaimedRow

log = logging.getLogger("pgpark.worker")

T = TypeVar("T")

# A transaction that has finished tasks and waits for its pool may stand in the way of who holds the pool and wants
# those tasks (park_put_pool with another queue, park_drop_pool). So park_next does not wait long, it gives up before
# Postgres looks for deadlocks, and then the two go in transactions of their own for a while.
_APART_SECS = 5.0
_SHORTEST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 0.01, 0.5
_SLOWEST_BYTES = 100_000  # per second, of a line that is still worth waiting for

_COLUMNS = (
    "t.task_id, t.attempt, t.payload::text, t.priority, t.units, t.tenant, t.user_id, t.session_id, t.deadline,"
    " t.created_at"
)
_WANTED = "pool => %s::text, worker => %s::text, max_tasks => %s::int, max_units => %s::int"
_FINISH = "select f.task_id, f.accepted from pgpark.park_finish_many(outcomes => %s) f"
_CLAIM = f"select {_COLUMNS} from pgpark.park_claim({_WANTED}) t"
_NEXT = f"select t.fenced, {_COLUMNS} from pgpark.park_next({_WANTED}, outcomes => %s) t"


class Lane:
    """A connection to the database for one pool and worker, used by one statement or pair of statements at a time.

    The methods raise the errors of pgpark.errors. A statement that lost to another transaction (a deadlock, a lock
    timeout) is tried again. patience: seconds for an answer, then the connection is lost.
    """

    def __init__(
        self,
        connection: psycopg.AsyncConnection[DictRow],
        pool: str,
        worker: str,
        max_units: int | None,
        patience: float | None,
    ) -> None:
        self._connection = connection
        self._patience = patience
        self._pool, self._worker, self._max_units = pool, worker, max_units
        self._finishing = connection.cursor(row_factory=tuple_row)
        self._claiming = connection.cursor(row_factory=tuple_row)
        self._apart_until = 0.0

    @property
    def pid(self) -> int:
        """The process id of the server's side."""
        return self._connection.info.backend_pid

    @property
    def lost(self) -> bool:
        """Whether the connection is known to be lost."""
        return self._connection.closed

    async def run(self, call: Call[T]) -> T:
        """Runs one call in a transaction of its own."""

        async def once() -> T:
            return await silence.run_on_async(self._connection, call, self._patience)

        return await _insisting(once)

    async def finish(self, outcomes: Sequence[bytes]) -> list[bool]:
        """Writes outcomes (elements of park_finish_many as JSON) and returns which were accepted, in their order."""

        async def once() -> list[bool]:
            return _accepted(await self._rows(self._finishing, _FINISH, (_array(outcomes),), _size(outcomes)))

        return await _insisting(once)

    async def claim(self, slots: int) -> list[ClaimedRow]:
        """Claims up to so many tasks."""

        async def once() -> list[ClaimedRow]:
            return _claimed(await self._rows(self._claiming, _CLAIM, self._wanted(slots)))

        return await _insisting(once)

    async def finish_and_claim(
        self, outcomes: Sequence[bytes], slots: int
    ) -> tuple[set[tuple[int, int]], list[ClaimedRow]] | None:
        """Both in one round trip and one transaction. Returns the tasks and attempts whose outcomes were not accepted,
        and what was claimed. None: nothing was done, they must go one after the other."""
        if time.monotonic() < self._apart_until:
            return None
        try:
            parameters = (*self._wanted(slots), _array(outcomes))
            rows = await self._rows(self._claiming, _NEXT, parameters, _size(outcomes))
        except ConflictError as error:
            log.debug("outcomes and claims go apart for %g s: %s", _APART_SECS, one_line(error))
            self._apart_until = time.monotonic() + _APART_SECS
            return None
        except BadInputError:
            return None
        claimed = [ClaimedRow._make(row) for fenced, *row in rows if not fenced]
        return {(row[1], row[2]) for row in rows if row[0]}, claimed

    def _wanted(self, slots: int) -> tuple[str, str, int, int | None]:
        return self._pool, self._worker, slots, self._max_units

    async def _rows(
        self, cursor: psycopg.AsyncCursor[TupleRow], statement: Any, parameters: Any, size: int = 0
    ) -> list[TupleRow]:
        """size: bytes to send, which takes its time."""
        patience = None if self._patience is None else self._patience + size / _SLOWEST_BYTES
        try:
            with silence.bounded(self._connection, patience):
                await cursor.execute(statement, parameters)
                return await cursor.fetchall()
        except psycopg.Error as error:
            raise translated(error) from error


async def _insisting(once: Callable[[], Awaitable[T]]) -> T:
    """Does it again for as long as it loses to other transactions."""
    pause = _SHORTEST_PAUSE_SECS
    while True:
        try:
            return await once()
        except ConflictError as error:
            log.debug("trying again: %s", one_line(error))
        await asyncio.sleep(pause * random.uniform(0.5, 1))
        pause = min(pause * 2, _LONGEST_PAUSE_SECS)


def _array(outcomes: Sequence[bytes]) -> Jsonb:
    return Jsonb(b"[" + b",".join(outcomes) + b"]", dumps=_as_it_is)


def _size(outcomes: Sequence[bytes]) -> int:
    return sum(map(len, outcomes))


def _as_it_is(encoded: bytes) -> bytes:
    return encoded


def _accepted(rows: list[TupleRow]) -> list[bool]:
    return [accepted for _, accepted in rows]


def _claimed(rows: list[TupleRow]) -> list[ClaimedRow]:
    return list(map(ClaimedRow._make, rows))
