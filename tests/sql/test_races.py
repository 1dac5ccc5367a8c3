"""Forced interleavings: one connection holds a transaction open, another is seen waiting for it, then it lets go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from tests.conftest import Background, Database

Run = Callable[[Database, Callable[[], Any]], Background]
Open = Callable[[], Database]


def test_a_claim_waits_for_an_uncommitted_one_and_starts_no_more_than_fits(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool(max_units=10)
    first, second, third = (db.parked(units=4) for _ in range(3))
    other = connect()
    db.connection.execute("begin")
    assert db.claimed(worker="a") == [first, second]
    waiting = background(other, lambda: other.claimed(worker="b")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() == []
    db.finish(first)
    assert other.claimed(worker="b") == [third]


def test_a_claim_that_is_rolled_back_starts_nothing(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_units=4)
    task = db.parked(units=4)
    other = connect()
    db.connection.execute("begin")
    assert db.claimed() == [task]
    waiting = background(other, lambda: [row["attempt"] for row in other.claim()]).wait_until_blocked()
    db.connection.execute("rollback")
    assert waiting.result() == [1]


def test_two_claims_of_one_worker_name_stay_within_its_units(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_units=100)
    tasks = [db.parked(units=4) for _ in range(4)]
    twin = connect()
    db.connection.execute("begin")
    assert db.claimed(worker="w", max_units=8) == tasks[:2]
    waiting = background(twin, lambda: twin.claimed(worker="w", max_units=8)).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() == []


def test_of_two_finishes_of_one_attempt_one_is_accepted(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    assert db.finish(task, result="first")
    waiting = background(other, lambda: other.finish(task, result="second")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is False
    assert db.value("select payload from pgpark.park_result(%s)", task) == "first"


def test_a_finish_that_is_rolled_back_leaves_the_task_running(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    assert db.finish(task, result="never")
    waiting = background(other, lambda: other.finish(task, result="this")).wait_until_blocked()
    db.connection.execute("rollback")
    assert waiting.result() is True
    assert db.value("select payload from pgpark.park_result(%s)", task) == "this"


def test_finish_against_cancel(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    db.finish(task, result=1)
    waiting = background(other, lambda: other.value("select pgpark.park_cancel(%s)", task)).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() == "finished"
    assert db.outcome(task)[0] == "completed"


def test_cancel_against_finish(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    assert db.value("select pgpark.park_cancel(%s, 'stop')", task) == "cancelling"
    waiting = background(other, lambda: other.finish(task, status="failed")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is True
    assert db.outcome(task) == ("dropped", "stop")


def test_a_claim_passes_over_a_task_that_is_being_cancelled(db: Database, connect: Open) -> None:
    db.pool()
    cancelled, task = db.parked(), db.parked()
    other = connect()
    db.connection.execute("begin")
    assert db.value("select pgpark.park_cancel(%s)", cancelled) == "dropped"
    assert other.claimed() == [task], "without waiting for the open transaction"
    db.connection.execute("commit")


def test_finish_against_a_lost_lease(db: Database, connect: Open, background: Run) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    task = db.parked()
    db.claim()
    db.advance(10)
    other = connect()
    db.connection.execute("begin")
    assert db.maintain()["reclaimed"] == 1
    waiting = background(other, lambda: other.finish(task, result="late")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is False
    assert db.status(task)["status"] == "parked"


def test_a_lost_lease_against_finish(db: Database, connect: Open) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    task = db.parked()
    db.claim()
    db.advance(10)
    other = connect()
    db.connection.execute("begin")
    assert db.finish(task, result="in time")
    assert other.maintain()["reclaimed"] == 0, "it passes over what somebody else holds"
    db.connection.execute("commit")
    assert db.outcome(task)[0] == "completed"


def test_a_heartbeat_against_a_lost_lease(db: Database, connect: Open) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    task = db.parked()
    db.claim()
    db.advance(10)
    other = connect()
    db.connection.execute("begin")
    db.maintain()
    beat = "select * from pgpark.park_heartbeat('gpu', 'w', %s)"
    assert other.rows(beat, [task]) == [], "it passes over what somebody else holds"
    db.connection.execute("commit")
    assert other.rows(beat, [task]) == [{"park_heartbeat": task}], "it is told to stop"


def test_finish_waits_for_no_claim(db: Database, connect: Open) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    db.claim()  # holds the pool's lock
    assert other.finish(task), "frees its units all the same"
    db.connection.execute("commit")


def test_maintenance_runs_one_at_a_time_and_nobody_waits(db: Database, connect: Open) -> None:
    db.pool()
    db.freeze()
    late = db.parked(deadline=db.after(1))
    db.advance(1)
    other = connect()
    db.connection.execute("begin")
    assert db.maintain()["expired"] == 1
    report = other.maintain()
    assert (report["expired"], report["next_due"]) == (0, db.status(late)["deadline"])
    db.connection.execute("commit")


def test_two_batches_that_finish_the_same_tasks_do_not_deadlock(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    tasks = [db.parked() for _ in range(2)]
    db.claim()
    other = connect()
    forward = [{"task_id": task, "attempt": 1} for task in tasks]
    finish = "select accepted from pgpark.park_finish_many(%s)"
    db.connection.execute("begin")
    db.finish(tasks[0])
    waiting = background(
        other, lambda: other.rows(finish, psycopg.types.json.Jsonb(forward[::-1]))
    ).wait_until_blocked()
    assert db.finish(tasks[1])
    db.connection.execute("commit")
    assert [row["accepted"] for row in waiting.result()] == [False, False]


def test_a_heartbeat_renews_the_rest_while_one_task_is_held(db: Database, connect: Open) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    held, other_task = db.parked(), db.parked()
    db.claim()
    db.advance(5)
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", held)
    assert db.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", [held, other_task]) == []
    other.connection.execute("rollback")
    db.advance(6)
    assert db.maintain()["reclaimed"] == 1
    assert db.status(other_task)["status"] == "running"


def test_a_task_behind_one_that_is_being_cancelled_starts_in_its_stead(db: Database, connect: Open) -> None:
    db.pool(max_units=24, max_bypass=5)
    front, fits, small = db.parked(units=20), db.parked(units=8), db.parked(units=2)
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", front)
    assert db.claimed(max_tasks=1) == [fits], "not nothing, and not one behind it"
    other.connection.execute("rollback")
    assert db.claimed() == [small], "the front is a head now"
    assert db.value("select bypassed from pgpark.task where task_id = %s", front) == 1


def test_a_claim_does_not_wait_for_a_head_that_is_being_cancelled(db: Database, connect: Open) -> None:
    db.pool(max_units=10, max_bypass=3)
    db.parked(units=6)
    db.claim()
    head, small = db.parked(units=8), db.parked(units=1)
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", head)
    db.connection.execute("set lock_timeout = '2s'")
    assert db.claimed() == [small]
    other.connection.execute("commit")


def test_a_rolled_back_cancel_is_noticed_within_a_second(db: Database, connect: Open) -> None:
    db.pool()
    db.freeze()
    task = db.parked()
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", task)
    assert db.claimed() == []
    other.connection.execute("rollback")
    assert db.maintain("gpu")["next_due"] == db.after(1)
    assert db.claimed() == [task]


def test_finish_and_claim_in_one_transaction_do_not_deadlock_with_a_heartbeat(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool()
    task, _ = db.parked(), db.parked()
    db.claim(max_tasks=1)
    db.rows("update pgpark.worker set seen_at = seen_at - interval '1 minute' returning 1")
    other = connect()
    db.connection.execute("begin")
    db.finish(task)
    db.claim()
    beat = background(other, lambda: other.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", [task]))
    db.connection.execute("commit")
    assert beat.result() == [{"park_heartbeat": task}]
