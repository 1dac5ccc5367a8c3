"""`pgpark doctor`: what it prints, what it exits with, and what only a client can see. What it finds: tests/sql."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest

from pgpark.errors import DatabaseError
from tests.cli.test_commands import Pgpark, pgpark
from tests.conftest import Database, psql, wait_for

__all__ = ["pgpark"]


def piped(dsn: str, out: str) -> None:
    """`pgpark doctor | psql`"""
    command = [psql(), "-X", "-q", "-v", "ON_ERROR_STOP=1", dsn]
    done = subprocess.run(command, input=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_when_nothing_is_wrong_it_prints_no_sql(db: Database, pgpark: Pgpark) -> None:
    db.pool()
    db.parked()
    said = pgpark("doctor")
    assert (said.code, said.out, said.err) == (0, "", "nothing is wrong\n")
    assert pgpark("doctor", "--json").out == ""


def test_what_it_prints_mends_when_it_is_piped_into_psql(db: Database, pgpark: Pgpark) -> None:
    db.connection.execute("drop index pgpark.task_due; drop function pgpark.park_stats(text)")
    said = pgpark("doctor")
    assert (said.code, said.err) == (1, "2 found\n")
    assert said.out.startswith("-- index missing: pgpark.task_due: migrate made it, and it is not there\nCREATE INDEX")
    piped(db.dsn, said.out)
    assert pgpark("doctor").code == 0


def test_with_json_each_finding_is_an_object_on_a_line(db: Database, pgpark: Pgpark) -> None:
    db.connection.execute("alter table pgpark.task set (autovacuum_enabled = off)")
    said = pgpark("doctor", "--json")
    assert said.code == 1
    assert said.rows == [
        {
            "problem": "autovacuum off",
            "subject": "pgpark.task",
            "detail": "for this table",
            "mend": "alter table pgpark.task reset (autovacuum_enabled);",
            "disruptive": False,
        }
    ]


def test_a_name_with_line_breaks_does_not_leave_the_comment(db: Database, pgpark: Pgpark) -> None:
    db.connection.execute(
        """create function pgpark."x\r\ndrop table pgpark.task;"() returns int language sql as 'select 1'"""
    )
    said = pgpark("doctor")
    comment, mend, *_ = said.out.split("\n", 1)
    assert comment.startswith('-- function unexpected: pgpark."x drop table pgpark.task;"(): no migration')
    assert mend.startswith('drop function pgpark."x\r\ndrop table')
    piped(db.dsn, said.out)
    assert pgpark("doctor").code == 0


def test_what_ends_the_work_of_others_is_commented_out(
    db: Database, pgpark: Pgpark, connect: Callable[[], Database]
) -> None:
    """A session counts as old after 15 minutes: here by a function that says so of all."""
    sitting = connect()
    sitting.connection.execute("begin isolation level repeatable read; select from pgpark.task")
    definition = db.value("select pg_get_functiondef('pgpark._held_horizon'::regproc)")
    db.connection.execute(definition.replace("clock_timestamp() - ", "clock_timestamp() + "))
    db.connection.execute("select pgpark._record_blueprint()")
    said = pgpark("doctor")
    assert said.code == 1
    terminate = f"select pg_terminate_backend({sitting.connection.info.backend_pid});"
    assert f" (look first)\n-- {terminate}\n" in said.out
    piped(db.dsn, said.out)
    assert sitting.rows("select 1 as here") == [{"here": 1}]


def test_a_database_without_pgpark_is_an_error(pgpark: Pgpark, empty_databases: Callable[[], str]) -> None:
    said = pgpark("doctor", "--dsn", empty_databases())
    assert (said.code, said.out) == (3, "")
    assert said.err.endswith("has no pgpark yet; run: pgpark migrate\n")


def test_a_server_that_is_not_there_is_an_error(pgpark: Pgpark, tmp_path: Path) -> None:
    assert pgpark("doctor", "--dsn", f"host={tmp_path} dbname=x").code == 3


def test_a_database_that_is_behind_says_so(db: Database, pgpark: Pgpark) -> None:
    db.connection.execute("delete from pgpark.migration where name = 'functions/stats.sql'")
    said = pgpark("doctor")
    assert said.code == 1
    assert said.out == "-- database behind: pgpark migrate: 1 files were not applied; run: pgpark migrate\n\n"
    pgpark("migrate")
    assert pgpark("doctor").code == 0


def test_a_database_of_a_newer_pgpark_says_so(db: Database, pgpark: Pgpark) -> None:
    db.connection.execute("insert into pgpark.migration (name, hash) values ('migrations/9999_future.sql', 'x')")
    said = pgpark("doctor")
    assert said.code == 1
    assert said.out.startswith("-- migration refused: pgpark migrate: this database was migrated by a newer pgpark")


@pytest.mark.parametrize("function", ["park_doctor()", "_drift()", "_is_stranger()", "park_maintain(text)"])
def test_functions_that_it_needs_itself_are_found_and_mended(db: Database, pgpark: Pgpark, function: str) -> None:
    db.connection.execute(f"drop function pgpark.{function}")
    said = pgpark("doctor")
    assert said.code == 1
    assert f"-- function missing: pgpark.{function}: " in said.out
    piped(db.dsn, said.out)
    assert pgpark("doctor").code == 0


def test_an_admin_may_ask_and_others_may_not(pgpark: Pgpark, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pgpark("grant", role, "--as", "reader")
    monkeypatch.setenv("PGOPTIONS", f"-c role={role}")
    said = pgpark("doctor")
    assert (said.code, said.out) == (3, "")
    assert "permission denied for function park_doctor; an admin can change that: pgpark grant" in said.err
    monkeypatch.delenv("PGOPTIONS")
    pgpark("grant", role, "--as", "admin")
    monkeypatch.setenv("PGOPTIONS", f"-c role={role}")
    assert pgpark("doctor").code == 0


def test_a_connection_for_notifications_that_is_refused_is_a_finding(
    pgpark: Pgpark, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise DatabaseError("cannot connect to here: too many clients")

    monkeypatch.setattr("pgpark.doctor.connect", refused)
    said = pgpark("doctor")
    assert said.code == 1
    assert "notifications not heard: " in said.out
    assert ": cannot connect to here: too many clients; give workers a DSN past the pooler" in said.out


# -- a pooler ----------------------------------------------------------------------------------------------------------

Pooler = Callable[[str], str]


@pytest.fixture
def pooler(db: Database) -> Iterator[Pooler]:
    """Runs PgBouncer before the database in a mode, and returns the DSN through it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        assert "PGPARK_TEST_NEEDS_TOOLS" not in os.environ, "there is no pgbouncer on this machine"
        pytest.skip("there is no pgbouncer on this machine")
    info = db.connection.info
    user = Path(info.host).owner() if info.host.startswith("/") else "nobody"  # who may open the server's socket
    password = f" password='{info.password}'" if info.password else ""
    running: list[subprocess.Popen[bytes]] = []

    with tempfile.TemporaryDirectory() as folder:

        def run(mode: str) -> str:
            config = Path(folder) / "pgbouncer.ini"
            config.write_text(
                f"[databases]\npooled = host={info.host} port={info.port} dbname={info.dbname} user={info.user}"
                f"{password}\n"
                f"[pgbouncer]\npool_mode = {mode}\nauth_type = any\nlisten_port = 6543\nunix_socket_dir = {folder}\n"
            )
            command = [program, str(config)]
            if os.getuid() == 0:
                shutil.chown(folder, user)
                command = ["runuser", "-u", user, "--", *command]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            dsn = f"host={folder} port=6543 user={info.user} dbname=pooled"
            wait_for(lambda: _answers(dsn), 20, "for pgbouncer")
            return dsn

        yield run
        for process in running:
            process.terminate()
            process.wait()


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def test_a_pooler_that_loses_notifications_is_found(pgpark: Pgpark, pooler: Pooler) -> None:
    said = pgpark("doctor", "--dsn", pooler("transaction"))
    assert said.code == 1
    assert said.out.startswith("-- notifications not heard: ")
    assert said.out.endswith(
        "/pooled: one did not arrive within 2 s; give workers a DSN past the pooler, or --poll\n\n"
    )


def test_a_pooler_that_keeps_sessions_is_no_problem(pgpark: Pgpark, pooler: Pooler) -> None:
    assert pgpark("doctor", "--dsn", pooler("session")).code == 0
