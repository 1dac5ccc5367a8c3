"""The command line of the soak. Exit status: 0 without, 1 with violations.

Without --dsn it runs on an embedded server of its own; with it, in a database that it makes there and drops again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from pgpark.database import connect
from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate
from tests.soak.plan import Plan
from tests.soak.runner import soak


@contextmanager
def database(dsn: str | None) -> Iterator[str]:
    """A migrated database, for as long as it is used."""
    if dsn is None:
        with tempfile.TemporaryDirectory() as home, EmbeddedServer(Path(home)).use() as embedded:
            with psycopg.connect(embedded, autocommit=True) as connection:
                connection.execute("alter system set fsync = off")
                connection.execute("select pg_reload_conf()")
            with database(embedded) as made:
                yield made
        return
    name = f"pgpark_soak_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(f"create database {name} template template0")
        try:
            made = psycopg.conninfo.make_conninfo(dsn, dbname=name)
            with connect(made) as connection:
                migrate(connection)
            yield made
        finally:
            admin.execute(f"drop database {name} with (force)")


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="See tests/soak/__init__.py.")
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_TEST_DSN"), help="a server where databases can be made")
    parser.add_argument("--admissions", type=int, default=Plan.admissions, help="tasks that must be accepted")
    parser.add_argument("--connections", type=int, default=Plan.connections)
    parser.add_argument("--processes", type=int, default=Plan.processes, help="that the connections are spread over")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    arguments = parser.parse_args()
    given = vars(arguments)
    dsn = given.pop("dsn")
    with database(dsn) as made, tempfile.TemporaryDirectory() as folder:
        report = soak(made, Plan(**given), Path(folder), say)
    sys.stdout.write(f"{report}\n")
    return 1 if report.findings.counts else 0


if __name__ == "__main__":
    sys.exit(main())
