"""Trace context: kept with the task that was submitted in it, and told to its worker."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import BACKENDS, Database
from tests.roles import Roles, roles

__all__ = ["roles"]  # a fixture

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def trace(db: Database, parent: str, state: str = "") -> None:
    db.rows("select set_config('pgpark.traceparent', %s, false)", parent)
    db.rows("select set_config('pgpark.tracestate', %s, false)", state)


def traces(db: Database, *tasks: int) -> dict[int, tuple[str, str | None]]:
    rows = db.rows("select * from pgpark.park_traces(%s)", list(tasks))
    return {row["task_id"]: (row["traceparent"], row["tracestate"]) for row in rows}


@pytest.mark.every_backend
def test_a_tasks_context_goes_from_submit_to_worker_and_every_attempt(db: Database) -> None:
    db.pool(archive=True, retry={"max_attempts": 2, "backoff_secs": 0})
    before = db.parked()
    trace(db, PARENT, "vendor=a:1,other=b")
    task = db.parked(payload={"x": 1}, deadline=db.after(1000))
    (many,) = db.rows("select task_id from pgpark.park_submit_many('gpu', %s)", Jsonb([{"payload": 2}]))
    trace(db, "")
    after = db.parked()
    expected = {task: (PARENT, "vendor=a:1,other=b"), many["task_id"]: (PARENT, "vendor=a:1,other=b")}
    assert traces(db, before, task, many["task_id"], after) == expected
    assert [row["payload"] for row in db.claim() if row["task_id"] == task] == [{"x": 1}]
    assert traces(db, task) == {task: expected[task]}
    db.finish(task, status="failed")
    db.maintain()
    assert task in db.claimed()
    assert traces(db, task) == {task: expected[task]}
    db.finish(task, 2)
    assert traces(db, task) == {}
    (kept,) = db.rows(f"select message #>> '{{metadata,traceparent}}' as kept from {db.archive()}")
    assert kept["kept"] == PARENT


def test_it_moves_with_its_pool(db: Database) -> None:
    db.pool()
    trace(db, PARENT)
    task = db.parked()
    for backend in (*BACKENDS.values(), {"max_queue_depth": 5}):
        db.pool(**backend)
        assert traces(db, task) == {task: (PARENT, None)}


def test_one_of_the_transaction_alone_ends_with_it(db: Database) -> None:
    db.pool()
    db.connection.execute("begin")
    db.rows("select set_config('pgpark.traceparent', %s, true)", PARENT)
    inside = db.parked()
    db.connection.execute("commit")
    outside = db.parked()
    assert traces(db, inside, outside) == {inside: (PARENT, None)}


@pytest.mark.parametrize(
    ("parent", "state", "kept"),
    [
        ("ff" + PARENT[2:], "", None),
        ("01" + PARENT[2:] + "-more", "", "01" + PARENT[2:] + "-more"),
        (PARENT + "-more", "", None),
        (PARENT.upper(), "", None),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", "", None),
        ("00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01", "", None),
        ("'; drop table x; --", "a=b", None),
        ("x" * 100000, "", None),
        (PARENT, "no pair", PARENT),
        (PARENT, "a=" + "b" * 600, PARENT),
        (PARENT, "ä=1", PARENT),
    ],
)
def test_what_is_not_of_the_form_is_none_and_no_error(db: Database, parent: str, state: str, kept: str | None) -> None:
    db.pool()
    trace(db, parent, state)
    task = db.parked()
    assert traces(db, task) == ({} if kept is None else {task: (kept, None)})


def test_a_worker_sees_those_of_its_pools(db: Database, roles: Roles) -> None:
    db.pool("gpu")
    db.pool("cpu")
    trace(db, PARENT)
    mine, other = db.parked("gpu"), db.parked("cpu")
    assert set(traces(roles.granted("worker", pools=["gpu"]), mine, other)) == {mine}
    producer: Any = roles.granted("producer")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        traces(producer, mine)
