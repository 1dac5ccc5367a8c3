"""park_lot: the picture of a pool agrees with what is there, and shows each caller no more than it may see."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.conftest import Database


def lot_of(db: Database, **arguments: Any) -> dict[str, Any]:
    named = "".join(f", {name} => %s" for name in arguments)
    return dict(db.value(f"select pgpark.park_lot('gpu'{named})", *arguments.values()))


def lanes(lot: dict[str, Any]) -> dict[str, list[int]]:
    return {lane["priority"]: [task["task_id"] for task in lane["tasks"]] for lane in lot["parked"]["lanes"]}


def test_an_empty_lot_says_so(db: Database) -> None:
    db.pool(max_units=24, max_bypass=3)
    lot = lot_of(db)
    assert (lot["pool"], lot["state"], lot["used_units"], lot["own"]) == ("gpu", "active", 0, None)
    assert lot["settings"]["max_units"] == 24 and lot["settings"]["max_bypass"] == 3
    assert lot["running"] == {"count": 0, "more": False, "tasks": []}
    assert lanes(lot) == {"critical": [], "high": [], "normal": [], "low": []}
    assert lot["parked"]["count"] == lot["delayed"]["count"] == lot["workers"]["count"] == 0
    assert lot["line"]["why"] is None and lot["line"]["head"] is None
    assert lot["mailbox"] == {"latest": [], "failures": [], "failed": 0, "more": False}


def test_what_runs_is_drawn_with_its_units_the_largest_first(db: Database) -> None:
    db.pool(max_units=24)
    small, large = db.parked(units=2, tenant="acme"), db.parked(units=8, priority="high")
    db.claim(worker="w1", max_units=24)
    lot = lot_of(db)
    assert lot["used_units"] == 10
    assert [(task["task_id"], task["units"], task["priority"], task["tenant"]) for task in lot["running"]["tasks"]] == [
        (large, 8, "high", None),
        (small, 2, "normal", "acme"),
    ]
    assert {task["worker"] for task in lot["running"]["tasks"]} == {"w1"}
    (worker,) = lot["workers"]["list"]
    assert (worker["worker"], worker["max_units"], worker["used_units"], worker["running"]) == ("w1", 24, 10, 2)
    db.value("select pgpark.park_cancel(%s)", small)
    assert [task["state"] for task in lot_of(db)["running"]["tasks"]] == ["running", "cancelling"]


def test_lanes_hold_what_is_parked_in_the_order_of_starting_with_its_age(db: Database) -> None:
    db.pool()
    db.freeze()
    low = db.parked(priority="low", units=3, deadline=db.after(100))
    first = db.parked(priority="high", units=2)
    db.advance(30)
    second = db.parked(priority="high", units=5)
    lot = lot_of(db)
    assert lanes(lot) == {"critical": [], "high": [first, second], "normal": [], "low": [low]}
    high, lowest = lot["parked"]["lanes"][1], lot["parked"]["lanes"][3]
    assert (high["count"], high["more"], high["units"], high["oldest_secs"]) == (2, False, 7, 30)
    assert [(task["secs"], task["position"]) for task in high["tasks"]] == [(30, 0), (0, 1)]
    assert (lowest["tasks"][0]["deadline_secs"], lowest["tasks"][0]["position"]) == (70, 2)
    assert lot["parked"]["count"] == 3


def test_the_head_and_why_it_waits(db: Database) -> None:
    db.pool(max_units=10)
    db.parked(units=6)
    db.claim()
    head, behind = db.parked(units=5, tenant="acme"), db.parked(units=1)
    line = lot_of(db)["line"]
    assert (line["why"], line["free_units"]) == ("no units", 4)
    assert (line["head"]["task_id"], line["head"]["units"], line["head"]["tenant"]) == (head, 5, "acme")
    (normal,) = [lane["tasks"] for lane in lot_of(db)["parked"]["lanes"] if lane["count"]]
    assert [(task["task_id"], task["why"]) for task in normal] == [(head, "no units"), (behind, "held for head")]


@pytest.mark.parametrize(
    ("state", "worker_units", "why"),
    [("paused", 10, "paused"), ("active", 2, "worker capacity"), ("active", None, None), ("active", 0, "no worker")],
)
def test_a_line_that_does_not_move_says_why(
    db: Database, state: str, worker_units: int | None, why: str | None
) -> None:
    db.pool(max_units=10)
    if worker_units != 0:
        db.claim(max_units=worker_units)
    db.parked(units=5)
    db.rows("select pgpark.park_set_pool_state('gpu', %s)", state)
    assert lot_of(db)["line"]["why"] == why


def test_a_line_of_tenants_at_their_limits_says_so(db: Database) -> None:
    db.pool(max_units=10, tenants={"acme": {"max_units": 2}})
    db.parked(units=2, tenant="acme")
    db.claim()
    db.parked(units=2, tenant="acme")
    lot = lot_of(db)
    assert (lot["line"]["why"], lot["line"]["head"]) == ("tenant limit", None)
    assert lot["tenants"] == [
        {
            "tenant": "acme",
            "running": 1,
            "running_units": 2,
            "parked": 1,
            "parked_units": 2,
            "weight": 1,
            "max_units": 2,
        }
    ]


@pytest.mark.parametrize(("units", "why"), [(5, "no units"), (3, "worker capacity"), (1, None)])
def test_the_backlog_of_a_tenant_at_its_limit_does_not_hide_the_head(db: Database, units: int, why: str | None) -> None:
    """However much of it ranks before."""
    db.pool(max_units=10, tenants={"acme": {"max_units": 2}})
    db.parked(units=2, tenant="acme"), db.parked(units=4)
    assert len(db.claim(max_units=8)) == 2
    for _ in range(20):
        db.parked(tenant="acme", priority="critical")
    head = db.parked(units=units)
    lot = lot_of(db, max_tasks=2)
    assert lot["line"]["why"] == why
    assert (lot["line"]["head"] or {}).get("task_id") == (head if why else None)
    (task,) = lot["parked"]["lanes"][2]["tasks"]
    assert (task["task_id"], task["position"], task["why"]) == (head, 0, why or "may start")


def test_lanes_of_limited_tenants_stand_with_the_others(db: Database) -> None:
    db.pool(tenants={"acme": {"max_units": 2}, "globex": {"max_units": 2}})
    tasks = [db.parked(tenant=tenant) for tenant in ("acme", None, "globex", "acme")]
    lot = lot_of(db)
    assert lanes(lot)["normal"] == tasks
    assert lot["parked"]["count"] == 4


def test_what_is_delayed_says_until_when_and_whether_it_failed(db: Database) -> None:
    db.pool(retry={"max_attempts": 2, "backoff_secs": 100, "max_backoff_secs": 100})
    db.freeze()
    failing = db.parked()
    db.claim()
    db.finish(failing, status="failed")
    later = db.parked(run_at=db.after(500))
    delayed = lot_of(db)["delayed"]
    assert [(task["task_id"], task["backoff"]) for task in delayed["tasks"]] == [(failing, True), (later, False)]
    assert delayed["tasks"][1]["due_secs"] == 500
    assert (delayed["count"], delayed["more"]) == (2, False)


def test_the_mailbox_shows_the_latest_outcomes_and_failures_by_reason(db: Database) -> None:
    db.pool(max_units=100)
    db.freeze()
    tasks = [db.parked() for _ in range(5)]
    db.advance(2)
    db.claim()
    db.advance(3)
    for task in tasks[:3]:
        db.value("select pgpark.park_finish(%s, 1, 'failed', null, 'no luck')", task)
    db.finish(tasks[3], result={"secret": 1})
    db.value("select pgpark.park_finish(%s, 1, 'failed', null, 'out of memory')", tasks[4])
    db.advance(4)
    mailbox = lot_of(db)["mailbox"]
    assert [row["task_id"] for row in mailbox["latest"]] == tasks[::-1]
    assert [(row["wait_secs"], row["run_secs"], row["secs"]) for row in mailbox["latest"]] == [(2, 3, 4)] * 5
    assert [(row["status"], row["reason"], row["count"]) for row in mailbox["failures"]] == [
        ("failed", "no luck", 3),
        ("failed", "out of memory", 1),
    ]
    assert "secret" not in str(mailbox)
    db.advance(3600)
    assert lot_of(db)["mailbox"]["failures"] == []


def test_what_did_not_run_when_it_ended_is_not_said_to_have_run_until_then(db: Database) -> None:
    db.pool(max_units=1, retry={"max_attempts": 2, "backoff_secs": 100, "max_backoff_secs": 100})
    db.freeze()
    released, late = db.parked(), db.parked(deadline=db.after(60))
    db.claim()
    db.advance(5)
    db.value("select pgpark.park_release(%s, 1)", released)
    db.value("select pgpark.park_cancel(%s)", released)
    db.claim()
    db.finish(late, status="failed")
    db.advance(500)
    db.maintain()
    told = {row["task_id"]: (row["status"], row["run_secs"]) for row in lot_of(db)["mailbox"]["latest"]}
    assert told == {released: ("dropped", None), late: ("expired", None)}


def test_failures_are_found_behind_the_outcomes_of_busier_pools(db: Database) -> None:
    db.pool(max_units=10_000)
    db.pool("busy", max_units=10_000)
    task = db.parked()
    db.claim()
    db.value("select pgpark.park_finish(%s, 1, 'failed', null, 'no luck')", task)
    many = "(select jsonb_agg('{\"payload\": 1}'::jsonb) from generate_series(1, 1100))"
    db.rows(f"select from pgpark.park_submit_many('busy', {many})")
    held = db.claim("busy", max_tasks=2000)
    outcomes = [{"task_id": row["task_id"], "attempt": 1} for row in held]
    db.rows("select from pgpark.park_finish_many(%s)", psycopg.types.json.Jsonb(outcomes))
    mailbox = lot_of(db)["mailbox"]
    assert [row["task_id"] for row in mailbox["latest"]] == [task]
    assert [row["reason"] for row in mailbox["failures"]] == ["no luck"]


def test_counts_stop_at_a_thousand_and_say_so(db: Database) -> None:
    db.pool(max_units=2000, max_queue_depth=5000)
    many = "(select jsonb_agg('{\"payload\": 1}'::jsonb) from generate_series(1, 1001))"
    db.rows(f"select from pgpark.park_submit_many('gpu', {many})")
    assert len(db.claim(max_tasks=2000)) == 1001
    db.rows(f"select from pgpark.park_submit_many('gpu', {many})")
    lot = lot_of(db, max_tasks=7)
    assert (lot["running"]["count"], lot["running"]["more"], len(lot["running"]["tasks"])) == (1000, True, 7)
    assert (lot["parked"]["count"], lot["parked"]["more"], len(lot["parked"]["lanes"][2]["tasks"])) == (1000, True, 7)
    assert (lot["used_units"], lot["settings"]["free_places"]) == (1001, 3999)
    assert [worker["used_units"] for worker in lot["workers"]["list"]] == [1001], "units are exact"


def test_a_bound_producer_sees_its_own_tasks_alone(db: Database, role: str) -> None:
    db.pool(max_units=10)
    mine, theirs = db.parked(units=3, tenant="acme"), db.parked(units=4, tenant="globex")
    db.claim(worker="w")
    waiting, _ = db.parked(units=5, tenant="acme"), db.parked(units=5, tenant="globex")
    db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{acme}')", role)
    db.connection.execute(f"set role {role}")
    lot = lot_of(db)
    assert [task["task_id"] for task in lot["running"]["tasks"]] == [mine]
    assert lanes(lot)["normal"] == [waiting]
    assert (lot["own"], lot["used_units"], lot["workers"], lot["outcomes"]) == (["acme"], 3, None, None)
    assert [row["tenant"] for row in lot["tenants"]] == ["acme"]
    assert lot["may"] == {"change": False, "cancel": True, "retry": True}
    assert lot["line"] == {"why": None}
    db.connection.execute("reset role")
    db.finish(mine)
    db.finish(theirs)
    db.connection.execute(f"set role {role}")
    assert [row["task_id"] for row in lot_of(db)["mailbox"]["latest"]] == [mine]
    assert "globex" not in str(lot_of(db))
    db.connection.execute("reset role")


def test_who_has_the_grants_of_several_tenants_may_do_what_each_may(db: Database, role: str) -> None:
    """As a pooler's login that is a member of each tenant's role."""
    db.pool()
    acme = f"{role}_acme"
    db.connection.execute(f"create role {acme}")
    try:
        db.connection.execute(f"grant {acme} to {role}")
        db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{acme}')", acme)
        db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{globex}')", role)
        task = db.parked(tenant="globex")
        db.rows("select pgpark.park_cancel(%s, 'too dear')", task)
        db.connection.execute(f"set role {role}")
        lot = lot_of(db)
        db.connection.execute("reset role")
        assert (lot["own"], lot["may"]) == (["acme", "globex"], {"change": False, "cancel": True, "retry": True})
        assert [row["reason"] for row in lot["mailbox"]["latest"]] == ["too dear"]
    finally:
        db.connection.execute("reset role")
        db.connection.execute(f"drop owned by {acme} cascade")
        db.connection.execute(f"drop role {acme}")


def test_own_tasks_behind_many_of_others_are_not_said_to_be_none(db: Database, role: str) -> None:
    db.pool(max_units=1001)
    others = '(select jsonb_agg(\'{"payload": 1, "tenant": "globex"}\'::jsonb) from generate_series(1, 1000))'
    db.rows(f"select from pgpark.park_submit_many('gpu', {others})")
    mine = db.parked(tenant="acme")
    assert len(db.claim(max_tasks=1001)) == 1001
    db.rows(f"select from pgpark.park_submit_many('gpu', {others})")
    db.parked(tenant="acme"), db.parked(tenant="acme", priority="high")
    db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{acme}')", role)
    db.connection.execute(f"set role {role}")
    lot = lot_of(db)
    assert ([task["task_id"] for task in lot["running"]["tasks"]], lot["used_units"]) == ([mine], 1)
    assert [(lane["count"], lane["more"]) for lane in lot["parked"]["lanes"][1:3]] == [(1, False), (0, True)]
    assert (lot["parked"]["count"], lot["parked"]["more"]) == (1, True)
    (small,) = db.value("select pgpark.park_lot()")["pools"]
    assert (small["parked"], small["running"]["count"]) == ({"count": 1, "more": True}, 1)
    db.connection.execute("reset role")


def test_a_token_sees_what_it_is_for(db: Database) -> None:
    db.pool(max_units=10)
    mine, _ = db.parked(units=3, tenant="acme"), db.parked(units=4, tenant="globex")
    db.claim(worker="w")

    def seen_with(*arguments: Any) -> dict[str, Any]:
        secret = db.value("select pgpark.park_create_token(gen_random_uuid()::text, %s, tenants => %s)", *arguments)
        with db.connection.transaction():
            db.rows("select from pgpark.park_enter(encode(sha256(%s::text::bytea), 'hex'))", secret)
            return lot_of(db)

    lot = seen_with(["producer"], ["acme", "initech"])
    assert [task["task_id"] for task in lot["running"]["tasks"]] == [mine]
    assert (lot["own"], lot["may"]["change"], lot["may"]["cancel"]) == (["acme", "initech"], False, True)
    lot = seen_with(["reader"], None)
    assert (lot["own"], lot["running"]["count"], lot["may"]["cancel"]) == (None, 2, False)
    assert seen_with(["admin"], None)["may"] == {"change": True, "cancel": True, "retry": True}


def test_a_reader_is_not_told_what_handlers_said(db: Database, role: str) -> None:
    db.pool(max_units=10, retry={"max_losses": 1}, lease_secs=1)
    db.freeze()
    told, lost = db.parked(), db.parked()
    db.claim()
    db.value("select pgpark.park_finish(%s, 1, 'failed', null, 'customer 42 has no card')", told)
    db.advance(2)
    db.maintain()
    db.rows("select pgpark.park_grant(%s, 'reader')", role)
    db.connection.execute(f"set role {role}")
    lot = lot_of(db)
    assert [(row["task_id"], row["reason"]) for row in lot["mailbox"]["latest"]] == [
        (lost, "lost worker"),
        (told, None),
    ]
    assert {row["reason"] for row in lot["mailbox"]["failures"]} == {"lost worker", None}
    assert lot["may"] == {"change": False, "cancel": False, "retry": False}
    db.connection.execute("reset role")
    assert lot_of(db)["mailbox"]["latest"][1]["reason"] == "customer 42 has no card"


def test_without_a_pool_each_is_shown_in_a_few_numbers(db: Database, role: str) -> None:
    db.pool(max_units=10)
    db.pool("cpu", max_units=4)
    task = db.parked(units=3, tenant="acme")
    db.claim()
    db.parked("cpu", tenant="globex")
    cpu, gpu = db.value("select pgpark.park_lot()")["pools"]
    assert (cpu["pool"], cpu["used_units"], cpu["parked"]["count"], cpu["workers"]) == ("cpu", 0, 1, False)
    assert (gpu["pool"], gpu["used_units"], gpu["max_units"], gpu["workers"]) == ("gpu", 3, 10, True)
    assert gpu["running"]["tasks"] == [{"task_id": task, "units": 3, "tenant": "acme", "priority": "normal"}]
    db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{acme}')", role)
    db.connection.execute(f"set role {role}")
    cpu, gpu = db.value("select pgpark.park_lot()")["pools"]
    assert (cpu["parked"]["count"], gpu["running"]["count"], gpu["used_units"]) == (0, 1, 3)
    db.connection.execute("reset role")
    db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{acme}', pools => '{cpu}')", role)
    db.connection.execute(f"set role {role}")
    assert [lot["pool"] for lot in db.value("select pgpark.park_lot()")["pools"]] == ["cpu"]
    db.connection.execute("reset role")


def test_who_was_granted_nothing_here_sees_nothing(db: Database, role: str) -> None:
    db.pool()
    db.pool("cpu")
    db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{acme}', pools => '{cpu}')", role)
    db.connection.execute(f"set role {role}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="may not see pool 'gpu'"):
        lot_of(db)
    db.connection.execute("reset role")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"max_tasks": 0}, "max_tasks must be from 1 to 1000, not 0"),
        ({"max_tasks": None}, "max_tasks must be from 1 to 1000, not NULL"),
        ({"max_tasks": 1001}, "max_tasks must be from 1 to 1000, not 1001"),
    ],
)
def test_a_wrong_argument_is_named(db: Database, arguments: dict[str, Any], complaint: str) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=complaint):
        lot_of(db, **arguments)
    with pytest.raises(psycopg.errors.UndefinedObject, match="unknown pool 'nowhere'"):
        db.value("select pgpark.park_lot('nowhere')")
