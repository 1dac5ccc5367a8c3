"""Brings a database to the state of the files below sql/: pgmq, migrations once each, functions when they changed.

Everything happens in one transaction, one caller at a time, so that any number of them end the same, and a failure
leaves the database as it was. At its end the schema is closed to everybody who was granted nothing, and recorded for
park_doctor. The logic of what exists and what is too old is SQL (sql/pgmq.sql).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from pgpark.errors import MigrationError, one_line
from pgpark.standstill import Standstill

REQUIRED_PGMQ = "1.5.0"
_LOCK = 1885826929
_CLOSE = "do $$ begin perform pgpark._close(); end $$;"
_RECORD = "do $$ begin perform pgpark._record_blueprint(); end $$;"
# Its licence asks that this goes with each copy (the text: NOTICE).
_COPYRIGHT_OF_PGMQ = """--
-- pgmq: Copyright (c) 2023, Tembo. Permission to use, copy, modify, and distribute this software and its documentation
-- for any purpose, without fee, and without a written agreement is hereby granted, provided that the above copyright
-- notice and this paragraph and the following two paragraphs appear in all copies.
--
-- IN NO EVENT SHALL TEMBO BE LIABLE TO ANY PARTY FOR DIRECT, INDIRECT, SPECIAL, INCIDENTAL, OR CONSEQUENTIAL DAMAGES,
-- INCLUDING LOST PROFITS, ARISING OUT OF THE USE OF THIS SOFTWARE AND ITS DOCUMENTATION, EVEN IF TEMBO HAS BEEN ADVISED
-- OF THE POSSIBILITY OF SUCH DAMAGE.
--
-- TEMBO SPECIFICALLY DISCLAIMS ANY WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF
-- MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE. THE SOFTWARE PROVIDED HEREUNDER IS ON AN "AS IS" BASIS, AND
-- TEMBO HAS NO OBLIGATIONS TO PROVIDE MAINTENANCE, SUPPORT, UPDATES, ENHANCEMENTS, OR MODIFICATIONS.
--
"""
_HELPER = re.compile(r"^create or replace function pgpark\.(_\w+)", re.MULTILINE)


@dataclass(frozen=True)
class SqlFile:
    """A file below sql/: `name` is its path there, `hash` the SHA-256 of its text."""

    name: str
    text: str
    hash: str

    @property
    def runs_once(self) -> bool:
        """Whether this is a migration, rather than a file of functions."""
        return self.name.startswith("migrations/")

    @property
    def helpers(self) -> frozenset[str]:
        """The names of the helpers that it makes."""
        return frozenset(_HELPER.findall(self.text))


@dataclass(frozen=True)
class Plan:
    """What a migration would do: install pgmq, and apply these files in order."""

    install_pgmq: bool
    files: tuple[SqlFile, ...]

    @property
    def empty(self) -> bool:
        """Whether the database is up to date."""
        return not self.install_pgmq and not self.files


def migrate(connection: psycopg.Connection[DictRow]) -> Plan:
    """Brings the database up to date and returns what was done. The connection must be in autocommit mode.

    Raises MigrationError; the database is then as it was before.
    """
    with Standstill(connection) as standstill:
        with connection.transaction():
            _lock(connection)
            todo = plan(connection)
            if todo.files:
                standstill.begin()
                _carry_out(connection, todo)
                standstill.turn_away()
        standstill.sweep()
    return todo


def _carry_out(connection: psycopg.Connection[DictRow], todo: Plan) -> None:
    before = _definitions(connection)
    _apply(connection, "sql/pgmq.sql", pgmq_script())
    _apply(connection, "sql/ledger.sql", _read("ledger.sql"))
    for file in todo.files:
        if not file.runs_once:
            _drop_functions(connection, file.helpers)
        _apply(connection, f"sql/{file.name}", file.text)
        connection.execute(
            "insert into pgpark.migration (name, hash) values (%s, %s)"
            " on conflict (name) do update set hash = excluded.hash, applied_at = clock_timestamp()",
            [file.name, file.hash],
        )
    if any(not file.runs_once for file in todo.files):
        _drop_functions(connection, _helpers(connection) - {name for file in sql_files() for name in file.helpers})
        connection.execute("delete from pgpark.migration where name <> all (%s)", [[file.name for file in sql_files()]])
        connection.execute(_CLOSE)
        connection.execute("select pgpark._record_blueprint(%s)", [before])
        connection.execute("select pgpark._renew_leases()")  # nobody could meanwhile


def plan(connection: psycopg.Connection[DictRow]) -> Plan:
    """What `migrate` would do now. Raises MigrationError where it would refuse."""
    applied = _ledger(connection)
    files = sql_files()
    known = {file.name for file in files}
    unknown = sorted(name for name in applied if name.startswith("migrations/") and name not in known)
    if unknown:
        raise MigrationError(f"this database was migrated by a newer pgpark ({unknown[0]} is unknown here); upgrade it")
    for file in files:
        if file.runs_once and applied.get(file.name, file.hash) != file.hash:
            raise MigrationError(
                f"sql/{file.name} was edited after it was applied (hash {applied[file.name][:12]} then, "
                f"{file.hash[:12]} now); restore it and put the change into a new migration"
            )
    row = connection.execute("select to_regnamespace('pgmq') is null as missing").fetchone()
    return Plan(bool(row and row["missing"]), tuple(file for file in files if applied.get(file.name) != file.hash))


def script() -> str:
    """One script that `psql -1 -f` applies to an empty database with the same result as `migrate`."""
    from pgmq.install import get_embedded_sql_version

    parts = [
        "-- pgpark, for PostgreSQL 14 or newer. For a database without it: psql -1 -v ON_ERROR_STOP=1 -f FILE\n"
        f"-- Carries pgmq {get_embedded_sql_version()} for servers that do not offer the extension.\n"
        f"{_COPYRIGHT_OF_PGMQ}"
        "set client_min_messages = warning;\n",
        pgmq_script(),
        _read("ledger.sql"),
    ]
    for file in sql_files():
        parts.append(f"-- sql/{file.name}\n\n{file.text}")
        parts.append(f"insert into pgpark.migration (name, hash) values ('{file.name}', '{file.hash}');\n")
    parts.append(f"{_CLOSE}\n{_RECORD}\n")
    parts.append("reset client_min_messages;\n")
    return "\n".join(parts)


def pgmq_script() -> str:
    """sql/pgmq.sql with pgmq's own install script filled in."""
    # Here, because it loads SQLAlchemy where that is installed, half of what a command took to start.
    from pgmq.install import get_embedded_install_sql, get_embedded_sql_version

    return (
        _read("pgmq.sql")
        .replace("{required}", REQUIRED_PGMQ)
        .replace("{bundled}", get_embedded_sql_version())
        .replace("{install_sql}", get_embedded_install_sql())
    )


