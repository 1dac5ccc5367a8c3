"""The audit of the accounts finds what it is for: each rule is broken once."""

from __future__ import annotations

import pytest

from tests import accounts
from tests.conftest import Database

SABOTAGE = {
    "units in use": "update pgpark.tally set units = units + 1 where units > 0",
    "free places": "update pgpark.place set free = free + 1 where place_id = (select max(place_id) from pgpark.place)",
    "has an outcome": "insert into pgpark.mailbox (task_id, pool, status, priority, units, attempt, submitted_at,"
    " created_at, pool_id, storage) select task_id, 'gpu', 'failed', 1, 1, 1, now(), now(), pool_id, 'mailbox_messages'"
    " from pgpark.task limit 1",
    "of no pool": "update pgpark.task set pool_id = -1 where state = 'parked'",
    "message without its task": "delete from pgpark.task where state = 'parked'",
    "or a task without": "delete from pgmq.q_gpu",
    "story S.,": "delete from pgpark.audit where event = 'started'",
    "last (completed,": "update pgpark.mailbox set status = 'failed'",
    "attempt , outcome": "delete from pgpark.task where state = 'parked'",
}


@pytest.fixture
def busy(db: Database) -> Database:
    db.pool(max_units=2, max_queue_depth=10, audit=True)
    for _ in range(4):
        db.parked()
    first, *_ = db.claimed()
    db.finish(first)
    return db


@pytest.mark.every_backend
def test_the_accounts_of_a_lot_at_work_add_up(busy: Database) -> None:
    assert accounts.faults(busy.dsn) == []


@pytest.mark.parametrize("what", SABOTAGE)
def test_each_fault_is_found(busy: Database, what: str) -> None:
    busy.connection.execute(SABOTAGE[what].encode())
    assert any(what in fault for fault in accounts.faults(busy.dsn))


def test_outcomes_are_counted_and_what_has_none_or_was_never_accepted_is_found(db: Database) -> None:
    db.pool()
    one, two = db.parked(), db.parked()
    with pytest.raises(AssertionError, match="2 tasks have not ended"):
        accounts.outcomes(db.dsn, [one, two])
    db.claim()
    db.finish(one)
    db.finish(two, status="failed")
    assert accounts.outcomes(db.dsn, [one, two]) == {"completed": 1, "failed": 1}
    with pytest.raises(AssertionError, match="never accepted"):
        accounts.outcomes(db.dsn, [one])
    with pytest.raises(AssertionError, match="without an outcome"):
        accounts.outcomes(db.dsn, [one, two, 99])
