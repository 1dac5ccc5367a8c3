"""Loops that deliver callbacks, in this process and in others, to servers that a test starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from pgpark.notifier import Notifier, NotifierSettings
from tests.conftest import Database, wait_for
from tests.receiver import Receiver

SECRET = "Bearer s3cr3t-T0ken"


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    """Starts HTTP servers."""
    opened: list[Receiver] = []

    def start(*arguments: Any) -> Receiver:
        opened.append(Receiver(*arguments))
        return opened[-1]

    yield start
    for receiver in opened:
        receiver.close()


def notified(db: Database, receiver: Receiver, name: str = "gpu", /, **notifier: Any) -> None:
    settings = {"base_url": receiver.url, "auth_header": SECRET, "timeout_secs": 5} | notifier
    db.pool(name, mailbox={"notifier": settings})


def ended(db: Database, pool: str = "gpu", /, **arguments: Any) -> int:
    task = db.parked(pool, **{"tenant": "t"} | arguments)
    db.value("select pgpark.park_cancel(%s)", task)
    return task


@contextlib.asynccontextmanager
async def delivering(dsn: str, **settings: Any) -> AsyncIterator[Notifier]:
    """A loop in this process, stopped on leaving."""
    notifier = Notifier(NotifierSettings(**{"dsn": dsn, "poll_secs": 60.0} | settings))
    serving = asyncio.create_task(notifier.serve())
    try:
        yield notifier
    finally:
        if not serving.done():
            notifier.stop()
        await serving


def deliver_until(db: Database, condition: Callable[[], Any], seconds: float = 60, **settings: Any) -> None:
    async def main() -> None:
        async with delivering(db.dsn, **settings):
            await asyncio.to_thread(wait_for, condition, seconds)

    asyncio.run(main())


def outbox(db: Database) -> int:
    return int(db.value("select count(*) from pgmq.q_pgpark_outbox"))


def letters(db: Database) -> list[Any]:
    return db.rows("select * from pgpark.park_dead_letters()")


def make_due(db: Database) -> bool:
    """Time passes: backoffs end and leases of lost attempts lapse, those of what is under way with them."""
    db.connection.execute("update pgmq.q_pgpark_outbox set vt = clock_timestamp() where vt > clock_timestamp()")
    db.connection.execute("notify \"pgpark.callback\", 'gpu'")
    return True


class Loops:
    """`pgpark notifier run` as processes."""

    def __init__(self, dsn: str) -> None:
        self._environment = os.environ | {"PGPARK_DSN": dsn}
        self._running: list[subprocess.Popen[str]] = []

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pgpark", "notifier", "run", *options]
        process = subprocess.Popen(command, env=self._environment, stderr=subprocess.PIPE, text=True)
        self._running.append(process)
        return process

    def kill_all(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate()
        self._running.clear()


@pytest.fixture
def loops(dsn: str) -> Iterator[Loops]:
    running = Loops(dsn)
    yield running
    running.kill_all()


def cut_all(db: Database) -> None:
    db.rows(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        " and pid <> pg_backend_pid()"
    )
