"""park_claim: capacity, order, bounded bypass, deadlines, lost payloads."""

from __future__ import annotations

import uuid

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Database

pytestmark = pytest.mark.every_backend


def test_tasks_start_by_priority_then_by_submission(db: Database) -> None:
    db.pool()
    low, normal, high = db.parked(priority="low"), db.parked(), db.parked(priority="high")
    critical, normal2 = db.parked(priority="critical"), db.parked()
    assert db.claimed() == [critical, high, normal, normal2, low]


def test_a_claimed_task_tells_all_that_a_worker_needs(db: Database) -> None:
    db.pool()
    deadline = db.after(100)
    task = db.parked(
        payload={"x": 1}, priority="high", units=3, tenant="t", user_id="u", session_id="s", deadline=deadline
    )
    (row,) = db.claim()
    assert row == {
        "task_id": task,
        "attempt": 1,
        "payload": {"x": 1},
        "priority": "high",
        "units": 3,
        "tenant": "t",
        "user_id": "u",
        "session_id": "s",
        "deadline": deadline,
        "created_at": row["created_at"],
    }


def test_no_more_starts_than_fits(db: Database) -> None:
    db.pool(max_units=10)
    first, second, third = (db.parked(units=4) for _ in range(3))
    assert db.claimed() == [first, second]
    assert db.claimed() == []
    db.finish(first)
    assert db.claimed() == [third]


def test_max_tasks_bounds_one_claim(db: Database) -> None:
    db.pool()
    tasks = [db.parked() for _ in range(3)]
    assert db.claimed(max_tasks=2) == tasks[:2]
    assert db.claimed(max_tasks=2) == tasks[2:]


def test_a_worker_never_holds_more_than_its_own_units(db: Database) -> None:
    db.pool(max_units=100)
    tasks = [db.parked(units=4) for _ in range(5)]
    assert db.claimed(worker="small", max_units=10) == tasks[:2]
    assert db.claimed(worker="small", max_units=10) == []
    assert db.claimed(worker="other", max_units=10) == tasks[2:4]
    assert db.claimed(worker="unlimited") == tasks[4:]


def test_by_default_nobody_passes_a_head_that_does_not_fit(db: Database) -> None:
    db.pool(max_units=10)
    db.parked(units=6)
    assert len(db.claimed()) == 1
    db.parked(units=5)
    db.parked(units=1)
    assert db.claimed() == []


def test_at_most_max_bypass_tasks_pass_a_head_in_its_whole_life(db: Database) -> None:
    db.pool(max_units=10, max_bypass=2)
    blocker = db.parked(units=6)
    db.claim()
    head = db.parked(units=5)
    small = [db.parked(units=1) for _ in range(4)]
    assert db.claimed() == small[:2]
    assert db.claimed() == [], "capacity is held for the head now"
    for task in small[:2]:
        db.finish(task)
    assert db.claimed() == []
    db.finish(blocker)
    assert db.claimed() == [head, *small[2:]]


def test_the_count_of_passes_survives_a_new_head_of_higher_priority(db: Database) -> None:
    db.pool(max_units=10, max_bypass=1)
    db.parked(units=6)
    db.claim()
    head = db.parked(units=5)
    first, second = db.parked(units=1), db.parked(units=1)
    assert db.claimed() == [first]
    higher = db.parked(units=9, priority="high")  # the head is another one now
    assert db.claimed() == [second]
    db.rows("select pgpark.park_cancel(%s)", higher)
    db.parked(units=1)
    assert db.claimed() == [], f"{head} has been passed once already"


@pytest.mark.parametrize(("in_between", "starts"), [(999, True), (1000, False)])
def test_a_window_bounds_how_far_a_claim_looks_behind_a_head(db: Database, in_between: int, starts: bool) -> None:
    db.pool(max_units=10, max_bypass=5)
    db.parked(units=6)
    db.claim()
    db.parked(units=5)
    db.rows(
        "select from pgpark.park_submit_many('gpu', (select jsonb_agg('{\"payload\": 1, \"units\": 5}'::jsonb)"
        " from generate_series(1, %s)))",
        in_between,
    )
    small = db.parked(units=1)
    assert db.claimed() == ([small] if starts else [])


def test_a_head_too_large_for_this_worker_is_not_passed_by_default(db: Database) -> None:
    db.pool(max_units=100)
    large, small = db.parked(units=50), db.parked(units=1)
    assert db.claimed(worker="small", max_units=10) == []
    assert db.claimed(worker="large", max_units=60) == [large, small]


def test_a_task_whose_deadline_has_come_never_starts(db: Database) -> None:
    db.pool()
    db.freeze()
    late, fine = db.parked(deadline=db.after(10)), db.parked(deadline=db.after(11))
    db.advance(10)
    assert db.claimed() == [fine]
    assert db.outcome(late) == ("expired", "deadline_expired")


def test_the_deadline_holds_for_a_restart_too(db: Database) -> None:
    db.pool(lease_secs=5)
    db.freeze()
    task = db.parked(deadline=db.after(10))
    assert db.claimed() == [task]
    db.advance(20)  # it started in time, but its worker is lost and it could only start again too late
    assert db.claimed() == []
    db.maintain()
    assert db.outcome(task) == ("expired", "deadline_expired")


