"""`pgpark audit`: what happened to tasks, in pools that write it down."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import click
import psycopg
from psycopg.rows import DictRow

from pgpark import calls
from pgpark.cli.common import Seconds, Settings, cell, database_options, moment, print_json, print_rows
from pgpark.models import AuditEvent

_COLUMNS = ("at", "event", "pool", "task_id", "attempt", "worker", "tenant", "priority", "units", "reason")
_PAGE = 1000
# What is committed late appears among what was seen before; who follows looks back so far.
_LOOK_BACK = timedelta(minutes=1)


@click.command()
@click.argument("pool", required=False)
@click.option(
    "--task",
    "task_id",
    envvar="PGPARK_AUDIT_TASK",
    type=click.IntRange(min=0),
    metavar="ID",
    help="Only this task's.",
)
@click.option("--tenant", help="Only this tenant's.")
@click.option("--event", help="Only these: submitted, rejected, started, completed, failed, retried, ...")
@click.option(
    "--since", help="Only what happened at this time or later: 2030-01-31T12:00Z, or -90s, -2h, -1d from now."
)
@click.option("--until", help="Only what happened before this time; the same forms.")
@click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(min=1), help="At most so many, the last ones."
)
@click.option("--follow", is_flag=True, help="Go on with what happens from now on, until interrupted.")
@click.option(
    "--interval", default=1.0, show_default=True, type=Seconds(0.1), help="With --follow: seconds between looks."
)
@database_options
def audit(
    settings: Settings,
    pool: str | None,
    task_id: int | None,
    tenant: str | None,
    event: str | None,
    since: str | None,
    until: str | None,
    limit: int,
    follow: bool,
    interval: float,
) -> None:
    """Show what happened to the tasks of a POOL, or of all, in pools with `audit: true`; oldest first."""
    if follow and until is not None:
        raise click.UsageError("--follow has no end; leave out --until")
    with settings.connection() as connection:
        asked = functools.partial(calls.audit, pool, task_id, tenant, event=event)
        begin, end = moment(connection, since), moment(connection, until)
        if follow:
            for row in _following(connection, asked, begin, limit, interval):
                print_json(row) if settings.json else click.echo(
                    "  ".join(cell(getattr(row, name)) for name in _COLUMNS)
                )
                sys.stdout.flush()
        rows = _last(connection, functools.partial(asked, since=begin), limit, until=end)
    print_rows(settings, rows, _COLUMNS, "no such event was written; pools write with `audit: true` in their config")


def _last(
    connection: psycopg.Connection[DictRow], asked: Callable[..., calls.Call[list[AuditEvent]]], limit: int, **page: Any
) -> list[AuditEvent]:
    """The last so many, oldest first; page by page, so that no statement takes long."""
    found: list[AuditEvent] = []
    while len(found) < limit:
        wanted = min(_PAGE, limit - len(found))
        rows = calls.run_on(connection, asked(max_events=wanted, **page))
        found += rows
        if len(rows) < wanted:
            break
        page |= {"until": rows[-1].at, "before": rows[-1].event_id}
    return found[::-1]


def _following(
    connection: psycopg.Connection[DictRow],
    asked: Callable[..., calls.Call[list[AuditEvent]]],
    since: str | None,
    limit: int,
    interval: float,
) -> Iterator[AuditEvent]:
    """The last so many, then what comes, each once and in the order in which it is seen."""
    (row,) = connection.execute("select pgpark._now() as now").fetchall()
    newest: datetime = row["now"]
    seen = {row.event_id: row.at for row in _lately(connection, asked, newest)}
    shown = _last(connection, functools.partial(asked, since=since), limit)
    while True:
        yield from shown
        seen |= {row.event_id: row.at for row in shown}
        newest = max([newest, *seen.values()])
        seen = {event_id: at for event_id, at in seen.items() if at >= newest - _LOOK_BACK}
        time.sleep(interval)
        shown = [row for row in _lately(connection, asked, newest) if row.event_id not in seen]


def _lately(
    connection: psycopg.Connection[DictRow], asked: Callable[..., calls.Call[list[AuditEvent]]], newest: datetime
) -> list[AuditEvent]:
    return _last(connection, functools.partial(asked, since=newest - _LOOK_BACK), sys.maxsize)
