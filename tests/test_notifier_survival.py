"""Delivery loops that lose their connection, are stopped, or die; and those that live in a worker."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pgpark import Worker, WorkerSettings
from pgpark.errors import NotMigratedError, UnknownPoolError
from pgpark.executors import FunctionExecutor
from pgpark.notifier import Notifier, NotifierSettings
from tests import handlers
from tests.conftest import Database, wait_for
from tests.delivery import (
    Loops,
    cut_all,
    delivering,
    ended,
    letters,
    loops,
    make_due,
    notified,
    outbox,
    receive,
)
from tests.receiver import HANG_UP, TRUNCATE, Receiver, Request

__all__ = ["loops", "receive"]  # fixtures


# -- losing things -----------------------------------------------------------------------------------------------------


def test_an_answer_is_written_after_the_connection_was_lost(db: Database, receive: Callable[..., Receiver]) -> None:
    release = threading.Event()
    receiver = receive(lambda _: release.wait(30) and 200)
    notified(db, receiver, timeout_secs=30)
    ended(db)

    async def main() -> None:
        async with delivering(db.dsn):
            await asyncio.to_thread(wait_for, lambda: receiver.arrived)
            await asyncio.to_thread(cut_all, db)
            release.set()
            await asyncio.to_thread(wait_for, lambda: outbox(db) == 0)
            await asyncio.to_thread(ended, db)
            await asyncio.to_thread(wait_for, lambda: len(receiver.arrived) == 2, 30)

    asyncio.run(main())
    assert max(receiver.tasks.values()) == 1


def test_a_stopped_loop_finishes_what_is_under_way_and_takes_no_more(
    db: Database, receive: Callable[..., Receiver]
) -> None:
    release = threading.Event()
    receiver = receive(lambda _: release.wait(30) and 200)
    notified(db, receiver, timeout_secs=30)
    first, second = ended(db), ended(db)

    async def main() -> None:
        async with delivering(db.dsn, concurrency=1) as notifier:
            await asyncio.to_thread(wait_for, lambda: receiver.arrived)
            notifier.stop()
            release.set()

    asyncio.run(main())
    assert receiver.tasks == {first: 1}
    assert [row["body"]["task_id"] for row in db.rows("select body from pgpark.park_callbacks()")] == [second]


def test_a_second_stop_leaves_what_is_under_way_to_others(db: Database, receive: Callable[..., Receiver]) -> None:
    release = threading.Event()
    receiver = receive(lambda _: release.wait(60) and 200)
    notified(db, receiver, timeout_secs=600)
    ended(db)

    async def main() -> None:
        async with delivering(db.dsn) as notifier:
            await asyncio.to_thread(wait_for, lambda: receiver.arrived)
            notifier.stop()
            notifier.stop()

    began = time.monotonic()
    asyncio.run(main())
    release.set()
    assert time.monotonic() - began < 30
    assert outbox(db) == 1


def test_a_loop_on_a_database_without_pgpark_says_what_to_run(empty_databases: Callable[[], str]) -> None:
    with pytest.raises(NotMigratedError, match="run: pgpark migrate"):
        asyncio.run(Notifier(NotifierSettings(empty_databases())).serve())


def test_a_loop_for_an_unknown_pool_does_not_start(dsn: str) -> None:
    with pytest.raises(UnknownPoolError, match="unknown pool 'nope'"):
        asyncio.run(Notifier(NotifierSettings(dsn, pool="nope")).serve())


@pytest.mark.slow
def test_no_callback_is_lost_when_the_loop_is_killed_again_and_again(
    db: Database, connect: Any, receive: Callable[..., Receiver], loops: Loops, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outcomes land all the while, the receiver fails at random, and loops are killed in the middle of deliveries."""
    dice = random.Random(7)
    acknowledged: Counter[int] = Counter()

    def answer(request: Request) -> Any:
        time.sleep(dice.choice([0.0, 0.01, 0.05]))
        how = dice.choice([200] * 7 + [503, HANG_UP, TRUNCATE])
        acknowledged[request.task_id] += how == 200
        return how

    receiver = receive(answer)
    notified(db, receiver, max_attempts=1000)
    tasks: list[int] = []
    submitter = connect()

    def submit_all() -> None:
        for _ in range(200):
            tasks.append(ended(submitter, tenant=f"t{dice.randrange(5)}", user_id="u"))
            time.sleep(0.02)

    submitting = threading.Thread(target=submit_all)
    submitting.start()
    kills = 0
    while kills < 6:
        seen = len(receiver.arrived)
        loops.start("--concurrency", "5"), loops.start("--concurrency", "5")
        wait_for(lambda seen=seen: make_due(db) and len(receiver.arrived) > seen + 15)
        loops.kill_all()
        kills += 2
    submitting.join()
    loops.start()
    wait_for(lambda: make_due(db) and outbox(db) == 0)
    requests, accepted = sum(receiver.tasks.values()), sum(acknowledged.values())
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(tasks)} callbacks, {kills} loops killed: {len(+acknowledged)} delivered, "
            f"{accepted - len(+acknowledged)} duplicates, {requests - accepted} retries\n"
        )
    assert letters(db) == []
    assert set(+acknowledged) == set(tasks)


