"""What can be said of the functions without running them: plpgsql_check over each, where the server has it."""

from __future__ import annotations

import os

import pytest

from tests.conftest import Database

# What plpgsql_check says and we know better, with the reason.
VOLATILE = "performance:00000:routine is marked as VOLATILE, should be STABLE"
UNSEEN = "Detail: attention: cannot to determine volatility of used dynamic SQL"
RECHECK = "Hint: When you fix this issue, please, recheck other functions that uses this function."
EXPLAINED = {
    f"{function}: {line}": why
    for function, lines, why in (
        (
            "_send",
            (VOLATILE, UNSEEN, RECHECK),
            "it inserts by dynamic statements, which plpgsql_check cannot look into",
        ),
        ("_enter_pool", (VOLATILE, UNSEEN, RECHECK), "it locks by a dynamic statement"),
        ("_spare_door", (VOLATILE, UNSEEN, RECHECK), "it makes a table by a dynamic statement"),
        ("park_status", (VOLATILE, RECHECK), "it sees what its own statement has submitted"),
        ("_front_of_line", (VOLATILE, RECHECK), "it locks rows, in a subquery that plpgsql_check does not look into"),
    )
    for line in lines
}


def test_plpgsql_check_finds_nothing(db: Database) -> None:
    if not db.rows("select from pg_available_extensions where name = 'plpgsql_check'"):
        assert "PGPARK_TEST_NEEDS_PLPGSQL_CHECK" not in os.environ, "this server does not offer plpgsql_check"
        pytest.skip("this server does not offer plpgsql_check")
    db.rows("select set_config('client_min_messages', 'warning', false)")
    db.connection.execute("create extension plpgsql_check")
    checked = db.rows(
        "select p.proname, c.line"
        " from pg_proc p join pg_language l on l.oid = p.prolang and l.lanname = 'plpgsql'"
        " left join lateral plpgsql_check_function(p.oid, fatal_errors => false, all_warnings => true) c (line) on true"
        " where p.pronamespace = 'pgpark'::regnamespace"
    )
    assert len({row["proname"] for row in checked}) > 40
    found = [f"{row['proname']}: {row['line']}" for row in checked if row["line"] is not None]
    assert [line for line in found if line not in EXPLAINED] == []


def test_a_session_that_warmed_up_on_an_empty_ledger_never_scans_a_full_one(db: Database) -> None:
    """Plans are cached when the tables are small and nothing has analysed them; they must hold when they have grown."""
    db.pool(max_units=100000, max_queue_depth=100000, max_bypass=2)

    def whole_path() -> None:
        task = db.parked(units=50000, deadline=db.after(1000), idempotency_key=str(db.value("select random()")))
        db.parked(units=50001, priority="critical")
        db.parked(priority="critical", run_at=db.after(0.001))
        (row,) = db.rows("select * from pgpark.park_claim('gpu', 'w', 1, 100000)")
        db.rows("select from pgpark.park_heartbeat('gpu', 'w', %s)", [row["task_id"]])
        db.rows("select from pgpark.park_finish(%s, %s)", row["task_id"], row["attempt"])
        for row in db.claim(max_tasks=3):
            db.rows("select from pgpark.park_release(%s, %s)", row["task_id"], row["attempt"])
        db.rows("select from pgpark.park_cancel(%s)", task)
        db.rows("select from pgpark.park_maintain('gpu')")
        db.rows("select from pgpark.park_status(%s)", task)
        db.rows("select from pgpark.park_explain('gpu')")
        db.rows("select pgpark.park_lot('gpu')")
        db.rows("select pgpark.park_lot()")
        db.rows("select * from pgpark.park_metrics()")
        db.rows("select * from pgpark.park_history('gpu')")
        db.rows("select from pgpark.park_retry(%s)", task)
        db.rows("select pgpark.park_ack(array(select message_id from pgpark.park_result(%s)))", task)

    for _ in range(3):
        whole_path()
    db.rows(
        "select from pgpark.park_submit_many('gpu', (select jsonb_agg(jsonb_build_object('payload', 1,"
        " 'priority', 'low', 'deadline', pgpark._now() + interval '1 hour')) from generate_series(1, 20000)))"
    )
    db.connection.execute("begin")
    whole_path()
    scanned = db.rows(
        "select relname, seq_scan from pg_stat_xact_user_tables"
        " where schemaname = 'pgpark' and relname in ('task', 'mailbox', 'submission_key') and seq_scan > 0"
    )
    db.connection.execute("rollback")
    assert scanned == []
