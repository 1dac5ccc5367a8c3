"""What can go wrong, in words for people. Every error here prints as one line; the command line turns its class into an
exit code."""

from __future__ import annotations

import psycopg


class PgparkError(Exception):
    """Base of all errors that pgpark raises on purpose."""


class BadInputError(PgparkError, ValueError):
    """An argument, file or config is wrong; nothing was done. `element` is the place in a batch, counted from 1."""

    def __init__(self, message: str, element: int | None = None) -> None:
        super().__init__(message)
        self.element = element


class UnknownPoolError(BadInputError):
    """There is no pool of that name."""


class PoolInUseError(PgparkError):
    """The pool still has live tasks."""


class DatabaseError(PgparkError):
    """The server cannot be reached, is too old, or refused."""


class NotMigratedError(DatabaseError):
    """The database has no pgpark, or an older one."""


class MigrationError(DatabaseError):
    """A migration cannot be applied; the database is as it was before."""


class WrongIsolationError(DatabaseError):
    """The caller's transaction is REPEATABLE READ or SERIALIZABLE."""


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks."""
    try:
        return " ".join(str(error).split())
    except Exception:  # an exception of somebody else's whose text cannot be made
        return type(error).__name__


def translated(error: psycopg.Error) -> PgparkError:
    """The error of this module that says what a database error means. Use as `raise translated(e) from e`."""
    message = error.diag.message_primary or one_line(error) or type(error).__name__
    hint = error.diag.message_hint
    text = one_line(Exception(f"{message}. {hint}" if hint else message))
    state = error.sqlstate
    if state == "42704" and message.startswith("unknown pool"):
        return UnknownPoolError(text)
    if state in {"22023", "42710"}:
        detail = error.diag.message_detail or ""
        place = detail.removeprefix("element ")
        return BadInputError(text, int(place) if place.isdigit() and detail.startswith("element ") else None)
    if state is not None and state.startswith(("22", "54")):  # bad data, too large
        return BadInputError(text)
    if state == "55006" and message.startswith("pool "):
        return PoolInUseError(text)
    if state == "25001":
        return WrongIsolationError(text)
    if state in {"3F000", "42883", "42P01"} and "pgpark" in message:
        return NotMigratedError(f"this database has no pgpark, or an older one ({message}); run: pgpark migrate")
    return DatabaseError(text)
