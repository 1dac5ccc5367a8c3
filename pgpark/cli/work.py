"""`pgpark worker` and `pgpark maintain`: running tasks, and the timers."""

from __future__ import annotations

import logging
import os

import click
from click.core import ParameterSource

from pgpark import calls
from pgpark.cli.common import MOST_UNITS, Seconds, Settings, database_options, print_rows
from pgpark.executors import CommandExecutor, Executor, FunctionExecutor, load_handler
from pgpark.worker import Worker, WorkerSettings, default_name

_POLL_SECS_WITHOUT_LISTEN = 1.0
_POLL_SECS_AS_BACKSTOP = 30.0


@click.command()
@click.argument("pool", envvar="PGPARK_WORKER_POOL")
@click.option("--handler", metavar="MODULE:FUNCTION", help="Python function that gets the payload; async or plain.")
@click.option(
    "--exec",
    "command",
    envvar="PGPARK_WORKER_EXEC",
    metavar="COMMAND",
    help="Program that gets the payload as JSON on standard input.",
)
@click.option(
    "--units",
    type=click.IntRange(1, MOST_UNITS),
    help="This worker's own capacity (default: only the pool's). See also --concurrency.",
)
@click.option(
    "--concurrency",
    default=8,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help="Most tasks at once, whatever their units.",
)
@click.option("--name", help="Name of this worker; must be its own (default: host, process id, random letters).")
@click.option("--poll", is_flag=True, help="Do not LISTEN; look for work again and again (behind PgBouncer).")
@click.option(
    "--poll-secs",
    type=Seconds(0.01),
    help=f"Seconds between looks (default: {_POLL_SECS_WITHOUT_LISTEN:g} with --poll; else "
    f"{_POLL_SECS_AS_BACKSTOP:g}, as a backstop).",
)
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=Seconds(0),
    help="Seconds that running tasks get after SIGTERM; then they are put back. A second SIGTERM puts them back now.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log each task, and the tracebacks of handlers that fail.")
@database_options
def worker(
    settings: Settings,
    pool: str,
    handler: str | None,
    command: str | None,
    units: int | None,
    concurrency: int,
    name: str | None,
    poll: bool,
    poll_secs: float | None,
    grace: float,
    verbose: bool,
) -> None:
    """Run the tasks of a POOL until SIGTERM or SIGINT."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    executor = _executor(handler, command)
    with settings.database() as dsn:
        clean = Worker(
            WorkerSettings(
                dsn=dsn,
                pool=pool,
                name=name or default_name(),
                units=units,
                concurrency=concurrency,
                listen=not poll,
                poll_secs=poll_secs or (_POLL_SECS_WITHOUT_LISTEN if poll else _POLL_SECS_AS_BACKSTOP),
                grace_secs=grace,
            ),
            executor,
        ).run()
    if not clean:  # a handler that cannot be stopped; its task is released, so it must not go on
        logging.shutdown()
        os._exit(0)


@click.command()
@click.argument("pool", required=False)
@database_options
def maintain(settings: Settings, pool: str | None) -> None:
    """Run the timers of a POOL, or of all: deadlines, backoffs, leases, retention. Workers do this by themselves."""
    with settings.connection() as connection:
        report = calls.run_on(connection, calls.maintain(pool))
    print_rows(settings, [report], ("expired", "reclaimed", "promoted", "purged", "next_due"), "")


def _executor(handler: str | None, command: str | None) -> Executor:
    if handler is not None and command is not None:  # one on the command line wins over one from the environment
        typed = click.get_current_context().get_parameter_source
        if typed("handler") is not typed("command"):
            handler, command = (handler, None) if typed("command") is ParameterSource.ENVIRONMENT else (None, command)
    if (handler is None) == (command is None):
        raise click.UsageError("give either --handler or --exec")
    if handler is not None:
        return FunctionExecutor(load_handler(handler))
    assert command is not None
    return CommandExecutor(command)
