"""Callbacks: outcomes that are posted to a server."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from pgpark.calls.call import Call, described, many, value_of
from pgpark.models import Callback, CallbacksDue, DeadLetter


def callbacks(pool: str | None = None, max_callbacks: int = 10) -> Call[list[Callback]]:
    """Takes callbacks of one pool, or of all, that are due, for delivery; see park_callbacks."""
    statement = sql.SQL(
        "select callback_id, task_id, pool, attempt, url, auth_header, timeout_secs, body::text"
        " from pgpark.park_callbacks(max_callbacks => %(max_callbacks)s::int, pool => %(pool)s::text)"
    ).format()
    return Call(statement, {"pool": pool, "max_callbacks": max_callbacks}, many(Callback))


def callbacks_due() -> Call[list[CallbacksDue]]:
    """When the next callback of each pool is due."""
    statement = sql.SQL(
        "select d.*, extract(epoch from d.due - pgpark._now())::float8 as due_in_secs"
        " from pgpark.park_callbacks_due() d"
    ).format()
    return Call(statement, {}, many(CallbacksDue))


def callback_done(
    callback_id: int,
    attempt: int,
    http_status: int | None = None,
    error: str | None = None,
    retry_after_secs: float | None = None,
) -> Call[str]:
    """Reports an attempt to deliver a callback: `delivered`, `retry`, `dead` or `unknown`."""
    return described(
        "park_callback_done",
        value_of("park_callback_done"),
        callback_id=callback_id,
        attempt=attempt,
        http_status=http_status,
        error=error,
        retry_after_secs=retry_after_secs,
    )


def dead_letters(pool: str | None = None, max_letters: int = 50) -> Call[list[DeadLetter]]:
    """Callbacks of one pool, or of all, that were given up; oldest first."""
    return described("park_dead_letters", many(DeadLetter), pool=pool, max_letters=max_letters)


def retry_callbacks(callback_ids: Sequence[int] | None = None, pool: str | None = None) -> Call[int]:
    """Puts dead letters (None: all) of one pool, or of all, back into the outbox; returns how many."""
    ids = None if callback_ids is None else list(callback_ids)
    return described("park_retry_callbacks", value_of("park_retry_callbacks"), callback_ids=ids, pool=pool)
