"""`pgpark migrate` and `pgpark db`: the schema, and the embedded server."""

from __future__ import annotations

import contextlib

import click

from pgpark.cli.common import Settings, database_options, messages, output_options, print_json
from pgpark.database import connect
from pgpark.embedded import EmbeddedServer
from pgpark.migrate import Plan, script
from pgpark.migrate import migrate as apply
from pgpark.migrate import plan as make_plan

_NAMED = 5


@click.command()
@click.option(
    "--plan", "only_plan", envvar="PGPARK_MIGRATE_PLAN", is_flag=True, help="Say what would be done, and do nothing."
)
@click.option("--check", is_flag=True, help="Exit 1 when the database is behind, and do nothing.")
@click.option("--dump-sql", is_flag=True, help="Print one script that `psql -1 -f` applies with the same result.")
@database_options
def migrate(settings: Settings, only_plan: bool, check: bool, dump_sql: bool) -> int:
    """Install pgpark in a database, or bring it up to date. Safe to run again, or many at once."""
    if only_plan + check + dump_sql > 1:
        raise click.UsageError("--plan, --check and --dump-sql exclude one another")
    if dump_sql:
        click.echo(script())
        return 0
    with contextlib.ExitStack() as stack:
        dsn = settings.dsn or stack.enter_context(EmbeddedServer(settings.home).use())
        connection = stack.enter_context(contextlib.closing(connect(dsn)))
        todo = make_plan(connection) if only_plan or check else apply(connection)
    done = "to do" if only_plan or check else "done"
    if settings.json:
        print_json({"up_to_date": todo.empty, "install_pgmq": todo.install_pgmq, "files": [f.name for f in todo.files]})
    elif only_plan:
        for line in _lines(todo):
            click.echo(line)
    messages.print("up to date" if todo.empty else f"{done}: {_in_short(todo)}", soft_wrap=True)
    return 1 if check and not todo.empty else 0


def _lines(todo: Plan) -> list[str]:
    return (["install pgmq"] if todo.install_pgmq else []) + [f"apply sql/{file.name}" for file in todo.files]


def _in_short(todo: Plan) -> str:
    """What a first migration does is fifty files; a few are named."""
    if len(todo.files) <= _NAMED:
        return ", ".join(_lines(todo))
    migrations = sum(file.runs_once for file in todo.files)
    functions = len(todo.files) - migrations
    parts = [(1, "install pgmq")] * todo.install_pgmq
    parts += [(migrations, f"apply {migrations} migrations"), (functions, f"apply {functions} files of functions")]
    return ", ".join(words for number, words in parts if number)


@click.group()
def db() -> None:
    """The embedded Postgres that commands share when no --dsn is given."""


@db.command()
@output_options
def start(settings: Settings) -> None:
    """Start it and keep it running until `pgpark db stop`; print its DSN."""
    server = EmbeddedServer(settings.home)
    with server.use() as dsn:
        with connect(dsn) as connection:
            apply(connection)
        server.keep()
    _print_url(settings, dsn)


@db.command()
@click.option("--force", is_flag=True, help="Also when other commands are using it.")
@output_options
def stop(settings: Settings, force: bool) -> None:
    """Stop it; the data is kept."""
    stopped = EmbeddedServer(settings.home).stop(force=force)
    messages.print("stopped" if stopped else "it was not running")


@db.command()
@output_options
def url(settings: Settings) -> int:
    """Print its DSN; exit 1 if it is not running."""
    dsn = EmbeddedServer(settings.home).url()
    if dsn is None:
        messages.print(f"the server in {settings.home} is not running; start it with: pgpark db start")
        return 1
    _print_url(settings, dsn)
    return 0


def _print_url(settings: Settings, dsn: str) -> None:
    if settings.json:
        print_json({"dsn": dsn})
    else:
        click.echo(dsn)
