"""Forced interleavings of submits: for the last places, of the same keys, of the same tenants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

from tests.conftest import Background, Database

Run = Callable[[Database, Callable[[], Any]], Background]
Open = Callable[[], Database]


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


def test_a_key_that_is_acknowledged_during_a_submit_makes_one_task(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool()
    ended = db.parked(idempotency_key="k1")
    db.claim()
    db.finish(ended)
    holder, submitter = connect(), connect()
    holder.connection.execute("begin")
    holder.parked(idempotency_key="k2")
    batch = psycopg.types.json.Jsonb([{"payload": 1, "idempotency_key": key} for key in ("k1", "k2")])
    submit = background(
        submitter, lambda: submitter.rows("select * from pgpark.park_submit_many('gpu', %s)", batch)
    ).wait_until_blocked()
    db.rows("select pgpark.park_ack(array(select message_id from pgpark.park_result(%s)))", ended)
    holder.connection.execute("rollback")
    submit.result()
    assert db.submit(idempotency_key="k1")["reason"] == "duplicate"
    assert db.value("select count(*) from pgpark.task where idempotency_key = 'k1'") == 1


def test_acknowledging_does_not_deadlock_with_a_submit_of_the_same_keys(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool()
    messages = {}
    for key in ("k3", "k1", "k2"):
        task = db.parked(idempotency_key=key)
        db.claim()
        db.finish(task)
        messages[key] = db.value("select message_id from pgpark.park_result(%s)", task)
    acknowledge = "select pgpark.park_ack(%s)"
    submitter, reader = connect(), connect()
    db.connection.execute("begin")
    db.value(acknowledge, [messages["k2"]])
    # k2 comes with a task that is refused, so that it is not inserted, only locked: after k1 and before k3.
    batch = psycopg.types.json.Jsonb(
        [{"payload": 1, "units": 99 if key == "k2" else 1, "idempotency_key": key} for key in ("k1", "k2", "k3")]
    )
    submit = background(
        submitter, lambda: submitter.rows("select reason from pgpark.park_submit_many('gpu', %s)", batch)
    ).wait_until_blocked()
    ack = background(reader, lambda: reader.value(acknowledge, [messages["k3"], messages["k1"]])).wait_until_blocked()
    db.connection.execute("rollback")
    assert [row["reason"] for row in submit.result()] == ["duplicate"] * 3
    assert ack.result() == 2


def test_purging_waits_for_nobody_who_acknowledges(db: Database, connect: Open) -> None:
    db.pool(mailbox={"ttl_secs": 0.001})
    for key in ("a", "b"):
        db.parked(idempotency_key=key, tenant="t")
    for task in db.claimed():
        db.finish(task)
    first, second = (row["message_id"] for row in db.rows("select * from pgpark.park_fetch('t')"))
    other = connect()
    other.connection.execute("begin")
    other.rows("select from pgpark.submission_key where idempotency_key = 'a' for update")  # as park_ack begins
    assert db.maintain()["purged"] == 1, "only what nobody holds"
    assert other.value("select pgpark.park_ack(array[%s::bigint, %s])", first, second) == 1
    other.connection.execute("commit")


def test_submits_into_a_pool_with_a_depth_do_not_wait_for_one_another(db: Database, connect: Open) -> None:
    db.pool(max_queue_depth=40)
    others = [connect() for _ in range(20)]
    for other in others:
        other.connection.execute("begin")
        other.connection.execute("set lock_timeout = '1s'")
        other.parked()
        other.parked(idempotency_key=str(id(other)))
    for other in others:
        other.connection.execute("commit")
    assert db.submit()["reason"] == "queue_full"


def test_a_full_lot_refuses_without_waiting_for_those_who_filled_it(db: Database, connect: Open) -> None:
    db.pool(max_queue_depth=2)
    first = db.parked()
    db.parked()
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", first)  # not committed: nothing is free yet
    db.connection.execute("set lock_timeout = '1s'")
    assert db.submit()["reason"] == "queue_full"
    other.connection.execute("commit")
    assert db.submit()["accepted"]


def test_two_batches_for_the_last_places_do_not_deadlock(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_queue_depth=10)
    batch = psycopg.types.json.Jsonb([{"payload": 1}] * 8)
    submit = "select accepted from pgpark.park_submit_many('gpu', %s)"
    one, two = connect(), connect()
    db.connection.execute("begin")
    assert [db.submit()["accepted"] for _ in range(3)] == [True] * 3  # held, so that each batch finds too few
    first = background(one, lambda: one.rows(submit, batch)).wait_until_blocked()
    second = background(two, lambda: two.rows(submit, batch)).wait_until_blocked()
    db.connection.execute("commit")
    taken = [row["accepted"] for rows in (first.result(), second.result()) for row in rows]
    assert (len(taken), sum(taken)) == (16, 7)


def test_places_that_a_rolled_back_submit_held_are_free_again(db: Database) -> None:
    db.pool(max_queue_depth=3)
    db.connection.execute("begin")
    db.rows("select from pgpark.park_submit_many('gpu', '[{\"payload\": 1}, {\"payload\": 1}]')")
    db.connection.execute("rollback")
    assert [db.submit()["accepted"] for _ in range(4)] == [True, True, True, False]


def test_a_claim_gives_places_back_while_all_of_them_are_held(db: Database, connect: Open) -> None:
    db.pool(max_queue_depth=2)
    task = db.parked()
    other = connect()
    other.connection.execute("begin")
    other.parked()
    db.rows("update pgpark.place set free = free where stripe = 0 returning 1")
    other.rows("select from pgpark.place for update")
    db.connection.execute("set lock_timeout = '1s'")
    assert db.claimed() == [task]
    other.connection.execute("commit")
    assert [db.submit()["accepted"] for _ in range(2)] == [True, False]


def test_tasks_of_one_tenant_are_stamped_one_after_another(db: Database, connect: Open, background: Run) -> None:
    db.pool(fairness="tenant")
    other, third = connect(), connect()
    db.connection.execute("begin")
    first = db.parked(tenant="a", units=5)
    third.connection.execute("set lock_timeout = '1s'")
    third.parked(tenant="b")  # another tenant does not wait
    waiting = background(other, lambda: other.parked(tenant="a")).wait_until_blocked()
    db.connection.execute("commit")
    second = waiting.result()
    tags = {row["task_id"]: row["start_tag"] for row in db.rows("select task_id, start_tag from pgpark.task")}
    assert (tags[first], tags[second]) == (0, 5)


def test_batches_of_the_same_tenants_do_not_deadlock(db: Database, connect: Open, background: Run) -> None:
    db.pool(fairness="tenant")
    submit = "select accepted from pgpark.park_submit_many('gpu', %s)"
    holder, one, two = connect(), connect(), connect()
    names = [str(number) for number in range(20)]
    holder.connection.execute("begin")
    holder.parked(tenant=names[10])
    forward, backward = (
        psycopg.types.json.Jsonb([{"payload": 1, "tenant": name} for name in order]) for order in (names, names[::-1])
    )
    first = background(one, lambda: one.rows(submit, forward)).wait_until_blocked()
    second = background(two, lambda: two.rows(submit, backward)).wait_until_blocked()
    holder.connection.execute("commit")
    assert len(first.result()) == len(second.result()) == 20


def test_a_claim_does_not_wait_for_a_submit_that_stamps(db: Database, connect: Open) -> None:
    db.pool(fairness="tenant", tenants={"a": {"max_units": 5}}, max_queue_depth=10)
    task = db.parked(tenant="a")
    other = connect()
    other.connection.execute("begin")
    other.parked(tenant="a")
    db.connection.execute("set lock_timeout = '1s'")
    assert db.claimed() == [task]
    assert db.value("select pgpark.park_release(%s, 1)", task)
    assert db.maintain()["next_due"] is not None
    other.connection.execute("rollback")


def test_drop_lowest_passes_over_a_task_that_is_being_cancelled(db: Database, connect: Open) -> None:
    db.pool(max_queue_depth=2, overflow="drop_lowest")
    victim, cancelled = db.parked(priority="low"), db.parked(priority="low")
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", cancelled)
    db.connection.execute("set lock_timeout = '1s'")
    assert db.submit(priority="high")["accepted"]
    assert db.outcome(victim) == ("dropped", "overflow")
    other.connection.execute("rollback")
    assert db.status(cancelled)["status"] == "parked"
