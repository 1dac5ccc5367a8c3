"""`pgpark stats` and `explain`: what the pools are doing, and why a task is not running."""

from __future__ import annotations

import contextlib
import sys
import time

import click
from rich.live import Live

from pgpark import calls
from pgpark.cli.common import Seconds, Settings, database_options, fitting, print_rows, results_console
from pgpark.models import PoolStats

_COLUMNS = list(PoolStats.model_fields)


@click.command()
@click.argument("pool", required=False)
@click.option("--watch", is_flag=True, help="Show them again and again until interrupted.")
@click.option("--interval", default=1.0, show_default=True, type=Seconds(0.1), help="Seconds between.")
@database_options
def stats(settings: Settings, pool: str | None, watch: bool, interval: float) -> None:
    """Show the numbers of a POOL, or of all."""
    empty = "there are no pools yet; make one: pgpark pool put NAME --max-units N"
    with settings.connection() as connection:
        if not watch:
            rows = calls.run_on(connection, calls.stats(pool))
            print_rows(settings, rows, _COLUMNS, empty)
            return
        drawn = sys.stdout.isatty() and not settings.json
        with Live(console=results_console(), auto_refresh=False) if drawn else contextlib.nullcontext() as live:
            while True:
                now = calls.run_on(connection, calls.stats(pool))
                if live is not None:
                    live.update(fitting(now, _COLUMNS, live.console), refresh=True)
                else:
                    print_rows(settings, now, _COLUMNS, empty)
                    sys.stdout.flush()
                time.sleep(interval)


@click.command()
@click.argument("pool")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(min=1), help="At most this many tasks.")
@database_options
def explain(settings: Settings, pool: str, limit: int) -> None:
    """Say for the first waiting tasks of a POOL why each is not running."""
    with settings.connection() as connection:
        rows = calls.run_on(connection, calls.explain(pool, limit))
    print_rows(settings, rows, ("task_id", "position", "why"), f"nothing waits in {pool}")
