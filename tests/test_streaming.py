"""Following a task: its parts as they come or late, and its outcome at the end."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from pgpark import AsyncClient, Client, Message, Part, calls
from pgpark.errors import DatabaseError
from tests.conftest import Database, wait_for
from tests.test_parts import contents
from tests.test_worker import Process, cut_all, start

__all__ = ["start"]  # a fixture


def emit(db: Database, task: int, *values: Any, attempt: int = 1) -> None:
    with Client(db.dsn) as park:
        assert park.run(calls.emit(task, attempt, [{"content": value} for value in values]))


def shown(items: list[Part | Message]) -> list[Any]:
    return [item.content if isinstance(item, Part) else (item.status, item.payload) for item in items]


class Follower:
    """A client that follows a task in a thread or on an event loop."""

    def __init__(self, dsn: str, task: int, asynchronous: bool) -> None:
        self.items: list[Part | Message] = []
        self.error: BaseException | None = None
        self._dsn, self._task = dsn, task
        self.thread = threading.Thread(target=self._guarded, args=(asynchronous,), daemon=True)
        self.thread.start()

    def _guarded(self, asynchronous: bool) -> None:
        try:
            asyncio.run(self._follow_async()) if asynchronous else self._follow()
        except BaseException as error:
            self.error = error

    def _follow(self) -> None:
        with Client(self._dsn) as park:
            for item in park.stream(self._task):
                self.items.append(item)
                assert park.run(calls.status(self._task)), "the client can be used meanwhile"

    async def _follow_async(self) -> None:
        async with AsyncClient(self._dsn) as park:
            async for item in park.stream(self._task):
                self.items.append(item)

    def join(self) -> list[Any]:
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return shown(self.items)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_follower_gets_each_part_when_it_comes_and_the_outcome_last(db: Database, asynchronous: bool) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    emit(db, task, "early")
    follower = Follower(db.dsn, task, asynchronous)
    wait_for(lambda: shown(follower.items) == ["early"])
    for number in range(5):
        began = time.monotonic()
        emit(db, task, number)
        wait_for(lambda number=number: shown(follower.items)[-1] == number)
        assert time.monotonic() - began < 4, "woken, and not by the backstop"
    emit(db, task, "last")
    db.finish(task, result="done")
    assert follower.join() == ["early", 0, 1, 2, 3, 4, "last", ("completed", "done")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_late_client_gets_all_parts_and_then_the_outcome(db: Database, asynchronous: bool) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    emit(db, task, *range(250))
    db.finish(task, result="done")
    assert Follower(db.dsn, task, asynchronous).join() == [*range(250), ("completed", "done")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_follower_sees_that_another_attempt_begins_anew(db: Database, asynchronous: bool) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    emit(db, task, "a", "b")
    follower = Follower(db.dsn, task, asynchronous)
    wait_for(lambda: len(follower.items) == 2)
    db.value("select pgpark.park_release(%s, 1)", task)
    db.claim()
    emit(db, task, "c", attempt=2)
    db.finish(task, attempt=2)
    follower.join()
    parts = [(part.number, part.attempt, part.content) for part in follower.items if isinstance(part, Part)]
    assert parts == [(1, 1, "a"), (2, 1, "b"), (3, 2, "c")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_follower_of_a_parked_task_sees_its_deadline_pass_without_any_worker(
    db: Database, asynchronous: bool
) -> None:
    db.pool()
    task = db.parked(deadline=db.after(0.3))
    assert Follower(db.dsn, task, asynchronous).join() == [("expired", None)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_parts_that_land_with_the_outcome_come_before_it(
    db: Database, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """The task emits and ends between the two looks that a follower takes."""
    db.pool()
    task = db.parked()
    db.claim()
    run_on, run_on_async = calls.run_on, calls.run_on_async
    looked: list[str] = []

    def end_the_task(call: Any) -> None:
        if "task_id" in call.parameters and "status" not in call.statement.as_string() and not looked:
            looked.append(call.statement.as_string())
            assert db.value("select pgpark.park_emit(%s, 1, %s)", task, Jsonb([{"content": "last"}]))
            db.finish(task)

    def spy(connection: Any, call: Any) -> Any:
        answer = run_on(connection, call)
        end_the_task(call)
        return answer

    async def spy_async(connection: Any, call: Any) -> Any:
        answer = await run_on_async(connection, call)
        end_the_task(call)
        return answer

    monkeypatch.setattr(calls, "run_on", spy)
    monkeypatch.setattr(calls, "run_on_async", spy_async)
    assert Follower(db.dsn, task, asynchronous).join() == ["last", ("completed", None)]
    assert looked


def test_a_stream_ends_without_an_outcome_in_time_or_where_there_is_no_task(db: Database) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    emit(db, task, "a")
    with Client(db.dsn) as park:
        assert shown(list(park.stream(task, timeout=0.2))) == ["a"]
        assert list(park.stream(999)) == []


def test_a_stream_ends_when_the_message_is_acknowledged_by_somebody_else(db: Database) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    emit(db, task, "a")
    with Client(db.dsn) as park:
        following = park.stream(task)
        assert shown([next(following)]) == ["a"]
        db.finish(task)
        db.rows("select pgpark.park_ack(array(select message_id from pgpark.park_result(%s)))", task)
        assert list(following) == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_lost_connection_ends_a_stream_with_an_error(db: Database, asynchronous: bool) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    emit(db, task, "a")
    follower = Follower(db.dsn, task, asynchronous)
    wait_for(lambda: follower.items)
    wait_for(lambda: db.value("select count(*) from pg_stat_activity where query ilike '%%park_parts%%'") >= 2)
    cut_all(db)
    with pytest.raises(DatabaseError):
        follower.join()


def test_a_stream_that_is_left_closes_its_connection(db: Database) -> None:
    db.pool()
    task = db.parked()
    db.claim()
    emit(db, task, "a", "b")

    def connections() -> int:
        return int(db.value("select count(*) from pg_stat_activity where datname = current_database()"))

    async def main() -> None:
        async with AsyncClient(db.dsn) as park:
            following = park.stream(task)
            assert (await following.__anext__()).task_id == task
            await following.aclose()  # type: ignore[attr-defined]

    with Client(db.dsn) as park:
        for _ in park.stream(task):
            break
        wait_for(lambda: connections() == 2)
    asyncio.run(main())
    wait_for(lambda: connections() == 1)


def test_the_parts_of_a_killed_worker_are_read_until_the_next_one_emits(
    db: Database, start: Callable[..., Process]
) -> None:
    db.pool(lease_secs=1)
    task = db.parked(payload={"parts": ["a", "b"], "secs": 600})
    worker = start("--handler", "tests.handlers:tell_then_sleep")
    follower = Follower(db.dsn, task, asynchronous=False)
    wait_for(lambda: shown(follower.items) == ["a1", "b1"])
    worker.signal(signal.SIGKILL)
    worker.exit_code()
    wait_for(lambda: db.maintain() and db.status(task)["status"] == "parked")
    assert contents(db, task) == ["a1", "b1"]
    start("--handler", "tests.handlers:tell_then_sleep")
    assert follower.join() == ["a1", "b1", "a2", "b2", ("completed", "done")]
    assert contents(db, task) == ["a2", "b2"]
