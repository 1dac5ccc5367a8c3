"""Databases and pools for benches that look at how pgpark grows: made, filled, settled, and asked what a call costs.

No figures are kept here and nothing is printed but progress: that is the caller's.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import DictRow
from psycopg.types.json import Jsonb
from report import progress

from pgpark import calls
from pgpark.database import connect
from pgpark.migrate import migrate

PAYLOAD = {"data": "x" * 189}  # 200 bytes as text
RESULT = {"ok": True}
# A lease that outlasts the bench, so that tasks which stand for running ones stay so.
POOL = {"max_units": 1_000_000, "lease_secs": 86_400}
FILL_BATCH = 10_000
WORKER = "bench"
CLAIM = "select * from pgpark.park_claim(%s, %s, %s)"
FINISH = "select pgpark.park_finish(%s::bigint, %s::int, result => %s)"
FINISH_MANY = "select * from pgpark.park_finish_many(%s)"
_PROGRESS_EVERY = 500_000

Connection = psycopg.Connection[DictRow]
Held = Sequence[Mapping[str, Any]]


class Databases:
    """Databases of this bench's own on a server; made by `own_databases`, which drops them."""

    def __init__(self, admin: str) -> None:
        self._admin = admin
        self._run = uuid.uuid4().hex[:8]
        self._made: list[str] = []

    def make(self, name: str, template: str | None = None) -> str:
        """The DSN of a migrated database, or of a copy of another one of these, to which nobody may be connected."""
        made = f"pgpark_bench_{self._run}_{name}"
        statement = sql.SQL("create database {} template {}").format(
            sql.Identifier(made), sql.Identifier(_database(template) if template else "template0")
        )
        with connect(self._admin) as connection:
            # Before 15 that is the only way. Else every page of the copy would be written to the WAL too.
            if template and connection.info.server_version >= 150_000:
                statement += sql.SQL(" strategy file_copy")
            connection.execute(statement)
        self._made.append(made)
        dsn = psycopg.conninfo.make_conninfo(self._admin, dbname=made)
        if not template:
            with connect(dsn) as connection:
                migrate(connection)
        return dsn

    def drop(self) -> None:
        with connect(self._admin) as connection:
            while self._made:
                name = sql.Identifier(self._made.pop())
                connection.execute(sql.SQL("drop database if exists {} with (force)").format(name))


@contextlib.contextmanager
def own_databases(admin: str) -> Iterator[Databases]:
    databases = Databases(admin)
    try:
        yield databases
    finally:
        databases.drop()


def make_pools(dsn: str, names: Sequence[str]) -> None:
    with connect(dsn) as connection:
        for nth, name in enumerate(names, start=1):
            calls.run_on(connection, calls.put_pool(name, POOL))
            if nth % 100 == 0:
                progress(f"  {nth:,} of {len(names):,} pools made")


def fill(dsn: str, pool: str, count: int) -> float:
    """Submits `count` tasks in batches of FILL_BATCH, a transaction each; returns the seconds that it took."""
    statement = "select count(*) from pgpark.park_submit_many(%s, %s::jsonb) where accepted"
    batch = json.dumps([{"payload": PAYLOAD}] * min(count, FILL_BATCH))
    started = time.perf_counter()
    with connect(dsn) as connection:
        for done in range(0, count, FILL_BATCH):
            size = min(FILL_BATCH, count - done)
            tasks = batch if size == FILL_BATCH else json.dumps([{"payload": PAYLOAD}] * size)
            row = connection.execute(statement, [pool, tasks]).fetchone()
            if row is None or row["count"] != size:
                raise RuntimeError(f"pool {pool} did not accept all of a batch: {row}")
            if (done + size) % _PROGRESS_EVERY == 0:
                progress(f"  {done + size:,} of {count:,} submitted")
    return time.perf_counter() - started


