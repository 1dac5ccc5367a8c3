"""Raw pgmq: messages are read with a visibility timeout and deleted. No results, no units, no order of priorities.

The version that the `pgmq` package carries (or the server's extension), as `pgpark migrate` installs it. Submits:
pgmq.send, and pgmq.send_batch with 1,000 messages a call. The worker: pgmq.read(queue, 300 s, N), then pgmq.delete with
the array of ids, a transaction each. When the queue is empty it waits in pgmq.read_with_poll, looking every 10 ms.
"""

from __future__ import annotations

import sys

import psycopg
from pgmq.install import get_embedded_install_sql, get_embedded_sql_version

from peers.base import ProgramPeer
from peers.processes import PROGRAMS

QUEUE = "bench"


class Pgmq(ProgramPeer):
    """Settings: batch, the messages read and deleted at once."""

    system = "pgmq"
    left_sql = f"select count(*) from pgmq.q_{QUEUE}"

    def command(self) -> list[str]:
        return [sys.executable, str(PROGRAMS / "run_pgmq.py")]

    def version(self) -> str:
        return f"pgmq {get_embedded_sql_version()}"

    def install(self, dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            offered = "select from pg_available_extensions where name = 'pgmq'"
            if connection.execute(offered).rowcount:
                connection.execute("create extension pgmq")
            else:
                connection.execute(get_embedded_install_sql().encode())
            connection.execute("select pgmq.create(%s)", [QUEUE])


PEERS = [
    Pgmq("pgmq, read 100, delete 100", batch=100),
    Pgmq("pgmq, read 1, delete 1", batch=1, single=True, tasks=10_000),
]
