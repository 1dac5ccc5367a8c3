"""park_next: outcomes and the next claim in one transaction; and whom that wakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database

Open = Callable[[], Database]


def outcome(task: int, attempt: int = 1, **rest: Any) -> dict[str, Any]:
    return {"task_id": task, "attempt": attempt, **rest}


def next_of(db: Database, *outcomes: dict[str, Any], worker: str = "w", **arguments: Any) -> list[dict[str, Any]]:
    named = "".join(f", {name} => %s" for name in arguments)
    statement = f"select * from pgpark.park_next('gpu', %s, %s{named})"
    return list(db.rows(statement, worker, Jsonb(outcomes), *arguments.values()))


def woken(listener: Database) -> bool:
    listener.rows("select 1 as one")  # whatever was sent before is here after an answer
    return bool(list(listener.connection.notifies(timeout=0.2, stop_after=1)))


@pytest.fixture
def listener(connect: Open) -> Database:
    other = connect()
    other.connection.execute('listen "pgpark.pool.gpu"')
    return other


def test_what_is_finished_makes_room_for_what_is_claimed(db: Database) -> None:
    db.pool(max_units=4)
    first, second = db.parked(units=4), db.parked(units=4, payload={"x": 2}, tenant="t")
    assert [row["task_id"] for row in next_of(db)] == [first]
    (row,) = next_of(db, outcome(first, result=41), max_tasks=5, max_units=4)
    assert (row["task_id"], row["attempt"], row["payload"], row["tenant"]) == (second, 1, {"x": 2}, "t")
    assert row["fenced"] is False
    assert db.outcome(first) == ("completed", None)
    assert next_of(db, outcome(second, status="failed", reason="no")) == []
    assert db.outcome(second) == ("failed", "no")


def test_outcomes_that_came_too_late_are_told_after_the_tasks(db: Database) -> None:
    db.pool(max_units=4)
    first, second = db.parked(), db.parked()
    db.claimed(max_tasks=1)
    rows = next_of(db, outcome(first, 7), outcome(first), outcome(987654), outcome(first))
    assert [(row["task_id"], row["attempt"], row["fenced"]) for row in rows] == [
        (second, 1, False),
        (first, 7, True),
        (987654, 1, True),
        (first, 1, True),
    ]
    assert {row["units"] for row in rows[1:]} == {None}


@pytest.mark.parametrize(
    ("outcomes", "arguments"),
    [([{"task_id": "x"}], {}), ([], {"max_tasks": 0}), ([], {"max_units": 0}), ([], {"worker": ""})],
)
def test_an_argument_that_is_wrong_leaves_everything(
    db: Database, outcomes: list[dict[str, Any]], arguments: dict[str, Any]
) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        next_of(db, outcome(task), *outcomes, **arguments)
    assert db.status(task)["status"] == "running"


def test_an_outcome_of_another_pool_wakes_that_pool(db: Database, listener: Database) -> None:
    db.pool(max_units=4)
    db.pool("cpu", max_units=1)
    task = db.parked("cpu")
    db.claim("cpu")
    listener.connection.execute('listen "pgpark.pool.cpu"')
    next_of(db, outcome(task))
    assert [note.channel for note in listener.connection.notifies(timeout=1, stop_after=1)] == ["pgpark.pool.cpu"]


def test_it_gives_up_before_it_would_deadlock(db: Database, connect: Open) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    operator = connect().connection
    operator.execute("begin")
    operator.execute("select from pgpark.pool for no key update")
    before = db.value("show lock_timeout")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        next_of(db, outcome(task))
    operator.execute("rollback")
    assert db.status(task)["status"] == "running"
    assert db.value("show lock_timeout") == before


def test_nobody_is_woken_who_could_have_started_all_the_same(db: Database, listener: Database) -> None:
    db.pool(max_units=100)
    first, *_ = (db.parked() for _ in range(3))
    db.claimed(max_tasks=1)
    assert woken(listener)
    while woken(listener):
        pass
    next_of(db, outcome(first))
    assert not woken(listener), "there was room for every task before"


@pytest.mark.parametrize(
    "config", [{}, {"max_bypass": 4}, {"tenants": {"t": {"max_units": 90}}}], ids=["plain", "bypass", "limited"]
)
def test_whoever_waited_for_the_units_is_woken(db: Database, listener: Database, config: dict[str, Any]) -> None:
    db.pool(max_units=100, **config)
    first, small, wide = db.parked(units=90), db.parked(units=20), db.parked(units=60)
    assert db.claimed(worker="other") == [first]
    while woken(listener):
        pass
    assert [row["task_id"] for row in next_of(db, outcome(first))] == [small]
    assert woken(listener), "the units that were freed let the next one start too"
    assert db.claimed(worker="third") == [wide]


def test_a_worker_with_little_room_is_woken_when_the_head_is_gone(db: Database, listener: Database) -> None:
    db.pool(max_units=100)
    first, wide, small = db.parked(), db.parked(units=50), db.parked()
    assert db.claimed(worker="big", max_tasks=1) == [first]
    assert db.claimed(worker="little", max_units=2) == [], "the head is too wide for it"
    while woken(listener):
        pass
    assert [row["task_id"] for row in next_of(db, outcome(first), worker="big")] == [wide]
    assert woken(listener)
    assert db.claimed(worker="little", max_units=2) == [small]
