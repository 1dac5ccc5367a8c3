"""Where payloads and outcomes are kept. That every kind behaves the same is tested by running the tests of submit,
claim, finish, timers and mailbox on each (marker `every_backend`); here is what differs, and moving between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Background, Database

QUEUES: dict[str, dict[str, Any]] = {
    "in_memory": {"type": "in_memory"},
    "postgres_pgmq": {"type": "postgres_pgmq"},
    "postgres_custom": {"type": "postgres_custom", "table": "own_tasks"},
    "yaque": {"type": "yaque", "path": "./data/queues", "stream": "tauri_llm"},
}
TABLES = {
    "in_memory": "pgmq.q_gpu",
    "postgres_pgmq": "pgmq.q_gpu",
    "postgres_custom": "pgpark.own_tasks",
    "yaque": "pgmq.q_tauri_llm",
}


def crash(db: Database, *tables: str) -> None:
    """What a crash of Postgres does to unlogged tables (tests/test_survival.py has a real one)."""
    for table in ("pgpark.memory", "pgpark.latch", *tables):
        assert db.value("select relpersistence::text from pg_class where oid = %s::regclass", table) == "u"
        db.connection.execute(f"truncate {table}".encode())


@pytest.mark.parametrize("kind", QUEUES)
def test_payloads_are_where_the_pool_says(db: Database, kind: str) -> None:
    db.pool(queue=QUEUES[kind])
    db.parked(payload={"prompt": "hi"})
    db.parked(payload={"prompt": "ho"})
    messages = db.rows(f"select message -> 'payload' as payload from {TABLES[kind]} order by msg_id")
    assert [row["payload"]["prompt"] for row in messages] == ["hi", "ho"]
    if TABLES[kind].startswith("pgmq."):
        assert db.value(f"select bool_and(vt = 'infinity') from {TABLES[kind]}"), "no other consumer can read them"
    unlogged = db.value("select relpersistence = 'u' from pg_class where oid = %s::regclass", TABLES[kind])
    assert unlogged == (kind == "in_memory")


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(QUEUES, 2)))
def test_a_pool_moves_to_another_queue_with_all_its_tasks(db: Database, before: str, after: str) -> None:
    db.freeze()
    db.pool(queue=QUEUES[before], archive=True)
    done, running, *parked = (
        db.parked(payload={"n": n}, units=10, priority="high" if n < 2 else "low") for n in range(5)
    )
    delayed = db.parked(payload={"n": 5}, units=10, run_at=db.after(10))
    assert db.claimed(max_tasks=1) == [done] and db.finish(done)
    assert db.claimed(max_tasks=1) == [running]

    assert db.pool(queue=QUEUES[after], archive=True) == "changed"
    db.advance(10)
    if TABLES[before] != TABLES[after]:
        assert db.value("select to_regclass(%s)", TABLES[before]) is None
    assert db.finish(running)
    started = []
    while tasks := db.claim(max_tasks=1):
        started += [(task["task_id"], task["payload"]["n"]) for task in tasks]
        assert db.finish(tasks[0]["task_id"])
    assert started == [(delayed, 5), (parked[0], 2), (parked[1], 3), (parked[2], 4)]
    kept = db.rows(f"select message #>> '{{metadata,task_id}}' as id from {db.archive()}")
    assert sorted(int(row["id"]) for row in kept) == [done, running, *parked, delayed], "archived ones moved along"
    assert db.parked(), "and new ones get numbers that no old one has"


def test_numbers_of_messages_are_not_used_again_after_a_move(db: Database) -> None:
    db.pool(archive=True)
    for _ in range(3):
        db.parked()
        db.finish(db.claimed()[0])
    for kind in ("postgres_custom", "yaque", "postgres_pgmq"):
        db.pool(queue=QUEUES[kind], archive=True)
        task = db.parked()
        assert db.claimed() == [task] and db.finish(task)
    assert db.value("select count(distinct msg_id) from pgmq.a_gpu") == 6


def test_a_finish_that_is_under_way_goes_before_the_move(
    db: Database, connect: Any, background: Callable[..., Background]
) -> None:
    db.pool(archive=True)
    task = db.parked()
    db.claim()
    with db.connection.transaction():
        assert db.finish(task)
        mover = connect()
        moving = background(mover, lambda: mover.pool(archive=True, queue=QUEUES["postgres_custom"]))
        moving.wait_until_blocked()
    assert moving.result() == "changed"
    assert db.value("select count(*) from pgpark.own_tasks where archived_at is not null") == 1


def test_a_finish_that_comes_during_the_move_finds_the_new_queue(
    db: Database, connect: Any, background: Callable[..., Background]
) -> None:
    db.pool(archive=True)
    task = db.parked()
    db.claim()
    with db.connection.transaction():
        db.pool(archive=True, queue=QUEUES["postgres_custom"])
        other = connect()
        finishing = background(other, lambda: other.finish(task)).wait_until_blocked()
    assert finishing.result() is True
    assert db.value("select count(*) from pgpark.own_tasks where archived_at is not null") == 1


def test_a_submit_and_a_claim_that_come_during_the_move_find_the_new_queue(
    db: Database, connect: Any, background: Callable[..., Background]
) -> None:
    db.pool()
    task = db.parked(payload={"n": 1})
    with db.connection.transaction():
        db.pool(queue=QUEUES["postgres_custom"])
        client, worker = connect(), connect()
        submitting = background(client, lambda: client.parked(payload={"n": 2})).wait_until_blocked()
        claiming = background(worker, lambda: worker.claim(max_tasks=1)).wait_until_blocked()
    assert [row["task_id"] for row in claiming.result()] == [task]
    assert submitting.result() and db.claim()[0]["payload"] == {"n": 2}


def test_a_move_that_is_rolled_back_leaves_all_as_it_was(db: Database) -> None:
    db.pool()
    task = db.parked(payload={"n": 1})
    with db.connection.transaction(force_rollback=True):
        db.pool(queue=QUEUES["in_memory"])
    assert db.value("select relpersistence::text from pg_class where oid = 'pgmq.q_gpu'::regclass") == "p"
    assert [(row["task_id"], row["payload"]) for row in db.claim()] == [(task, {"n": 1})]


def test_a_table_of_somebody_else_is_not_taken_over(db: Database) -> None:
    for queue in ({"type": "postgres_custom", "table": "task"}, {"type": "postgres_custom", "table": "mailbox"}):
        with pytest.raises(psycopg.errors.DuplicateObject, match="there is something named"):
            db.pool(queue=queue)
    for table in ("task", "mailbox", "mailbox_in_memory"):
        db.pool("mem", mailbox={"storage": {"type": "in_memory"}})
        with pytest.raises(psycopg.errors.DuplicateObject, match=f"there is something else named '{table}' in the"):
            db.pool(mailbox={"storage": {"type": "postgres", "table": table}})
    assert [row["name"] for row in db.rows("select name from pgpark.park_pools()")] == ["mem"]


def test_a_dropped_pool_takes_its_table_along(db: Database) -> None:
    db.pool(queue=QUEUES["postgres_custom"])
    db.rows("select pgpark.park_drop_pool('gpu')")
    assert db.value("select to_regclass('pgpark.own_tasks')") is None


# -- the mailbox -----------------------------------------------------------------------------------------------------


def test_outcomes_go_to_the_part_of_the_mailbox_that_the_pool_names(db: Database) -> None:
    storages = {"a": {"type": "postgres", "table": "pl_mailbox_messages"}, "b": {"type": "in_memory"}, "c": {}}
    for name, storage in storages.items():
        db.pool(name, mailbox={"storage": storage})
        task = db.parked(name, tenant="acme")
        db.claim(name)
        assert db.finish(task, result=name)
    for table, pool in {"pl_mailbox_messages": "a", "mailbox_in_memory": "b", "mailbox_messages": "c"}.items():
        assert [row["pool"] for row in db.rows(f"select pool from pgpark.{table}")] == [pool]
    assert [row["payload"] for row in db.rows("select payload from pgpark.park_fetch('acme')")] == ["a", "b", "c"]
    assert db.value("select pgpark.park_ack(array(select message_id from pgpark.park_fetch('acme')))") == 3
    assert db.value("select relpersistence::text from pg_class where relname = 'mailbox_in_memory'") == "u"
    assert db.value("select relpersistence::text from pg_class where relname = 'pl_mailbox_messages'") == "p"


def test_making_a_part_keeps_nobody_out_of_the_mailbox(db: Database, connect: Any) -> None:
    db.pool("other")
    task = db.parked("other", tenant="acme")
    db.claim("other")
    with db.connection.transaction():
        db.pool(mailbox={"storage": {"type": "in_memory"}})
        other = connect()
        other.connection.execute("set lock_timeout = '1s'")
        assert other.finish(task)
        assert len(other.rows("select * from pgpark.park_fetch('acme')")) == 1


def test_a_transaction_that_used_the_mailbox_before_finds_a_part_made_since(db: Database, connect: Any) -> None:
    db.pool("other")
    db.pool()
    first, second = db.parked("other"), db.parked()
    db.claim("other"), db.claim()
    other = connect()
    with db.connection.transaction():
        assert db.finish(first)
        other.pool(mailbox={"storage": {"type": "postgres", "table": "made_since"}})
        assert db.finish(second)
    assert db.value("select count(*) from pgpark.made_since") == 1


def test_names_that_would_clash_are_refused_by_plan_and_put(db: Database) -> None:
    reserved = {"mailbox": {"storage": {"type": "postgres", "table": "mailbox_in_memory"}}}
    twice = {
        "queue": {"type": "postgres_custom", "table": "both"},
        "mailbox": {"storage": {"type": "postgres", "table": "both"}},
    }
    for name, config in (("mailbox_in_memory", reserved), ("both", twice)):
        with pytest.raises(psycopg.errors.DuplicateObject, match=name):
            plan(db, **config)
        with pytest.raises(psycopg.errors.DuplicateObject, match=name):
            db.pool(**config)


def test_several_pools_may_share_a_part(db: Database) -> None:
    for name in ("a", "b"):
        db.pool(name, mailbox={"storage": {"type": "postgres", "table": "shared"}})
        db.parked(name)
        db.finish(db.claimed(name)[0])
    assert db.value("select count(*) from pgpark.shared") == 2


def test_outcomes_are_found_after_the_pool_names_another_part(db: Database) -> None:
    db.pool(mailbox={"storage": {"type": "postgres", "table": "first"}})
    one = db.parked(tenant="acme", idempotency_key="k")
    db.claim()
    db.finish(one)
    assert db.pool(mailbox={"storage": {"type": "in_memory"}}) == "changed"
    two = db.parked(tenant="acme")
    db.claim()
    db.finish(two)
    assert [row["task_id"] for row in db.rows("select task_id from pgpark.park_fetch('acme')")] == [one, two]
    assert db.submit(tenant="acme", idempotency_key="k")["task_id"] == one


def test_a_new_ttl_holds_for_the_outcomes_that_are_there(db: Database) -> None:
    db.freeze()
    db.pool()
    task = db.parked()
    db.claim()
    db.finish(task)
    db.advance(50)
    assert db.maintain()["purged"] == 0
    db.pool(mailbox={"ttl_secs": 60})
    assert db.maintain()["purged"] == 0
    db.advance(11)
    assert db.maintain()["purged"] == 1


def test_maintain_comes_back_for_what_is_to_be_purged(db: Database) -> None:
    db.freeze()
    db.pool(mailbox={"ttl_secs": 3600})
    db.rows("select pgpark.park_submit_many('gpu', %s)", Jsonb([{"payload": 1}] * 1500))
    db.rows("select pgpark.park_cancel(task_id) from pgpark.task")
    assert db.maintain()["next_due"] == db.after(3600)
    db.advance(3600)
    first = db.maintain()
    assert first["purged"] == 1000 and first["next_due"] <= db.after(0), "a full bite: there may be more"
    assert db.maintain()["purged"] == 500
    assert db.maintain()["next_due"] is None
    assert db.value("select count(*) from pgpark.mailbox") == 0


# -- after a crash ---------------------------------------------------------------------------------------------------


def test_after_a_crash_each_waiting_task_of_an_unlogged_queue_is_dropped_and_says_why(db: Database) -> None:
    db.pool(queue=QUEUES["in_memory"], max_queue_depth=5)
    running, parked, delayed = db.parked(units=24), db.parked(), db.parked(run_at=db.after(100))
    db.claim()
    crash(db, "pgmq.q_gpu")
    after = db.parked(payload={"new": True})
    db.maintain("gpu")
    assert db.outcome(parked) == db.outcome(delayed) == ("dropped", "payload lost")
    assert db.finish(running), "its worker has the payload"
    assert [(row["task_id"], row["payload"]) for row in db.claim()] == [(after, {"new": True})]
    assert db.value("select sum(free) from pgpark.place") == 5


def test_after_a_crash_many_lost_tasks_are_dropped_bite_by_bite(db: Database) -> None:
    db.pool(queue=QUEUES["in_memory"])
    db.rows("select pgpark.park_submit_many('gpu', %s)", Jsonb([{"payload": 1}] * 2500))
    crash(db, "pgmq.q_gpu")
    waiting = []
    while True:
        again = db.maintain("gpu")["next_due"]
        waiting.append(db.stats()["parked"])
        if again is None or again > db.after(0):
            break
    assert waiting == [1500, 500, 0]
    assert db.stats()["dropped"] == 2500


def test_a_crash_does_not_touch_tasks_whose_payloads_are_logged(db: Database) -> None:
    db.pool(mailbox={"storage": {"type": "in_memory"}})
    task = db.parked()
    crash(db)
    db.maintain("gpu")
    assert db.claimed() == [task]


def test_a_key_whose_outcome_was_lost_can_be_used_again(db: Database) -> None:
    db.pool(mailbox={"storage": {"type": "in_memory"}})
    ended, live = db.parked(idempotency_key="ended", units=24), db.parked(idempotency_key="live")
    db.claim()
    db.finish(ended)
    crash(db, "pgpark.mailbox_in_memory")
    db.maintain()
    assert db.submit(idempotency_key="ended")["reason"] is None
    assert db.submit(idempotency_key="live")["task_id"] == live


def test_changing_a_pool_after_a_crash_first_ends_what_was_lost(db: Database) -> None:
    db.pool(queue=QUEUES["in_memory"])
    tasks = [db.parked() for _ in range(3)]
    crash(db, "pgmq.q_gpu")
    db.pool(max_units=30)  # to a queue that is logged
    assert {db.outcome(task) for task in tasks} == {("dropped", "payload lost")}
    assert db.parked() in db.claimed()


def test_a_key_is_forgotten_though_the_pool_left_the_memory_before_the_crash(db: Database) -> None:
    db.pool(mailbox={"storage": {"type": "in_memory"}})
    task = db.parked(idempotency_key="k")
    db.claim()
    db.finish(task)
    db.pool(mailbox={"storage": {"type": "postgres"}})
    crash(db, "pgpark.mailbox_in_memory")
    assert db.submit(idempotency_key="k")["reason"] is None, "even before anybody has maintained"


def test_maintaining_all_pools_gets_over_one_that_is_dropped_meanwhile(
    db: Database, connect: Any, background: Callable[..., Background]
) -> None:
    db.pool("a", queue={"type": "in_memory"})
    crash(db)
    other = connect()
    with db.connection.transaction():
        db.rows("select pgpark.park_drop_pool('a')")
        maintaining = background(other, lambda: other.maintain()).wait_until_blocked()
    assert maintaining.result()["expired"] == 0


# -- planning a change -----------------------------------------------------------------------------------------------


def plan(db: Database, name: str = "gpu", /, **config: Any) -> dict[str, tuple[Any, Any]]:
    rows = db.rows("select * from pgpark.park_plan_pool(%s, %s)", name, Jsonb({"max_units": 24} | config))
    return {row["key"]: (row["before"], row["after"]) for row in rows}


def test_a_plan_names_what_would_change_and_changes_nothing(db: Database) -> None:
    assert plan(db)["max_units"] == (None, 24)
    assert db.rows("select * from pgpark.park_pools()") == []
    db.pool()
    assert plan(db) == {}
    assert plan(db, max_units=8, retry={"max_attempts": 3}, queue=QUEUES["postgres_custom"]) == {
        "max_units": (24, 8),
        "queue.queue_name": ("gpu", None),
        "queue.table": (None, "own_tasks"),
        "queue.type": ("postgres_pgmq", "postgres_custom"),
        "retry.max_attempts": (1, 3),
    }
    assert plan(db, tenants={"acme": {"max_units": 4}}) == {
        "tenants": ({}, None),
        "tenants.acme.max_units": (None, 4),
        "tenants.acme.weight": (None, 1),
    }
    assert plan(db) == {}


def test_a_plan_refuses_what_putting_the_pool_would_refuse(db: Database) -> None:
    db.pool("other")
    for error, config in (
        (psycopg.errors.InvalidParameterValue, {"max_units": 0}),
        (psycopg.errors.DuplicateObject, {"queue": {"type": "postgres_pgmq", "queue_name": "other"}}),
        (psycopg.errors.DuplicateObject, {"mailbox": {"storage": {"type": "postgres", "table": "task"}}}),
    ):
        with pytest.raises(error) as planned:
            plan(db, **config)
        with pytest.raises(error) as put:
            db.pool(**config)
        assert planned.value.diag.message_primary == put.value.diag.message_primary
