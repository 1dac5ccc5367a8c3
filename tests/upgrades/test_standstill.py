"""Migrating while others work: workers of each kept release, submitters, transactions that stay open."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from pgpark import migrate, standstill
from pgpark.errors import MigrationError
from tests import accounts
from tests.conftest import Database, wait_for
from tests.test_migrate import catalog, connected
from tests.upgrades.conftest import copy_of
from tests.upgrades.releases import PRESENT, Release

UNITS = 12

# The release to come: it touches the tables that tasks go through, and renames what most calls use, so that a call with
# old text that goes on fails.
_TOUCHES = """
    alter table pgpark.mailbox add column next int;
    alter table pgpark.tally add column next int;
    alter table pgpark.task add column next int;
    alter table pgpark.pool add column next int;
    """
_RENAMED = re.compile(
    r"\b(_claim|_conclude|_enter_pool|_finish|_lock_pool|_look|_pool|_pools|_sees_the_past|_try_latch)\b"
)
FAILS = migrate.SqlFile("migrations/9999_fails.sql", "select 1 / 0", "0")


def next_release(*more: str) -> tuple[migrate.SqlFile, ...]:
    """The files of the release to come; `more` are statements of its migration."""
    files = migrate.sql_files()
    touching = migrate.SqlFile("migrations/9998_touches.sql", _TOUCHES + ";".join(more), "0")
    renamed = [
        migrate.SqlFile(file.name, _RENAMED.sub(r"\1_", file.text), f"{file.hash} next")
        for file in files
        if not file.runs_once
    ]
    return (*[file for file in files if file.runs_once], touching, *renamed)


def migrate_to(files: tuple[migrate.SqlFile, ...], dsn: str, monkeypatch: pytest.MonkeyPatch) -> migrate.Plan:
    with monkeypatch.context() as patched, connected(dsn) as connection:
        patched.setattr(migrate, "sql_files", lambda: files)
        return migrate.migrate(connection)


class Submitter:
    """A thread that submits tasks to the pool gpu, as quickly as it can, and keeps what it was told."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._submit)
        self.accepted: list[int] = []
        self.cancelled = 0
        self.longest_secs = 0.0

    def __enter__(self) -> Submitter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _submit(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._over.is_set():
                payload = Jsonb({"n": len(self.accepted)})
                asked_at = time.monotonic()
                try:
                    (row,) = connection.execute(
                        "select task_id, accepted from pgpark.park_submit('gpu', %s, units => 2)", [payload]
                    ).fetchall()
                except psycopg.errors.QueryCanceled:
                    self.cancelled += 1
                else:
                    self.accepted += [row[0]] if row[1] else []
                self.longest_secs = max(self.longest_secs, time.monotonic() - asked_at)
                self._over.wait(0.01)


@contextlib.contextmanager
def working(release: Release, dsn: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of a release; at the end it must still be there, and stop when it is asked to."""
    worker = release.worker(dsn, log, "--name", release.number)
    try:
        yield worker
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0, log.read_text()
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.oldest_and_newest
def test_a_worker_of_each_release_goes_on_while_the_database_is_migrated_under_it(
    release: Release, made: str, empty_databases: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To this release and to the one to come, after a failure; while tasks run, wait and come."""
    dsn = copy_of(made, empty_databases)
    with contextlib.closing(Database(dsn)) as db:
        goes_on_under(db, release, tmp_path, monkeypatch)


def goes_on_under(db: Database, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dsn, log, go = db.dsn, tmp_path / "log", tmp_path / "go"
    db.pool(max_units=UNITS)
    held = [db.parked(payload={"n": n, "file": str(go)}) for n in range(4)]
    running = "select count(*) from pgpark.task where state = 'running' and attempt = 1 and task_id = any (%s)"
    with working(release, dsn, log) as worker:
        wait_for(lambda: db.value(running, held) == len(held))
        with Submitter(dsn) as one, Submitter(dsn) as another:

            def goes_on(name: str = release.number) -> None:
                finished = "select count(*) from pgpark.mailbox where worker = %s"
                goal = db.value(finished, name) + 10
                wait_for(lambda: worker.poll() is not None or db.value(finished, name) >= goal)
                assert worker.poll() is None, log.read_text()
                assert db.value("select sum(units) from pgpark.task where state = 'running'") <= UNITS

            goes_on()
            with pytest.raises(MigrationError, match="division by zero"):
                migrate_to((*migrate.sql_files(), FAILS), dsn, monkeypatch)
            goes_on()
            began_at = time.monotonic()
            migrate_to(migrate.sql_files(), dsn, monkeypatch)
            took_secs = time.monotonic() - began_at
            goes_on()
            migrate_to(next_release(), dsn, monkeypatch)
            goes_on()
            with working(PRESENT, dsn, tmp_path / "present"):
                goes_on("present")
                assert db.value(running, held) == len(held)
                go.touch()
                one.stop()
                another.stop()
                wait_for(lambda: not db.rows("select from pgpark.task limit 1"))
    accepted = [*held, *one.accepted, *another.accepted]
    assert accounts.outcomes(dsn, accepted) == {"completed": len(accepted)}
    assert db.value("select max(attempt) from pgpark.mailbox") == 1
    assert accounts.faults(dsn) == []
    assert max(one.cancelled, another.cancelled) <= 4, "calls fail at a migration, and go on"
    waited_secs = max(one.longest_secs, another.longest_secs)
    sys.stdout.write(f"{release.number}: migrated in {took_secs:.2f} s; longest submit {waited_secs:.2f} s\n")


@pytest.mark.parametrize(
    "asked", ["select task_id from pgpark.park_claim('gpu', 'w')", "select pgpark.park_ack('{1}')"]
)
def test_a_call_that_waits_for_a_migration_is_cancelled_and_may_be_made_again(
    db: Database, connect: Any, background: Any, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """The first waits at a gate, the second at another table."""
    db.pool()
    db.parked()
    holder, caller, migrator = connect(), connect(), connect()
    holder.connection.execute("create table public.held ()")
    with holder.connection.transaction():
        holder.connection.execute("lock table public.held")
        files = next_release("select from public.held")
        monkeypatch.setattr(migrate, "sql_files", lambda: files)
        migration = background(migrator, lambda: migrate.migrate(migrator.connection)).wait_until_blocked()
        call = background(caller, lambda: caller.rows(asked)).wait_until_blocked()
    with pytest.raises(psycopg.errors.QueryCanceled):
        call.result()
    assert not migration.result().empty
    assert len(caller.rows(asked)) == 1


def test_a_call_that_waits_for_a_migration_that_fails_goes_on(
    db: Database, connect: Any, background: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.pool()
    task = db.parked()
    holder, caller, migrator = connect(), connect(), connect()
    holder.connection.execute("create table public.held ()")
    files = next_release("select 1 / (select count(*) from public.held)")
    with holder.connection.transaction():
        holder.connection.execute("lock table public.held")
        monkeypatch.setattr(migrate, "sql_files", lambda: files)
        migration = background(migrator, lambda: migrate.migrate(migrator.connection)).wait_until_blocked()
        call = background(caller, caller.claimed).wait_until_blocked()
    with pytest.raises(MigrationError, match="division by zero"):
        migration.result()
    assert call.result() == [task]


def test_a_migration_waits_until_open_transactions_have_ended(
    db: Database, connect: Any, background: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that holds a table and wants another is not in its way, and does not become part of a deadlock."""
    db.pool()
    task = db.parked()
    client, migrator = connect(), connect()
    files = next_release()
    monkeypatch.setattr(migrate, "sql_files", lambda: files)
    with client.connection.transaction():
        assert client.claimed() == [task]
        migration = background(migrator, lambda: migrate.migrate(migrator.connection)).wait_until_blocked()
        assert client.finish(task)
        another = client.parked()
    assert not migration.result().empty
    assert db.outcome(task) == ("completed", None)
    assert db.claimed() == [another]


def test_a_migration_that_finds_no_moment_says_who_is_in_the_way_and_changes_nothing(
    db: Database, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.pool()
    before = catalog(db.dsn)
    client, files = connect(), next_release()
    monkeypatch.setattr(standstill, "_PATIENCE_SECS", 0.2)
    with client.connection.transaction():
        client.parked()
        pid = client.connection.info.backend_pid
        expected = (
            rf"^tables of pgpark were in use for 0\.2 s, now by process {pid} of \w+ \(idle in transaction\); end"
        )
        with pytest.raises(MigrationError, match=expected):
            migrate_to(files, db.dsn, monkeypatch)
        assert catalog(db.dsn) == before
    assert not migrate_to(files, db.dsn, monkeypatch).empty
    assert db.stats()["parked"] == 1


def test_a_call_that_the_migrating_role_may_not_cancel_makes_it_fail(
    empty_databases: Callable[[], str], role: str, background: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a superuser may cancel a superuser's call, and this one would go on with its old text."""
    dsn = empty_databases()
    owned = psycopg.conninfo.make_conninfo(dsn, user=role)
    with contextlib.closing(Database(dsn)) as admin, contextlib.closing(Database(dsn)) as caller:
        admin.connection.execute(f"grant create on database {admin.connection.info.dbname} to {role}")
        admin.connection.execute("create table public.held ()")
        admin.connection.execute(f"grant select on public.held to {role}")
        try:
            fails_for(owned, admin, caller, background, monkeypatch)
        finally:
            admin.connection.execute(f"drop owned by {role} cascade")


def fails_for(owned: str, admin: Database, caller: Database, background: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Database(owned)) as migrator:
        migrate.migrate(migrator.connection)
        migrator.pool()
        files = next_release("select from public.held")
        monkeypatch.setattr(migrate, "sql_files", lambda: files)
        with admin.connection.transaction():
            admin.connection.execute("lock table public.held")
            migration = background(migrator, lambda: migrate.migrate(migrator.connection)).wait_until_blocked()
            call = background(caller, caller.parked).wait_until_blocked()
        with pytest.raises(
            MigrationError, match=r"^a call of role postgres is under way, which this role may not cancel;"
        ):
            migration.result()
        task = call.result()
        assert migrator.claimed() == [task]
        assert not migrate.migrate(migrator.connection).empty
