"""Connections: how they are made, and the one-line errors when they cannot be."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import DictRow, dict_row

from pgpark.errors import DatabaseError, NotMigratedError, one_line

OLDEST_SERVER = 14
_CONNECT_TIMEOUT_SECS = 10


def connect(dsn: str, *, prepare: bool = True) -> psycopg.Connection[DictRow]:
    """An autocommit connection to a server that is new enough.

    prepare: let psycopg keep prepared statements; not possible behind a pooler in transaction mode.
    Raises DatabaseError.
    """
    try:
        connection = psycopg.connect(dsn, **_options(dsn, prepare), row_factory=dict_row)
    except psycopg.Error as error:
        raise _unreachable(dsn, error) from error
    if (complaint := _too_old(connection.info.server_version)) is not None:
        connection.close()
        raise DatabaseError(complaint)
    return connection


async def connect_async(dsn: str, *, prepare: bool = True) -> psycopg.AsyncConnection[DictRow]:
    """The same for asyncio."""
    try:
        connection = await psycopg.AsyncConnection.connect(dsn, **_options(dsn, prepare), row_factory=dict_row)
    except psycopg.Error as error:
        raise _unreachable(dsn, error) from error
    if (complaint := _too_old(connection.info.server_version)) is not None:
        await connection.close()
        raise DatabaseError(complaint)
    return connection


def require_migrated(connection: psycopg.Connection[Any]) -> None:
    """Raises NotMigratedError where the database has no pgpark."""
    row = connection.execute("select to_regprocedure('pgpark.park_maintain(text)') is not null as here").fetchone()
    if not row or not row["here"]:
        raise NotMigratedError(f"the database {connection.info.dbname} has no pgpark yet; run: pgpark migrate")


def _options(dsn: str, prepare: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"autocommit": True, "prepare_threshold": 5 if prepare else None}
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.Error as error:
        raise DatabaseError(f"the DSN cannot be read: {one_line(error)}") from error
    options["connect_timeout"] = given.get("connect_timeout") or _CONNECT_TIMEOUT_SECS
    options["application_name"] = given.get("application_name") or "pgpark"
    return options


def _unreachable(dsn: str, error: psycopg.Error) -> DatabaseError:
    return DatabaseError(f"cannot connect to {_where(dsn)}: {one_line(error)}")


def _where(dsn: str) -> str:
    """The server and database of a DSN, without the password."""
    given = psycopg.conninfo.conninfo_to_dict(dsn)
    return f"{given.get('host', 'the default host')}/{given.get('dbname', 'the default database')}"


def _too_old(server_version: int) -> str | None:
    if server_version // 10000 >= OLDEST_SERVER:
        return None
    return f"PostgreSQL {server_version // 10000} is too old: pgpark needs {OLDEST_SERVER} or newer"