def test_sigterm_ends_the_command(db: Database, receive: Callable[..., Receiver], loops: Loops) -> None:
    receiver = receive()
    notified(db, receiver)
    ended(db)
    process = loops.start()
    wait_for(lambda: outbox(db) == 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


# -- in a worker -------------------------------------------------------------------------------------------------------


def test_a_worker_delivers_for_its_pool_even_while_a_handler_blocks(
    db: Database, receive: Callable[..., Receiver]
) -> None:
    receiver = receive()
    notified(db, receiver)
    notified(db, receiver, "other")

    async def main() -> None:
        worker = Worker(WorkerSettings(dsn=db.dsn, pool="gpu"), FunctionExecutor(handlers.block_the_loop))
        serving = asyncio.create_task(worker.serve())
        await asyncio.to_thread(ended, db, "other")
        first = await asyncio.to_thread(ended, db)
        await asyncio.to_thread(wait_for, lambda: receiver.tasks[first])
        blocking = await asyncio.to_thread(db.parked, payload={"secs": 2}, tenant="t")
        await asyncio.to_thread(wait_for, lambda: db.status(blocking)["started_at"])
        second = await asyncio.to_thread(ended, db)
        await asyncio.to_thread(wait_for, lambda: receiver.tasks[second])
        await asyncio.to_thread(wait_for, lambda: receiver.tasks[blocking])
        worker.stop()
        await serving

    asyncio.run(main())
    assert {request.body["pool"] for request in receiver.arrived} == {"gpu"}


def test_a_worker_follows_its_pool_when_it_gets_and_loses_a_notifier(
    db: Database, receive: Callable[..., Receiver]
) -> None:
    receiver = receive()
    db.pool(lease_secs=0.3)
    listening = (
        "select from pg_stat_activity where query = 'listen \"pgpark.callback\"' and datname = current_database()"
    )

    async def main() -> None:
        worker = Worker(WorkerSettings(dsn=db.dsn, pool="gpu"), FunctionExecutor(handlers.echo))
        serving = asyncio.create_task(worker.serve())
        await asyncio.to_thread(wait_for, lambda: db.stats()["workers"])
        assert not db.rows(listening)
        db.pool(lease_secs=0.3, mailbox={"notifier": {"base_url": receiver.url}})
        await asyncio.to_thread(wait_for, lambda: db.rows(listening))
        task = await asyncio.to_thread(db.parked, tenant="t")
        await asyncio.to_thread(wait_for, lambda: receiver.tasks[task])
        db.pool(lease_secs=0.3)
        await asyncio.to_thread(wait_for, lambda: not db.rows(listening))
        worker.stop()
        await serving

    asyncio.run(main())


def test_a_worker_can_leave_callbacks_to_others(db: Database, receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    notified(db, receiver)

    async def main() -> None:
        settings = WorkerSettings(dsn=db.dsn, pool="gpu", notifier=False)
        worker = Worker(settings, FunctionExecutor(handlers.echo))
        serving = asyncio.create_task(worker.serve())
        task = await asyncio.to_thread(db.parked, tenant="t")
        await asyncio.to_thread(wait_for, lambda: db.status(task)["finished_at"])
        worker.stop()
        await serving

    asyncio.run(main())
    assert (receiver.arrived, outbox(db)) == ([], 1)
