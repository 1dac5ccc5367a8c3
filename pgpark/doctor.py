"""What is wrong with an installation: what the database finds (park_doctor), and what only a client can see, which is
files that were not applied yet, and a pooler that loses notifications."""

from __future__ import annotations

import contextlib
import uuid

import psycopg
from psycopg import sql
from psycopg.rows import DictRow

from pgpark import calls, migrate
from pgpark.database import connect, require_migrated, where
from pgpark.errors import DatabaseError, MigrationError, NotMigratedError, one_line
from pgpark.models import Finding

_HEARD_WITHIN_SECS = 2.0


def findings(connection: psycopg.Connection[DictRow], dsn: str) -> list[Finding]:
    """Everything that is wrong, nothing where all is well. `connection` leads to the database of the DSN.

    Raises NotMigratedError where there is no pgpark, NotGrantedError where the role may not ask.
    """
    found = _behind(connection)
    try:
        found += calls.run_on(connection, calls.doctor())
    except NotMigratedError:
        lost = _lost_functions(connection)
        if not lost:
            require_migrated(connection)
            if not found:
                raise
        found += lost
    return found + _unheard(dsn)


def _behind(connection: psycopg.Connection[DictRow]) -> list[Finding]:
    """Whether `pgpark migrate` would do something here, or refuse. An admin who is not the owner cannot see that."""
    try:
        files = migrate.plan(connection).files
    except MigrationError as error:
        return [_finding("migration refused", "pgpark migrate", str(error))]
    except psycopg.errors.InsufficientPrivilege:
        return []
    if not files:
        return []
    return [_finding("database behind", "pgpark migrate", f"{len(files)} files were not applied; run: pgpark migrate")]


def _lost_functions(connection: psycopg.Connection[DictRow]) -> list[Finding]:
    """What park_doctor would say of functions, where it cannot because one that it needs is missing."""
    lost = "select object, make from pgpark.blueprint where kind = 'function' and to_regprocedure(object) is null"
    try:
        rows = connection.execute(lost).fetchall()
    except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege):
        return []
    return [_finding("function missing", row["object"], "park_doctor needs it", row["make"]) for row in rows]


def _unheard(dsn: str) -> list[Finding]:
    """Whether a notification arrives on a connection of this DSN, as a worker needs it."""
    channel = f"pgpark.doctor.{uuid.uuid4().hex}"
    advice = "give workers a DSN past the pooler, or --poll"
    try:
        with contextlib.closing(connect(dsn, prepare=False)) as listener:
            listener.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
            with contextlib.closing(connect(dsn, prepare=False)) as other:
                other.execute("select pg_notify(%s, '')", [channel])
                heard = any(listener.notifies(timeout=_HEARD_WITHIN_SECS, stop_after=1))
                for connection in (listener, other):  # behind a pooler it may be either that listens
                    connection.execute(sql.SQL("unlisten {}").format(sql.Identifier(channel)))
    except (DatabaseError, psycopg.Error) as error:
        return [_finding("notifications not heard", where(dsn), f"{one_line(error)}; {advice}")]
    if heard:
        return []
    why = f"one did not arrive within {_HEARD_WITHIN_SECS:g} s; {advice}"
    return [_finding("notifications not heard", where(dsn), why)]


def _finding(problem: str, subject: str, detail: str, mend: str | None = None) -> Finding:
    return Finding(problem=problem, subject=subject, detail=detail, mend=mend, disruptive=False)
