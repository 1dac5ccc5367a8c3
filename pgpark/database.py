"""Connections: how they are made, and the one-line errors when they cannot be."""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any

import psycopg
from psycopg.rows import DictRow, dict_row

from pgpark.errors import DatabaseError, NotMigratedError, one_line

OLDEST_SERVER = 14
_CONNECT_TIMEOUT_SECS = 10


_open: weakref.WeakSet[psycopg.Connection[Any] | psycopg.AsyncConnection[Any]] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    """In a process that was just forked: our connections are the other's, where anything said here would be heard."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for connection in list(_open):
        with contextlib.suppress(OSError, psycopg.Error):
            os.dup2(nothing, connection.fileno(), inheritable=False)
    os.close(nothing)


os.register_at_fork(after_in_child=_leave_to_the_parent)


def connect(dsn: str, *, prepare: bool = True) -> psycopg.Connection[DictRow]:
    """An autocommit connection to a server that is new enough.

    prepare: let psycopg keep prepared statements; not possible behind a pooler in transaction mode.
    Raises DatabaseError.
    """
    try:
        connection = psycopg.connect(dsn, **options(dsn, prepare), row_factory=dict_row)
    except psycopg.Error as error:
        raise _unreachable(dsn, error) from error
    _open.add(connection)
    if (complaint := _too_old(connection.info.server_version)) is not None:
        connection.close()
        raise DatabaseError(complaint)
    return connection


async def connect_async(dsn: str, *, prepare: bool = True) -> psycopg.AsyncConnection[DictRow]:
    """The same for asyncio."""
    try:
        connection = await psycopg.AsyncConnection.connect(dsn, **options(dsn, prepare), row_factory=dict_row)
    except psycopg.Error as error:
        raise _unreachable(dsn, error) from error
    _open.add(connection)
    if (complaint := _too_old(connection.info.server_version)) is not None:
        await connection.close()
        raise DatabaseError(complaint)
    return connection


def require_migrated(connection: psycopg.Connection[Any]) -> None:
    """Raises NotMigratedError where the database has no pgpark."""
    row = connection.execute("select to_regprocedure('pgpark.park_maintain(text)') is not null as here").fetchone()
    if not row or not row["here"]:
        raise NotMigratedError(f"the database {connection.info.dbname} has no pgpark yet; run: pgpark migrate")


def options(dsn: str, prepare: bool = True) -> dict[str, Any]:
    """Our defaults for what the DSN leaves open; a dead peer is noticed within about a minute."""
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        # Without libpq's text, which repeats the DSN with its password.
        raise DatabaseError(
            "the DSN cannot be read; use postgresql://user@host/database or key=value pairs, "
            "and percent-encode special characters in a URL's password"
        ) from None
    defaults: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT_SECS,
        "application_name": "pgpark",
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
    }
    options = {name: value for name, value in defaults.items() if name not in given}
    return options | {"autocommit": True, "prepare_threshold": 5 if prepare else None}


def _unreachable(dsn: str, error: psycopg.Error) -> DatabaseError:
    return DatabaseError(f"cannot connect to {where(dsn)}: {one_line(error)}")


def where(dsn: str) -> str:
    """The server and database of a DSN, without the password."""
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.Error:
        return "a DSN that cannot be read"
    return f"{given.get('host', 'the default host')}/{given.get('dbname', 'the default database')}"


def _too_old(server_version: int) -> str | None:
    if server_version // 10000 >= OLDEST_SERVER:
        return None
    return f"PostgreSQL {server_version // 10000} is too old: pgpark needs {OLDEST_SERVER} or newer"
