"""`build_pools`: pools as objects, sync and async, typed, in the caller's transaction, and waiting for results."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from pgpark import AsyncPool, Pool, Pools, build_pools, build_pools_async, calls
from pgpark.embedded import EmbeddedServer
from pgpark.errors import (
    BadInputError,
    BadResultError,
    DatabaseError,
    NotMigratedError,
    UnknownPoolError,
)
from tests.conftest import Database, wait_for

CONFIG = {"pools": {"gpu": {"max_units": 24}}}
ROOT = Path(__file__).parent.parent


class Prompt(BaseModel):
    text: str
    at: datetime | None = None


class Answer(BaseModel):
    length: int


@pytest.fixture
def pools(dsn: str) -> Iterator[Pools]:
    with build_pools(CONFIG, dsn=dsn) as built:
        yield built


@pytest.fixture
def pool(pools: Pools) -> Pool:
    return pools["gpu"]


def finish(db: Database, task_id: int, result: Any = None, status: str = "completed") -> None:
    db.claim(max_tasks=1000)
    assert db.finish(task_id, status=status, result=result)


def asynchronously(dsn: str, work: Callable[[AsyncPool], Any]) -> Any:
    """Runs work with an asyncio pool."""

    async def main() -> Any:
        async with build_pools_async(CONFIG, dsn=dsn) as built:
            return await work(built["gpu"])

    return asyncio.run(main())


# -- building --------------------------------------------------------------------------------------------------------


def test_pools_are_made_where_they_are_missing_and_never_changed(
    db: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    db.pool("gpu", max_queue_depth=5)
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"pools": {"gpu": {"max_units": 30}, "new": {"max_units": 1}}}))
    with build_pools(file, dsn=db.dsn) as built:
        assert list(built) == ["gpu", "new"]
        assert (built["gpu"].stats().max_units, built["new"].stats().max_units) == (24, 1)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == f"pool gpu is not as {file} says (max_queue_depth, max_units); run: pgpark apply {file}"
    caplog.clear()
    with build_pools(file, dsn=db.dsn, apply=True) as built:
        assert built["gpu"].info().settings["max_units"] == 30
    with build_pools(file, dsn=db.dsn) as built:
        assert "not as" not in caplog.text


def test_an_unknown_pool_is_named_with_those_that_there_are(pools: Pools) -> None:
    with pytest.raises(KeyError) as caught:
        pools["gpux"]
    assert isinstance(caught.value, UnknownPoolError)
    assert str(caught.value) == "config: there is no pool 'gpux'; there are gpu"
    assert "gpux" not in pools


def test_a_wrong_config_opens_nothing(dsn: str, empty_databases: Callable[[], str]) -> None:
    with pytest.raises(BadInputError, match=r"^config: pools\.gpu\.max_units must be a whole number"):
        build_pools({"pools": {"a": {"max_units": 1}, "gpu": {"max_units": 0}}}, dsn=dsn)
    with pytest.raises(NotMigratedError, match=r"^config: gpu: .* run: pgpark migrate"):
        build_pools(CONFIG, dsn=empty_databases())
    with pytest.raises(DatabaseError, match="config: gpu: cannot connect"):
        asynchronously("host=h.invalid dbname=x password=hunter2", lambda pool: pool.stats())


def test_closed_pools_say_so_and_can_be_closed_again(dsn: str) -> None:
    with build_pools(CONFIG, dsn=dsn) as built:
        pool = built["gpu"]
    built.close()
    with pytest.raises(DatabaseError, match="closed"):
        pool.stats()
    with pytest.raises(DatabaseError, match="closed"):
        pool.result(1, timeout=5)


@pytest.mark.slow
def test_an_embedded_server_lives_as_long_as_a_pool_of_it(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "home")
    pool = build_pools(CONFIG, home=tmp_path / "home")["gpu"]  # nobody holds the mapping
    task = pool.submit(1).task_id
    assert task is not None and server.url() is not None
    typed = pool.typed(int, int)
    del pool
    assert typed.status(task) is not None
    del typed
    wait_for(lambda: server.url() is None, what="for the server to stop")


# -- calls -----------------------------------------------------------------------------------------------------------


def test_every_method_works_on_both_kinds_of_pool(db: Database, pools: Pools) -> None:
    db.pool("llm", cost_model={"model_vram_gb": 1, "kv_per_token_mb": 1, "max_batch_tokens": 1})
    pool = pools["gpu"]

    async def same(method: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        async with build_pools_async(CONFIG, dsn=db.dsn) as built:
            return getattr(pool, method)(*args, **kwargs), await getattr(built["gpu"], method)(*args, **kwargs)

    first, second = asyncio.run(same("submit", {"x": 1}, units=2, tenant="t"))
    assert (first.accepted, second.task_id) == (True, first.task_id + 1)
    for method, *args in (
        ("submit_many", [{"payload": Prompt(text="x"), "deadline": datetime(2030, 1, 1, tzinfo=timezone.utc)}]),
        ("status", first.task_id),
        ("stats",),
        ("info",),
        ("explain",),
        ("maintain",),
        ("prune",),
        ("pause",),
        ("resume",),
        ("drain",),
        ("disable",),
        ("resume",),
        ("fetch", "t"),
        ("ack", [1]),
        ("result", 10**6, 0),
    ):
        sync, other = asyncio.run(same(method, *args))
        assert type(sync) is type(other), method
    assert asyncio.run(same("cancel", first.task_id)) == ("dropped", "finished")
    with pytest.raises(BadInputError, match="cost_model"):
        pool.llm_units(1, 1)
    with pytest.raises(BadInputError, match="unknown priority"):
        pool.submit(1, priority="urgent")


def test_a_pool_may_be_used_by_many_threads(pool: Pool) -> None:
    with ThreadPoolExecutor(30) as threads:
        rows = list(threads.map(pool.submit, range(200)))
    assert len({row.task_id for row in rows}) == 200


def test_fetch_gives_the_outcomes_of_its_own_pool(db: Database, pool: Pool) -> None:
    db.pool("other")
    tasks = [db.parked(name, tenant="t") for name in ("other", "gpu", "other", "gpu")]
    db.claim()
    db.claim("other")
    for task in tasks:
        db.finish(task)
    assert [message.task_id for message in pool.fetch("t", max_messages=1)] == [tasks[1]]
    messages = pool.fetch("t")
    assert [message.task_id for message in messages] == [tasks[1], tasks[3]]
    assert pool.ack([message.message_id for message in messages]) == 2
    assert pool.fetch("t") == []


# -- types -----------------------------------------------------------------------------------------------------------


def test_payloads_and_results_have_types(db: Database, pool: Pool) -> None:
    typed = pool.typed(Prompt, Answer)
    at = datetime(2030, 1, 1, tzinfo=timezone.utc)
    first = typed.submit(Prompt(text="hello", at=at), tenant="t").task_id
    second = typed.submit({"text": "hi"}, tenant="t").task_id
    (third,) = typed.submit_many([{"payload": Prompt(text="many"), "tenant": "t"}])
    payloads = [row["payload"] for row in db.claim()]
    assert payloads == [
        {"text": "hello", "at": "2030-01-01T00:00:00Z"},
        {"text": "hi", "at": None},
        {"text": "many", "at": None},
    ]
    assert first is not None and second is not None and third.task_id is not None
    db.finish(first, result={"length": 5})
    db.finish(second, status="failed")
    answer = typed.result(first, timeout=5)
    assert answer is not None and answer.payload == Answer(length=5)
    assert [message.payload for message in typed.fetch("t")] == [Answer(length=5), None]
    assert asynchronously(db.dsn, lambda pool: pool.typed(Prompt, Answer).result(first)).payload == Answer(length=5)
    db.finish(third.task_id, result={"length": "long"})
    with pytest.raises(BadResultError, match=r"^the result of task \d+ does not fit Answer: length: Input") as caught:
        typed.result(third.task_id)
    assert caught.value.message.payload == {"length": "long"}, "so that it can be looked at, and acknowledged"


def test_a_payload_that_does_not_fit_is_one_line(pool: Pool) -> None:
    typed = pool.typed(Prompt, Answer)
    with pytest.raises(BadInputError, match=r"^the payload does not fit Prompt: text: Input should be a valid string$"):
        typed.submit({"text": 5})
    with pytest.raises(BadInputError, match=r"^element 2: the payload does not fit Prompt: text: Field req") as caught:
        typed.submit_many([{"payload": Prompt(text="x")}, {"payload": {}}])
    assert caught.value.element == 2
    for nonsense in (object(), float("nan"), {"x": {1, object()}}):
        with pytest.raises(BadInputError):
            pool.submit(nonsense)


def test_type_checkers_see_the_arguments_and_results() -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "-p", "tests.typing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


# -- the caller's own transaction ------------------------------------------------------------------------------------


def url(dsn: str, driver: str) -> sqlalchemy.URL:
    given: dict[str, Any] = psycopg.conninfo.conninfo_to_dict(dsn)
    where: dict[str, Any] = {name: str(given[name]) for name in ("host", "port") if name in given}
    user, password, database = (given.get(name) for name in ("user", "password", "dbname"))
    return sqlalchemy.URL.create(f"postgresql+{driver}", user, password, database=database, query=where)


@contextlib.contextmanager
def opened(dsn: str, kind: str) -> Iterator[Any]:
    """A connection or session of this kind, with commit() and rollback()."""
    what, _, driver = kind.partition("+")
    if what == "psycopg":
        with psycopg.connect(dsn) as connection:
            yield connection
        return
    engine = sqlalchemy.create_engine(url(dsn, driver))
    try:
        with Session(engine) if what == "session" else engine.connect() as transaction:
            yield transaction
    finally:
        engine.dispose()


SYNC_KINDS = ("psycopg", "session+psycopg", "connection+psycopg", "session+psycopg2")


@pytest.mark.parametrize("kind", SYNC_KINDS)
def test_a_submit_is_committed_or_rolled_back_with_the_callers_transaction(db: Database, pool: Pool, kind: str) -> None:
    with opened(db.dsn, kind) as transaction:
        bound = pool.on(transaction)
        row = bound.submit({"text": "a: b, c::d %s"}, units=3, deadline=datetime(2030, 1, 1, tzinfo=timezone.utc))
        assert row.task_id is not None
        assert bound.status(row.task_id) is not None
        assert pool.status(row.task_id) is None, "not yet for others"
        transaction.rollback()
        assert db.stats()["parked"] == 0
        kept = bound.submit({"text": "a: b, c::d %s"}, units=3, deadline=datetime(2030, 1, 1, tzinfo=timezone.utc))
        bound.submit_many([{"payload": n} for n in range(2)])
        transaction.commit()
    assert kept.task_id is not None
    status = pool.status(kept.task_id)
    assert status is not None
    assert (status.units, status.deadline) == (3, datetime(2030, 1, 1, tzinfo=timezone.utc))
    assert [row["payload"] for row in db.claim()] == [{"text": "a: b, c::d %s"}, 0, 1]


@pytest.mark.parametrize("kind", SYNC_KINDS)
def test_every_call_and_error_comes_out_alike_in_the_callers_transaction(db: Database, pool: Pool, kind: str) -> None:
    task = db.parked(tenant="t")
    finish(db, task, "just a text")
    with opened(db.dsn, kind) as transaction:
        bound = pool.typed(Prompt, str).on(transaction)
        message = bound.result(task)
        assert message is not None and message.payload == "just a text"
        assert bound.fetch("t", since="2020-01-01") == [message] == pool.fetch("t")
        assert bound.result(10**6, timeout=60) is None, "it looks once"
        assert (bound.stats(), bound.info(), bound.explain()) == (pool.stats(), pool.info(), pool.explain())
        bound.pause()
        assert (bound.ack([message.message_id]), bound.cancel(10**6)) == (1, "unknown")
        transaction.rollback()
        assert pool.fetch("t") == [message]
        with pytest.raises(BadInputError) as caught:
            bound.submit({"text": "hunter2"}, priority="urgent")
        assert "urgent" in str(caught.value) and "hunter2" not in str(caught.value)
        with pytest.raises(DatabaseError) as aborted:
            bound.submit({"text": "hunter2"})
        assert "hunter2" not in str(aborted.value)
        transaction.rollback()
        with pytest.raises(BadInputError) as caught:
            bound.submit_many([{"payload": {"text": "x"}}, {"payload": {"text": "x"}, "units": 0}])
        assert caught.value.element == 2
        transaction.rollback()
        with pytest.raises(UnknownPoolError, match="unknown pool 'gpu'"):
            db.rows("select pgpark.park_drop_pool('gpu')")
            bound.submit(Prompt(text="x"))


@pytest.mark.parametrize("kind", ["psycopg", "session+psycopg", "session+asyncpg", "connection+asyncpg"])
def test_the_same_goes_for_asyncio(db: Database, kind: str) -> None:
    what, _, driver = kind.partition("+")

    async def work(pool: AsyncPool) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if what == "psycopg":
                transaction: Any = await stack.enter_async_context(await psycopg.AsyncConnection.connect(db.dsn))
            else:
                engine = create_async_engine(url(db.dsn, driver))
                stack.push_async_callback(engine.dispose)
                transaction = await stack.enter_async_context(
                    AsyncSession(engine) if what == "session" else engine.connect()
                )
            bound = pool.on(transaction)
            deadline = datetime(2030, 1, 1, tzinfo=timezone.utc)
            await bound.submit({"x": 1}, deadline=deadline)
            await transaction.rollback()
            kept = await bound.submit({"x": [2]}, units=2, deadline=deadline, tenant="t")
            await transaction.commit()
            assert kept.task_id is not None
            status = await pool.status(kept.task_id)
            assert status is not None and status.deadline == deadline
            assert await bound.ack([1, 2]) == 0
            with pytest.raises(BadInputError, match=r"unknown priority.*low, normal, high"):
                await bound.submit(1, priority="urgent")
            await transaction.rollback()
            with pytest.raises(BadInputError) as caught:
                await bound.submit_many([{"payload": 1}, {}])
            assert caught.value.element == 2

    asynchronously(db.dsn, work)
    assert [row["payload"] for row in db.claim()] == [{"x": [2]}]


def test_what_is_no_transaction_is_refused(db: Database, pool: Pool) -> None:
    engine = create_async_engine(url(db.dsn, "asyncpg"))
    for wrong in (engine, engine.sync_engine, AsyncSession(engine), "dsn", None, db):
        with pytest.raises(BadInputError, match=r"^on\(\) takes a psycopg Connection, or a SQLAlchemy Session or"):
            pool.on(wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"AsyncSession or AsyncConnection, not psycopg\.Connection"):
        asynchronously(db.dsn, lambda pool: pool.on(db.connection))  # type: ignore[arg-type]


# -- waiting ---------------------------------------------------------------------------------------------------------


def backends(db: Database) -> set[int]:
    """The processes that serve connections to this database."""
    rows = db.rows(
        "select pid from pg_stat_activity where datname = current_database() and backend_type like 'client%'"
    )
    return {row["pid"] for row in rows}


def waiting(dsn: str) -> int:
    """How many wait for a result in this process."""
    from pgpark import waiting

    return sum(len(entry[0]._waiting) for (_, other, _), entry in waiting._listeners.items() if other == dsn)


def test_many_wait_on_one_listening_connection(db: Database, pool: Pool) -> None:
    db.pool(max_units=1000)
    tasks = [pool.submit(n).task_id or 0 for n in range(150)]
    db.claim(max_tasks=1000)
    before = backends(db)
    with ThreadPoolExecutor(len(tasks)) as threads, build_pools(CONFIG, dsn=db.dsn) as second:
        both = (pool, second["gpu"])
        results = [threads.submit(both[n % 2].result, task, 60) for n, task in enumerate(tasks)]
        wait_for(lambda: waiting(db.dsn) == len(tasks))
        wait_for(lambda: len(backends(db) - before) == 2, what="for the listener, and the first of the second pools")
        for task in tasks:
            db.finish(task, result=task)
        assert [message.payload for future in results if (message := future.result())] == tasks
        assert len(backends(db) - before) <= 2, "waiting took no connection"
    assert waiting(db.dsn) == 0


def test_a_result_arrives_within_a_moment(db: Database, pool: Pool) -> None:
    """That is by notification: looking again and again takes seconds."""
    took = []
    with ThreadPoolExecutor(1) as threads:
        for n in range(5):
            task = pool.submit(n).task_id or 0
            db.claim()
            future = threads.submit(pool.result, task, 60)
            wait_for(lambda: waiting(db.dsn) == 1)
            wait_for(lambda: db.value("select count(*) = 1 from pg_stat_activity where query ~ 'park_maintain'"))
            began = time.monotonic()
            db.finish(task)
            assert future.result() is not None
            took.append(time.monotonic() - began)
    assert sorted(took)[2] < 0.5


def test_an_outcome_that_is_there_is_given_at_once(db: Database, pool: Pool) -> None:
    task = db.parked()
    finish(db, task, 5)
    for timeout in (0, 0.0001, 60, None):
        message = pool.result(task, timeout)
        assert message is not None and message.payload == 5
    assert pool.result(10**6, timeout=0) is None
    assert pool.result(10**6, timeout=0.05) is None


def test_a_killed_listener_comes_back_and_the_result_arrives(db: Database, pool: Pool) -> None:
    task = pool.submit(1).task_id or 0
    db.claim()
    before = backends(db)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(pool.result, task, 60)
        (listener,) = wait_for(lambda: backends(db) - before)
        began = time.monotonic()
        db.rows("select pg_terminate_backend(%s)", listener)
        db.finish(task, result=7)  # nobody listens now
        message = future.result()
        assert message is not None and message.payload == 7
        assert time.monotonic() - began < 30, "not only by the last look"


def test_a_deadline_ends_a_wait_where_no_worker_lives(db: Database, pool: Pool) -> None:
    assert pool.result(10**6, timeout=0.1) is None, "the listener is up, and knows of no deadline"
    task = pool.submit(1, deadline=db.after(0.3)).task_id or 0
    began = time.monotonic()
    message = pool.result(task, timeout=60)
    assert message is not None and message.status == "expired"
    assert time.monotonic() - began < 4, "not only by looking now and then"


def test_two_may_wait_for_one_task(db: Database, pool: Pool) -> None:
    task = pool.submit(1).task_id or 0
    with ThreadPoolExecutor(2) as threads:
        assert pool.result(task, timeout=0.05) is None, "who gives up takes nobody along"
        futures = [threads.submit(pool.result, task, 60) for _ in range(2)]
        wait_for(lambda: waiting(db.dsn) == 1)
        finish(db, task)
        assert all(future.result() for future in futures)


def test_a_stream_gives_the_parts_and_then_the_outcome(db: Database, pool: Pool) -> None:
    task_id = pool.submit("x").task_id
    assert task_id is not None
    db.claim()
    assert pool.run(calls.emit(task_id, 1, [{"content": "to"}, {"content": "ken"}]))
    finish(db, task_id, {"length": 5})

    async def read(later: AsyncPool) -> list[Any]:
        return [item async for item in later.typed(str, Answer).stream(task_id)]

    for items in (list(pool.typed(str, Answer).stream(task_id)), asynchronously(db.dsn, read)):
        assert [item.content for item in items[:-1]] == ["to", "ken"]
        assert items[-1].payload == Answer(length=5)


def test_asyncio_waits_beside_other_work_and_can_be_cancelled(db: Database) -> None:
    async def work(pool: AsyncPool) -> None:
        tasks = [(await pool.submit(n)).task_id or 0 for n in range(20)]
        results = [asyncio.create_task(pool.result(task, 60)) for task in tasks]
        while waiting(db.dsn) < len(tasks):
            await asyncio.sleep(0.01)
        results[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await results[0]
        assert waiting(db.dsn) == len(tasks) - 1
        for row in db.claim():
            db.finish(row["task_id"], result=row["task_id"])
        messages = await asyncio.gather(*results[1:])
        assert [message.payload for message in messages if message] == tasks[1:]
        assert await pool.result(10**6, timeout=0.05) is None

    asynchronously(db.dsn, work)


def test_nobody_waits_for_a_task_that_was_refused(pool: Pool) -> None:
    task = pool.submit({}, units=25)
    assert (task.task_id, task.reason) == (None, "too_large")
    with pytest.raises(BadInputError, match="task_id is None: the task was refused"):
        pool.result(task.task_id)
    with pytest.raises(BadInputError, match="task_id is None"):
        next(pool.stream(task.task_id))


def test_a_notification_of_somebody_else_disturbs_nobody(db: Database, pool: Pool) -> None:
    task_id = pool.submit({}).task_id
    assert task_id is not None
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.result, task_id, 30)
        for payload in ("9" * 5000, "x", ""):
            db.rows("select pg_notify('pgpark.mailbox', %s)", payload)
        finish(db, task_id)
        message = waiting.result(40)
    assert message is not None and message.status == "completed"


FORKED = """
import os, sys
from pgpark import build_pools
from pgpark.errors import DatabaseError
pool = build_pools({"pools": {"gpu": {"max_units": 24}}}, dsn=sys.argv[1])["gpu"]
assert pool.result(int(sys.argv[2]), 30) is not None
sys.stdout.flush()
if (child := os.fork()) == 0:
    for call in (lambda: pool.result(int(sys.argv[2]), 30), pool.stats):
        try:
            call()
        except DatabaseError as error:
            print(error)
    sys.exit()
