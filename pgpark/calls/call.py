"""A call: a statement with its parameters, and how to read what it returns; how one is described, and run.

The functions of the SQL contract themselves are described in the modules beside this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from psycopg import AsyncConnection, Connection, sql
from psycopg import Error as PsycopgError
from psycopg.rows import dict_row

from pgpark.errors import BadInputError, translated
from pgpark.models import Row

T = TypeVar("T")
U = TypeVar("U")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R", bound=Row)
Rows = list[dict[str, Any]]
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """A statement with its parameters, and how to read what it returns."""

    statement: sql.Composed
    parameters: Mapping[str, Any]
    read: Callable[[Rows], T_co]

    def __post_init__(self) -> None:
        for name, value in self.parameters.items():
            for text in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(text, str) and ("\0" in text or (not text.isascii() and _HALF.search(text))):
                    what = "a NUL character" if "\0" in text else "half of a surrogate pair"
                    raise BadInputError(f"{name} must not hold {what}: Postgres cannot store it")

    def then(self, convert: Callable[[T_co], U]) -> Call[U]:
        """The same call, what it returns being converted."""
        return Call(self.statement, self.parameters, lambda rows: convert(self.read(rows)))


def run_on(connection: Connection[Any], call: Call[T]) -> T:
    """Runs a call on the caller's own connection and in its transaction.

    Raises the errors of pgpark.errors; after one, the transaction is aborted as usual in Postgres.
    """
    try:
        with connection.cursor(row_factory=dict_row) as cursor:
            return call.read(cursor.execute(call.statement, call.parameters).fetchall())
    except PsycopgError as error:
        raise translated(error) from error


async def run_on_async(connection: AsyncConnection[Any], call: Call[T]) -> T:
    """The same on an asyncio connection."""
    try:
        async with connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(call.statement, call.parameters)
            return call.read(await cursor.fetchall())
    except PsycopgError as error:
        raise translated(error) from error


# Arguments whose type Postgres cannot see from the value alone.
_CASTS = {
    "task_id": "bigint",
    "task_ids": "bigint[]",
    "message_ids": "bigint[]",
    "callback_id": "bigint",
    "callback_ids": "bigint[]",
    "tenants": "text[]",
    "kinds": "text[]",
    "expires_at": "timestamptz",
    "requests_per_sec": "float8",
    "burst": "int",
    "pools": "text[]",
    "http_status": "int",
    "retry_after_secs": "float8",
    "max_letters": "int",
    "attempt": "int",
    "parts": "jsonb",
    "emissions": "jsonb",
    "first": "int",
    "after": "int",
    "max_parts": "int",
    "units": "int",
    "max_tasks": "int",
    "max_units": "int",
    "max_messages": "int",
    "prompt_tokens": "int",
    "max_tokens": "int",
    "result": "jsonb",
    "deadline": "timestamptz",
    "run_at": "timestamptz",
    "since": "timestamptz",
    "until": "timestamptz",
    "max_events": "int",
    "before": "bigint",
    "force": "boolean",
    "payload": "jsonb",
    "tasks": "jsonb",
    "outcomes": "jsonb",
    "config": "jsonb",
    "changes": "jsonb",
    "cost_model": "jsonb",
}


def described(function: str, read: Callable[[Rows], T], **arguments: Any) -> Call[T]:
    """A call of a function of the schema with these arguments.

    An argument may itself be a call that returns one value; where both have a parameter, it is the same.
    """
    parameters: dict[str, Any] = {}
    named: list[sql.Composed] = []
    for name, argument in arguments.items():
        given: sql.Composable = sql.Placeholder(name)
        if isinstance(argument, Call):
            parameters |= argument.parameters
            given = sql.SQL("({})").format(argument.statement)
        else:
            parameters[name] = argument
        kind = sql.SQL(_CASTS.get(name, "text"))
        named.append(sql.SQL("{} => cast({} as {})").format(sql.Identifier(name), given, kind))
    listed = sql.SQL(", ").join(named)
    return Call(sql.SQL("select * from {}({})").format(sql.Identifier("pgpark", function), listed), parameters, read)


def many(row: type[R]) -> Callable[[Rows], list[R]]:
    """Reads a model from each row."""
    return lambda rows: [row.model_validate(values) for values in rows]


def one(row: type[R]) -> Callable[[Rows], R]:
    """Reads a model from the only row."""
    return lambda rows: row.model_validate(rows[0])


def maybe(row: type[R]) -> Callable[[Rows], R | None]:
    """Reads a model from the only row; None where there is none."""
    return lambda rows: row.model_validate(rows[0]) if rows else None


def value_of(column: str) -> Callable[[Rows], Any]:
    """Reads this column of the only row."""
    return lambda rows: rows[0][column]
