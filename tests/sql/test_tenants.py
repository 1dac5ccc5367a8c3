"""Fair share between tenants, their weights, and their limits."""

from __future__ import annotations

from typing import Any

from psycopg.types.json import Jsonb

from tests.conftest import Database


def submitted(db: Database, *tenants: str | None, **arguments: Any) -> list[int]:
    """A task of each of these tenants, in one batch."""
    named = {"payload": 1} | arguments
    batch = Jsonb([named | {"tenant": tenant} for tenant in tenants])
    rows = db.rows("select task_id from pgpark.park_submit_many('gpu', %s)", batch)
    return [row["task_id"] for row in rows]


def start_one_by_one(db: Database, count: int) -> list[str]:
    """Whose tasks start, when each is finished before the next one starts."""
    started = []
    for _ in range(count):
        (row,) = db.claim(max_tasks=1)
        started.append(row["tenant"])
        assert db.finish(row["task_id"], row["attempt"])
    return started


def test_tenants_take_turns_however_much_one_of_them_has_parked(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    submitted(db, *["big"] * 5, *["small"] * 2)
    assert start_one_by_one(db, 7) == ["big", "small", "big", "small", "big", "big", "big"]


def test_in_a_fifo_pool_they_do_not(db: Database) -> None:
    db.pool(max_units=1)
    submitted(db, *["big"] * 3, "small")
    assert start_one_by_one(db, 4) == ["big", "big", "big", "small"]


def test_a_new_tenant_is_served_next_and_not_after_anothers_backlog(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    submitted(db, *["old"] * 50)
    start_one_by_one(db, 20)
    (newcomer,) = submitted(db, "new")
    assert db.status(newcomer)["position"] == 1, "only the one whose turn it is already is ahead"
    assert start_one_by_one(db, 3) == ["old", "new", "old"]


def test_a_tenant_that_waited_for_nothing_has_not_saved_up_turns(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    submitted(db, "idle")
    submitted(db, *["busy"] * 40)
    start_one_by_one(db, 21)
    submitted(db, *["idle"] * 3)
    assert start_one_by_one(db, 6) == ["busy", "idle"] * 3


def test_usage_is_forgotten_when_the_pool_falls_idle(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    submitted(db, *["a"] * 20)
    start_one_by_one(db, 20)
    submitted(db, "a", "b", "a", "b")
    assert start_one_by_one(db, 4) == ["a", "b", "a", "b"]


def test_usage_is_remembered_while_the_pool_is_busy(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant", tenants={"heavy": {"weight": 10}})
    submitted(db, *["heavy"] * 40)
    submitted(db, "light")
    starts = []
    for _ in range(30):  # the light one has one task at a time, and comes again as soon as that is done
        (tenant,) = start_one_by_one(db, 1)
        starts.append(tenant)
        if tenant == "light":
            submitted(db, "light")
    assert starts.count("light") == 3, "not every second one, only because it waits at the front each time"


def test_a_task_that_passes_a_head_does_not_move_the_clock_to_its_own_turn(db: Database) -> None:
    db.pool(max_units=10, max_bypass=1, fairness="tenant")
    db.parked(tenant="other", units=6)
    assert len(db.claim()) == 1
    db.parked(tenant="heavy", units=9)
    for _ in range(20):
        db.parked(tenant="heavy", units=5)
    last = db.parked(tenant="heavy", units=4)
    assert db.claimed() == [last], "from far behind, for it fits"
    newcomer = db.parked(tenant="new")
    assert db.status(newcomer)["position"] == 1, "and not after all that the heavy one has parked"


def test_units_and_weights_count(db: Database) -> None:
    db.pool(max_units=4, fairness="tenant", tenants={"paid": {"weight": 3}})
    submitted(db, *["paid"] * 9, *["free"] * 9)
    assert start_one_by_one(db, 8).count("paid") == 6
    db.pool("other", max_units=4, fairness="tenant")
    for tenant, units in [("large", 4)] * 4 + [("small", 1)] * 16:
        db.parked("other", tenant=tenant, units=units)
    started = []
    while rows := db.claim("other", max_tasks=1):
        started.append(rows[0]["tenant"])
        db.finish(rows[0]["task_id"])
    assert started[:10].count("small") == 8, "four small ones for each large one"


def test_priority_comes_before_share(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    submitted(db, "a", "b")
    submitted(db, *["a"] * 3, priority="high")
    submitted(db, "b", priority="high")
    assert start_one_by_one(db, 6) == ["a", "b", "a", "a", "a", "b"]


def test_tasks_without_a_tenant_share_as_one(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant", tenants={"": {"weight": 2}})
    submitted(db, *[None] * 4, *["a"] * 2)
    assert start_one_by_one(db, 6) == [None, "a", None, None, "a", None]


def test_what_was_cancelled_does_not_count_against_its_tenant(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    submitted(db, *["b"] * 50)
    for task in submitted(db, *["a"] * 100):
        db.value("select pgpark.park_cancel(%s)", task)
    (again,) = submitted(db, "a")
    assert db.status(again)["position"] <= 1


def test_a_delayed_task_has_its_turn_from_when_it_parks(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    db.freeze()
    for _ in range(3):
        db.parked(tenant="later", run_at=db.after(10))
    submitted(db, *["now"] * 20)
    start_one_by_one(db, 10)
    db.advance(10)
    assert start_one_by_one(db, 6) == ["later", "now"] * 3, "of two with the same tag the older one is first"


def test_a_task_that_comes_back_has_its_old_place(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant", retry={"max_attempts": 2, "backoff_secs": 0})
    tasks = submitted(db, "a", "a", "b", "a")
    db.claim(max_tasks=1)
    db.value("select pgpark.park_release(%s, 1)", tasks[0])
    assert db.claimed(max_tasks=1) == [tasks[0]]
    db.finish(tasks[0], 2, "failed")
    assert db.claimed(max_tasks=1) == [tasks[0]]


def test_a_task_that_comes_back_from_long_ago_does_not_set_the_clock_back(db: Database) -> None:
    db.pool(max_units=2, fairness="tenant")
    (old,) = submitted(db, "slow")
    assert db.claimed() == [old]
    submitted(db, *["busy"] * 30)
    start_one_by_one(db, 20)
    db.value("select pgpark.park_release(%s, 1)", old)
    third = submitted(db, *["new"] * 3)[-1]
    assert db.status(third)["position"] >= 4, "not all three before anybody else"


def test_a_weight_that_changes_counts_for_what_is_parked_already(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    submitted(db, *["a", "b"] * 20)
    assert start_one_by_one(db, 4).count("a") == 2
    db.pool(max_units=1, fairness="tenant", tenants={"a": {"weight": 3}})
    assert start_one_by_one(db, 12).count("a") == 9
    submitted(db, *["a"] * 3)
    assert start_one_by_one(db, 8).count("a") == 6


def test_a_pool_becomes_fair_and_fifo_again_with_what_is_parked(db: Database) -> None:
    db.pool(max_units=1)
    submitted(db, *["a"] * 6, *["b"] * 6)
    db.pool(max_units=1, fairness="tenant")
    assert start_one_by_one(db, 4) == ["a", "b", "a", "b"]
    submitted(db, "c")
    db.pool(max_units=1)
    assert start_one_by_one(db, 9) == ["a"] * 4 + ["b"] * 4 + ["c"]


def test_a_task_that_runs_while_its_pool_becomes_fifo_comes_back_to_its_old_place(db: Database) -> None:
    db.pool(max_units=1, fairness="tenant")
    submitted(db, *["a"] * 5)
    start_one_by_one(db, 2)
    (task,) = db.claimed(max_tasks=1)
    db.pool(max_units=1)
    db.value("select pgpark.park_release(%s, 1)", task)
    assert db.claimed() == [task]


def test_a_tenant_never_holds_more_than_its_limit(db: Database) -> None:
    db.pool(max_units=10, tenants={"a": {"max_units": 3}})
    tasks = submitted(db, *["a"] * 5)
    assert db.claimed() == tasks[:3]
    db.finish(tasks[0])
    assert db.claimed() == [tasks[3]]


def test_a_tenant_at_its_limit_is_passed_over_and_is_no_head(db: Database) -> None:
    db.pool(max_units=10, tenants={"a": {"max_units": 4}})
    first, waits = db.parked(tenant="a", units=4), db.parked(tenant="a", units=4, priority="critical")
    db.value("select pgpark.park_cancel(%s)", waits)
    assert db.claimed() == [first]
    waits = db.parked(tenant="a", units=1, priority="critical")
    other = db.parked(tenant="b", units=6, priority="low")
    assert db.claimed() == [other], "max_bypass is 0, and nothing was passed"
    assert db.value("select bypassed from pgpark.task where task_id = %s", waits) == 0
    db.finish(first)
    assert db.claimed() == [waits]


def test_within_a_tenant_nothing_passes_a_task_that_its_limit_keeps_waiting(db: Database) -> None:
    db.pool(max_units=10, max_bypass=5, tenants={"a": {"max_units": 4}})
    first = db.parked(tenant="a", units=3)
    large, small = db.parked(tenant="a", units=4), db.parked(tenant="a", units=1)
    assert db.claimed() == [first]
    assert db.claimed() == []
    db.finish(first)
    assert db.claimed() == [large]
    db.finish(large)
    assert db.claimed() == [small]


def test_a_task_larger_than_its_tenants_limit_is_refused(db: Database) -> None:
    db.pool(max_units=10, tenants={"a": {"max_units": 4}})
    assert db.submit(tenant="a", units=5)["reason"] == "too_large"
    assert db.submit(tenant="b", units=5)["accepted"]


def test_limits_change_live(db: Database) -> None:
    db.pool(max_units=10)
    tasks = submitted(db, *["a"] * 8)
    assert db.claimed(max_tasks=2) == tasks[:2]
    db.pool(max_units=10, tenants={"a": {"max_units": 1}})
    assert db.rows("select distinct lane from pgpark.task where state = 'parked'") == [{"lane": "a"}]
    assert db.claimed() == []
    db.finish(tasks[0])
    assert db.claimed() == []
    db.finish(tasks[1])
    assert db.claimed() == [tasks[2]]
    db.pool(max_units=10, tenants={"a": {"max_units": 3}})
    assert db.claimed() == tasks[3:5]
    db.pool(max_units=10)
    assert db.claimed() == tasks[5:]


def test_a_lowered_limit_drops_what_can_never_fit(db: Database) -> None:
    db.pool(max_units=10, tenants={"a": {"max_units": 8}})
    running, waiting = db.parked(tenant="a", units=8), db.parked(tenant="a", units=7)
    delayed, small = db.parked(tenant="a", units=6, run_at=db.after(100)), db.parked(tenant="a", units=2)
    db.claim()
    db.pool(max_units=10, tenants={"a": {"max_units": 5}})
    assert db.outcome(waiting) == db.outcome(delayed) == ("dropped", "too_large")
    db.value("select pgpark.park_release(%s, 1)", running)
    assert db.claimed() == [small], "and the one that came back does not block its tenant"
    assert db.outcome(running) == ("dropped", "too_large")


def test_share_and_limit_go_together(db: Database) -> None:
    db.pool(max_units=6, fairness="tenant", tenants={"a": {"max_units": 2}, "b": {"max_units": 2}})
    submitted(db, *["a"] * 6, *["b"] * 6, *["c"] * 6)
    assert [row["tenant"] for row in db.claim()] == ["a", "b", "c", "a", "b", "c"]
    db.finish(db.value("select max(task_id) from pgpark.task where state = 'running' and tenant = 'a'"))
    assert [row["tenant"] for row in db.claim()] == ["a"]


def test_position_and_explain_tell_who_waits_for_a_limit(db: Database) -> None:
    db.pool(max_units=3, tenants={"a": {"max_units": 1}})
    submitted(db, "a")
    db.claim()
    a1, a2 = submitted(db, "a", "a")
    b1, b2, b3 = submitted(db, "b", "b", "b")
    explained = [
        (row["task_id"], row["position"], row["why"]) for row in db.rows("select * from pgpark.park_explain('gpu')")
    ]
    assert explained == [
        (a1, 0, "tenant limit"),
        (a2, 1, "tenant limit"),
        (b1, 0, "may start"),
        (b2, 1, "may start"),
        (b3, 2, "no units"),
    ]
    assert [db.status(task)["position"] for task in (a1, a2, b1, b2, b3)] == [0, 1, 0, 1, 2]
    assert db.claimed() == [b1, b2]


def test_a_finish_that_frees_a_limit_is_due_at_once(db: Database) -> None:
    db.pool(max_units=10, tenants={"a": {"max_units": 1}})
    db.freeze()
    first, second = submitted(db, "a", "a")
    assert db.claimed() == [first]
    assert db.maintain()["next_due"] == db.after(30), "its lease: until then nothing can start"
    db.finish(first)
    assert db.maintain()["next_due"] == db.after(1)
    assert db.claimed() == [second]


def test_a_dropped_pool_leaves_nothing_of_its_tenants(db: Database) -> None:
    db.pool(fairness="tenant", tenants={"a": {"max_units": 1}}, max_queue_depth=5)
    submitted(db, "a", "b")
    db.claim()
    db.rows("select pgpark.park_drop_pool('gpu', true)")
    for table in ("tenant", "tenant_service", "place"):
        assert db.value(f"select count(*) from pgpark.{table}") == 0


def test_tenants_that_were_served_long_ago_are_forgotten(db: Database) -> None:
    db.pool(max_units=100, fairness="tenant")
    submitted(db, *[str(number) for number in range(50)], *["busy"] * 4)
    db.claim(max_tasks=54)
    db.maintain()
    assert db.rows("select tenant from pgpark.tenant_service") == [{"tenant": "busy"}]
