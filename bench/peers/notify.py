"""The floor under every wake-up: NOTIFY, from the call in one process to its arrival in another that listens.

Not a queue; it only submits and stamps. `listener` says with what kind of connection: asyncio (as in `pgpark worker`)
or plain (as in a loop that calls the SQL functions). `insert`: the same statement also writes a row with the payload,
so that its commit waits for the disk as that of every queue does; a NOTIFY alone does not.
"""

from __future__ import annotations

import sys

import psycopg

from peers.base import PROGRAMS, ProgramPeer


class BareNotify(ProgramPeer):
    """Settings: listener, insert."""

    system = "notify"
    left_sql = "select 0"

    def command(self) -> list[str]:
        return [sys.executable, str(PROGRAMS / "run_notify.py")]

    def version(self) -> str:
        return f"psycopg {psycopg.__version__}"

    def install(self, dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("create table bench_note (payload jsonb)")
