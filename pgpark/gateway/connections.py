"""The gateway's connections to the database: few, waited for briefly, and each request one round trip.

A request's calls are sent as one pipeline, which is one transaction; the first of them makes it act for the caller's
token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
import psycopg_pool
from psycopg import AsyncConnection, sql
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from pgpark import calls
from pgpark.calls import Call
from pgpark.database import options
from pgpark.errors import DatabaseError, one_line, translated
from pgpark.gateway.settings import GatewaySettings

T = TypeVar("T")
log = logging.getLogger("pgpark.gateway")
_CLOSE_SECS = 5.0
_MOST_ROWS = 100  # of a page


class BusyError(DatabaseError):
    """No connection was free in time, or the call took too long."""


class Connections:
    """Runs calls, each list of them in a transaction of its own. Raises the errors of pgpark.errors."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._pool: AsyncConnectionPool[AsyncConnection[dict[str, Any]]] = AsyncConnectionPool(
            settings.dsn,
            # Unprepared: in a pipeline that fails, psycopg takes for prepared what the server has passed over.
            kwargs=options(settings.dsn, prepare=False) | {"row_factory": dict_row},
            min_size=1,
            max_size=settings.max_connections,
            timeout=settings.connection_secs,
            max_waiting=settings.max_connections * 100,
            open=False,
        )
        self._looking = asyncio.Semaphore(max(settings.max_connections // 2, 1))
        logging.getLogger("psycopg.pool").setLevel(logging.ERROR)

    async def open(self) -> None:
        """Begins to connect; does not wait for it."""
        await self._pool.open()

    async def close(self) -> None:
        """Closes all."""
        await self._pool.close(_CLOSE_SECS)

    async def run(self, call: Call[T], token_hash: str | None = None) -> T:
        """Runs one call, for a token unless that is None."""
        result: T
        (result,) = await self.run_all([call], token_hash)
        return result

    async def run_all(self, steps: Sequence[Call[Any]], token_hash: str | None = None) -> list[Any]:
        """Runs calls in one transaction, for a token unless that is None; what each returns."""
        first = [] if token_hash is None else [calls.enter(token_hash)]
        try:
            async with self._pool.connection() as connection:
                rows = await asyncio.wait_for(_pipelined(connection, [*first, *steps]), self._settings.request_secs)
        except (psycopg_pool.PoolTimeout, psycopg_pool.TooManyRequests) as error:
            raise BusyError("all connections to the database are in use, or it cannot be reached") from error
        except asyncio.TimeoutError as error:
            raise BusyError("the database took too long") from error
        except psycopg.OperationalError as error:
            if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
                await self._forget_lost()
            raise translated(error) from error
        except psycopg.Error as error:
            raise translated(error) from error
        return [step.read(found) for step, found in zip(steps, rows[len(first) :], strict=True)]

    async def look(self, steps: Sequence[Call[Any]], token_hash: str) -> list[Any]:
        """As `run_all`, for those who wait: they leave half of the connections to requests."""
        async with self._looking:
            return await self.run_all(steps, token_hash)

    async def _forget_lost(self) -> None:
        """A server that went away took all connections with it; the next request is not to find that out again."""
        try:
            await self._pool.check()
        except psycopg.Error as error:
            log.debug("looking for lost connections: %s", one_line(error))


async def _pipelined(connection: AsyncConnection[dict[str, Any]], steps: Sequence[Call[Any]]) -> list[Any]:
    async with connection.pipeline():
        cursors = [await connection.execute(step.statement, step.parameters) for step in steps]
    return [await cursor.fetchall() for cursor in cursors]


def keyed(call: Call[Any], column: str) -> Call[list[tuple[Any, str]]]:
    """The same as `as_json`, each line together with the value of a column."""
    statement = sql.SQL("select r.{} as key, cast(to_jsonb(r) as text) as line from ({}) r")
    return Call(
        statement.format(sql.Identifier(column), call.statement),
        call.parameters,
        lambda rows: [(row["key"], row["line"]) for row in rows],
    )


def as_json(call: Call[Any]) -> Call[list[str]]:
    """The same call, its rows as JSON text just as Postgres writes them: no number loses a digit, and it is quick."""
    statement = sql.SQL("select cast(to_jsonb(r) as text) as line from ({}) r").format(call.statement)
    return Call(statement, call.parameters, lambda rows: [row["line"] for row in rows])


@dataclass(frozen=True)
class Page:
    """The first rows of a call, each with its key, and whether there may be more; most_rows: to ask for next."""

    rows: list[tuple[Any, str]]
    more: bool
    most_rows: int


def page(call: Callable[[int], Call[Any]], column: str, most_rows: int, most_bytes: int) -> Call[Page]:
    """As `keyed`, but no more rows than fit into so many bytes, though at least one, however large they are.

    call: makes the call, given the most rows that it may return.
    """
    statement = sql.SQL(
        "select p.key, p.line, p.found from ("
        "select l.key, l.line, count(*) over () as found,"
        " sum(octet_length(l.line)) over (rows unbounded preceding) - octet_length(l.line) as before"
        " from (select r.{} as key, cast(to_jsonb(r) as text) as line from ({}) r offset 0) l"
        ") p where p.before < %(most_bytes)s"
    )
    asked = call(most_rows)

    def read(rows: list[dict[str, Any]]) -> Page:
        found = rows[0]["found"] if rows else 0
        cut = len(rows) < found
        following = len(rows) if cut else most_rows * 2  # so that what does not fit is not made again and again
        return Page([(row["key"], row["line"]) for row in rows], cut or found == most_rows, min(following, _MOST_ROWS))

    return Call(
        statement.format(sql.Identifier(column), asked.statement), {**asked.parameters, "most_bytes": most_bytes}, read
    )
