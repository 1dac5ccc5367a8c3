"""park_submit and park_submit_many: what is accepted, refused, and remembered."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database

pytestmark = pytest.mark.every_backend


def submit_many(db: Database, tasks: Any, pool: str = "gpu") -> list[Any]:
    return db.rows("select * from pgpark.park_submit_many(%s, %s)", pool, Jsonb(tasks))


def test_a_task_parks_and_its_payload_lies_in_the_pools_queue(db: Database) -> None:
    db.pool()
    row = db.submit(payload={"prompt": "hi"}, units=8, tenant="t", user_id="u", session_id="s", priority="high")
    assert row == {"task_id": row["task_id"], "accepted": True, "status": "parked", "reason": None}
    message = db.value(f"select message from {db.messages()}")
    assert message["payload"] == {"prompt": "hi"}
    assert message["metadata"]["task_id"] == row["task_id"]
    assert message["metadata"]["units"] == 8


def test_a_task_larger_than_the_pool_is_refused_as_too_large(db: Database) -> None:
    db.pool(max_units=8)
    assert db.submit(units=9) == {"task_id": None, "accepted": False, "status": "rejected", "reason": "too_large"}
    assert db.submit(units=8)["accepted"]


@pytest.mark.parametrize("seconds", [0, -1, -1e6])
def test_a_deadline_that_has_come_is_refused(db: Database, seconds: float) -> None:
    db.pool()
    db.freeze()
    assert db.submit(deadline=db.after(seconds))["reason"] == "deadline_expired"


def test_a_deadline_before_run_at_is_refused(db: Database) -> None:
    db.pool()
    row = db.submit(run_at=db.after(100), deadline=db.after(99))
    assert row["reason"] == "deadline_expired"


def test_a_deadline_within_the_scheduling_slack_is_refused(db: Database) -> None:
    db.pool(scheduling_slack_secs=10)
    db.freeze()
    assert db.submit(deadline=db.after(10))["reason"] == "deadline_expired"
    assert db.submit(deadline=db.after(10.001))["accepted"]


def test_the_default_timeout_counts_from_run_at(db: Database) -> None:
    db.pool(default_timeout_secs=60)
    db.freeze()
    at_once, later = db.parked(), db.parked(run_at=db.after(100))
    assert db.status(at_once)["deadline"] == db.after(60)
    assert db.status(later)["deadline"] == db.after(160)


def test_an_infinite_deadline_is_none(db: Database) -> None:
    db.pool(default_timeout_secs=60)
    assert db.status(db.parked(deadline="infinity"))["deadline"] is None


def test_a_task_with_run_at_is_delayed_until_then(db: Database) -> None:
    db.pool()
    db.freeze()
    row = db.submit(run_at=db.after(30))
    assert row["status"] == "delayed"
    assert db.claimed() == []
    db.advance(30)
    assert db.claimed() == [row["task_id"]]


@pytest.mark.parametrize(("state", "accepted"), [("paused", True), ("draining", False), ("disabled", False)])
def test_what_a_pool_accepts_in_each_state(db: Database, state: str, accepted: bool) -> None:
    db.pool()
    db.rows("select pgpark.park_set_pool_state('gpu', %s)", state)
    row = db.submit()
    assert (row["accepted"], row["reason"]) == (accepted, None if accepted else "pool_closed")


def test_parked_and_delayed_tasks_together_fill_the_lot(db: Database) -> None:
    db.pool(max_queue_depth=2)
    db.submit()
    db.submit(run_at=db.after(100))
    assert db.submit()["reason"] == "queue_full"
    (running,) = db.claimed()
    assert db.submit()["accepted"], "a running task takes no place in the lot"
    assert db.submit()["reason"] == "queue_full"
    assert db.status(running)["status"] == "running"


def test_a_batch_fills_the_lot_exactly_and_in_order(db: Database) -> None:
    db.pool(max_queue_depth=3)
    rows = submit_many(db, [{"payload": n, "units": 100 if n == 1 else 1} for n in range(6)])
    assert [row["reason"] for row in rows] == [None, "too_large", None, None, "queue_full", "queue_full"]
    assert [row["task_id"] is None for row in rows] == [False, True, False, False, True, True]
    assert db.stats()["parked"] == 3


def test_a_batch_keeps_each_payload_with_its_task(db: Database) -> None:
    db.pool(max_units=1000)
    rows = submit_many(db, [{"payload": {"n": n}, "units": 1 + n % 3} for n in range(200)])
    by_id = {row["task_id"]: row["payload"]["n"] for row in db.claim(max_tasks=1000)}
    assert [by_id[row["task_id"]] for row in rows] == list(range(200))


def test_an_empty_batch_does_nothing(db: Database) -> None:
    db.pool()
    assert submit_many(db, []) == []


def test_any_json_value_is_a_payload(db: Database) -> None:
    db.pool()
    values: list[Any] = [1, "text", [1, 2], {"a": {"b": None}}, True, 0.5]
    submit_many(db, [{"payload": value} for value in values])
    assert [row["payload"] for row in db.claim()] == values


def test_a_json_null_is_a_payload_and_stays_one(db: Database) -> None:
    db.pool()
    submit_many(db, [{"payload": None}])
    (task,) = db.rows("select jsonb_typeof(payload) as kind from pgpark.park_claim('gpu', 'w')")
    assert task["kind"] == "null"


# -- idempotency keys ------------------------------------------------------------------------------------------------


def test_the_same_key_gets_the_first_task(db: Database) -> None:
    db.pool()
    first = db.parked(idempotency_key="k")
    again = db.submit(idempotency_key="k")
    assert again == {"task_id": first, "accepted": True, "status": "parked", "reason": "duplicate"}
    assert db.stats()["parked"] == 1


def test_a_key_belongs_to_its_pool(db: Database) -> None:
    db.pool("a")
    db.pool("b")
    assert db.parked("a", idempotency_key="k") != db.parked("b", idempotency_key="k")


def test_a_duplicate_tells_the_present_status_up_to_the_outcome(db: Database) -> None:
    db.pool()
    task = db.parked(idempotency_key="k")
    db.claim()
    assert db.submit(idempotency_key="k")["status"] == "running"
    db.finish(task)
    assert db.submit(idempotency_key="k")["status"] == "completed"


def test_a_key_is_forgotten_with_its_outcome(db: Database) -> None:
    db.pool()
    first = db.parked(idempotency_key="k", tenant="t")
    db.claim()
    db.finish(first)
    db.rows("select pgpark.park_ack(array(select message_id from pgpark.park_fetch('t')))")
    assert db.parked(idempotency_key="k") != first


def test_a_repeated_call_learns_of_its_task_even_after_the_deadline(db: Database) -> None:
    db.pool()
    db.freeze()
    deadline = db.after(10)
    first = db.parked(idempotency_key="k", deadline=deadline)
    db.advance(60)
    assert db.submit(idempotency_key="k", deadline=deadline)["task_id"] == first


def test_a_refused_task_leaves_its_key_free(db: Database) -> None:
    db.pool(max_queue_depth=1, max_units=4)
    db.submit()
    assert db.submit(idempotency_key="k")["reason"] == "queue_full"
    assert db.submit(idempotency_key="k2", units=5)["reason"] == "too_large"
    db.claim()
    assert db.submit(idempotency_key="k")["reason"] is None
    db.claim()
    assert db.submit(idempotency_key="k2")["reason"] is None


def test_a_key_twice_in_one_batch_is_one_task(db: Database) -> None:
    db.pool()
    rows = submit_many(db, [{"payload": n, "idempotency_key": "k"} for n in range(3)])
    assert len({row["task_id"] for row in rows}) == 1
    assert [row["reason"] for row in rows] == [None, "duplicate", "duplicate"]


def test_a_key_twice_in_one_batch_that_finds_no_room_is_refused_twice(db: Database) -> None:
    db.pool(max_queue_depth=1)
    rows = submit_many(db, [{"payload": 0}, *({"payload": n, "idempotency_key": "k"} for n in (1, 2))])
    assert [row["reason"] for row in rows] == [None, "queue_full", "queue_full"]
    assert db.value("select count(*) from pgpark.submission_key") == 0


def test_a_refused_element_is_no_duplicate_of_a_later_one(db: Database) -> None:
    db.pool(max_units=4)
    rows = submit_many(db, [{"payload": 1, "units": 5, "idempotency_key": "k"}, {"payload": 1, "idempotency_key": "k"}])
    assert [row["reason"] for row in rows] == ["too_large", None]


# -- the caller's transaction ----------------------------------------------------------------------------------------


def test_a_submit_is_rolled_back_with_the_callers_transaction(db: Database) -> None:
    db.pool()
    with pytest.raises(ZeroDivisionError), db.connection.transaction():
        db.submit(idempotency_key="k")
        raise ZeroDivisionError
    assert db.stats()["parked"] == 0
    assert db.value(f"select count(*) from {db.messages()}") == 0
    assert db.submit(idempotency_key="k")["reason"] is None


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"priority": "urgent"}, "unknown priority 'urgent'; use low, normal, high, critical"),
        ({"units": 0}, "units must be at least 1, not 0"),
        ({"units": -5}, "units must be at least 1, not -5"),
        ({"run_at": "infinity"}, "run_at must be a time before the year 9999, not infinity"),
        ({"tenant": "x" * 256}, "tenant, user_id, session_id and idempotency_key take at most 255 bytes each"),
        ({"idempotency_key": "é" * 128}, "tenant, user_id, session_id and idempotency_key take at most 255 bytes each"),
    ],
)
def test_an_impossible_argument_is_named(db: Database, arguments: dict[str, Any], message: str) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        db.submit(**arguments)
    assert caught.value.diag.message_primary == message


def test_a_missing_payload_is_an_error(db: Database) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="payload is missing"):
        db.rows("select pgpark.park_submit('gpu', null)")


def test_an_unknown_pool_is_named_with_those_that_exist(db: Database) -> None:
    db.pool("gpu")
    with pytest.raises(psycopg.errors.UndefinedObject) as caught:
        db.submit("gpux")
    assert caught.value.diag.message_primary == "unknown pool 'gpux'"
    assert caught.value.diag.message_hint == "Pools here: gpu"


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (5, "a task must be a JSON object, not number"),
        ({}, "payload is missing"),
        ({"payload": 1, "unit": 2}, "unknown key 'unit'; a task has payload, priority, units"),
        ({"payload": 1, "units": "8"}, 'units must be a whole number of at least 1, not "8"'),
        ({"payload": 1, "units": 1.5}, "units must be a whole number of at least 1, not 1.5"),
        ({"payload": 1, "units": 0}, "units must be at least 1, not 0"),
        ({"payload": 1, "units": -1}, "units must be a whole number of at least 1, not -1"),
        ({"payload": 1, "units": 1e30}, "units must be a whole number"),
        ({"payload": 1, "priority": 3}, "unknown priority 3"),
        ({"payload": 1, "priority": "x"}, "unknown priority 'x'"),
        ({"payload": 1, "deadline": "soon"}, 'deadline must be a time such as "2030-01-31T12:00:00Z", not "soon"'),
        ({"payload": 1, "deadline": "2030-01-01 10:00:00+99"}, "deadline must be a time such as"),
        ({"payload": 1, "run_at": 5}, "run_at must be a time"),
        ({"payload": 1, "run_at": "infinity"}, "run_at must be a time"),
        ({"payload": 1, "tenant": 5}, "tenant must be a string, not 5"),
    ],
)
def test_a_bad_element_is_named_by_its_place_and_nothing_is_submitted(db: Database, element: Any, message: str) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        submit_many(db, [{"payload": 0}, element])
    assert str(caught.value.diag.message_primary).startswith(f"element 2: {message}")
    assert caught.value.diag.message_detail == "element 2"
    assert db.stats()["parked"] == 0


@pytest.mark.parametrize("tasks", [{}, "x", None, 5])
def test_a_batch_must_be_an_array(db: Database, tasks: Any) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="tasks must be a JSON array"):
        submit_many(db, tasks)


@pytest.mark.parametrize(
    "call",
    [
        "park_stats(repeat('y', 100000) || e'\\n')",
        "park_submit('gpu', '{}', priority => repeat('y', 100000) || e'\\n')",
        "park_submit_many('gpu', jsonb_build_array(jsonb_build_object('units', repeat('y', 100000))))",
        "park_put_pool('gpu', jsonb_build_object(repeat('y', 100000) || e'\\n', 1))",
        "park_put_pool(e'gpu\\n', '{}')",
        "park_set_pool_state('gpu', e'\\n')",
        "park_llm_capacity(to_jsonb(repeat('y', 100000)))",
    ],
)
def test_an_error_is_one_line_whatever_it_repeats(db: Database, call: str) -> None:
    db.pool()
    with pytest.raises(psycopg.Error) as caught:
        db.rows(f"select pgpark.{call}")
    message = caught.value.diag.message_primary or ""
    assert caught.value.sqlstate in ("22023", "42704")
    assert "\n" not in message
    assert len(message) < 800


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_each_writing_function_refuses_a_stale_snapshot(db: Database, level: str) -> None:
    db.pool()
    for call in (
        "park_put_pool('p', '{\"max_units\": 1}')",
        "park_drop_pool('gpu')",
        "park_set_pool_state('gpu', 'paused')",
        "park_submit('gpu', '{}')",
        "park_submit_many('gpu', '[]')",
        "park_claim('gpu', 'w')",
        "park_finish(1, 1)",
        'park_finish_many(\'[{"task_id": 1, "attempt": 1}]\')',
        "park_release(1, 1)",
        "park_heartbeat('gpu', 'w', '{}')",
        "park_cancel(1)",
        "park_prune()",
        "park_maintain()",
        "park_emit(1, 1, '[]')",
        "park_emit_many('[]')",
        "park_next('gpu', 'w')",
        "park_ack('{1}')",
        "park_callbacks()",
        "park_callback_done(1, 1)",
        "park_retry_callbacks()",
        "park_grant(current_user, 'reader')",
        "park_revoke(current_user)",
    ):
        db.connection.execute(f"begin isolation level {level}")
        with pytest.raises(psycopg.errors.ActiveSqlTransaction, match="pgpark needs READ COMMITTED"):
            db.rows(f"select pgpark.{call}")
        db.connection.rollback()


# -- the size of payloads --------------------------------------------------------------------------------------------


def test_a_payload_larger_than_the_pool_takes_is_refused(db: Database) -> None:
    db.pool(max_payload_kb=1)
    refusal = {"task_id": None, "accepted": False, "status": "rejected", "reason": "payload_too_large"}
    assert db.submit(payload="x" * 1023) == refusal  # 1,025 bytes with its quotes
    assert db.submit(payload="x" * 1022)["accepted"]
    assert db.submit(payload="é" * 512) == refusal  # bytes, not letters
    rows = db.rows("select * from pgpark.park_submit_many('gpu', %s)", Jsonb([{"payload": "x" * 2000}, {"payload": 1}]))
    assert [row["reason"] for row in rows] == ["payload_too_large", None]
    db.pool()
    assert db.submit(payload="x" * 5000)["accepted"]