def top_up(dsn: str, pool: str, parked: int) -> None:
    """Submits what is missing to that many parked tasks."""
    with connect(dsn) as connection:
        row = connection.execute(
            "select count(*) from pgpark.task t join pgpark.pool p using (pool_id)"
            " where p.name = %s and t.state = 'parked'",
            [pool],
        ).fetchone()
    assert row is not None
    if row["count"] < parked:
        fill(dsn, pool, parked - row["count"])


def settle(dsn: str) -> None:
    """Vacuums and analyzes the database, and writes a checkpoint, so that every turn begins alike."""
    with connect(dsn) as connection:
        connection.execute("vacuum analyze")
        connection.execute("checkpoint")


@dataclass
class Cost:
    """Medians of a claim of `size` tasks and of finishing them.

    Milliseconds are seen from the client, commit included; `server_ms` and `pages` (shared buffers, hit or read) are
    of the claim alone, by explain (analyze, buffers) in a transaction that is rolled back.
    """

    claim_ms: float
    finish_ms: float
    server_ms: float
    pages: float


class Lot:
    """A pool as one worker connection uses it."""

    def __init__(self, connection: Connection, pool: str) -> None:
        self.connection = connection
        self.pool = pool

    def claim(self, size: int) -> list[DictRow]:
        held = self.connection.execute(CLAIM, [self.pool, WORKER, size]).fetchall()
        if len(held) != size:
            raise RuntimeError(f"a claim of {size} from pool {self.pool} got {len(held)}: the lot ran dry")
        return held

    def finish(self, held: Held) -> None:
        finish(self.connection, held)

    def cost(self, size: int, times: int) -> Cost:
        """Of `times` claims, each finished at once; before them two to warm up."""
        self.warm_up(size)
        claims, finishes = [], []
        for _ in range(times):
            taken, held = timed(lambda: self.claim(size))
            claims.append(taken)
            finishes.append(timed(lambda held=held: self.finish(held))[0])
        explained = [self.explain(size) for _ in range(3)]
        return Cost(
            1000 * statistics.median(claims),
            1000 * statistics.median(finishes),
            statistics.median(ms for ms, _ in explained),
            statistics.median(pages for _, pages in explained),
        )

    def warm_up(self, size: int) -> None:
        """Two claims and finishes, which load what a session keeps: catalog rows, plans."""
        for _ in range(2):
            self.finish(self.claim(size))

    def explain(self, size: int) -> tuple[float, int]:
        """Milliseconds inside the server, and pages, of a claim that is rolled back."""
        with self.connection.transaction(force_rollback=True):
            statement = f"explain (analyze, buffers, timing off, format json) {CLAIM}"
            row = self.connection.execute(statement, [self.pool, WORKER, size]).fetchone()
        assert row is not None
        (told,) = row["QUERY PLAN"]
        plan = told["Plan"]
        if plan["Actual Rows"] != size:
            raise RuntimeError(f"a claim of {size} from pool {self.pool} got {plan['Actual Rows']:g}: the lot ran dry")
        return told["Execution Time"], plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]

    def drain(self, count: int, size: int = 100) -> float:
        """Claims and finishes `count` tasks, `size` at a time; returns tasks per second."""
        started = time.perf_counter()
        for done in range(0, count, size):
            self.finish(self.claim(min(size, count - done)))
        return count / (time.perf_counter() - started)


def finish(connection: Connection, held: Held) -> None:
    """Completes tasks that were claimed: one by park_finish, more by park_finish_many."""
    if len(held) == 1:
        connection.execute(FINISH, [held[0]["task_id"], held[0]["attempt"], Jsonb(RESULT)]).fetchone()
        return
    outcomes = [{"task_id": row["task_id"], "attempt": row["attempt"], "result": RESULT} for row in held]
    connection.execute(FINISH_MANY, [Jsonb(outcomes)]).fetchall()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that it took, and what it returned."""
    started = time.perf_counter()
    returned = work()
    return time.perf_counter() - started, returned


def _database(dsn: str) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"])
