"""The delivery loop against a real HTTP server: slow, failing, hanging up, gone and back; and as processes that die."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from pgpark import Worker, WorkerSettings, __version__, calls, cli
from pgpark.errors import NotMigratedError, UnknownPoolError
from pgpark.executors import FunctionExecutor
from pgpark.notifier import Notifier, NotifierSettings, _seconds
from tests import handlers
from tests.conftest import Database, wait_for
from tests.receiver import FLOOD, HANG_UP, NONSENSE, TRUNCATE, Receiver, Request

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


# -- what is sent ----------------------------------------------------------------------------------------------------


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


# -- what comes back -------------------------------------------------------------------------------------------------


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


# -- losing things ---------------------------------------------------------------------------------------------------


def cut_all(db: Database) -> None:
    db.rows(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        " and pid <> pg_backend_pid()"
    )


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


# -- in a worker -----------------------------------------------------------------------------------------------------


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


# -- secrets and the command line ------------------------------------------------------------------------------------


def test_no_log_line_holds_a_secret_or_a_tenant(
    db: Database, receive: Callable[..., Receiver], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)  # also of the libraries below
    answers: list[Any] = [200, 500, 410, HANG_UP, NONSENSE]
    receiver = receive(lambda request: answers[int(request.body["user_id"])])
    notified(db, receiver)
    for user in range(len(answers)):
        ended(db, tenant="whoever", user_id=str(user))
    deliver_until(db, lambda: len(receiver.arrived) == 5 and letters(db) and outbox(db) == 3)
    assert "s3cr3t" not in caplog.text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("pgpark")]
    assert not [line for line in ours if "whoever" in line]
    said = [line for line in ours if "HTTP 500" in line]
    assert len(said) == 1
    assert f"attempt 1, to 127.0.0.1:{receiver.port}: HTTP 500 Internal Server Error; will be tried again" in said[0]


def test_a_verbose_loop_prints_no_secret(db: Database, receive: Callable[..., Receiver], loops: Loops) -> None:
    receiver = receive(lambda _: 410)
    notified(db, receiver)
    ended(db)
    process = loops.start("-v")
    wait_for(lambda: letters(db))
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=30)
    assert "HTTP 410 Gone; given up; see pgpark notifier list" in printed
    assert "s3cr3t" not in printed
    assert "/mailbox/" not in printed


def test_a_callback_in_hand_does_not_print_its_secret(db: Database, receive: Callable[..., Receiver]) -> None:
    notified(db, receive())
    ended(db)
    (callback,) = calls.run_on(db.connection, calls.callbacks())
    printed = f"{callback} {callback!r} {callback.model_dump()} {callback.model_dump_json()}"
    assert "s3cr3t" not in printed
    assert callback.auth_header is not None
    assert callback.auth_header.get_secret_value() == SECRET


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capfd.readouterr()
    code = cli.run(arguments)
    return code, *capfd.readouterr()


@pytest.fixture
def environment(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPARK_DSN", dsn)


@pytest.mark.usefixtures("environment")
def test_dead_letters_are_listed_and_retried(
    db: Database, receive: Callable[..., Receiver], capfd: pytest.CaptureFixture[str]
) -> None:
    receiver = receive(lambda _: 410)
    notified(db, receiver)
    assert run(capfd, "notifier", "list") == (0, "", "no callback was given up\n")
    task = ended(db, tenant="acme")
    ended(db)
    deliver_until(db, lambda: len(letters(db)) == 2)
    code, out, err = run(capfd, "notifier", "list")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split()[1:8] == [
        *(str(task), "gpu", "acme", f"{receiver.url}/mailbox/acme", "1", "410", "HTTP")
    ]
    assert run(capfd, "notifier", "list", "--pool", "x", "--json")[1] == ""
    first = letters(db)[0]["callback_id"]
    assert run(capfd, "notifier", "retry", str(first), "99999")[0] == 1
    assert run(capfd, "notifier", "retry", "--all", "--pool", "x")[2] == "0 put back into the outbox\n"
    assert run(capfd, "notifier", "retry", "--all", "--json")[:2] == (0, '{"retried": 1}\n')
    assert outbox(db) == 2


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retry"], "pgpark notifier retry: give either ids, as pgpark notifier list shows them, or --all"),
        (["retry", "1", "--all"], "pgpark notifier retry: give either ids"),
        (["retry", "x"], "pgpark notifier retry: Invalid value for '[CALLBACK_ID...]': 'x' is not a valid integer"),
        (["run", "--pool", "nope"], "pgpark: unknown pool 'nope'"),
        (["run", "--concurrency", "0"], "pgpark notifier run: Invalid value for '--concurrency'"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = run(capfd, "notifier", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(message)


@pytest.mark.usefixtures("environment")
def test_nothing_that_the_command_line_prints_holds_a_secret(
    db: Database, receive: Callable[..., Receiver], capfd: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    receiver = receive(lambda _: 410)
    good, bad, worse = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "worse.json"
    config = 'max_units: 4\ndatabase: "postgresql://u:s3cr3t@h/d"\nmailbox:\n  notifier:\n    auth_header: {}\n'
    good.write_text(config.format(f'"{SECRET}"') + f"    base_url: {receiver.url}\n")
    bad.write_text(config.format(f'"{SECRET}'))
    worse.write_text(f'{{"max_units": 4, "mailbox": {{"notifier": {{"auth_headers": "{SECRET}"}}}}}}')
    printed = [run(capfd, "pool", "put", "gpu", "--config", str(file)) for file in (bad, worse, good)]
    assert [code for code, _, _ in printed] == [2, 2, 0]
    assert printed[0][2].startswith(f"pgpark: {bad} is not YAML: found unexpected end of stream at line 6, column 1")
    ended(db)
    deliver_until(db, lambda: letters(db))
    for arguments in (
        ["pool", "show", "gpu"],
        ["pool", "show", "gpu", "--json"],
        ["pool", "list", "--json"],
        ["pool", "put", "gpu", "--set", "max_bypass=1"],
        ["pool", "put", "gpu", "--set", f"mailbox.notifier.auth_heade={SECRET}"],
        ["pool", "put", "gpu", "--set", f"mailbox.notifier.auth_header= {SECRET}"],
        ["pool", "put", "gpu", "--set", f"mailbox.notifier={SECRET}"],
        ["notifier", "list", "--json"],
        ["stats", "--json"],
        ["explain", "gpu"],
        ["pool", "drop", "gpu"],
    ):
        printed.append(run(capfd, *arguments))
    assert "s3cr3t" not in str(printed)
    assert '"auth_header": "(secret)"' in str(printed)
    assert db.value("select count(*) from pgpark.pool_secret") == 0, "the put with --set kept it until the drop"
