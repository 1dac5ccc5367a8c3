"""park_retry: once more, for what waits out its backoff and for what has ended."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.accounts import faults
from tests.conftest import Database


def retry(db: Database, task_id: int) -> tuple[Any, ...]:
    (row,) = db.rows("select * from pgpark.park_retry(%s)", task_id)
    assert list(row) == ["task_id", "accepted", "status", "reason"]
    return tuple(row.values())


def ended(db: Database, **arguments: Any) -> int:
    """A task that failed for good."""
    task = db.parked(**arguments)
    assert task in db.claimed()
    db.value("select pgpark.park_finish(%s, 1, 'failed', null, 'no luck')", task)
    assert db.outcome(task) == ("failed", "no luck")
    return task


def test_a_task_in_its_backoff_runs_at_once(db: Database) -> None:
    db.pool(retry={"max_attempts": 3, "backoff_secs": 1000, "max_backoff_secs": 1000}, max_queue_depth=5)
    task, other = db.parked(), db.parked()
    assert db.claimed() == [task, other]
    db.finish(task, status="failed")
    db.finish(other)
    for _ in range(3):
        assert db.claimed() == []
    assert retry(db, task) == (task, True, "parked", None)
    assert [(row["task_id"], row["attempt"]) for row in db.claim()] == [(task, 2)]
    assert faults(db.dsn) == []


def test_a_retried_task_of_a_fair_pool_has_its_old_turn(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant", retry={"max_attempts": 2, "backoff_secs": 1000, "max_backoff_secs": 1000})
    first = db.parked(tenant="a")
    others = [db.parked(tenant="b") for _ in range(2)]
    assert db.claimed() == [first]
    db.finish(first, status="failed")
    assert retry(db, first)[1]
    assert db.claimed() == [first]
    db.finish(first, attempt=2)
    assert db.claimed() == others[:1]


@pytest.mark.every_backend
def test_an_ended_task_is_submitted_once_more_as_it_was(db: Database) -> None:
    db.pool(archive=True)
    task = ended(db, payload={"prompt": "hi"}, units=7, priority="high", tenant="t", user_id="u", session_id="s")
    again, accepted, status, reason = retry(db, task)
    assert (accepted, status, reason) == (True, "parked", None)
    assert again > task
    (claimed,) = db.claim()
    keys = ("task_id", "attempt", "payload", "units", "priority", "tenant", "user_id", "session_id")
    assert tuple(claimed[key] for key in keys) == (again, 1, {"prompt": "hi"}, 7, "high", "t", "u", "s")
    assert db.outcome(task) == ("failed", "no luck"), "what has ended stays ended"


def test_two_retries_of_one_task_make_one_task(db: Database) -> None:
    db.pool(archive=True)
    task = ended(db)
    again = retry(db, task)[0]
    assert retry(db, task) == (again, True, "parked", "duplicate")
    assert db.claimed() == [again]


def test_an_expired_and_a_cancelled_task_may_be_tried_again(db: Database) -> None:
    db.pool(archive=True)
    db.freeze()
    late, unwanted = db.parked(deadline=db.after(5)), db.parked()
    db.value("select pgpark.park_cancel(%s)", unwanted)
    db.advance(6)
    db.maintain()
    assert (db.outcome(late)[0], db.outcome(unwanted)[0]) == ("expired", "dropped")
    tasks = [retry(db, late)[0], retry(db, unwanted)[0]]
    assert db.claimed() == tasks


def test_without_an_archive_the_payload_is_gone(db: Database) -> None:
    db.pool()
    assert retry(db, ended(db)) == (None, False, "rejected", "payload_gone")


def test_an_archive_that_was_emptied_or_dropped_is_gone(db: Database) -> None:
    db.pool(archive=True)
    task, other = ended(db), ended(db)
    db.connection.execute("delete from pgmq.a_gpu where (message #>> '{metadata,task_id}')::int = %s", [task])
    assert retry(db, task)[3] == "payload_gone"
    db.rows("select pgpark.park_drop_pool('gpu')")
    assert retry(db, other)[3] == "payload_gone"
    db.pool(archive=True)
    assert retry(db, other)[3] == "payload_gone", "another pool of that name"


def test_what_need_not_be_retried_is_refused(db: Database) -> None:
    db.pool(archive=True)
    done, running = db.parked(), db.parked()
    db.claim()
    db.finish(done)
    parked, later = db.parked(), db.parked(run_at=db.after(1000))
    assert retry(db, done)[3] == "completed"
    assert {retry(db, task) for task in (running, parked, later)} == {(None, False, "rejected", "not_ended")}
    assert retry(db, 987654)[3] == "unknown"


def test_a_pool_that_takes_nothing_refuses_a_retry_too(db: Database) -> None:
    db.pool(archive=True)
    task = ended(db)
    db.rows("select pgpark.park_set_pool_state('gpu', 'draining')")
    assert retry(db, task) == (None, False, "rejected", "pool_closed")


def test_a_stranger_retries_its_own_tasks_alone(db: Database, role: str) -> None:
    db.pool(archive=True)
    mine, theirs = ended(db, tenant="acme"), ended(db, tenant="globex")
    db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{acme}')", role)
    db.connection.execute(f"set role {role}")
    assert retry(db, mine)[1:] == (True, "parked", None)
    assert retry(db, theirs) == (None, False, "rejected", "unknown")
    db.connection.execute("reset role")
    db.rows("select pgpark.park_revoke(%s)", role)
    db.rows("select pgpark.park_grant(%s, 'reader')", role)
    db.connection.execute(f"set role {role}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        retry(db, mine)
    db.connection.execute("reset role")
