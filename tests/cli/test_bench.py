"""`pgpark bench`: figures that are possible, and nothing left behind, whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import Database, wait_for

SMALL = ("--tasks", "200", "--batch", "20", "--seconds", "10")
SHORT = ("--tasks", "200", "--batch", "20", "--seconds", "0.3")
LATENCIES = {"select_1", "notify", "submit_to_claim", "finish_to_client"}
RATES = {"submit_one_by_one": 20, "claim_and_finish_one_by_one": 20, "submit_in_bulk": 200, "drain": 200}


def start(dsn: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pgpark", "bench", *options]
    environment = {name: value for name, value in os.environ.items() if name != "PGPARK_DSN"}
    environment["PGPARK_DSN"] = dsn
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(dsn: str, *options: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    process = start(dsn, *options)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def read_until(process: subprocess.Popen[str], line: str) -> None:
    """Until the command has said that it is now doing this."""
    assert process.stderr is not None
    said = []
    for heard in process.stderr:
        said.append(heard)
        if heard.startswith(line):
            return
    pytest.fail(f"it never said {line!r}: {said}")


def assert_nothing_left(db: Database) -> None:
    for what in ("pool", "task", "mailbox", "worker", "tally", "place"):
        assert db.value(f"select count(*) from pgpark.{what}") == 0, what
    assert db.value("select count(*) from pgmq.list_queues() where queue_name ~ 'bench'") == 0
    assert db.value("select count(*) from pg_tables where schemaname = 'pgmq' and tablename ~ 'bench'") == 0


def test_its_figures_are_possible_and_nothing_is_left_behind(dsn: str, db: Database) -> None:
    code, out, err = run(dsn, *SMALL, "--workers", "2", "--json")
    assert code == 0, err
    rows = {row["measure"]: row for row in map(json.loads, out.splitlines())}
    assert rows.keys() == LATENCIES | RATES.keys()
    for row in rows.values():
        assert 0 <= row["p50_ms"] <= row["p99_ms"] < 120_000, row
    for measure, count in RATES.items():
        assert rows[measure]["count"] == count, rows[measure]
        assert rows[measure]["per_sec"] > 0
    for measure in ("submit_one_by_one", "claim_and_finish_one_by_one"):
        seconds = rows[measure]["count"] / rows[measure]["per_sec"]
        assert seconds * 1000 >= rows[measure]["p50_ms"] * rows[measure]["count"] / 2, "one after another"
    for measure in LATENCIES:
        assert rows[measure]["per_sec"] is None
        assert rows[measure]["count"] > 0
    # A claim is more than an empty statement, however soon its worker was woken.
    assert rows["submit_to_claim"]["p50_ms"] > rows["select_1"]["p50_ms"]
    assert_nothing_left(db)


def test_it_shows_a_table_and_leaves_the_tasks_of_others_alone(dsn: str, db: Database) -> None:
    db.pool("mine")
    parked = db.parked("mine")
    ended = db.parked("mine", tenant="me", priority="high")
    assert db.claimed("mine", max_tasks=1) == [ended]
    db.finish(ended)
    code, out, err = run(dsn, *SHORT)
    assert code == 0, err
    assert "claim and finish, 20 at a time, 1 connection" in out
    assert "submitted until a waiting worker has it" in out
    assert db.status(parked)["status"] == "parked"
    assert [row["task_id"] for row in db.rows("select task_id from pgpark.mailbox")] == [ended]
    assert [row["name"] for row in db.rows("select name from pgpark.pool")] == ["mine"]


def test_behind_a_pooler_it_measures_all_that_needs_no_notification(dsn: str, db: Database) -> None:
    code, out, err = run(dsn, *SHORT, "--poll", "--json")
    assert code == 0, err
    assert {json.loads(line)["measure"] for line in out.splitlines()} == {"select_1"} | RATES.keys()
    assert_nothing_left(db)


@pytest.mark.parametrize(
    ("number", "code", "phase"),
    [
        (signal.SIGINT, 130, "submitting in bulk"),
        (signal.SIGINT, 130, "waking a worker"),
        (signal.SIGTERM, 143, "submitting one by one"),
    ],
)
def test_a_run_that_is_interrupted_leaves_nothing_behind(
    dsn: str, db: Database, number: signal.Signals, code: int, phase: str
) -> None:
    process = start(dsn, "--tasks", "500000", "--seconds", "2")
    read_until(process, phase)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), err
    assert "Traceback" not in err
    assert_nothing_left(db)


def test_an_interrupt_ends_a_claim_that_waits_for_somebody(
    dsn: str, db: Database, connect: Callable[[], Database]
) -> None:
    process = start(dsn, "--tasks", "4000", "--batch", "1", "--seconds", "600", "--poll")
    read_until(process, "draining")
    holder = connect()
    with holder.connection.transaction():
        holder.rows("select 1 from pgpark.pool for update")
        waiting = "select 1 from pg_stat_activity where query like '%park_claim%' and wait_event_type = 'Lock'"
        wait_for(lambda: db.rows(f"{waiting} and datname = current_database()"), what="for a claim to wait")
        process.send_signal(signal.SIGINT)
        wait_for(
            lambda: db.rows(
                "select 1 from pg_stat_activity where query like '%park_drop_pool%' and wait_event_type = 'Lock'"
                " and datname = current_database()"
            ),
            what="for the pool to be dropped",
        )
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert_nothing_left(db)


def test_an_error_on_the_way_leaves_nothing_behind(dsn: str, db: Database) -> None:
    db.connection.execute("alter function pgpark.park_finish_many rename to gone")
    code, out, err = run(dsn, *SHORT)
    assert (code, out) == (3, "")
    assert err.splitlines()[-1].startswith("pgpark: this database has no pgpark, or an older one")
    assert_nothing_left(db)


def test_the_next_run_removes_the_pool_of_one_that_was_killed(dsn: str, db: Database) -> None:
    process = start(dsn, "--tasks", "500000")
    read_until(process, "submitting one by one")
    process.kill()
    process.communicate(timeout=60)
    (left,) = [row["name"] for row in db.rows("select name from pgpark.pool")]
    wait_for(lambda: not db.rows("select 1 from pg_locks where locktype = 'advisory'"), what="for its sessions to end")
    code, _, err = run(dsn, *SHORT)
    assert code == 0, err
    assert f"removed pool {left}, which a run that was killed left behind\n" in err
    assert_nothing_left(db)


def test_the_pool_of_a_run_that_is_under_way_is_left_alone(dsn: str, db: Database) -> None:
    other = db.pool("pgpark_bench_0123abcd") and "pgpark_bench_0123abcd"
    db.rows("select pg_advisory_lock_shared(1885826934, hashtext(%s))", other)
    code, _, err = run(dsn, *SHORT)
    assert code == 0, err
    assert "another pgpark bench is under way" in err
    code, _, err = run(dsn, *SHORT, "--poll")
    assert code == 0, err
    assert f"pgpark pool drop {other} --force" in err
    assert [row["name"] for row in db.rows("select name from pgpark.pool")] == [other]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "1"), "pgpark bench: Invalid value for '--tasks': 1 is not in the range"),
        (("--batch", "0"), "pgpark bench: Invalid value for '--batch': 0 is not in the range"),
        (("--workers", "many"), "pgpark bench: Invalid value for '--workers': 'many' is not a valid integer"),
        (("--seconds", "nan"), "pgpark bench: Invalid value for '--seconds': 'nan' is no number of seconds"),
        (("gpu",), "pgpark bench: Got unexpected extra argument (gpu)"),
    ],
)
def test_a_wrong_option_is_one_clear_line(dsn: str, options: tuple[str, ...], message: str) -> None:
    code, out, err = run(dsn, *options)
    assert (code, out) == (2, "")
    assert err.startswith(message), err
    assert err.count("\n") == 1


def test_a_database_without_pgpark_is_one_clear_line(empty_databases: Callable[[], str]) -> None:
    code, out, err = run(empty_databases())
    assert (code, out) == (3, "")
    assert "has no pgpark yet; run: pgpark migrate" in err
    assert err.count("\n") == 1
