"""Calls inside the caller's own transaction: on a psycopg connection, or a SQLAlchemy session or connection with any
Postgres driver. SQLAlchemy is no dependency; it is there if the caller hands something of it over."""

from __future__ import annotations

import json
import re
from collections.abc import Coroutine
from datetime import datetime
from typing import Any, Protocol, TypeAlias, TypeVar

import psycopg
from psycopg.types.json import Jsonb

from pgpark.calls import Call, run_on, run_on_async
from pgpark.errors import BadInputError, DatabaseError, PgparkError, explained, one_line

T = TypeVar("T")


class SqlAlchemy(Protocol):
    """A SQLAlchemy Session or Connection."""

    def execute(self, statement: Any, parameters: Any = ..., /) -> Any: ...


class AsyncSqlAlchemy(Protocol):
    """A SQLAlchemy AsyncSession or AsyncConnection."""

    def execute(self, statement: Any, parameters: Any = ..., /) -> Coroutine[Any, Any, Any]: ...


Transaction: TypeAlias = "psycopg.Connection[Any] | SqlAlchemy"
AsyncTransaction: TypeAlias = "psycopg.AsyncConnection[Any] | AsyncSqlAlchemy"

_CAST = re.compile(r"cast\(%\((\w+)\)s as (\w+(?:\[\])?)\)")
_AS_TEXT = ("jsonb", "timestamptz")  # what drivers have types of their own for


def run_within(transaction: Transaction, call: Call[T]) -> T:
    """Runs a call in the caller's transaction, which the caller commits or rolls back.

    Raises the errors of pgpark.errors; after one, the transaction is aborted as usual in Postgres.
    """
    if isinstance(transaction, psycopg.Connection):
        return run_on(transaction, call)
    if _family(transaction) != "sync":
        raise _unknown(transaction, "psycopg Connection, or a SQLAlchemy Session or Connection")
    try:
        return call.read(_rows(transaction.execute(*_rendered(call))))
    except PgparkError:
        raise
    except Exception as error:
        raise _translated(error) from error


async def run_within_async(transaction: AsyncTransaction, call: Call[T]) -> T:
    """The same for asyncio."""
    if isinstance(transaction, psycopg.AsyncConnection):
        return await run_on_async(transaction, call)
    if _family(transaction) != "async":
        raise _unknown(transaction, "psycopg AsyncConnection, or a SQLAlchemy AsyncSession or AsyncConnection")
    try:
        return call.read(_rows(await transaction.execute(*_rendered(call))))
    except PgparkError:
        raise
    except Exception as error:
        raise _translated(error) from error


def require_transaction(transaction: object, *, asynchronous: bool) -> None:
    """Raises BadInputError for what is no connection or session that calls can run on."""
    kind: type = psycopg.AsyncConnection if asynchronous else psycopg.Connection
    wanted = "async" if asynchronous else "sync"
    if not isinstance(transaction, kind) and _family(transaction) != wanted:
        a = "Async" if asynchronous else ""
        raise _unknown(transaction, f"psycopg {a}Connection, or a SQLAlchemy {a}Session or {a}Connection")


def _family(transaction: object) -> str | None:
    """Whether it is something of SQLAlchemy, and of which kind; without importing it."""
    modules = [each.__module__ for each in type(transaction).__mro__]
    if not any(module.split(".")[0] == "sqlalchemy" for module in modules) or not hasattr(transaction, "execute"):
        return None
    return "async" if any(module.startswith("sqlalchemy.ext.asyncio") for module in modules) else "sync"


def _unknown(transaction: object, wanted: str) -> BadInputError:
    kind = type(transaction)
    return BadInputError(f"on() takes a {wanted}, not {kind.__module__}.{kind.__qualname__}")


def _rendered(call: Call[Any]) -> tuple[Any, dict[str, Any]]:
    """The statement for SQLAlchemy. Rows come back as JSON text, which every driver gives alike."""
    from sqlalchemy import text

    def bound(found: re.Match[str]) -> str:
        name, kind = found.groups()
        return f"cast(cast(:{name} as text) as {kind})" if kind in _AS_TEXT else f"cast(:{name} as {kind})"

    statement = _CAST.sub(bound, call.statement.as_string())
    parameters = {name: _parameter(value) for name, value in call.parameters.items()}
    return text(f"select cast(to_jsonb(r) as text) from ({statement}) r"), parameters


def _parameter(value: Any) -> Any:
    if isinstance(value, Jsonb):
        try:
            return json.dumps(value.obj)
        except (TypeError, ValueError) as error:
            raise BadInputError(f"the payload is not JSON: {one_line(error)}") from error
    return value.isoformat() if isinstance(value, datetime) else value


def _rows(result: Any) -> list[dict[str, Any]]:
    return [json.loads(text) for text in result.scalars()]


def _translated(error: Exception) -> Exception:
    """What an error of SQLAlchemy means. Its own text is not used: it repeats the parameters, and so the payload."""
    from sqlalchemy.exc import SQLAlchemyError

    if not isinstance(error, SQLAlchemyError):
        return error
    origin = getattr(error, "orig", None)
    if origin is None:
        return DatabaseError(f"this SQLAlchemy transaction cannot be used: {type(error).__name__}")
    source = origin.__cause__ if getattr(origin, "diag", None) is None and origin.__cause__ is not None else origin
    parts = getattr(source, "diag", None)  # psycopg and psycopg2 have this; asyncpg has attributes of its own
    state = getattr(source, "sqlstate", None) or getattr(origin, "pgcode", None)
    message, hint, detail = (
        getattr(parts, f"message_{name}", None) if parts is not None else getattr(source, own, None)
        for name, own in (("primary", "message"), ("hint", "hint"), ("detail", "detail"))
    )
    return explained(state, message or one_line(source) or type(source).__name__, hint, detail)
