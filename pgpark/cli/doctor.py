"""`pgpark doctor`: what is wrong with an installation, and the SQL that mends it."""

from __future__ import annotations

import contextlib

import click

from pgpark.cli.common import Settings, database_options, messages, print_json
from pgpark.database import connect
from pgpark.doctor import findings
from pgpark.models import Finding


@click.command()
@database_options
def doctor(settings: Settings) -> int:
    """Say what is wrong with an installation, and print the SQL that mends it. Exit 1 if anything is.

    Compares the schema with what migrate left, looks for messages without tasks and tasks without messages, accounts
    that do not add up, overdue timers, invalid indexes, what vacuum waits for, an old pgmq, and notifications that a
    pooler loses. Changes nothing.

    The output is SQL: read it, then run it with `pgpark doctor | psql`. What ends sessions or transactions of others
    is commented out.
    """
    with settings.database() as dsn, contextlib.closing(connect(dsn)) as connection:
        found = findings(connection, dsn)
    for finding in found:
        if settings.json:
            print_json(finding)
        else:
            click.echo(_as_sql(finding))
    messages.print(f"{len(found)} found" if found else "nothing is wrong")
    return 1 if found else 0


def _as_sql(finding: Finding) -> str:
    """A comment of one line, whatever names are in it, and the statements."""
    said = " ".join(f"-- {finding.problem}: {finding.subject}: {finding.detail}".split())
    if finding.mend is None:
        return f"{said}\n"
    if finding.disruptive:
        return "\n".join([f"{said} (look first)", *(f"-- {line}" for line in finding.mend.splitlines()), ""])
    return f"{said}\n{finding.mend}\n"
