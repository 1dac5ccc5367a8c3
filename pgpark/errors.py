"""What can go wrong, in words for people. Every error here prints as one line; the command line turns its class into an
exit code."""

from __future__ import annotations

from typing import Any

import psycopg


class PgparkError(Exception):
    """Base of all errors that pgpark raises on purpose."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # what it repeats of an argument may have line breaks


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


class ConflictError(DatabaseError):
    """Another transaction was in the way (a deadlock, a lock timeout); nothing was done, and trying again helps."""


class WrongIsolationError(DatabaseError):
    """The caller's transaction is REPEATABLE READ or SERIALIZABLE."""


class NotGrantedError(DatabaseError):
    """The role may not do that; `pgpark grant` would let it."""


class UnknownTokenError(PgparkError):
    """There is no such token, or not any more."""


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks."""
    try:
        return " ".join(str(error).split())
    except Exception:  # an exception of somebody else's whose text cannot be made
        return type(error).__name__


class BadResultError(PgparkError):
    """A result does not fit the type that the client expects; `message` is the outcome as it is in the mailbox."""

    def __init__(self, text: str, message: Any) -> None:
        super().__init__(text)
        self.message = message


def translated(error: psycopg.Error) -> PgparkError:
    """The error of this module that says what a database error means. Use as `raise translated(e) from e`."""
    diag = error.diag
    message = diag.message_primary or one_line(error) or type(error).__name__
    return explained(error.sqlstate, message, diag.message_hint, diag.message_detail)


def explained(state: str | None, message: str, hint: str | None, detail: str | None) -> PgparkError:
    """The same for the parts of an error of any driver; `state` is its SQLSTATE."""
    text = one_line(Exception(f"{message}. {hint}" if hint else message))
    if state == "42704" and message.startswith("unknown pool"):
        return UnknownPoolError(text)
    if state == "28000" and message == "unknown token":
        return UnknownTokenError(text)
    if state in {"22023", "42710"}:
        detail = detail or ""
        place = detail.removeprefix("element ")
        return BadInputError(text, int(place) if place.isdigit() and detail.startswith("element ") else None)
    if state is not None and state.startswith(("22", "54")):  # bad data, too large
        return BadInputError(text)
    if state == "55006" and message.startswith("pool "):
        return PoolInUseError(text)
    if state in {"40001", "40P01", "55P03"}:
        return ConflictError(text)
    if state == "25001":
        return WrongIsolationError(text)
    if state == "42501":
        return NotGrantedError(text if hint else f"{text}; an admin can change that: pgpark grant")
    if state in {"3F000", "42883", "42P01"} and "pgpark" in message:
        return NotMigratedError(f"this database has no pgpark, or an older one ({message}); run: pgpark migrate")
    return DatabaseError(text)
