"""Forced interleavings with whoever makes, changes, closes or drops a pool meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.conftest import Background, Database

Run = Callable[[Database, Callable[[], Any]], Background]
Open = Callable[[], Database]


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


def test_a_submit_that_waits_while_the_pool_is_made_anew_enters_the_new_one(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool()
    submitter, closer = connect(), connect()
    db.connection.execute("begin")
    db.rows("select pgpark.park_drop_pool('gpu')")
    db.pool(max_units=30)
    submitter.connection.execute("begin")
    submit = background(submitter, submitter.parked).wait_until_blocked()
    db.connection.execute("commit")
    task = submit.result()
    drop = background(closer, lambda: closer.rows("select pgpark.park_drop_pool('gpu', true)")).wait_until_blocked()
    submitter.connection.execute("commit")
    drop.result()
    assert db.outcome(task) == ("dropped", "pool_dropped"), "the drop waited for it and saw it"


def test_a_claim_that_waits_while_the_pool_is_made_anew_finds_it(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    other = connect()
    db.connection.execute("begin")
    db.rows("select pgpark.park_drop_pool('gpu')")
    db.pool()
    claim = background(other, other.claimed).wait_until_blocked()
    db.connection.execute("commit")
    assert claim.result() == []


def test_a_depth_that_is_set_while_submits_are_under_way_holds(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    other = connect()
    db.connection.execute("begin")
    for _ in range(3):
        db.parked()
    cap = background(other, lambda: other.pool(max_queue_depth=5)).wait_until_blocked()
    db.connection.execute("commit")
    cap.result()
    assert [db.submit()["accepted"] for _ in range(3)] == [True, True, False]


def test_a_limit_that_is_set_while_submits_are_under_way_holds(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_units=10)
    other = connect()
    db.connection.execute("begin")
    first, _ = db.parked(tenant="a"), db.parked(tenant="a")
    limit = background(other, lambda: other.pool(max_units=10, tenants={"a": {"max_units": 1}})).wait_until_blocked()
    db.connection.execute("commit")
    limit.result()
    assert db.claimed() == [first]


def test_a_task_that_came_back_while_its_tenants_limit_was_being_set_is_limited(db: Database, connect: Open) -> None:
    db.pool(max_units=10)
    first, second = db.parked(tenant="a"), db.parked(tenant="a")
    assert db.claimed(max_tasks=1) == [first]
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_release(%s, 1)", first)  # knows of no limit
    db.pool(max_units=10, tenants={"a": {"max_units": 1}})
    assert db.claimed() == []
    other.connection.execute("commit")
    assert db.claimed() == [], "it stands in the wrong line, and is put into the right one"
    assert db.claimed() == [first]
    assert db.claimed() == []
    db.finish(first, attempt=2)
    assert db.claimed() == [second]


def test_a_task_that_came_back_while_its_pool_became_fifo_is_put_in_its_place(db: Database, connect: Open) -> None:
    db.pool(max_units=1, fairness="tenant")
    done, task = db.parked(tenant="a"), db.parked(tenant="a")
    assert db.claimed(max_tasks=1) == [done]
    db.finish(done)
    assert db.claimed(max_tasks=1) == [task]
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_release(%s, 1)", task)  # with the tag of its turn
    db.pool(max_units=1)
    newer = db.parked(tenant="a")
    other.connection.execute("commit")
    assert db.status(task)["position"] == 1
    db.maintain()
    assert (db.status(task)["position"], db.status(newer)["position"]) == (0, 1)