@cache
def sql_files() -> tuple[SqlFile, ...]:
    """The migrations, then the functions, each in the order of their names."""
    paths = [*sorted((_root() / "migrations").glob("*.sql")), *sorted((_root() / "functions").glob("*.sql"))]
    files = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(_root()).as_posix()
        files.append(SqlFile(name, text, hashlib.sha256(text.encode()).hexdigest()))
    return tuple(files)


@cache
def _root() -> Path:
    """sql/: inside the package when it was installed from a wheel, beside it in a source tree."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "sql", package.parent / "sql"):
        if (candidate / "ledger.sql").is_file():
            return candidate
    raise MigrationError(f"the folder sql/ is missing beside or inside {package}; install pgpark again")


def _read(name: str) -> str:
    return (_root() / name).read_text(encoding="utf-8")


def _lock(connection: psycopg.Connection[DictRow]) -> None:
    """Waits for others who migrate: by a lock that anybody could take only until there is a table that nobody can."""
    if not _installed(connection):
        connection.execute("select pg_advisory_xact_lock(%s)", [_LOCK])
    if _installed(connection):
        connection.execute("lock table pgpark.migration in exclusive mode")


def _installed(connection: psycopg.Connection[DictRow]) -> bool:
    # Not to_regclass(): that may remember what was not there before somebody else's migration.
    there = "select from pg_class where relname = 'migration' and relnamespace::regnamespace::text = 'pgpark'"
    return connection.execute(there).rowcount > 0


def _ledger(connection: psycopg.Connection[DictRow]) -> dict[str, str]:
    if not _installed(connection):
        return {}
    return {row["name"]: row["hash"] for row in connection.execute("select name, hash from pgpark.migration")}


def _definitions(connection: psycopg.Connection[DictRow]) -> Jsonb | None:
    """The objects of the schema before this migration; None where none was recorded yet."""
    if "_inventory" not in _helpers(connection):
        return None
    rows = connection.execute("select kind, object, definition from pgpark._inventory()")
    return Jsonb({f"{row['kind']} {row['object']}": row["definition"] for row in rows})


def _helpers(connection: psycopg.Connection[DictRow]) -> set[str]:
    """The names of the helpers (`_name`) that are there."""
    rows = connection.execute(
        "select proname from pg_proc where pronamespace = to_regnamespace('pgpark') and starts_with(proname, '_')"
    )
    return {row["proname"] for row in rows}


def _drop_functions(connection: psycopg.Connection[Any], names: Iterable[str]) -> None:
    """Drops functions of these names, in whatever form they are there.

    `create or replace` can change neither a result type nor arguments. Public functions keep their signatures for ever
    and are replaced in place; helpers may change or go, and nobody outside the schema calls them.
    """
    found = connection.execute(
        "select oid::regprocedure::text as signature from pg_proc"
        " where pronamespace = to_regnamespace('pgpark') and proname = any (%s)",
        [list(names)],
    ).fetchall()
    for row in found:
        connection.execute(f"drop function {row['signature']}".encode())


def _apply(connection: psycopg.Connection[Any], name: str, text: str) -> None:
    try:
        connection.execute(text.encode())
    except psycopg.Error as error:
        message = error.diag.message_primary or one_line(error)
        hint = f" {error.diag.message_hint}" if error.diag.message_hint else ""
        raise MigrationError(f"{name}: {message}.{hint} Nothing was changed.") from error