os.waitpid(child, 0)
print(pool.stats().completed)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pools_do_not_outlive_a_fork(db: Database, pool: Pool) -> None:
    """Else two processes would talk on one connection, and wait for a thread that only one of them has."""
    task_id = pool.submit({}).task_id
    assert task_id is not None
    finish(db, task_id)
    command = [sys.executable, "-c", FORKED, db.dsn, str(task_id)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    line = "these pools were built before a fork; build them in each process"
    assert told.stdout.splitlines() == [line, line, "1"], told.stderr


def test_who_waits_when_the_pools_are_closed_is_told(dsn: str) -> None:
    built = build_pools(CONFIG, dsn=dsn)
    task = built["gpu"].submit(1).task_id or 0
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(built["gpu"].result, task)
        wait_for(lambda: waiting(dsn) == 1)
        built.close()
        with pytest.raises(DatabaseError, match="closed while somebody waited"):
            future.result()
    assert not [thread for thread in threading.enumerate() if thread.name == "pgpark-listener"]


def test_a_database_that_lost_pgpark_ends_the_wait(db: Database, pool: Pool) -> None:
    task = pool.submit(1).task_id or 0
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(pool.result, task, 60)
        wait_for(lambda: waiting(db.dsn) == 1)
        db.connection.execute("drop function pgpark.park_result(bigint)")
        with pytest.raises(NotMigratedError, match="pgpark migrate"):
            future.result()


# -- the worker ------------------------------------------------------------------------------------------------------

WORKER = """
from pgpark import build_pools
def answer(payload): return {"length": len(payload["text"])}
build_pools("scheduler-config.json")["gpu"].worker(answer).run()
"""


def test_a_worker_is_three_lines(db: Database, pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "scheduler-config.json").write_text(
        json.dumps({"pools": {"gpu": {"max_units": 24, "database": db.dsn}}})
    )
    worker = subprocess.Popen([sys.executable, "-c", WORKER], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        task = pool.submit({"text": "hello"}).task_id or 0
        message = pool.typed(Prompt, Answer).result(task, timeout=60)
        assert message is not None and message.payload == Answer(length=5)
        worker.send_signal(signal.SIGTERM)
        assert (worker.communicate(timeout=30)[1], worker.returncode) == ("", 0)
    finally:
        worker.kill()
        worker.wait()


def test_a_handler_may_be_named_and_must_be_there(pool: Pool) -> None:
    assert pool.worker("tests.handlers:echo", units=3)
    with pytest.raises(BadInputError):
        pool.worker("tests.handlers:nope")


def test_calls_can_be_run_as_they_are(pool: Pool) -> None:
    assert pool.run(calls.stats())[0].pool == "gpu"
