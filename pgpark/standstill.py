"""A moment without calls, for a change of the schema: none is under way then, and none that began before goes on after.

A call that waits for a table has the old text of its function in hand. It would go on with that in the new tables, and
do there what is wrong by now: leave units booked, or miss a helper. So whoever waits when the change is committed is
cancelled (57014) and may call again, as workers do by themselves. When the change fails, they go on instead.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import psycopg
from psycopg.rows import DictRow, dict_row

from pgpark.errors import MigrationError, one_line

_PATIENCE_SECS = 30.0
_SHORTEST_WAIT_MS, _LONGEST_WAIT_MS = 50, 4000  # in the longest, autovacuum makes way
_LOOK_SECS = 0.005
_QUIET_SECS = 0.1  # in which a call that has begun comes to a gate
_GATES = ("pool", "task")  # whoever changes a task comes to these, and most calls to one of them first

# Not the ledger of migrations, for which those wait who migrate too; nor the doors, which no call comes to first.
_TABLES = """
    select oid::int8 as oid, oid::regclass::text as name
    from pg_class
    where relnamespace = to_regnamespace('pgpark') and relkind in ('r', 'p')
      and relname <> 'migration' and relname !~ '^door_[0-9]+$'
    order by relname <> all (%s), relname"""
_HOLDERS = """
    select a.pid, coalesce(a.usename, a.backend_type) as who, coalesce(a.state, 'active') as state
    from pg_stat_activity a
    where a.pid <> pg_backend_pid() and a.datname = current_database() and exists (
      select from pg_locks l where l.pid = a.pid and l.granted and l.relation = any (%s::oid[]))
    order by a.xact_start
    limit 3"""
# Whoever waits for these tables and asked before a time; whether a gate comes before it; and whether we may cancel it.
# A superuser may cancel any. Others may not cancel a superuser or a foreign role, and cannot see when those asked.
_WAITING = """
    select a.pid, a.usename as who, pg_blocking_pids(a.pid) && %(gates)s::int[] as behind_a_gate,
           me.rolsuper or not r.rolsuper and (
             pg_has_role(r.oid, 'usage') or pg_has_role('pg_signal_backend', 'usage')) as ours
    from pg_stat_activity a
    join pg_roles r on r.oid = a.usesysid
    join pg_roles me on me.rolname = current_user
    where a.datname = current_database()
      and a.pid <> all (%(gates)s)
      and coalesce(a.query_start < %(before)s, true)
      and exists (
        select from pg_locks l where l.pid = a.pid and not l.granted and l.relation = any (%(tables)s::oid[]))"""


class Standstill:
    """In this order: `begin`, the change, `turn_away`, the commit, `sweep`. Leaving the context lets calls in again."""

    def __init__(self, connection: psycopg.Connection[DictRow]) -> None:
        self._connection = connection
        self._tables: list[int] = []
        self._gates: list[int] = []  # process ids of the server
        self._closed: list[Future[Any]] = []
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Standstill:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def begin(self) -> None:
        """Waits until nobody uses a table of ours, and keeps everybody from it until the transaction ends.

        Raises MigrationError when somebody keeps one for 30 seconds.
        """
        tables = self._connection.execute(_TABLES, [list(_GATES)]).fetchall()
        if tables:
            self._tables = [row["oid"] for row in tables]
            gates = self._connected()
            self._lock([row["name"] for row in tables])
            self._close(gates)

    def turn_away(self) -> None:
        """Cancels the calls that wait before the gates, or elsewhere; those behind are left to `sweep`.

        Raises MigrationError where there is one that this role may not cancel.
        """
        if not self._tables:
            return
        waiting = self._waiting(before="infinity")
        if strangers := {row["who"] for row in waiting if not row["ours"]}:
            raise MigrationError(
                f"a call of role {min(strangers)} is under way, which this role may not cancel; grant it"
                " pg_signal_backend, or stop whoever calls, and migrate again. Nothing was changed."
            )
        pids = [row["pid"] for row in waiting if not row["behind_a_gate"]]
        self._cancel(pids)
        self._until(pids, waiting=False)

    def sweep(self) -> None:
        """Cancels the calls that began before the commit: they are behind the gates, or come there soon."""
        if not self._tables:
            return
        wait(self._closed)
        row = self._connection.execute("select clock_timestamp() as now").fetchone()
        committed = row and row["now"]
        told: set[int] = set()  # and nobody twice: the second time might be for what it asks next
        quiet_since = time.monotonic()
        while time.monotonic() < quiet_since + _QUIET_SECS:
            waiting = {row["pid"] for row in self._waiting(before=committed) if row["ours"]} - told
            if waiting:
                self._cancel(list(waiting))
                told |= waiting
                quiet_since = time.monotonic()
            time.sleep(_LOOK_SECS)

    def _lock(self, tables: Iterable[str]) -> None:
        """All tables or none: who holds one of them and wants another is not in a deadlock with us for long."""
        lock = f"lock table {', '.join(tables)} in access exclusive mode"
        give_up = time.monotonic() + _PATIENCE_SECS
        wait_ms = _SHORTEST_WAIT_MS
        while True:
            try:
                with self._connection.transaction():
                    self._connection.execute(f"set local lock_timeout = {wait_ms}".encode())
                    self._connection.execute(lock.encode())
                    self._connection.execute("set local lock_timeout = 0")
                return
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if time.monotonic() > give_up:
                    raise MigrationError(self._complaint()) from None
            time.sleep(random.uniform(0.01, 0.1))
            wait_ms = min(wait_ms * 2, _LONGEST_WAIT_MS)

    def _complaint(self) -> str:
        holders = self._connection.execute(_HOLDERS, [self._tables]).fetchall()
        named = ", ".join(f"process {row['pid']} of {row['who']} ({row['state']})" for row in holders)
        return (
            f"tables of pgpark were in use for {_PATIENCE_SECS:g} s{f', now by {named}' if named else ''};"
            " end that transaction and migrate again. Nothing was changed."
        )

    def _connected(self) -> dict[str, psycopg.Connection[DictRow]]:
        """A connection for each gate, by table."""
        info = self._connection.info
        gates = {}
        for table in _GATES:
            try:
                gate = psycopg.connect(info.dsn, password=info.password, autocommit=True, row_factory=dict_row)
            except psycopg.Error as error:
                raise MigrationError(
                    f"two more connections are needed: {one_line(error)}. Nothing was changed."
                ) from error
            self._closing.callback(gate.close)
            gate.execute("set lock_timeout = 0; set statement_timeout = 0; set idle_in_transaction_session_timeout = 0")
            self._gates.append(gate.info.backend_pid)
            gates[table] = gate
        return gates

    def _close(self, gates: Mapping[str, psycopg.Connection[DictRow]]) -> None:
        """Has them wait for their tables, ahead of the calls that come from here on. They get them when we let go."""
        threads = ThreadPoolExecutor(len(gates))
        self._closing.callback(threads.shutdown)
        for table, gate in gates.items():
            self._closing.callback(gate.cancel)
            lock = f"begin; lock table pgpark.{table} in access exclusive mode"
            self._closed.append(threads.submit(gate.execute, lock.encode()))
        self._until(self._gates, waiting=True)

    def _waiting(self, before: Any) -> list[DictRow]:
        parameters = {"tables": self._tables, "gates": self._gates, "before": before}
        return self._connection.execute(_WAITING, parameters).fetchall()

    def _cancel(self, pids: list[int]) -> None:
        self._connection.execute("select pg_cancel_backend(pid) from unnest(%s::int[]) as pid", [pids])

    def _until(self, pids: list[int], *, waiting: bool) -> None:
        """Returns when all of them wait for a lock, or none of them does; at the latest after a second."""
        count = "select count(distinct pid) as n from pg_locks where not granted and pid = any (%s)"
        give_up = time.monotonic() + 1
        wanted = [{"n": len(pids) if waiting else 0}]
        while self._connection.execute(count, [pids]).fetchall() != wanted and time.monotonic() < give_up:
            time.sleep(_LOOK_SECS)
