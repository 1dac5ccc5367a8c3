"""Whatever may let a parked task start, or changes when the next timer is due, notifies the pool's listeners."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Database

ACTIONS: dict[str, Callable[[Database, int, int], object]] = {
    "submit": lambda db, running, waiting: db.submit(),
    "a delayed submit": lambda db, running, waiting: db.submit(run_at=db.after(10)),
    "finish": lambda db, running, waiting: db.finish(running),
    "a failure with a retry": lambda db, running, waiting: db.finish(running, status="failed"),
    "release": lambda db, running, waiting: db.value("select pgpark.park_release(%s, 1)", running),
    "cancelling the head": lambda db, running, waiting: db.value("select pgpark.park_cancel(%s)", waiting),
    "a lapsed lease": lambda db, running, waiting: (db.advance(31), db.maintain()),
    "an expired head": lambda db, running, waiting: (db.advance(20), db.maintain()),
    "a task that is due": lambda db, running, waiting: (db.advance(5), db.maintain()),
    "growing": lambda db, running, waiting: db.pool(max_units=30, retry={"max_attempts": 2}),
    "resuming": lambda db, running, waiting: db.rows("select pgpark.park_set_pool_state('gpu', 'active')"),
}


@pytest.fixture
def listener(connect: Callable[[], Database]) -> Iterator[Database]:
    yield connect()


@pytest.mark.parametrize("action", ACTIONS)
def test_it_wakes_the_pool(db: Database, listener: Database, action: str) -> None:
    db.pool(retry={"max_attempts": 2})
    db.freeze()
    running = db.parked(units=20)
    db.claim()
    waiting = db.parked(units=20, deadline=db.after(20))
    db.parked(run_at=db.after(5))
    listener.connection.execute('listen "pgpark.pool.gpu"')
    ACTIONS[action](db, running, waiting)
    assert {(note.channel, note.payload) for note in listener.connection.notifies(timeout=5, stop_after=1)} == {
        ("pgpark.pool.gpu", "")
    }


def test_cancelling_a_running_task_tells_its_worker(db: Database, listener: Database) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    listener.connection.execute('listen "pgpark.pool.gpu"')
    db.value("select pgpark.park_cancel(%s)", task)
    assert [note.payload for note in listener.connection.notifies(timeout=5, stop_after=1)] == ["cancel"]


def test_a_rolled_back_submit_wakes_nobody(db: Database, listener: Database) -> None:
    db.pool()
    listener.connection.execute('listen "pgpark.pool.gpu"')
    db.connection.execute("begin")
    db.parked()
    db.connection.execute("rollback")
    assert list(listener.connection.notifies(timeout=0.2)) == []


def test_a_claim_that_starts_the_head_wakes_those_who_looked_in_vain(db: Database, listener: Database) -> None:
    """No submit and no finish tells a small worker that the large head, which it could not take, has gone."""
    db.pool(max_units=24)
    head, small = db.parked(units=8), db.parked(units=2)
    assert db.claimed(worker="small", max_units=4) == []
    listener.connection.execute('listen "pgpark.pool.gpu"')
    assert db.claimed(worker="large", max_units=8) == [head]
    assert [note.channel for note in listener.connection.notifies(timeout=5, stop_after=1)] == ["pgpark.pool.gpu"]
    assert db.claimed(worker="small", max_units=4) == [small]
    assert list(listener.connection.notifies(timeout=0.2)) == [], "and there it ends"
