"""`pgpark notifier`: delivering callbacks, and those that were given up."""

from __future__ import annotations

import logging

import click

from pgpark import calls
from pgpark.cli.common import (
    Settings,
    database_options,
    log_json_option,
    messages,
    poll_options,
    print_json,
    print_rows,
    seconds_between_looks,
)
from pgpark.logs import start_logging
from pgpark.notifier import Notifier, NotifierSettings


@click.group()
def notifier() -> None:
    """Callbacks: outcomes that are posted to the URL of their pool (mailbox.notifier in its config)."""


@notifier.command("run")
@click.option("--pool", help="Only this pool's (default: every pool's).")
@click.option(
    "--concurrency",
    default=10,
    show_default=True,
    type=click.IntRange(1, 100),
    help="Most deliveries at once for one pool.",
)
@poll_options
@click.option("-v", "--verbose", is_flag=True, help="Log each delivery.")
@log_json_option
@database_options
def run_(
    settings: Settings,
    pool: str | None,
    concurrency: int,
    poll: bool,
    poll_secs: float | None,
    verbose: bool,
    log_json: bool,
) -> None:
    """Deliver callbacks until SIGTERM or SIGINT; a second one does not wait for deliveries that are under way.

    Workers do this too for their own pool. Any number may run at once.
    """
    start_logging(logging.DEBUG if verbose else logging.INFO, log_json, **({} if pool is None else {"pool": pool}))
    with settings.database() as dsn:
        Notifier(
            NotifierSettings(
                dsn=dsn,
                pool=pool,
                concurrency=concurrency,
                listen=not poll,
                poll_secs=seconds_between_looks(poll, poll_secs),
            )
        ).run()


@notifier.command("list")
@click.option("--pool", help="Only this pool's.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(min=1), help="At most this many.")
@database_options
def list_(settings: Settings, pool: str | None, limit: int) -> None:
    """List callbacks that were given up, oldest first: a client error such as 410, or no attempts left."""
    with settings.connection() as connection:
        rows = calls.run_on(connection, calls.dead_letters(pool, limit))
    columns = ("callback_id", "task_id", "pool", "tenant", "url", "attempts", "http_status", "error", "died_at")
    print_rows(settings, rows, columns, "no callback was given up")


@notifier.command()
@click.argument("callback_ids", type=int, nargs=-1, metavar="[CALLBACK_ID...]")
@click.option(
    "--all",
    "everything",
    envvar="PGPARK_NOTIFIER_RETRY_ALL",
    is_flag=True,
    help="All of them (with --pool: all of that pool).",
)
@click.option("--pool", help="Only this pool's.")
@database_options
def retry(settings: Settings, callback_ids: tuple[int, ...], everything: bool, pool: str | None) -> int:
    """Deliver callbacks that were given up after all. Exit 1 if one that was named was not there."""
    if everything == bool(callback_ids):
        raise click.UsageError("give either ids, as pgpark notifier list shows them, or --all")
    with settings.connection() as connection:
        retried = calls.run_on(connection, calls.retry_callbacks(None if everything else callback_ids, pool))
    if settings.json:
        print_json({"retried": retried})
    messages.print(f"{retried} {'' if everything else f'of {len(set(callback_ids))} '}put back into the outbox")
    return 0 if everything or retried == len(set(callback_ids)) else 1