@pytest.mark.parametrize(("state", "starts"), [("paused", 0), ("draining", 1), ("disabled", 0), ("active", 1)])
def test_what_starts_in_each_state(db: Database, state: str, starts: int) -> None:
    db.pool()
    db.parked()
    db.rows("select pgpark.park_set_pool_state('gpu', %s)", state)
    assert len(db.claimed()) == starts


def test_a_deleted_message_ends_its_task_and_claiming_goes_on(db: Database) -> None:
    db.pool(max_units=2)
    lost, fine = db.parked(units=2), db.parked(units=2)
    db.lose(lost)
    assert db.claimed() == [fine], "in the same claim, with the units that the lost one would have taken"
    assert db.outcome(lost) == ("dropped", "payload lost")


def test_a_purged_queue_ends_all_its_tasks(db: Database) -> None:
    db.pool()
    tasks = [db.parked() for _ in range(5)]
    db.lose(*tasks)
    assert db.claimed(max_tasks=2) == []
    assert {db.outcome(task) for task in tasks} == {("dropped", "payload lost")}


def test_each_claim_of_a_task_has_the_next_attempt_number(db: Database) -> None:
    db.pool()
    task = db.parked()
    for attempt in (1, 2, 3):
        (row,) = db.claim()
        assert row["attempt"] == attempt
        assert db.value("select pgpark.park_release(%s, %s)", task, attempt)


def test_tasks_past_their_deadline_in_front_do_not_hide_the_rest(db: Database) -> None:
    db.pool(max_units=1)
    db.freeze()
    blocker = db.parked(deadline=db.after(1000))
    db.claim()
    db.rows(
        "select from pgpark.park_submit_many('gpu', (select jsonb_agg(jsonb_build_object('payload', 1,"
        " 'priority', 'high', 'deadline', pgpark._now() + interval '1 minute')) from generate_series(1, 3000)))"
    )
    fine = db.parked()
    db.finish(blocker)
    db.advance(60)
    assert db.claimed() == [] and db.maintain("gpu")["next_due"] <= db.after(0), "a bite, and more at once"
    assert db.claimed() == [fine]
    assert db.stats()["expired"] == 3000


def test_a_message_of_another_task_is_never_handed_out(db: Database) -> None:
    db.pool()
    mine, other = db.parked(payload="mine", tenant="a"), db.parked(payload="secret", tenant="b")
    last = db.value(f"select max(msg_id) from {db.messages()}")
    db.rows("update pgpark.task set msg_id = %s where task_id = %s returning 1", last, mine)
    assert [(row["task_id"], row["payload"]) for row in db.claim()] == [(other, "secret")]
    assert db.outcome(mine) == ("dropped", "payload lost")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'gpu', ''", "worker must be a name of 1 to 255 bytes"),
        ("'gpu', null", "worker must be a name of 1 to 255 bytes"),
        ("'gpu', 'w', 0", "max_tasks must be at least 1, not 0"),
        ("'gpu', 'w', 1, 0", "max_units must be at least 1, not 0"),
    ],
)
def test_an_impossible_claim_is_named(db: Database, arguments: str, message: str) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        db.rows(f"select pgpark.park_claim({arguments})")
    assert caught.value.diag.message_primary == message


def test_a_claim_of_as_many_as_there_are_numbers_starts_what_fits(db: Database) -> None:
    db.pool(max_bypass=1, tenants={"t": {"max_units": 2}})
    first, second, _ = (db.parked(tenant="t") for _ in range(3))
    assert db.claimed(max_tasks=2**31 - 1) == [first, second]


def reference_pick(parked: list[tuple[int, int]], free: int, slots: int, bypass: int) -> list[int]:
    """What DESIGN section 5 says starts, for parked (id, units) in rank order and a head that was never passed."""
    picked: list[int] = []
    head = passed = 0
    for task_id, units in parked:
        if len(picked) == slots or (head and passed >= bypass):
            break
        if units <= free:
            picked.append(task_id)
            free -= units
            passed += bool(head)
        else:
            head = head or task_id
    return picked


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    max_units=st.integers(1, 30),
    bypass=st.integers(0, 4),
    costs=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), max_size=20),
    slots=st.integers(1, 8),
)
def test_a_first_claim_starts_what_the_rules_say(
    db: Database, max_units: int, bypass: int, costs: list[tuple[int, int]], slots: int
) -> None:
    pool = f"p{uuid.uuid4().hex[:12]}"
    db.pool(pool, max_units=max_units, max_bypass=bypass)
    tasks = []
    for units, priority in costs:
        row = db.submit(pool, units=units, priority=["low", "normal", "high", "critical"][priority])
        assert row["accepted"] == (units <= max_units)
        if row["accepted"]:
            tasks.append((-priority, row["task_id"], units))
    expected = reference_pick([(task_id, units) for _, task_id, units in sorted(tasks)], max_units, slots, bypass)
    assert db.claimed(pool, max_tasks=slots) == expected
