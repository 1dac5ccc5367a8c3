"""What can be said of the functions without running them: plpgsql_check over each, where the server has it."""

from __future__ import annotations

import os

import pytest

from tests.conftest import Database

# What plpgsql_check says and we know better, with the reason.
EXPLAINED: dict[str, str] = {}


def test_plpgsql_check_finds_nothing(db: Database) -> None:
    if not db.rows("select from pg_available_extensions where name = 'plpgsql_check'"):
        assert "PGPARK_TEST_NEEDS_PLPGSQL_CHECK" not in os.environ, "this server does not offer plpgsql_check"
        pytest.skip("this server does not offer plpgsql_check")
    db.rows("select set_config('client_min_messages', 'warning', false)")
    db.connection.execute("create extension plpgsql_check")
    checked = db.rows(
        "select p.proname, c.line from pg_proc p join pg_language l on l.oid = p.prolang and l.lanname = 'plpgsql'"
        " left join lateral plpgsql_check_function(p.oid, fatal_errors => false, all_warnings => true) as c (line) on true"
        " where p.pronamespace = 'pgpark'::regnamespace"
    )
    assert len({row["proname"] for row in checked}) > 40
    found = [f"{row['proname']}: {row['line']}" for row in checked if row["line"] is not None]
    assert [line for line in found if line not in EXPLAINED] == []


def test_walks_over_the_lot_go_by_index(db: Database) -> None:
    """Each question of the hot path has its index, also where the planner has no statistics yet."""
    db.pool()
    db.connection.execute("set enable_seqscan = off")
    lot = "pool_id = (select pool_id from pgpark.pool where name = 'gpu')"
    for question, index in {
        f"select task_id from pgpark.task where {lot} and state = 'parked' order by priority desc, task_id": "task_rank",
        f"select sum(units) from pgpark.task where {lot} and state in ('running', 'cancelling')": "task_running",
        f"select task_id from pgpark.task where {lot} and state = 'delayed' and run_at <= now()": "task_due",
        f"select task_id from pgpark.task where {lot} and state in ('parked', 'delayed') and deadline <= now()"
        " order by deadline": "task_deadline",
    }.items():
        plan = "\n".join(row["QUERY PLAN"] for row in db.rows(f"explain {question}"))
        assert index in plan, plan
        assert "Sort" not in plan, plan
