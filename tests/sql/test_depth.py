"""max_queue_depth: places that are taken and given back, debts, overflow: drop_lowest."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database


def free_places(db: Database) -> int:
    """What the books say, checked against what waits."""
    free, counted = db.rows(
        "select (select sum(free) from pgpark.place) as free,"
        " (select max(max_queue_depth) from pgpark.pool)"
        " - (select count(*) from pgpark.task where state in ('parked', 'delayed')) as counted"
    )[0].values()
    assert free == counted
    return int(free)


def reasons(db: Database, *tasks: dict[str, Any]) -> list[str | None]:
    batch = Jsonb([{"payload": 1} | task for task in tasks])
    return [row["reason"] for row in db.rows("select reason from pgpark.park_submit_many('gpu', %s)", batch)]


def test_whatever_takes_a_task_out_of_the_lot_frees_its_place(db: Database) -> None:
    db.pool(max_queue_depth=20, max_units=10)
    db.freeze()
    running, cancelled = db.parked(units=10), db.parked(units=10)
    db.parked(deadline=db.after(5), units=10)
    db.parked(run_at=db.after(100), units=9)
    db.parked(units=9)
    assert free_places(db) == 15
    assert db.claimed() == [running]
    assert free_places(db) == 16
    db.value("select pgpark.park_cancel(%s)", cancelled)
    assert free_places(db) == 17
    db.advance(5)
    db.maintain()
    assert free_places(db) == 18
    db.pool(max_queue_depth=20, max_units=8)  # drops the two that do not fit any more
    assert free_places(db) == 20
    db.rows("select pgpark.park_drop_pool('gpu', true)")
    assert db.value("select count(*) from pgpark.place") == 0


def test_whatever_brings_a_task_back_takes_a_place(db: Database) -> None:
    db.pool(max_queue_depth=5, lease_secs=10, retry={"max_attempts": 2})
    db.freeze()
    released, failed, lost = (db.parked() for _ in range(3))
    db.claim()
    assert free_places(db) == 5
    db.value("select pgpark.park_release(%s, 1)", released)
    assert free_places(db) == 4
    db.finish(failed, status="failed")
    assert free_places(db) == 3
    db.advance(10)
    assert db.maintain()["reclaimed"] == 1
    assert db.status(lost)["status"] == "parked"
    assert free_places(db) == 2


def test_a_task_that_comes_back_to_a_full_lot_owes_its_place(db: Database) -> None:
    db.pool(max_queue_depth=2)
    back = [db.parked() for _ in range(2)]
    db.claim()
    waiting = [db.parked() for _ in range(2)]
    for task in back:
        assert db.value("select pgpark.park_release(%s, 1)", task)
    assert free_places(db) == -2
    for task in (*back, waiting[0]):
        assert db.submit()["reason"] == "queue_full"
        db.value("select pgpark.park_cancel(%s)", task)
    assert free_places(db) == 1
    assert db.submit()["accepted"]


def test_a_batch_gets_what_places_there_are(db: Database) -> None:
    db.pool(max_queue_depth=100)
    assert reasons(db, *[{}] * 130) == [None] * 100 + ["queue_full"] * 30
    assert free_places(db) == 0


@pytest.mark.parametrize("depth", [1, 63, 64, 65, 1000])
def test_places_are_dealt_out_exactly(db: Database, depth: int) -> None:
    db.pool(max_queue_depth=depth)
    assert free_places(db) == depth
    assert reasons(db, *[{}] * (depth + 1)).count(None) == depth


def test_a_depth_that_is_set_live_counts_what_waits(db: Database) -> None:
    db.pool()
    for _ in range(5):
        db.parked()
    db.pool(max_queue_depth=3)
    assert free_places(db) == -2
    assert db.submit()["reason"] == "queue_full"
    db.pool(max_queue_depth=6)
    assert [db.submit()["accepted"] for _ in range(2)] == [True, False]
    db.pool()
    assert db.submit()["accepted"]
    assert db.value("select count(*) from pgpark.place") == 0


def test_maintenance_finds_places_that_were_lost(db: Database) -> None:
    db.pool(max_queue_depth=10)
    db.freeze()
    for _ in range(5):
        db.parked()
    db.rows("delete from pgpark.task where task_id in (select task_id from pgpark.task limit 3) returning 1")
    db.rows("insert into pgpark.place (pool_id, stripe, free) select pool_id, 7, 0 from pgpark.pool returning 1")
    db.maintain()
    assert db.value("select sum(free) from pgpark.place") == 5, "not each time: once a minute"
    db.advance(60)
    db.maintain()
    assert free_places(db) == 8
    assert db.value("select count(*) from pgpark.place") == 11


def test_a_full_lot_drops_its_lowest_task_for_one_of_higher_priority(db: Database) -> None:
    db.pool(max_queue_depth=3, overflow="drop_lowest")
    low, normal, last = db.parked(priority="low"), db.parked(), db.parked(priority="low")
    high = db.parked(priority="high")
    assert db.outcome(last) == ("dropped", "overflow"), "the last in rank goes first"
    assert db.parked(priority="high")
    assert db.outcome(low) == ("dropped", "overflow")
    assert db.submit()["reason"] == "queue_full", "one of the same priority is not dropped"
    assert db.parked(priority="critical")
    assert db.outcome(normal) == ("dropped", "overflow")
    assert db.status(high)["status"] == "parked"
    assert free_places(db) == 0
    assert db.value("select count(*) from pgmq.q_gpu") == 3


def test_a_lot_that_is_not_full_drops_nothing(db: Database) -> None:
    db.pool(max_queue_depth=2, overflow="drop_lowest")
    low = db.parked(priority="low")
    db.parked(priority="high")
    assert db.status(low)["status"] == "parked"


def test_a_full_lot_that_rejects_drops_nothing(db: Database) -> None:
    db.pool(max_queue_depth=1)
    low = db.parked(priority="low")
    assert db.submit(priority="critical")["reason"] == "queue_full"
    assert db.status(low)["status"] == "parked"


def test_a_batch_into_a_full_lot_leaves_the_best_of_both(db: Database) -> None:
    db.pool(max_queue_depth=3, overflow="drop_lowest")
    normal, low, high = db.parked(), db.parked(priority="low"), db.parked(priority="high")
    batch = [{"priority": word} for word in ("low", "critical", "normal", "high")]
    assert reasons(db, *batch) == ["queue_full", None, "queue_full", None]
    assert db.outcome(low) == db.outcome(normal) == ("dropped", "overflow")
    assert db.claimed()[1:] == [high, db.value("select max(task_id) from pgpark.task")]


def test_of_the_same_priority_the_older_one_stays(db: Database) -> None:
    db.pool(max_queue_depth=2, overflow="drop_lowest")
    old = db.parked()
    assert reasons(db, {"priority": "critical"}, {}) == [None, "queue_full"]
    assert db.status(old)["status"] == "parked"


def test_running_and_delayed_tasks_are_not_dropped(db: Database) -> None:
    db.pool(max_queue_depth=1, overflow="drop_lowest")
    running = db.parked(priority="low")
    db.claim()
    delayed = db.parked(priority="low", run_at=db.after(100))
    assert db.submit(priority="critical")["reason"] == "queue_full"
    assert [db.status(task)["status"] for task in (running, delayed)] == ["running", "delayed"]


def test_the_lowest_may_be_of_a_limited_tenant(db: Database) -> None:
    db.pool(max_queue_depth=2, overflow="drop_lowest", tenants={"": {"max_units": 1}, "a": {"max_units": 1}})
    nobodys, normal = db.parked(priority="low"), db.parked(tenant="a")
    db.parked(tenant="b", priority="high")
    db.parked(tenant="b", priority="high")
    assert db.outcome(nobodys) == db.outcome(normal) == ("dropped", "overflow")


def test_dropping_pays_no_debts(db: Database) -> None:
    db.pool(max_queue_depth=2, overflow="drop_lowest")
    back = db.parked(priority="low")
    db.claim()
    for _ in range(2):
        db.parked(priority="normal")
    db.value("select pgpark.park_release(%s, 1)", back)
    assert free_places(db) == -1
    assert db.submit(priority="high")["accepted"]
    assert db.outcome(back) == ("dropped", "overflow")
    assert free_places(db) == -1


def test_many_hands_at_the_limit_lose_no_place_and_wait_for_no_one_in_a_circle(
    db: Database, connect: Callable[[], Database]
) -> None:
    db.pool(max_queue_depth=20)
    failures: list[BaseException] = []

    def hand(number: int, other: Database) -> None:
        dice, held = random.Random(number), 0
        call = "select pgpark.{}((select pool_id from pgpark.pool), %s)"
        try:
            for _ in range(120):
                other.connection.execute("begin")
                if (chance := dice.random()) < 0.5:
                    taken = other.value(call.format("_take_places"), dice.randint(1, 6))
                elif chance < 0.9:
                    other.rows(call.format("_give_places"), -(taken := -dice.randint(0, held)))
                else:
                    other.rows(call.format("_owe_places"), taken := dice.randint(1, 3))
                keep = dice.random() < 0.9
                other.connection.execute("commit" if keep else "rollback")
                held += taken if keep else 0
            other.rows(call.format("_give_places"), held)
        except BaseException as error:
            failures.append(error)

    hands = [threading.Thread(target=hand, args=(number, connect())) for number in range(8)]
    for thread in hands:
        thread.start()
    for thread in hands:
        thread.join()
    assert failures == []
    assert free_places(db) == 20
