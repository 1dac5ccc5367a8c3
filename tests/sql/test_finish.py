"""park_finish, park_finish_many, park_release, park_cancel: how attempts end, and the fence."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database

pytestmark = pytest.mark.every_backend


def finish_many(db: Database, outcomes: Any) -> list[tuple[int, bool]]:
    rows = db.rows("select * from pgpark.park_finish_many(%s)", Jsonb(outcomes))
    return [(row["task_id"], row["accepted"]) for row in rows]


def running(db: Database, **arguments: Any) -> int:
    task = db.parked(**arguments)
    assert db.claimed() == [task]
    return task


def test_finish_frees_the_units_and_leaves_the_result(db: Database) -> None:
    db.pool()
    task = running(db, units=24)
    assert db.finish(task, result={"answer": 42})
    assert db.stats()["used_units"] == 0
    (message,) = db.rows("select * from pgpark.park_result(%s)", task)
    assert (message["status"], message["payload"]) == ("completed", {"answer": 42})
    assert db.value(f"select count(*) from {db.messages()}") == 0


def test_a_second_finish_changes_nothing(db: Database) -> None:
    db.pool()
    task = running(db)
    assert db.finish(task, result=1)
    assert not db.finish(task, result=2)
    assert not db.finish(task, status="failed")
    assert db.value("select payload from pgpark.park_result(%s)", task) == 1


def test_a_late_finish_of_an_earlier_attempt_changes_nothing(db: Database) -> None:
    db.pool()
    task = running(db)
    db.value("select pgpark.park_release(%s, 1)", task)
    db.claim(worker="other")
    assert not db.finish(task, attempt=1, result="late")
    assert not db.value("select pgpark.park_release(%s, 1)", task)
    assert db.status(task)["status"] == "running"
    assert db.finish(task, attempt=2, result="right")


def test_a_parked_task_cannot_be_finished(db: Database) -> None:
    db.pool()
    task = db.parked()
    assert not db.finish(task, attempt=0)
    assert not db.finish(task, attempt=1)


def test_archived_pools_keep_the_message(db: Database) -> None:
    db.pool(archive=True)
    task = running(db, payload={"x": 1})
    db.finish(task)
    assert db.value(f"select message -> 'payload' from {db.archive()}") == {"x": 1}
    assert db.value(f"select count(*) from {db.messages()}") == 0


def test_a_batch_is_answered_row_by_row_in_order(db: Database) -> None:
    db.pool()
    first, second = db.parked(), db.parked()
    db.claim()
    outcomes = [
        {"task_id": second, "attempt": 1, "result": "b"},
        {"task_id": 999, "attempt": 1},
        {"task_id": first, "attempt": 7},
        {"task_id": first, "attempt": 1, "status": "failed", "reason": "boom"},
        {"task_id": second, "attempt": 1, "result": "again"},
    ]
    assert finish_many(db, outcomes) == [(second, True), (999, False), (first, False), (first, True), (second, False)]
    assert db.outcome(first) == ("failed", "boom")
    assert db.value("select payload from pgpark.park_result(%s)", second) == "b"


def test_a_batch_may_span_pools(db: Database) -> None:
    db.pool("a")
    db.pool("b", archive=True)
    one, two = db.parked("a"), db.parked("b")
    db.claim("a"), db.claim("b")
    assert finish_many(db, [{"task_id": one, "attempt": 1}, {"task_id": two, "attempt": 1}]) == [
        (one, True),
        (two, True),
    ]
    assert db.value(f"select count(*) from {db.archive('a')}") == 0
    assert db.value(f"select count(*) from {db.archive('b')}") == 1


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ({}, "outcomes must be a JSON array, not object"),
        ([5], "element 1: an outcome is an object with task_id and attempt"),
        ([{"task_id": 1}], "element 1: an outcome is an object with task_id and attempt"),
        ([{"task_id": 1, "attempt": "x"}], "element 1: an outcome is an object"),
        ([{"task_id": 1, "attempt": 1, "satus": "failed"}], "element 1: unknown key 'satus'; an outcome has task_id, "),
        ([{"task_id": 1, "attempt": 1, "reason": {}}], "element 1: reason must be a string, not {}"),
        (
            [{"task_id": 1, "attempt": 1}, {"task_id": 1, "attempt": 1, "status": "expired"}],
            "element 2: unknown status",
        ),
    ],
)
def test_a_bad_batch_is_named_and_changes_nothing(db: Database, outcomes: Any, message: str) -> None:
    db.pool()
    task = running(db)
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        finish_many(db, outcomes)
    assert str(caught.value.diag.message_primary).startswith(message)
    assert db.status(task)["status"] == "running"


def test_an_unknown_status_is_named(db: Database) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="unknown status 'done'; use completed"):
        db.finish(1, status="done")


def test_a_released_task_parks_in_its_old_place_and_nothing_is_counted(db: Database) -> None:
    db.pool(max_units=1, retry={"max_attempts": 1, "max_losses": 1})
    first, second = db.parked(), db.parked()
    for attempt in range(1, 6):
        assert db.claimed() == [first]
        assert db.value("select pgpark.park_release(%s, %s)", first, attempt)
    assert db.claimed() == [first]
    db.finish(first, attempt=6)
    assert db.claimed() == [second]


# -- cancelling ------------------------------------------------------------------------------------------------------


def cancel(db: Database, task: int, reason: str = "changed my mind") -> str:
    return str(db.value("select pgpark.park_cancel(%s, %s)", task, reason))


def test_a_waiting_task_is_dropped_at_once(db: Database) -> None:
    db.pool()
    parked, delayed = db.parked(), db.parked(run_at=db.after(100))
    assert cancel(db, parked) == cancel(db, delayed) == "dropped"
    assert db.outcome(parked) == db.outcome(delayed) == ("dropped", "changed my mind")
    assert cancel(db, parked) == "finished"
    assert cancel(db, 999) == "unknown"


def test_a_running_task_holds_its_units_until_its_worker_has_stopped_it(db: Database) -> None:
    db.pool()
    task = running(db, units=20)
    assert cancel(db, task) == cancel(db, task) == "cancelling"
    assert db.stats()["used_units"] == 20
    assert db.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", [task]) == [{"park_heartbeat": task}]
    assert db.finish(task, status="failed")
    assert db.outcome(task) == ("dropped", "changed my mind")
    assert db.stats()["used_units"] == 0


def test_a_cancelled_task_that_completes_all_the_same_keeps_its_answer(db: Database) -> None:
    db.pool()
    task = running(db)
    cancel(db, task)
    assert db.finish(task, result="paid for")
    assert db.outcome(task)[0] == "completed"


def test_a_cancelled_task_is_not_retried(db: Database) -> None:
    db.pool(retry={"max_attempts": 5})
    task = running(db)
    cancel(db, task)
    db.finish(task, status="failed")
    assert db.outcome(task) == ("dropped", "changed my mind")


def test_releasing_a_cancelled_task_drops_it(db: Database) -> None:
    db.pool()
    task = running(db)
    cancel(db, task)
    assert db.value("select pgpark.park_release(%s, 1)", task)
    assert db.outcome(task) == ("dropped", "changed my mind")


# -- the size of results ---------------------------------------------------------------------------------------------


def test_a_result_larger_than_the_pool_takes_fails_the_task_for_good(db: Database) -> None:
    db.pool(max_payload_kb=1, retry={"max_attempts": 3})
    db.pool("any")
    large, fits, elsewhere = db.parked(), db.parked(), db.parked("any")
    db.claim()
    db.claim("any")
    outcomes = [
        {"task_id": large, "attempt": 1, "result": "x" * 1023},
        {"task_id": fits, "attempt": 1, "result": "x" * 1022},
        {"task_id": elsewhere, "attempt": 1, "result": "x" * 5000},
    ]
    rows = db.rows("select * from pgpark.park_finish_many(%s)", Jsonb(outcomes))
    assert [row["accepted"] for row in rows] == [True, True, True]
    assert db.outcome(large) == ("failed", "result too large: 2 KiB, the pool takes 1 (max_payload_kb)")
    assert db.outcome(fits) == db.outcome(elsewhere) == ("completed", None)
    assert db.rows("select payload from pgpark.park_result(%s)", large) == [{"payload": None}]
    assert db.stats()["failed"] == 1


def test_a_failure_with_too_large_a_result_keeps_its_reason(db: Database) -> None:
    db.pool(max_payload_kb=1)
    task, unexplained = db.parked(), db.parked()
    db.claim()
    db.rows("select pgpark.park_finish(%s, 1, 'failed', %s, 'no such model')", task, Jsonb("x" * 2000))
    db.finish(unexplained, status="failed", result="x" * 2000)
    assert db.outcome(task) == ("failed", "no such model")
    assert db.outcome(unexplained) == ("failed", "result too large: 2 KiB, the pool takes 1 (max_payload_kb)")
    assert db.rows("select payload from pgpark.park_result(%s)", task) == [{"payload": None}]
