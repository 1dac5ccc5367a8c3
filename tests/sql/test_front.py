"""Where the walks of a claim begin, and what is in use: exact, whoever commits late, comes back or rolls back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import Database, wait_for

Open = Callable[[], Database]


@pytest.fixture
def raised(db: Database) -> Callable[[], list[int]]:
    """Raises the floors of the pool as far as it goes (twice: the first time sets a mark), and returns them. Tests in
    other databases of the server hold them up for a moment; another writer of this database may do so for good."""
    settled = (
        "select pgpark._all_in_sight(m.xmin) or exists (select from pg_stat_activity a"
        " where a.datname = current_database() and a.pid <> pg_backend_pid() and a.backend_xid is not null)"
        " from pgpark.mark m"
    )

    def raise_floors() -> list[int]:
        for _ in range(2):
            wait_for(lambda: db.value(settled))
            db.connection.execute("begin")
            db.rows("select pgpark._raise_floors(pgpark._lock_pool('gpu'), pgpark._now()) is null as done")
            db.connection.execute("commit")
        return list(db.value("select task_floors from pgpark.front"))

    return raise_floors


def test_floors_rise_to_the_first_parked_task_of_each_priority(db: Database, raised: Callable[[], list[int]]) -> None:
    db.pool(max_units=2)
    started = [db.parked(), db.parked()]
    high, first, second = db.parked(priority="high"), db.parked(), db.parked()
    db.rows("select pgpark.park_cancel(%s)", high)
    assert db.claimed() == started
    low, normal, high_floor, critical = raised()
    assert normal == first
    assert low == high_floor == critical == second + 1
    for task in started:
        db.finish(task)
    assert db.claimed() == [first, second]


def test_a_floor_does_not_pass_what_has_yet_to_be_committed(
    db: Database, connect: Open, raised: Callable[[], list[int]]
) -> None:
    db.pool(max_units=100)
    late = connect()
    late.connection.execute("begin")
    early = late.parked()
    late_many = late.rows("select task_id from pgpark.park_submit_many('gpu', '[{\"payload\": 1}]')")[0]["task_id"]
    others = [db.parked() for _ in range(3)]
    assert db.claimed() == others
    for task in others:
        db.finish(task)
    assert max(raised()) <= early
    late.connection.execute("commit")
    assert db.claimed() == [early, late_many]
    assert min(raised()) > late_many


def test_a_floor_passes_what_is_open_but_writes_nothing(
    db: Database, connect: Open, raised: Callable[[], list[int]]
) -> None:
    db.pool()
    old = connect()
    old.connection.execute("begin isolation level repeatable read")
    old.rows("select 1 as one")
    task = db.parked()
    assert db.claimed() == [task]
    assert min(raised()) > task


@pytest.mark.parametrize("comes_back", ["released", "retried", "lost"])
def test_a_task_that_parks_again_below_the_floor_keeps_its_place(
    db: Database, raised: Callable[[], list[int]], comes_back: str
) -> None:
    db.freeze()
    db.pool(max_units=4, retry={"max_attempts": 2, "backoff_secs": 0}, lease_secs=5)
    first, second, *rest = (db.parked() for _ in range(6))
    assert db.claimed(max_tasks=4) == [first, second, *rest[:2]]
    db.finish(first)
    assert raised()[1] == rest[2]
    if comes_back == "released":
        db.rows("select pgpark.park_release(%s, 1)", second)
    elif comes_back == "retried":
        db.finish(second, status="failed")
        db.advance(1)  # the claim itself parks it again
    else:
        for task in rest[:2]:
            db.finish(task)
        db.advance(6)  # the claim itself takes it back
    assert db.claimed(max_tasks=1) == [second]
    assert db.value("select count(*) from pgpark.returned") == 0


@pytest.mark.parametrize("ends", ["retry", "release"])
def test_a_deadline_that_passed_while_the_task_ran_expires_it_when_it_waits_again(
    db: Database, raised: Callable[[], list[int]], ends: str
) -> None:
    db.freeze()
    db.pool(max_units=1, retry={"max_attempts": 2, "backoff_secs": 600}, lease_secs=600)
    task = db.parked(deadline=db.after(10))
    db.claim()
    db.advance(200)
    raised()
    if ends == "retry":
        db.finish(task, status="failed")
    else:
        db.rows("select pgpark.park_release(%s, 1)", task)
    assert db.maintain()["expired"] == 1
    assert db.outcome(task) == ("expired", "deadline_expired")


def test_a_task_that_came_back_is_seen_by_whoever_only_looks(db: Database, raised: Callable[[], list[int]]) -> None:
    db.freeze()
    db.pool(max_units=4)
    task = db.parked()
    db.claim()
    raised()
    db.rows("select pgpark.park_release(%s, 1)", task)
    assert db.maintain("gpu")["next_due"] == db.after(1), "it could start"


def test_a_task_whose_cancel_is_rolled_back_is_not_passed(
    db: Database, connect: Open, raised: Callable[[], list[int]]
) -> None:
    db.pool(max_units=100)
    tasks = [db.parked() for _ in range(3)]
    canceller = connect()
    canceller.connection.execute("begin")
    canceller.rows("select pgpark.park_cancel(%s)", tasks[0])
    assert db.claimed() == tasks[1:]
    raised()
    canceller.connection.execute("rollback")
    assert raised()[1] == tasks[0]
    assert db.claimed() == tasks[:1]


def test_a_claim_that_is_rolled_back_leaves_the_floors(db: Database, raised: Callable[[], list[int]]) -> None:
    db.pool(max_units=100)
    task = db.parked()
    before = raised()
    db.connection.execute("begin")
    db.claim()
    db.rows("select pgpark._raise_floors(pgpark._lock_pool('gpu'), pgpark._now()) is null as done")
    db.connection.execute("rollback")
    assert db.value("select task_floors from pgpark.front") == before
    assert db.claimed() == [task]


@pytest.mark.parametrize("fairness", ["fifo", "tenant"])
def test_a_pool_that_changes_its_order_forgets_its_floors(
    db: Database, raised: Callable[[], list[int]], fairness: str
) -> None:
    db.pool(max_units=1, fairness=fairness)
    tasks = [db.parked(tenant=tenant) for tenant in ("a", "a", "a", "b")]
    assert db.claimed() == tasks[:1]
    raised()
    db.finish(tasks[0])
    db.pool(max_units=1, fairness="tenant" if fairness == "fifo" else "fifo")
    order = []
    while started := db.claimed():
        order += started
        raised()
        db.finish(started[0])
    assert sorted(order) == tasks[1:]


def test_units_in_use_are_those_of_what_runs(db: Database) -> None:
    db.pool(max_units=20, retry={"max_attempts": 2})
    tasks = [db.parked(units=units) for units in (1, 2, 3, 4, 5, 6)]
    in_use = "select pgpark._used_units(pool_id) from pgpark.pool"
    assert db.claimed(max_tasks=5) == tasks[:5]
    assert db.value(in_use) == 15
    db.finish(tasks[0])
    db.finish(tasks[1], status="failed")
    db.rows("select pgpark.park_release(%s, 1)", tasks[2])
    db.rows("select pgpark.park_cancel(%s)", tasks[3])
    assert db.value(in_use) == 4 + 5
    db.finish(tasks[3], status="dropped")
    assert db.value(in_use) == 5
    for _ in range(60):
        task = db.parked()
        db.claim()
        db.finish(task)
    db.rows("select pgpark._fold_tally(pool_id) from pgpark.pool")
    assert db.value(in_use) == db.value("select sum(units) from pgpark.task where state = 'running'")


def test_a_shorter_lease_is_looked_after_in_time(db: Database) -> None:
    db.freeze()
    db.pool(lease_secs=600)
    db.parked()
    db.claim()
    db.pool(lease_secs=5)
    task = db.parked()
    assert db.claimed() == [task]
    db.advance(6)
    assert db.maintain()["reclaimed"] == 1
    assert db.claimed() == [task]
