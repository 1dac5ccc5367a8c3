"""Workers and clients beside strangers in the same database, and with no more rights than they were granted."""

from __future__ import annotations

import asyncio
import contextlib

import psycopg

from pgpark import AsyncClient, Client, calls
from tests import handlers
from tests.conftest import Database
from tests.receiver import Receiver
from tests.test_worker import eventually, function, working


def acting_as(dsn: str, role: str) -> str:
    """A DSN whose sessions act as this role."""
    return psycopg.conninfo.make_conninfo(dsn, options=f"-c role={role}")


def test_a_flood_of_foreign_notifications_costs_time_and_nothing_else(db: Database, role: str) -> None:
    """Nonsense on every channel that workers and clients listen to, from a role without any access."""
    db.pool()
    junk = ["", "cancel", "0", "-1", "99999999999999999999", "'; drop schema pgpark; --", "🅿" * 1900, "null"]

    async def main() -> None:
        async with (
            working(db.dsn, function(handlers.echo), poll_secs=600),
            AsyncClient(db.dsn) as park,
            await psycopg.AsyncConnection.connect(acting_as(db.dsn, role), autocommit=True) as stranger,
        ):
            await eventually(lambda: db.stats()["workers"] == 1)
            flood = asyncio.create_task(notify(stranger))
            tasks = [await park.run(calls.submit("gpu", n, tenant="t")) for n in range(20)]
            messages = [await park.wait(task.task_id or 0, timeout=60) for task in tasks]
            assert [message and message.payload for message in messages] == list(range(20))
            parts = [part async for part in park.stream(tasks[0].task_id or 0, timeout=60)]
            assert len(parts) == 1
            flood.cancel()

    async def notify(stranger: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
        while True:
            for channel in ("pgpark.pool.gpu", "pgpark.mailbox", "pgpark.task.1", "pgpark.callback"):
                for payload in junk:
                    await stranger.execute("select pg_notify(%s, %s)", [channel, payload])
            await asyncio.sleep(0)

    asyncio.run(main())
    assert db.stats()["completed"] == 20


def test_a_worker_needs_the_access_of_a_worker_and_no_more(db: Database, role: str) -> None:
    """Claiming, emitting, finishing, timers, heartbeats and callbacks, all as a role that was granted one pool."""
    with contextlib.closing(Receiver()) as receiver:
        db.pool(lease_secs=1, mailbox={"notifier": {"type": "http", "base_url": receiver.url}})
        db.pool("other")
        db.rows("select pgpark.park_grant(%s, 'worker', pools => '{gpu}')", role)

        async def main() -> None:
            async with working(acting_as(db.dsn, role), function(handlers.echo)):
                late = db.parked(run_at=db.after(0.3), tenant="t")
                await eventually(lambda: db.rows("select from pgpark.park_result(%s)", late))
                await eventually(lambda: len(receiver.arrived) == 1)

        asyncio.run(main())
    assert db.stats()["completed"] == 1


def test_a_client_needs_the_access_of_a_producer_and_no_more(db: Database, role: str) -> None:
    db.pool()
    db.rows("select pgpark.park_grant(%s, 'producer', tenants => '{t}')", role)
    with Client(acting_as(db.dsn, role)) as park:
        task = park.run(calls.submit("gpu", 1, tenant="t")).task_id or 0
        foreign = db.parked(tenant="u")
        db.claim()
        db.finish(task, result="mine")
        db.finish(foreign, result="theirs")
        message = park.wait(task, timeout=30)
        assert message is not None and message.payload == "mine"
        assert [one.payload for one in park.stream(task, timeout=30) if hasattr(one, "payload")] == ["mine"]
        assert list(park.stream(foreign, timeout=1)) == []
        assert park.wait(foreign, timeout=0.2) is None
        assert [row.task_id for row in park.run(calls.results([task, foreign]))] == [task]
        assert park.run(calls.ack([message.message_id])) == 1
