"""How a worker talks: outcomes and claims together, two lanes at once, and locks that others want."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from pgpark.errors import ConflictError
from pgpark.executors import TaskContext
from pgpark.hands import Hands, Run
from pgpark.lane import _insisting
from pgpark.models import ClaimedRow
from tests import handlers
from tests.conftest import Database, wait_for
from tests.test_worker import eventually, function, run_all, working


def test_an_outcome_and_the_next_claim_are_one_transaction(db: Database) -> None:
    db.pool()

    async def are_one() -> bool:
        first, second = db.parked(payload={"secs": 0}), db.parked(payload={"secs": 1})
        await eventually(lambda: db.rows("select from pgpark.park_result(%s)", first))
        claim = db.rows("select xmin::text from pgpark.task where task_id = %s and state = 'running'", second)
        finish = db.rows("select xmin::text from pgpark.mailbox where task_id = %s", first)
        return claim == finish

    async def main() -> None:
        async with working(db.dsn, function(handlers.sleep), concurrency=1):
            # A heartbeat in between would have written the row anew.
            assert await are_one() or await are_one() or await are_one()

    asyncio.run(main())


def test_a_worker_gives_way_to_who_holds_the_pool_and_wants_its_tasks(
    db: Database, connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "pgpark.worker")
    db.pool()
    task = db.parked(payload={"secs": 0.5})
    db.parked(payload={"secs": 0})
    operator = connect().connection
    blocked = (
        """select from pg_stat_activity where query like '%park_claim%' and cardinality(pg_blocking_pids(pid)) > 0"""
    )

    def hold_pool_then_take_tasks() -> None:  # as park_put_pool does when it moves a queue
        operator.execute("begin")
        operator.execute("select from pgpark.pool for no key update")
        wait_for(lambda: db.rows(blocked))
        operator.execute("select from pgpark.task where task_id = %s for update", [task])
        operator.execute("commit")

    async def main() -> None:
        async with working(db.dsn, function(handlers.sleep), concurrency=1):
            await eventually(lambda: db.status(task)["status"] == "running")
            await asyncio.to_thread(hold_pool_then_take_tasks)
            await eventually(lambda: db.stats()["completed"] == 2)

    asyncio.run(main())
    assert db.status(task)["attempt"] == 1
    assert "lock timeout" in caplog.text and "deadlock" not in caplog.text


def test_two_rounds_at_once_never_hold_more_than_the_concurrency(db: Database) -> None:
    db.pool(max_units=1000)
    tasks = [db.parked() for _ in range(300)]
    running, most = 0, 0

    async def count(_payload: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    outcomes = run_all(db, function(count), tasks, concurrency=20)
    assert {status for status, *_ in outcomes} == {"completed"}
    assert 1 < most <= 20


def test_what_lost_to_another_transaction_is_tried_again() -> None:
    answers: list[Any] = [ConflictError("deadlock detected"), ConflictError("deadlock detected"), "done"]

    async def once() -> Any:
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    assert asyncio.run(_insisting(once)) == "done"


def test_a_payload_that_python_cannot_read_fails_its_task_alone(db: Database) -> None:
    db.pool()
    huge = db.value("select task_id from pgpark.park_submit('gpu', (repeat('9', 5000))::jsonb)")
    good = db.parked(payload=1)
    bad_outcome, good_outcome = run_all(db, function(handlers.echo), [huge, good])
    assert bad_outcome[0] == "failed"
    assert bad_outcome[1].startswith("the payload cannot be read: ")
    assert good_outcome == ("completed", None, 1)


def row(task_id: int) -> Run:
    claimed: Any = (task_id, 1, "{}", "normal", 1, None, None, None, None, None)
    return Run(task_id, 1, TaskContext("gpu", ClaimedRow._make(claimed)))


def test_an_outcome_on_its_way_makes_room_and_one_that_comes_back_takes_none() -> None:
    hands = Hands(room=4)
    runs = [row(task_id) for task_id in range(4)]
    for run in runs:
        hands.hold(run)
        run.complete(b"1")
        hands.ended(run)
    first, second = hands.take_ended(2), hands.take_ended(2)
    hands.ask_for(2)
    assert hands.free() == 2
    hands.let_go(first[0])
    hands.give_back(first)
    assert hands.free() == 1, "one was written, one is ended and not on its way, two are, and two were asked for"
    hands.hold(row(second[0].task_id))
    assert hands.free() == 0, "its task is ours again and runs anew"
