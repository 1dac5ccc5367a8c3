"""Forced interleavings: one connection holds a transaction open, another is seen waiting for it, then it lets go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

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


def test_a_heartbeat_against_a_lost_lease(db: Database, connect: Open, background: Run) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    task = db.parked()
    db.claim()
    db.advance(10)
    other = connect()
    db.connection.execute("begin")
    db.maintain()
    beat = background(
        other, lambda: other.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", [task])
    ).wait_until_blocked()
    db.connection.execute("commit")
    assert beat.result() == [{"park_heartbeat": task}], "it is told to stop"


def test_submits_against_the_last_free_place(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_queue_depth=1)
    other = connect()
    db.connection.execute("begin")
    assert db.submit()["accepted"]
    waiting = background(other, lambda: other.submit()["reason"]).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() == "queue_full"


def test_the_last_free_place_is_free_again_after_a_rollback(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_queue_depth=1)
    other = connect()
    db.connection.execute("begin")
    assert db.submit()["accepted"]
    waiting = background(other, lambda: other.submit()["reason"]).wait_until_blocked()
    db.connection.execute("rollback")
    assert waiting.result() is None


def test_submits_with_one_key_make_one_task(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    other = connect()
    db.connection.execute("begin")
    first = db.parked(idempotency_key="k")
    waiting = background(other, lambda: other.submit(idempotency_key="k")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() == {"task_id": first, "accepted": True, "status": "parked", "reason": "duplicate"}


def test_a_key_whose_first_submit_is_rolled_back_goes_to_the_second(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool()
    other = connect()
    db.connection.execute("begin")
    first = db.parked(idempotency_key="k")
    waiting = background(other, lambda: other.submit(idempotency_key="k")).wait_until_blocked()
    db.connection.execute("rollback")
    row = waiting.result()
    assert row["reason"] is None
    assert row["task_id"] != first


def test_a_shrink_waits_for_a_claim_and_nothing_starts_over_the_new_size(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool(max_units=20)
    for _ in range(4):
        db.parked(units=5)
    other = connect()
    db.connection.execute("begin")
    assert len(db.claimed(max_tasks=2)) == 2
    shrink = background(other, lambda: other.pool(max_units=10)).wait_until_blocked()
    db.connection.execute("commit")
    assert shrink.result() == "changed"
    assert db.claimed() == []


def test_a_claim_waits_for_a_shrink(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_units=20)
    fits = db.parked(units=10)
    db.parked(units=10)
    other = connect()
    db.connection.execute("begin")
    db.pool(max_units=10)
    claim = background(other, other.claimed).wait_until_blocked()
    db.connection.execute("commit")
    assert claim.result() == [fits]


def test_a_shrink_sees_a_submit_that_was_under_way(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_units=20)
    other = connect()
    db.connection.execute("begin")
    large = db.parked(units=20)
    shrink = background(other, lambda: other.pool(max_units=10)).wait_until_blocked()
    db.connection.execute("commit")
    shrink.result()
    assert db.outcome(large) == ("dropped", "too_large")


def test_draining_waits_for_submits_under_way_and_admits_none_after(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool()
    other = connect()
    db.connection.execute("begin")
    task = db.parked()
    drain = background(
        other, lambda: other.rows("select pgpark.park_set_pool_state('gpu', 'draining')")
    ).wait_until_blocked()
    db.connection.execute("commit")
    drain.result()
    assert db.submit()["reason"] == "pool_closed"
    assert db.claimed() == [task]


def test_a_forced_drop_takes_a_submit_that_was_under_way_with_it(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    other = connect()
    db.connection.execute("begin")
    task = db.parked()
    drop = background(
        other, lambda: other.rows("select pgpark.park_drop_pool('gpu', force => true)")
    ).wait_until_blocked()
    db.connection.execute("commit")
    drop.result()
    assert db.outcome(task) == ("dropped", "pool_dropped")


def test_a_submit_that_waits_for_a_drop_finds_no_pool(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    other = connect()
    db.connection.execute("begin")
    db.rows("select pgpark.park_drop_pool('gpu')")
    submit = background(other, other.submit).wait_until_blocked()
    db.connection.execute("commit")
    with pytest.raises(psycopg.errors.UndefinedObject, match="unknown pool 'gpu'"):
        submit.result()


def test_two_who_make_the_same_pool_make_one(db: Database, connect: Open, background: Run) -> None:
    other = connect()
    db.connection.execute("begin")
    assert db.pool(max_units=5) == "created"
    second = background(other, lambda: other.pool(max_units=5)).wait_until_blocked()
    db.connection.execute("commit")
    assert second.result() == "unchanged"


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
