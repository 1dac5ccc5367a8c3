"""Hears the notifications of a pool on a connection of its own, whatever the worker's other connections wait for."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import psycopg
from psycopg import sql
from psycopg.pq.abc import PGconn

from pgpark.database import connect_async
from pgpark.errors import DatabaseError, one_line

log = logging.getLogger("pgpark.worker")

_LONGEST_RETRY_SECS = 5.0


async def listen(dsn: str, pool: str, began: Callable[[], None], heard: Callable[[str, int], None]) -> None:
    """Calls `heard` with the message of each notification of the pool and the process id of who sent it; never returns.

    `began` is called whenever it begins to listen: something may have come while nobody did. A connection that is lost
    is made again.
    """
    while True:
        try:
            connection = await connect_async(dsn)
            async with connection:
                await connection.execute(sql.SQL("listen {}").format(sql.Identifier(f"pgpark.pool.{pool}")))
                began()
                await _hear(connection.pgconn, heard)
        except (DatabaseError, psycopg.Error, OSError) as error:
            log.warning("not listening, trying again: %s", one_line(error))
        await asyncio.sleep(_LONGEST_RETRY_SECS * random.uniform(0.1, 0.5))


async def _hear(server: PGconn, heard: Callable[[str, int], None]) -> None:
    """Reads what the server sends until the connection is lost, which is raised. Cheaper than connection.notifies(),
    which sets up its wait anew each time: a busy worker hears of each of its own commits."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        try:
            server.consume_input()
        except psycopg.Error as error:
            loop.remove_reader(descriptor)
            if not over.done():
                over.set_exception(error)
        while (notice := server.notifies()) is not None:
            heard(notice.extra.decode(errors="replace"), notice.be_pid)

    descriptor = server.socket
    loop.add_reader(descriptor, readable)
    try:
        readable()  # what came with the answer to `listen`
        await over
    finally:
        loop.remove_reader(descriptor)
