"""The delivery loop against a real HTTP server: slow, failing, hanging up, gone and back."""

from __future__ import annotations

import asyncio
import email.utils
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pgpark import __version__, calls
from pgpark.notifier import _seconds
from tests.conftest import Database, wait_for
from tests.delivery import (
    SECRET,
    deliver_until,
    delivering,
    ended,
    letters,
    make_due,
    notified,
    outbox,
    receive,
)
from tests.receiver import FLOOD, HANG_UP, NONSENSE, TRUNCATE, Receiver

__all__ = ["receive"]  # a fixture


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_a_callback_arrives_with_its_headers_and_body(db: Database, receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    notified(db, receiver, base_url=f"{receiver.url}/hooks/")
    task = db.parked(tenant="é/..", user_id="..", session_id=".")
    db.claim()
    db.connection.execute(
        'select pgpark.park_finish(%s, 1, result => \'{"text": "日本", "n": 1e400, "x": 1.10}\')', [task]
    )
    deliver_until(db, lambda: outbox(db) == 0)
    (request,) = receiver.arrived
    assert request.path == "/hooks/mailbox/%C3%A9%2F../%2E%2E/%2E"
    sent = {name: request.headers[name] for name in ("content-type", "authorization", "idempotency-key", "user-agent")}
    assert sent == {
        "content-type": "application/json",
        "authorization": SECRET,
        "idempotency-key": str(task),
        "user-agent": f"pgpark/{__version__}",
    }
    assert request.body["payload"]["text"] == "日本"
    assert set(request.body) == {
        *("message_id", "task_id", "pool", "tenant", "user_id", "session_id", "status", "reason", "payload"),
        "created_at",
    }


def test_numbers_arrive_as_they_were_stored(db: Database, receive: Callable[..., Receiver]) -> None:
    """A jsonb number may be larger than a float: it is passed on as text, not through Python's floats."""
    notified(db, receive())
    db.parked(tenant="t")
    (task,) = db.claim()
    db.connection.execute("select pgpark.park_finish(%s, 1, result => '[1e400, 1.10]')", [task["task_id"]])
    (callback,) = calls.run_on(db.connection, calls.callbacks())
    assert f"[1{'0' * 400}, 1.10]" in callback.body


def test_without_a_secret_no_authorization_is_sent(db: Database, receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    notified(db, receiver, auth_header=None)
    ended(db)
    deliver_until(db, lambda: outbox(db) == 0)
    assert "authorization" not in receiver.arrived[0].headers


def test_an_outcome_is_delivered_at_once_and_over_one_connection(
    db: Database, receive: Callable[..., Receiver]
) -> None:
    receiver = receive()
    notified(db, receiver)

    async def main() -> None:
        async with delivering(db.dsn, poll_secs=600.0):
            for n in range(1, 11):
                await asyncio.to_thread(ended, db)
                await asyncio.to_thread(wait_for, lambda n=n: len(receiver.arrived) == n and outbox(db) == 0, 10)

    asyncio.run(main())
    assert receiver.connections == 1


def test_a_loop_that_polls_needs_no_notifications(db: Database, receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    notified(db, receiver)

    async def main() -> None:
        async with delivering(db.dsn, listen=False, poll_secs=0.05):
            await asyncio.to_thread(ended, db)
            await asyncio.to_thread(wait_for, lambda: receiver.arrived)
            assert db.value("select count(*) from pg_stat_activity where query ilike 'listen%%'") == 0

    asyncio.run(main())


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (500, "HTTP 500 Internal Server Error"),
        (429, "HTTP 429 Too Many Requests"),
        (599, "HTTP 599"),
        ((307, {"Location": "http://127.0.0.1:1/elsewhere"}), "HTTP 307 Temporary Redirect"),
        (HANG_UP, "the connection broke before the whole answer was there (ReadError)"),
        (TRUNCATE, "the connection broke before the whole answer was there (RemoteProtocolError)"),
        (NONSENSE, "the connection broke before the whole answer was there (RemoteProtocolError)"),
    ],
)
def test_a_receiver_that_fails_and_recovers_gets_it_again(
    db: Database, receive: Callable[..., Receiver], answer: Any, error: str
) -> None:
    receiver = receive(lambda _: answer)
    notified(db, receiver)
    task = ended(db)
    failed = "select headers ->> 'error' as error from pgmq.q_pgpark_outbox where headers is not null"

    async def main() -> None:
        async with delivering(db.dsn):
            (row,) = await asyncio.to_thread(wait_for, lambda: db.rows(failed))
            assert row["error"] == error
            receiver.answer = lambda _: 200
            await asyncio.to_thread(wait_for, lambda: make_due(db) and outbox(db) == 0)

    asyncio.run(main())
    assert set(receiver.tasks) == {task}
    assert receiver.tasks[task] >= 2


@pytest.mark.parametrize("status", [400, 401, 404, 410])
def test_a_client_error_makes_a_dead_letter_that_can_be_retried(
    db: Database, receive: Callable[..., Receiver], status: int
) -> None:
    receiver = receive(lambda _: status)
    notified(db, receiver)
    task = ended(db)
    deliver_until(db, lambda: letters(db))
    (letter,) = letters(db)
    assert (letter["task_id"], letter["attempts"], letter["http_status"]) == (task, 1, status)
    receiver.answer = lambda _: 200
    db.value("select pgpark.park_retry_callbacks()")
    deliver_until(db, lambda: outbox(db) == 0)
    assert (letters(db), receiver.tasks) == ([], {task: 2})


def test_a_receiver_that_is_down_is_tried_again(db: Database, receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    receiver.close()
    notified(db, receiver)
    tasks = {ended(db) for _ in range(5)}
    failed = "select headers ->> 'error' as error from pgmq.q_pgpark_outbox where headers is not null"

    async def main() -> None:
        async with delivering(db.dsn):
            rows = await asyncio.to_thread(wait_for, lambda: len(db.rows(failed)) == 5 and db.rows(failed))
            assert {row["error"] for row in rows} == {"cannot connect: All connection attempts failed"}
            receiver.open()
            await asyncio.to_thread(wait_for, lambda: make_due(db) and outbox(db) == 0)

    asyncio.run(main())
    assert set(receiver.tasks) == tasks


def test_a_slow_answer_ends_at_the_timeout(db: Database, receive: Callable[..., Receiver]) -> None:
    slow = threading.Event()
    receiver = receive(lambda _: slow.wait(30) and 200)
    notified(db, receiver, timeout_secs=0.3, max_attempts=1)
    ended(db)
    began = time.monotonic()
    deliver_until(db, lambda: letters(db), seconds=20)
    slow.set()
    assert time.monotonic() - began < 15
    assert letters(db)[0]["error"] == "no whole answer within 0.3 s"


def test_an_endless_answer_is_not_read_to_its_end(db: Database, receive: Callable[..., Receiver]) -> None:
    receiver = receive(lambda _: FLOOD)
    notified(db, receiver, timeout_secs=30)
    ended(db)
    deliver_until(db, lambda: outbox(db) == 0, seconds=20)
    assert letters(db) == []


def test_retry_after_is_heeded(db: Database, receive: Callable[..., Receiver]) -> None:
    receiver = receive(lambda _: (503, {"Retry-After": "1000"}))
    notified(db, receiver)
    ended(db)
    due = "select extract(epoch from due - clock_timestamp())::float8 as secs from pgpark.park_callbacks_due()"
    deliver_until(db, lambda: db.rows(due)[0]["secs"] > 900)


def test_retry_after_may_be_seconds_or_a_date() -> None:
    assert _seconds("7") == 7
    later = email.utils.formatdate(time.time() + 10**6, usegmt=True)
    assert 10**6 - 300 <= (_seconds(later) or 0) <= 10**6


@pytest.mark.parametrize("header", [None, "", "soon", "-5", "1.5", "²", "Fri, 99 Nov 9999"])
def test_a_retry_after_that_cannot_be_read_is_none(header: str | None) -> None:
    assert _seconds(header) is None


@pytest.mark.parametrize(
    "base", ["http://127.0.0.1:999999", "http://%", "http://xn--/", "http://a..b", "https://é\u0301.."]
)
def test_a_url_that_cannot_be_used_stops_nothing(db: Database, receive: Callable[..., Receiver], base: str) -> None:
    receiver = receive()
    notified(db, receiver, "broken", base_url=base, max_attempts=1)
    notified(db, receiver)
    ended(db, "broken"), ended(db)
    deliver_until(db, lambda: outbox(db) == 0 and letters(db))
    assert letters(db)[0]["error"]
    assert len(receiver.arrived) == 1


def test_a_slow_receiver_holds_up_no_other(db: Database, receive: Callable[..., Receiver]) -> None:
    release = threading.Event()
    slow, quick = receive(lambda _: release.wait(60) and 200), receive()
    notified(db, slow, "slow", timeout_secs=60)
    notified(db, quick, "quick")
    for _ in range(30):
        ended(db, "slow")

    async def main() -> None:
        async with delivering(db.dsn, concurrency=4):
            await asyncio.to_thread(wait_for, lambda: len(slow.arrived) == 4)
            await asyncio.to_thread(lambda: [ended(db, "quick") for _ in range(30)])
            await asyncio.to_thread(wait_for, lambda: len(quick.arrived) == 30, 20)
            assert len(slow.arrived) == 4
            release.set()
            await asyncio.to_thread(wait_for, lambda: outbox(db) == 0)

    asyncio.run(main())
    assert slow.most_at_once == 4
    assert len(slow.tasks) == 30


def test_two_loops_at_once_deliver_each_callback_once(db: Database, receive: Callable[..., Receiver]) -> None:
    receiver = receive()
    notified(db, receiver)

    async def main() -> None:
        async with delivering(db.dsn), delivering(db.dsn):
            tasks = await asyncio.to_thread(lambda: [ended(db) for _ in range(50)])
            await asyncio.to_thread(wait_for, lambda: outbox(db) == 0)
            assert receiver.tasks == dict.fromkeys(tasks, 1)

    asyncio.run(main())
