"""Numbers and pictures of pools, and what happened to tasks."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from psycopg import sql

from pgpark.calls.call import Call, described, many, value_of
from pgpark.models import AuditEvent, Explained, HistoryStep, Metric, PoolStats


def stats(pool: str | None = None) -> Call[list[PoolStats]]:
    """The numbers of one pool, or of all."""
    return described("park_stats", many(PoolStats), pool=pool)


def metrics(pool: str | None = None) -> Call[list[Metric]]:
    """What Prometheus would read of one pool, or of all."""
    return described("park_metrics", many(Metric), pool=pool)


def demand(pool: str) -> Call[int]:
    """How many units a pool could use at once: those in use, and those of what is parked."""
    return described("park_demand", value_of("park_demand"), pool=pool)


def history(pool: str | None = None, period_secs: float = 3600, step_secs: float = 60) -> Call[list[HistoryStep]]:
    """What a pool (None: each) did lately: a row for each step, the oldest first; see park_history."""
    statement = sql.SQL(
        "select * from pgpark.park_history(pool => cast(%(pool)s as text),"
        " period => make_interval(secs => %(period)s), step => make_interval(secs => %(step)s))"
    ).format()
    parameters = {"pool": pool, "period": float(period_secs), "step": float(step_secs)}
    return Call(statement, parameters, many(HistoryStep))


def explain(pool: str, max_tasks: int = 20) -> Call[list[Explained]]:
    """Why the first waiting tasks of a pool are not running."""
    return described("park_explain", many(Explained), pool=pool, max_tasks=max_tasks)


def lot(pool: str | None = None, max_tasks: int = 100) -> Call[dict[str, Any]]:
    """The picture of one pool, or (None) all in a few numbers: the object that park_lot describes."""
    return described("park_lot", value_of("park_lot"), pool=pool, max_tasks=max_tasks)


def lot_text(pool: str | None = None, max_tasks: int = 100) -> Call[str]:
    """The same as JSON text, just as Postgres writes it."""
    statement = sql.SQL("select cast(park_lot as text) from ({}) picture").format(lot(pool, max_tasks).statement)
    return Call(statement, {"pool": pool, "max_tasks": max_tasks}, value_of("park_lot"))


def audit(
    pool: str | None = None,
    task_id: int | None = None,
    tenant: str | None = None,
    since: datetime | str | None = None,
    until: datetime | str | None = None,
    event: str | None = None,
    max_events: int = 100,
    before: int | None = None,
) -> Call[list[AuditEvent]]:
    """What happened to tasks, newest first; see park_audit. To read on, `until` and `before` are the `at` and the
    `event_id` of the last row."""
    return described(
        "park_audit",
        many(AuditEvent),
        pool=pool,
        task_id=task_id,
        tenant=tenant,
        since=since,
        until=until,
        event=event,
        max_events=max_events,
        before=before,
    )
