"""`pgpark worker` and `pgpark maintain`: running tasks, and the timers."""

from __future__ import annotations

import contextlib
import gc
import logging
import os

import click
from click.core import ParameterSource

from pgpark import calls, telemetry
from pgpark.cli.common import (
    MOST_UNITS,
    Seconds,
    Settings,
    database_options,
    log_json_option,
    poll_options,
    print_rows,
    seconds_between_looks,
)
from pgpark.errors import BadInputError
from pgpark.executors import CommandExecutor, Executor, FunctionExecutor, load_handler
from pgpark.logs import start_logging
from pgpark.processes import ProcessExecutor
from pgpark.worker import Worker, WorkerSettings, default_name


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
    "--exec-env",
    "environment",
    envvar="PGPARK_WORKER_EXEC_ENV",
    multiple=True,
    metavar="NAME",
    help="A variable that --exec gets beside paths, locale and devices; may be repeated.",
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
@click.option(
    "--processes",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Run --handler in N processes, one task each: one that crashes takes only its own task with it.",
)
@click.option("--name", help="Name of this worker; must be its own (default: host, process id, random letters).")
@poll_options
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=Seconds(0),
    help="Seconds that running tasks get after SIGTERM; then they are put back. A second SIGTERM puts them back now.",
)
@click.option(
    "--notifier/--no-notifier",
    default=True,
    help="Deliver callbacks too, if the pool has a notifier (default: yes; see pgpark notifier run).",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Serve metrics of this worker and of its pool for Prometheus on this port (0: any that is free, see the log).",
)
@click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Address for --metrics-port.")
@click.option(
    "--metrics-pool/--no-metrics-pool",
    default=True,
    help="Whether --metrics-port serves the pool's numbers too (default: yes; no where a gateway is scraped for them).",
)
@click.option("-v", "--verbose", is_flag=True, help="Log each task, and the tracebacks of handlers that fail.")
@log_json_option
@database_options
def worker(
    settings: Settings,
    pool: str,
    handler: str | None,
    command: str | None,
    environment: tuple[str, ...],
    units: int | None,
    concurrency: int,
    processes: int | None,
    name: str | None,
    poll: bool,
    poll_secs: float | None,
    grace: float,
    notifier: bool,
    metrics_port: int | None,
    metrics_host: str,
    metrics_pool: bool,
    verbose: bool,
    log_json: bool,
) -> None:
    """Run the tasks of a POOL until SIGTERM or SIGINT."""
    name = name or default_name()
    start_logging(logging.DEBUG if verbose else logging.INFO, log_json, pool=pool, worker=name)
    telemetry.configure()
    if processes is not None:
        if click.get_current_context().get_parameter_source("concurrency") is not ParameterSource.DEFAULT:
            raise click.UsageError("--processes says how many tasks run at once; leave out --concurrency")
        concurrency = processes
    executor = _executor(handler, command, environment, in_processes=processes is not None)
    gc.freeze()  # what is loaded by now stays: a collection that looked through it took a tenth of a task's time
    with settings.database() as dsn:
        working = Worker(
            WorkerSettings(
                dsn=dsn,
                pool=pool,
                name=name,
                units=units,
                concurrency=concurrency,
                listen=not poll,
                poll_secs=seconds_between_looks(poll, poll_secs),
                grace_secs=grace,
                notifier=notifier,
            ),
            executor,
        )
        with _metrics(working, metrics_host, metrics_port, dsn if metrics_pool else None):
            clean = working.run()
    if not clean:  # a handler that cannot be stopped; its task is released, so it must not go on
        telemetry.flush()
        logging.shutdown()
        os._exit(0)


def _metrics(worker: Worker, host: str, port: int | None, dsn: str | None) -> contextlib.AbstractContextManager[object]:
    """Serves metrics of a worker, if there is a port for them; of its pool too, if there is a DSN to ask."""
    if port is None:
        return contextlib.nullcontext()
    try:
        from pgpark.exporter import PoolNumbers, serving
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pgpark"):
            raise
        raise BadInputError(
            f"{error.name} is not installed; --metrics-port needs: pip install 'pgpark[gateway]'"
        ) from None
    return serving(worker, host, port, PoolNumbers(dsn, worker.pool) if dsn is not None else None)


@click.command()
@click.argument("pool", required=False)
@database_options
def maintain(settings: Settings, pool: str | None) -> None:
    """Run the timers of a POOL, or of all: deadlines, backoffs, leases, retention. Workers do this by themselves."""
    with settings.connection() as connection:
        report = calls.run_on(connection, calls.maintain(pool))
    print_rows(settings, [report], ("expired", "reclaimed", "promoted", "purged", "next_due"), "")


def _executor(handler: str | None, command: str | None, environment: tuple[str, ...], in_processes: bool) -> Executor:
    if handler is not None and command is not None:  # one on the command line wins over one from the environment
        typed = click.get_current_context().get_parameter_source
        if typed("handler") is not typed("command"):
            handler, command = (handler, None) if typed("command") is ParameterSource.ENVIRONMENT else (None, command)
    if (handler is None) == (command is None):
        raise click.UsageError("give either --handler or --exec")
    if handler is not None:
        if environment:
            raise click.UsageError("--exec-env goes with --exec")
        return ProcessExecutor(handler) if in_processes else FunctionExecutor(load_handler(handler))
    if in_processes:
        raise click.UsageError("--processes goes with --handler; --exec runs each task in a process anyway")
    assert command is not None
    return CommandExecutor(command, environment)
