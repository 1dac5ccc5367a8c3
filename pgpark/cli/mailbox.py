"""`pgpark mailbox`: outcomes that wait for whoever comes back."""

from __future__ import annotations

import sys

import click

from pgpark import calls
from pgpark.cli.common import Settings, database_options, messages, print_json, print_rows


@click.group()
def mailbox() -> None:
    """Outcomes, kept until they are acknowledged or purged."""


@mailbox.command()
@click.argument("tenant")
@click.option("--user", help="Only this user's.")
@click.option("--session", help="Only this session's.")
@click.option("--since", help="Only those that landed at this time or later, for instance 2030-01-31T12:00Z.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(min=1), help="At most this many.")
@click.option(
    "--ack",
    "take",
    envvar="PGPARK_MAILBOX_FETCH_ACK",
    is_flag=True,
    help="Take them out of the mailbox once they are printed.",
)
@database_options
def fetch(
    settings: Settings, tenant: str, user: str | None, session: str | None, since: str | None, limit: int, take: bool
) -> None:
    """Print the messages of a tenant, oldest first."""
    with settings.connection() as connection:
        rows = calls.run_on(connection, calls.fetch(tenant, user, session, since, limit))
        columns = (
            "message_id",
            "task_id",
            "pool",
            "user_id",
            "session_id",
            "status",
            "reason",
            "payload",
            "created_at",
        )
        print_rows(settings, rows, columns, f"no messages for {tenant}")
        if take:
            sys.stdout.flush()  # first out of our hands, then out of the mailbox
            calls.run_on(connection, calls.ack([row.message_id for row in rows]))


@mailbox.command()
@click.argument("message_ids", type=int, nargs=-1, required=True, metavar="MESSAGE_ID...")
@database_options
def ack(settings: Settings, message_ids: tuple[int, ...]) -> int:
    """Take messages out of the mailbox. Exit 1 if one was not there."""
    with settings.connection() as connection:
        taken = calls.run_on(connection, calls.ack(message_ids))
    if settings.json:
        print_json({"taken": taken})
    messages.print(f"{taken} of {len(set(message_ids))} taken out")
    return 0 if taken == len(set(message_ids)) else 1
