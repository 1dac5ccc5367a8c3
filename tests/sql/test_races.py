"""Forced interleavings: one connection holds a transaction open, another is seen waiting for it, then it lets go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.conftest import Background, Database

Run = Callable[[Database, Callable[[], Any]], Background]
Open = Callable[[], Database]


def test_a_claim_waits_for_an_uncommitted_one_and_starts_no_more_than_fits(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool(max_units=10)
    first, second, third = (db.parked(units=4) for _ in range(3))
    other = connect()
    db.connection.execute("begin")
    assert db.claimed(worker="a") == [first, second]
    waiting = background(other, lambda: other.claimed(worker="b")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() == []
    db.finish(first)
    assert other.claimed(worker="b") == [third]


def test_a_claim_that_is_rolled_back_starts_nothing(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_units=4)
    task = db.parked(units=4)
    other = connect()
    db.connection.execute("begin")
    assert db.claimed() == [task]
    waiting = background(other, lambda: [row["attempt"] for row in other.claim()]).wait_until_blocked()
    db.connection.execute("rollback")
    assert waiting.result() == [1]


def test_two_claims_of_one_worker_name_stay_within_its_units(db: Database, connect: Open, background: Run) -> None:
    db.pool(max_units=100)
    tasks = [db.parked(units=4) for _ in range(4)]
    twin = connect()
    db.connection.execute("begin")
    assert db.claimed(worker="w", max_units=8) == tasks[:2]
    waiting = background(twin, lambda: twin.claimed(worker="w", max_units=8)).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() == []


def test_of_two_finishes_of_one_attempt_one_is_accepted(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    assert db.finish(task, result="first")
    waiting = background(other, lambda: other.finish(task, result="second")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is False
    assert db.value("select payload from pgpark.park_result(%s)", task) == "first"


def test_a_finish_that_is_rolled_back_leaves_the_task_running(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    assert db.finish(task, result="never")
    waiting = background(other, lambda: other.finish(task, result="this")).wait_until_blocked()
    db.connection.execute("rollback")
    assert waiting.result() is True
    assert db.value("select payload from pgpark.park_result(%s)", task) == "this"


def test_finish_against_cancel(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    db.finish(task, result=1)
    waiting = background(other, lambda: other.value("select pgpark.park_cancel(%s)", task)).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() == "finished"
    assert db.outcome(task)[0] == "completed"


def test_cancel_against_finish(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    assert db.value("select pgpark.park_cancel(%s, 'stop')", task) == "cancelling"
    waiting = background(other, lambda: other.finish(task, status="failed")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is True
    assert db.outcome(task) == ("dropped", "stop")


def test_a_claim_passes_over_a_task_that_is_being_cancelled(db: Database, connect: Open) -> None:
    db.pool()
    cancelled, task = db.parked(), db.parked()
    other = connect()
    db.connection.execute("begin")
    assert db.value("select pgpark.park_cancel(%s)", cancelled) == "dropped"
    assert other.claimed() == [task], "without waiting for the open transaction"
    db.connection.execute("commit")


def test_finish_against_a_lost_lease(db: Database, connect: Open, background: Run) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    task = db.parked()
    db.claim()
    db.advance(10)
    other = connect()
    db.connection.execute("begin")
    assert db.maintain()["reclaimed"] == 1
    waiting = background(other, lambda: other.finish(task, result="late")).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is False
    assert db.status(task)["status"] == "parked"


def test_a_lost_lease_against_finish(db: Database, connect: Open) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    task = db.parked()
    db.claim()
    db.advance(10)
    other = connect()
    db.connection.execute("begin")
    assert db.finish(task, result="in time")
    assert other.maintain()["reclaimed"] == 0, "it passes over what somebody else holds"
    db.connection.execute("commit")
    assert db.outcome(task)[0] == "completed"


def test_a_heartbeat_against_a_lost_lease(db: Database, connect: Open) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    task = db.parked()
    db.claim()
    db.advance(10)
    other = connect()
    db.connection.execute("begin")
    db.maintain()
    beat = "select * from pgpark.park_heartbeat('gpu', 'w', %s)"
    assert other.rows(beat, [task]) == [], "it passes over what somebody else holds"
    db.connection.execute("commit")
    assert other.rows(beat, [task]) == [{"park_heartbeat": task}], "it is told to stop"


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


def test_finish_waits_for_no_claim(db: Database, connect: Open) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    other = connect()
    db.connection.execute("begin")
    db.claim()  # holds the pool's lock
    assert other.finish(task), "frees its units all the same"
    db.connection.execute("commit")


def test_maintenance_runs_one_at_a_time_and_nobody_waits(db: Database, connect: Open) -> None:
    db.pool()
    db.freeze()
    late = db.parked(deadline=db.after(1))
    db.advance(1)
    other = connect()
    db.connection.execute("begin")
    assert db.maintain()["expired"] == 1
    report = other.maintain()
    assert (report["expired"], report["next_due"]) == (0, db.status(late)["deadline"])
    db.connection.execute("commit")


def test_two_batches_that_finish_the_same_tasks_do_not_deadlock(db: Database, connect: Open, background: Run) -> None:
    db.pool()
    tasks = [db.parked() for _ in range(2)]
    db.claim()
    other = connect()
    forward = [{"task_id": task, "attempt": 1} for task in tasks]
    finish = "select accepted from pgpark.park_finish_many(%s)"
    db.connection.execute("begin")
    db.finish(tasks[0])
    waiting = background(
        other, lambda: other.rows(finish, psycopg.types.json.Jsonb(forward[::-1]))
    ).wait_until_blocked()
    assert db.finish(tasks[1])
    db.connection.execute("commit")
    assert [row["accepted"] for row in waiting.result()] == [False, False]


def test_a_heartbeat_renews_the_rest_while_one_task_is_held(db: Database, connect: Open) -> None:
    db.pool(lease_secs=10)
    db.freeze()
    held, other_task = db.parked(), db.parked()
    db.claim()
    db.advance(5)
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", held)
    assert db.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", [held, other_task]) == []
    other.connection.execute("rollback")
    db.advance(6)
    assert db.maintain()["reclaimed"] == 1
    assert db.status(other_task)["status"] == "running"


def test_a_task_behind_one_that_is_being_cancelled_starts_in_its_stead(db: Database, connect: Open) -> None:
    db.pool(max_units=24, max_bypass=5)
    front, fits, small = db.parked(units=20), db.parked(units=8), db.parked(units=2)
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", front)
    assert db.claimed(max_tasks=1) == [fits], "not nothing, and not one behind it"
    other.connection.execute("rollback")
    assert db.claimed() == [small], "the front is a head now"
    assert db.value("select bypassed from pgpark.task where task_id = %s", front) == 1


def test_a_claim_does_not_wait_for_a_head_that_is_being_cancelled(db: Database, connect: Open) -> None:
    db.pool(max_units=10, max_bypass=3)
    db.parked(units=6)
    db.claim()
    head, small = db.parked(units=8), db.parked(units=1)
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", head)
    db.connection.execute("set lock_timeout = '2s'")
    assert db.claimed() == [small]
    other.connection.execute("commit")


def test_a_rolled_back_cancel_is_noticed_within_a_second(db: Database, connect: Open) -> None:
    db.pool()
    db.freeze()
    task = db.parked()
    other = connect()
    other.connection.execute("begin")
    other.value("select pgpark.park_cancel(%s)", task)
    assert db.claimed() == []
    other.connection.execute("rollback")
    assert db.maintain("gpu")["next_due"] == db.after(1)
    assert db.claimed() == [task]


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


def test_finish_and_claim_in_one_transaction_do_not_deadlock_with_a_heartbeat(
    db: Database, connect: Open, background: Run
) -> None:
    db.pool()
    task, _ = db.parked(), db.parked()
    db.claim(max_tasks=1)
    db.rows("update pgpark.worker set seen_at = seen_at - interval '1 minute' returning 1")
    other = connect()
    db.connection.execute("begin")
    db.finish(task)
    db.claim()
    beat = background(other, lambda: other.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", [task]))
    db.connection.execute("commit")
    assert beat.result() == [{"park_heartbeat": task}]
