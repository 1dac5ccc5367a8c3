"""What calls read while another session holds an old snapshot, so that nothing dead can be vacuumed away.

Ten thousand tasks have passed through by then, and the tables were analyzed while the lot was empty: statistics say
that there is nothing, indexes are full of dead entries, and a plan that walks all of an index looks cheaper than one
that looks up what it needs. Counted is what index scans read (pg_stat_user_indexes.idx_tup_read), dead entries
included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database, wait_for

PASSED = 10_000
BATCH = 100
# Entries that a walk may read beyond what it needs: functions/_front.sql raises a floor after a thousand, or at the
# next mark after that.
SLACK = 4_000

Outcomes = list[dict[str, Any]]


def entries_read(db: Database, statement: str, *parameters: Any) -> int:
    """By all index scans of this call on tables of ours."""

    def so_far() -> int:
        db.rows("select pg_stat_force_next_flush()")
        count = db.value(
            "select sum(idx_tup_read)::bigint from pg_stat_user_indexes where schemaname in ('pgpark', 'pgmq')"
        )
        return int(count)

    before = so_far()
    db.rows(statement, *parameters)
    return so_far() - before


def submit(db: Database, count: int = BATCH, **arguments: Any) -> None:
    task = {"payload": "x" * 100, "tenant": "t"} | arguments
    db.rows("select from pgpark.park_submit_many('gpu', %s)", Jsonb([task] * count))


def outcomes_of(rows: list[Any], status: str = "completed") -> Outcomes:
    return [{"task_id": row["task_id"], "attempt": row["attempt"], "status": status} for row in rows]


def held(db: Database, status: str = "completed") -> Jsonb:
    """Outcomes for a batch that is claimed now."""
    submit(db)
    rows = db.claim(max_tasks=BATCH)
    assert len(rows) == BATCH
    return Jsonb(outcomes_of(rows, status))


def claim(db: Database) -> int:
    submit(db)
    return entries_read(db, "select from pgpark.park_claim('gpu', 'w', %s)", BATCH)


def claim_of_a_limited_worker(db: Database) -> int:
    submit(db)
    return entries_read(db, "select from pgpark.park_claim('gpu', 'w', %s, 1000000)", BATCH)


def next_(db: Database) -> int:
    outcomes = held(db)
    submit(db)
    return entries_read(db, "select from pgpark.park_next('gpu', 'w', %s, %s)", outcomes, BATCH)


def finish(db: Database) -> int:
    return entries_read(db, "select from pgpark.park_finish_many(%s)", held(db))


def retry(db: Database) -> int:
    return entries_read(db, "select from pgpark.park_finish_many(%s)", held(db, "failed"))


def heartbeat(db: Database) -> int:
    ids = [outcome["task_id"] for outcome in held(db).obj]
    return entries_read(db, "select from pgpark.park_heartbeat('gpu', 'w', %s)", ids)


def release(db: Database) -> int:
    one = held(db).obj[0]
    return entries_read(db, "select from pgpark.park_release(%s, %s)", one["task_id"], one["attempt"])


def emit(db: Database) -> int:
    emissions = [
        {"task_id": one["task_id"], "attempt": one["attempt"], "parts": [{"content": 1}]} for one in held(db).obj
    ]
    return entries_read(db, "select from pgpark.park_emit_many(%s)", Jsonb(emissions))


def cancel(db: Database) -> int:
    return entries_read(db, "select from pgpark.park_cancel(%s)", db.parked())


def status(db: Database) -> int:
    return entries_read(db, "select from pgpark.park_status(%s)", db.parked())


def submit_one(db: Database) -> int:
    return entries_read(db, "select from pgpark.park_submit('gpu', '1', idempotency_key => random()::text)")


def calling(call: str) -> Callable[[Database], int]:
    return lambda db: entries_read(db, f"select from pgpark.{call}")


def acknowledge(db: Database) -> int:
    outcomes = held(db)
    db.rows("select from pgpark.park_finish_many(%s)", outcomes)
    ids = "array(select message_id from pgpark.park_fetch('t', max_messages => 100))"
    return entries_read(db, f"select pgpark.park_ack({ids})")


# Without park_stats, which counts what runs by its index, dead entries included.
CALLS: dict[str, Callable[[Database], int]] = {
    "claim": claim,
    "claim of a limited worker": claim_of_a_limited_worker,
    "next": next_,
    "finish": finish,
    "retry": retry,
    "heartbeat": heartbeat,
    "release": release,
    "emit": emit,
    "cancel": cancel,
    "status": status,
    "submit": submit_one,
    "explain": calling("park_explain('gpu')"),
    "maintain": calling("park_maintain('gpu')"),
    "prune": calling("park_prune('gpu')"),
    "ack": acknowledge,
}


def empty(db: Database) -> None:
    """Ends every task, so that the lot is empty while its indexes are not."""
    db.rows("select pgpark.park_cancel(task_id) from pgpark.task")
    running = "select task_id, attempt from pgpark.task"
    db.rows("select from pgpark.park_finish_many(%s)", Jsonb(outcomes_of(db.rows(running))))
    assert db.value("select count(*) from pgpark.task") == 0


def until_the_floors_have_risen(db: Database, before: int, call: Callable[[Database], int] = claim) -> None:
    """Calls until one reads as little as before: whoever writes on this server, in another test, may hold them up."""
    wait_for(lambda: call(db) <= before + SLACK, what="for the floors to rise")


@pytest.fixture
def old_snapshot(connect: Callable[[], Database]) -> Iterator[None]:
    """Held from before anything is submitted."""
    session = connect()
    session.connection.execute("begin isolation level repeatable read")
    session.rows("select 1")
    yield
    session.connection.execute("rollback")


@pytest.mark.every_backend
@pytest.mark.usefixtures("old_snapshot")
def test_what_calls_read_does_not_grow_under_an_old_snapshot(db: Database) -> None:
    if db.connection.info.server_version < 150_000:
        pytest.skip("statistics cannot be asked for at once before PostgreSQL 15")
    db.pool(max_units=1_000_000, retry={"max_attempts": 9, "backoff_secs": 1000}, lease_secs=1000)
    before = {name: call(db) for name, call in CALLS.items()}
    outcomes: Outcomes = []
    for _ in range(PASSED // BATCH):
        submit(db)
        rows = db.rows("select * from pgpark.park_next('gpu', 'w', %s, %s)", Jsonb(outcomes), 2 * BATCH)
        outcomes = outcomes_of(rows)
    empty(db)
    db.connection.execute("vacuum analyze")
    until_the_floors_have_risen(db, before["claim"])
    after = {name: call(db) for name, call in CALLS.items()}
    assert {name: (count, before[name]) for name, count in after.items() if count > before[name] + SLACK} == {}


@pytest.mark.usefixtures("old_snapshot")
def test_deadlines_and_delays_that_are_over_are_not_read_again(db: Database) -> None:
    """Ten thousand tasks were delayed, then started before their deadline, which has passed since."""
    if db.connection.info.server_version < 150_000:
        pytest.skip("statistics cannot be asked for at once before PostgreSQL 15")
    db.freeze()
    db.pool(max_units=1_000_000, lease_secs=10_000)
    before = claim(db)
    empty(db)
    outcomes: Outcomes = []
    for _ in range(PASSED // BATCH):
        submit(db, run_at=db.after(0.5).isoformat(), deadline=db.after(1).isoformat())
        db.advance(0.6)
        rows = db.rows("select * from pgpark.park_next('gpu', 'w', %s, %s)", Jsonb(outcomes), 2 * BATCH)
        assert len(rows) == BATCH
        outcomes = outcomes_of(rows)
    empty(db)
    db.advance(10)
    db.connection.execute("vacuum analyze")
    until_the_floors_have_risen(db, before)
    until_the_floors_have_risen(db, before, calling("park_maintain('gpu')"))
