"""Outcomes and partial results, for whoever comes back for them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from psycopg import sql

from pgpark.calls.call import Call, described, many, maybe, value_of
from pgpark.models import Followed, Message, Part


def result(task_id: int) -> Call[Message | None]:
    """The outcome of a task, or None while there is none."""
    return described("park_result", maybe(Message), task_id=task_id)


def results(task_ids: Sequence[int]) -> Call[list[Message]]:
    """The outcomes of those of these tasks that have one."""
    statement = sql.SQL(
        "select r.* from unnest(cast(%(task_ids)s as bigint[])) w (task_id)"
        " cross join lateral pgpark.park_result(w.task_id) r"
    ).format()
    return Call(statement, {"task_ids": list(task_ids)}, many(Message))


def parts(task_id: int, after: int = 0, max_parts: int = 1000) -> Call[list[Part]]:
    """What a task has emitted with a number greater than `after`, in order."""
    return described("park_parts", many(Part), task_id=task_id, after=after, max_parts=max_parts)


def fetch(
    tenant: str,
    user_id: str | None = None,
    session_id: str | None = None,
    since: datetime | str | None = None,
    max_messages: int = 50,
) -> Call[list[Message]]:
    """Outcomes of a tenant, oldest first; None for user or session means any."""
    return described(
        "park_fetch",
        many(Message),
        tenant=tenant,
        user_id=user_id,
        session_id=session_id,
        since=since,
        max_messages=max_messages,
    )


def fetch_of(
    pool: str,
    tenant: str,
    user_id: str | None = None,
    session_id: str | None = None,
    since: datetime | str | None = None,
    max_messages: int = 50,
) -> Call[list[Message]]:
    """Outcomes that a tenant has from one pool, oldest first; None for user or session means any."""
    return described(
        "park_fetch_of",
        many(Message),
        pool=pool,
        tenant=tenant,
        user_id=user_id,
        session_id=session_id,
        since=since,
        max_messages=max_messages,
    )


def follow(
    tenant: str,
    bookmark: str | None = None,
    user_id: str | None = None,
    session_id: str | None = None,
    since: datetime | str | None = None,
    pool: str | None = None,
    max_messages: int = 50,
) -> Call[list[Followed]]:
    """Outcomes of a tenant that were not given yet; `bookmark` is that of the last one, None: from the beginning."""
    return described(
        "park_follow",
        many(Followed),
        tenant=tenant,
        bookmark=bookmark,
        user_id=user_id,
        session_id=session_id,
        since=since,
        pool=pool,
        max_messages=max_messages,
    )


def ack(message_ids: Sequence[int]) -> Call[int]:
    """Takes messages out of the mailbox; returns how many were there."""
    return described("park_ack", value_of("park_ack"), message_ids=list(message_ids))
