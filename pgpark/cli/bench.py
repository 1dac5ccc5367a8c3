"""`pgpark bench`: what your own database does for pgpark, in a minute."""

from __future__ import annotations

import contextlib

import click
import psycopg
from psycopg.rows import DictRow
from rich.table import Table

from pgpark.benchmark import SETTINGS, Measured, Plan, measure
from pgpark.cli.common import Seconds, Settings, database_options, messages, print_rows, results_console
from pgpark.database import connect, require_migrated

_RATES = {
    "submit_one_by_one": "submit, one by one",
    "submit_in_bulk": "submit, in bulk",
    "claim_and_finish_one_by_one": "claim and finish, one by one",
    "drain": "claim and finish, {batch} at a time, {workers}",
}
_LATENCIES = {
    "select_1": "select 1, its round trip",
    "notify": "NOTIFY until it is heard",
    "submit_to_claim": "submitted until a waiting worker has it",
    "finish_to_client": "finished until a waiting client has the result",
}


@click.command()
@click.option("--tasks", default=20_000, show_default=True, type=click.IntRange(10, 10_000_000), help="Tasks to drain.")
@click.option("--batch", default=100, show_default=True, type=click.IntRange(1, 10_000), help="Tasks of a claim.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 100), help="Connections that drain.")
@click.option("--seconds", default=8.0, show_default=True, type=Seconds(0.1), help="At most, for each measurement.")
@click.option("--poll", is_flag=True, help="Do not LISTEN (behind PgBouncer): leaves out what waits.")
@database_options
def bench(settings: Settings, tasks: int, batch: int, workers: int, seconds: float, poll: bool) -> None:
    """Measure your database: submits, claims and finishes per second, and how soon who waits is woken.

    Takes less than a minute, in a pool of its own that is removed afterwards.
    """
    plan = Plan(tasks=tasks, batch=batch, workers=workers, seconds=seconds, listen=not poll)
    with settings.database() as dsn:
        with contextlib.closing(connect(dsn, prepare=plan.listen)) as connection:
            require_migrated(connection)
            about = [f"PostgreSQL {connection.info.parameter_status('server_version')}"]
            about += [f"{name} {_setting(connection, name)}" for name in SETTINGS]
        measured = measure(dsn, plan, lambda line: messages.print(line, soft_wrap=True))
    if settings.json:
        print_rows(settings, measured, (), "")
        return
    out = results_console()
    out.print(f"{', '.join(about)}; tasks of 200 bytes\n")
    out.print(_drawn(measured, plan, _RATES, rates=True))
    out.print()
    out.print(_drawn(measured, plan, _LATENCIES, rates=False))


def _drawn(measured: list[Measured], plan: Plan, names: dict[str, str], *, rates: bool) -> Table:
    """The rates, or the latencies, as a table."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    drawn.add_column("" if rates else "milliseconds")
    for column in ("tasks/s", "tasks", "call, p50 ms", "p99 ms") if rates else ("p50", "p99", "samples"):
        drawn.add_column(column, justify="right")
    found = {row.measure: row for row in measured}
    workers = "1 connection" if plan.workers == 1 else f"{plan.workers} connections"
    for measure_, name in names.items():
        if (row := found.get(measure_)) is not None:
            times = [f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}"]
            figures = [f"{row.per_sec:,.0f}", f"{row.count:,}", *times] if rates else [*times, str(row.count)]
            drawn.add_row(name.format(batch=plan.batch, workers=workers), *figures)
    return drawn


def _setting(connection: psycopg.Connection[DictRow], name: str) -> str:
    row = connection.execute("select current_setting(%s) as value", [name]).fetchone()
    assert row is not None
    return str(row["value"])
