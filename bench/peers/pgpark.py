"""pgpark, in two forms, both with results in the mailbox, in a pool of 1,000 units, a unit per task.

worker      the real `pgpark worker` process (python -m pgpark worker), with an async handler that returns a small JSON
            object. Batch N is --concurrency N: a free worker claims as many tasks as it may run, and writes what has
            ended in one call. It waits on LISTEN. The pool is paused until `go`, so that it is connected by then.
SQL loop    park_next N: the outcomes of the last N and the next N in one transaction, with psycopg, as any language
            would do it; LISTEN when there is nothing to claim.

Submits: park_submit, and park_submit_many with 1,000 tasks a call, with psycopg.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version

from peers.base import Crew, ProgramPeer
from peers.processes import PROGRAMS
from pgpark import calls
from pgpark.database import connect
from pgpark.migrate import migrate

POOL = "bench"
MAX_UNITS = 1000
_SETTLED_SECS = 0.3


class Pgpark(ProgramPeer):
    """The SQL loop. Settings: batch."""

    system = "pgpark"
    left_sql = "select count(*) from pgpark.task"

    def command(self) -> list[str]:
        return [sys.executable, str(PROGRAMS / "run_pgpark.py")]

    def version(self) -> str:
        return f"pgpark {version('pgpark')}"

    def install(self, dsn: str) -> None:
        with connect(dsn) as connection:
            migrate(connection)
            calls.run_on(connection, calls.put_pool(POOL, {"max_units": MAX_UNITS}))


class PgparkWorker(Pgpark):
    """The worker process. Settings: batch."""

    @contextlib.contextmanager
    def worker(self, dsn: str, handler: str, step: int = 100) -> Iterator[Crew]:
        crew = Crew(step)
        command = [sys.executable, "-m", "pgpark", "worker", POOL, "--handler", f"pgpark_handlers:{handler}"]
        command += ["--concurrency", str(self._settings["batch"])]
        with connect(dsn) as connection:
            calls.run_on(connection, calls.set_pool_state(POOL, "paused"))
            crew.begin_by(lambda: calls.run_on(connection, calls.set_pool_state(POOL, "active")))
            settled = _Settled()

            def connected() -> bool:
                if calls.run_on(connection, calls.stats(POOL))[0].workers < self.workers:
                    return False
                backends = "select count(*) as n from pg_stat_activity where datname = current_database()"
                row = connection.execute(backends).fetchone()
                assert row is not None
                return settled.at(row["n"])

            try:
                for _ in range(self.workers):
                    crew.add(command, dsn, environment={"PGPARK_DSN": dsn, "BENCH_STEP": str(step)})
                crew.wait_ready(connected)
                yield crew
            finally:
                crew.stop()


class _Settled:
    """Whether a number has been the same for a moment."""

    def __init__(self) -> None:
        self._number, self._since = -1, 0.0

    def at(self, number: int) -> bool:
        if number != self._number:
            self._number, self._since = number, time.monotonic()
        return time.monotonic() - self._since > _SETTLED_SECS


PEERS = [
    form(
        f"pgpark {name}, batch {batch}{', 2 workers' if workers == 2 else ''}",
        batch=batch,
        workers=workers,
        tasks=tasks,
        single=batch == workers == 1,
    )
    for name, form in (("worker", PgparkWorker), ("SQL loop", Pgpark))
    for batch, tasks in ((100, 40_000), (10, 20_000), (1, 4000))
    for workers in (1, 2)
]
