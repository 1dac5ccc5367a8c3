"""The command line: `pgpark COMMAND`. Each module of this package holds the commands of one subject.

Standard output carries results only; messages go to standard error. Exit codes: 0 done; 1 the answer is no (refused,
not completed, not found, database behind, something wrong); 2 wrong usage or input; 3 the database cannot be used;
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click
import psycopg

from pgpark import __version__
from pgpark.cli import access, audit, bench, config, database, mailbox, notifier, pools, show, tasks, token, work
from pgpark.cli.common import DRAWN_PLAINLY, plain
from pgpark.cli.demo import demo
from pgpark.cli.doctor import doctor
from pgpark.cli.gpu import gpu
from pgpark.cli.serve import serve
from pgpark.cli.top import top
from pgpark.errors import BadInputError, DatabaseError, PgparkError, one_line, translated

_EPILOG = (
    "Without --dsn or PGPARK_DSN, commands share an embedded Postgres whose data is in PGPARK_HOME (.pgpark); with "
    "--pools FILE, a config file says where each pool lives. Every option can be set in the environment: PGPARK_DSN, "
    "PGPARK_HOME, PGPARK_POOLS, PGPARK_JSON, and PGPARK_<COMMAND>_<OPTION>, for instance PGPARK_WORKER_UNITS. Exit "
    "codes: 0 done; 1 the answer is no; 2 wrong usage or input; 3 the database cannot be used; 130 interrupted, 143 "
    "terminated."
)

_LONGEST_COMPLAINT = 2000


class _InterruptedError(Exception):
    """Ctrl-C, before click prints an empty line for it."""


class _ReaderGoneError(Exception):
    """The reader of our output has left, before click makes an exit code of it."""


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            returned = super().invoke(ctx)
            sys.stdout.flush()
            return returned
        except KeyboardInterrupt as error:
            raise _InterruptedError from error
        except BrokenPipeError as error:
            raise _ReaderGoneError from error


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="pgpark")
def cli() -> None:
    """A parking lot for expensive work on Postgres: tasks that fit start, the others park."""


for _command in (
    database.migrate,
    database.db,
    doctor,
    pools.pool,
    config.apply,
    config.config,
    tasks.submit,
    tasks.status,
    tasks.result,
    tasks.cancel,
    mailbox.mailbox,
    show.stats,
    show.explain,
    audit.audit,
    top,
    notifier.notifier,
    work.worker,
    work.maintain,
    access.grant,
    access.revoke,
    access.grants,
    token.token,
    serve,
    gpu,
    bench.bench,
    demo,
):
    cli.add_command(_command)


def main() -> None:
    """The entry point: runs a command and turns every expected error into one line and an exit code."""
    signal.signal(signal.SIGTERM, _leave)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=DRAWN_PLAINLY)  # a terminal that cannot show a character
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command (None: that of the process) and returns its exit code."""
    try:
        returned = cli.main(arguments, standalone_mode=False, auto_envvar_prefix="PGPARK", prog_name="pgpark")
        return returned if isinstance(returned, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "pgpark"
        return _complain(f"{where}: {one_line(Exception(error.format_message()))}", 2)
    except (click.Abort, _InterruptedError):
        return _complain("pgpark: interrupted", 130)
    except _ReaderGoneError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except psycopg.Error as error:
        return _refused(translated(error))
    except PgparkError as error:
        return _refused(error)
    except (OSError, UnicodeError, RecursionError) as error:
        return _complain(f"pgpark: {type(error).__name__}: {one_line(error)}", 2)


def _refused(error: PgparkError) -> int:
    code = 2 if isinstance(error, BadInputError) else 3 if isinstance(error, DatabaseError) else 1
    return _complain(f"pgpark: {one_line(error)}", code)


def _complain(message: str, code: int) -> int:
    if len(message) > _LONGEST_COMPLAINT:  # what it repeats of an argument is cut in the middle
        half = _LONGEST_COMPLAINT // 2
        message = f"{message[:half]} ... {message[-half:]}"
    click.echo(plain(message, keep="\n\t"), err=True)
    return code


def _leave(_number: int, _frame: FrameType | None) -> None:
    sys.exit(143)
