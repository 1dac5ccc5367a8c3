"""What handlers and commands emit, on its way through the worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pgpark import TaskContext, calls
from pgpark.errors import BadInputError, DatabaseError
from pgpark.executors import CommandExecutor
from pgpark.models import Claimed
from pgpark.parts import LARGEST_PART, PartBuffer
from tests.conftest import Database, wait_for
from tests.test_worker import Process, cut_all, eventually, function, run_all, start, working

__all__ = ["start"]  # a fixture


def contents(db: Database, task: int) -> list[Any]:
    return [row["content"] for row in db.rows("select content from pgpark.park_parts(%s, 0, 100000)", task)]


# -- the buffer ------------------------------------------------------------------------------------------------------


def texts(batch: tuple[int, list[dict[str, Any]]]) -> list[Any]:
    return [part["content"] for part in batch[1]]


def test_a_batch_goes_out_again_as_it_was_until_it_is_written() -> None:
    buffer = PartBuffer()
    buffer.put("progress", 1)
    buffer.put("partial", "a")
    assert buffer.batch() == (1, [{"kind": "progress", "content": 1}, {"kind": "partial", "content": "a"}])
    buffer.put("progress", 2)
    buffer.put("partial", "b")
    assert texts(buffer.batch()) == [1, "a"], "what is on its way is not replaced: it may have arrived"
    buffer.wrote()
    assert (buffer.batch()[0], texts(buffer.batch())) == (3, [2, "b"])
    buffer.wrote()
    assert buffer.batch() == (5, [])


def test_progress_that_waits_is_replaced() -> None:
    buffer = PartBuffer()
    for number in range(10_000):
        buffer.put("progress", number)
    buffer.put("partial", "a")
    buffer.put("progress", "last")
    assert texts(buffer.batch()) == ["a", "last"]
    assert len(buffer._waiting) == 0


def test_a_batch_is_bounded_by_its_size_but_takes_one_part_at_least() -> None:
    buffer = PartBuffer()
    large = "x" * (LARGEST_PART - 2)
    for content in (large, large, "a", "b"):
        buffer.put("partial", content)
    sizes = []
    while batch := texts(buffer.batch()):
        sizes.append(len(batch))
        buffer.wrote()
    assert sizes == [1, 1, 2]


def test_a_thread_waits_while_the_buffer_is_full_and_the_loop_does_not() -> None:
    buffer = PartBuffer(announce=lambda: None)
    for number in range(1000):
        buffer.put("partial", number)
    buffer.put("partial", "from the home thread")
    thread = threading.Thread(target=buffer.put, args=("partial", "last"))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    while texts(buffer.batch()):
        buffer.wrote()
        if not thread.is_alive():
            break
    thread.join(10)
    assert not thread.is_alive()
    assert texts(buffer.batch())[-1] == "last"


@pytest.mark.parametrize("end", [PartBuffer.seal, PartBuffer.discard])
def test_a_thread_that_waits_is_let_go_when_the_attempt_ends(end: Callable[[PartBuffer], None]) -> None:
    buffer = PartBuffer(announce=lambda: None)
    for number in range(1000):
        buffer.put("partial", number)
    thread = threading.Thread(target=buffer.put, args=("partial", "last"))
    thread.start()
    thread.join(0.1)
    end(buffer)
    thread.join(10)
    assert not thread.is_alive()
    buffer.put("partial", "too late, and nobody minds")
    assert len(texts(buffer.batch())) == (500 if end is PartBuffer.seal else 0)


def test_drain_waits_for_room() -> None:
    async def main() -> None:
        buffer = PartBuffer(announce=lambda: None)
        await buffer.drain()
        for number in range(1000):
            buffer.put("partial", number)
        draining = asyncio.create_task(buffer.drain())
        await asyncio.sleep(0.05)
        assert not draining.done()
        buffer.batch()
        buffer.wrote()
        await asyncio.wait_for(draining, 10)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (float("nan"), "a part must be JSON: Out of range float values"),
        (object(), "a part must be JSON: Unable to serialize unknown type"),
        ("\ud800", "a part must be JSON: "),
        ("a\0b", "a part must not hold a NUL character"),
        ({"a\0": 1}, "a part must not hold a NUL character"),
        ("x" * LARGEST_PART, "a part is too large: 1048578 bytes as JSON, at most 1048576"),
    ],
)
def test_what_cannot_be_stored_is_refused_where_it_is_emitted(content: Any, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        context().emit(content)
    assert str(caught.value).startswith(message)


def context() -> TaskContext:
    """As one makes it by hand, to test a handler."""
    claimed = {
        "task_id": 1,
        "attempt": 1,
        "payload": None,
        "priority": "normal",
        "units": 1,
        "created_at": "2030-01-01",
    }
    nothing = {"tenant": None, "user_id": None, "session_id": None, "deadline": None}
    return TaskContext("gpu", Claimed.model_validate(claimed | nothing))


def test_a_backslash_before_u0000_is_no_nul_and_a_part_is_a_copy() -> None:
    by_hand = context()
    by_hand.emit("\\u0000")
    growing = [{"a": 1}]
    by_hand.emit(growing)
    growing[0]["a"] = 2
    by_hand.progress(0.5, "half")
    assert texts(by_hand.parts.batch()) == ["\\u0000", [{"a": 1}], {"value": 0.5, "message": "half"}]


def test_an_attempt_may_emit_64_mib() -> None:
    by_hand = context()
    for _ in range(64):
        by_hand.emit("x" * (LARGEST_PART - 102))
    by_hand.progress("does not count")
    with pytest.raises(BadInputError, match="has emitted 67108864 bytes, more are not kept"):
        by_hand.emit("")


# -- handlers --------------------------------------------------------------------------------------------------------


async def count(payload: int, context: TaskContext) -> str:
    for number in range(payload):
        context.emit(number)
        context.progress(number + 1, "counting")
        await context.drain()
    return "counted"


def count_in_thread(payload: int, context: TaskContext) -> str:
    for number in range(payload):
        context.emit(number)
        context.progress(number + 1, "counting")
    return "counted"


@pytest.mark.parametrize("handler", [count, count_in_thread])
def test_whatever_a_handler_emits_is_there_when_its_outcome_is(db: Database, handler: Any) -> None:
    db.pool()
    tasks = [db.parked(payload=2500) for _ in range(3)]
    assert run_all(db, function(handler), tasks) == [("completed", None, "counted")] * 3
    for task in tasks:
        told = contents(db, task)
        assert told[:-1] == list(range(2500))
        assert told[-1] == {"value": 2500, "message": "counting"}


def test_a_handler_that_awaits_nothing_loses_nothing_either(db: Database) -> None:
    async def burst(payload: int, context: TaskContext) -> None:
        for number in range(payload):
            context.emit(number)

    db.pool()
    task = db.parked(payload=5000)
    assert run_all(db, function(burst), [task])[0][0] == "completed"
    assert contents(db, task) == list(range(5000))


def test_a_thousand_tokens_a_second_cost_a_few_dozen_statements(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    emit_many = calls.emit_many
    monkeypatch.setattr(calls, "emit_many", lambda emissions: called.append(len(emissions)) or emit_many(emissions))

    def speak(_payload: Any, context: TaskContext) -> float:
        began = time.monotonic()
        for number in range(1000):
            context.emit(number)
            time.sleep(0.001)
        return time.monotonic() - began

    db.pool()
    tasks = [db.parked() for _ in range(4)]
    outcomes = run_all(db, function(speak), tasks)
    assert [len(contents(db, task)) for task in tasks] == [1000] * 4
    assert len(called) <= 25 * max(secs for *_, secs in outcomes) + 10


def test_parts_go_out_one_call_at_a_time(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outcome that overtakes a call with parts would leave them behind."""
    run_on_async = calls.run_on_async
    under_way = 0
    together: list[int] = []

    async def slow(connection: Any, call: Any) -> Any:
        nonlocal under_way
        if "emissions" not in call.parameters:
            return await run_on_async(connection, call)
        under_way += 1
        together.append(under_way)
        try:
            await asyncio.sleep(0.1)
            return await run_on_async(connection, call)
        finally:
            under_way -= 1

    async def talk(payload: int, context: TaskContext) -> None:
        context.emit("a")
        await asyncio.sleep(0.02 * payload)
        context.emit("b")

    monkeypatch.setattr(calls, "run_on_async", slow)
    db.pool()
    tasks = [db.parked(payload=number) for number in range(8)]
    run_all(db, function(talk), tasks)
    assert [contents(db, task) for task in tasks] == [["a", "b"]] * 8
    assert set(together) == {1}


def test_a_part_that_a_handler_may_not_emit_fails_its_attempt(db: Database) -> None:
    def emit_an_object(_payload: Any, context: TaskContext) -> None:
        context.emit(object())

    db.pool()
    ((status, reason, _),) = run_all(db, function(emit_an_object), [db.parked()])
    assert status == "failed"
    assert reason.startswith("BadInputError: a part must be JSON: Unable to serialize unknown type")


def test_a_part_that_the_database_refuses_fails_its_task_alone(db: Database) -> None:
    """A float of five characters is a numeric of three hundred digits, so only the database can tell its size."""

    async def swell(payload: bool, context: TaskContext) -> str:
        context.emit([1e308] * 10_000 if payload else "fine")
        return "done"

    db.pool()
    bad, good = db.parked(payload=True), db.parked(payload=False)
    outcomes = run_all(db, function(swell), [bad, good])
    assert outcomes[0][0] == "failed"
    assert outcomes[0][1].startswith("a part cannot be stored: element 1: part 1: content is too large")
    assert outcomes[1] == ("completed", None, "done")
    assert (contents(db, bad), contents(db, good)) == ([], ["fine"])


def test_parts_are_kept_while_the_database_is_away_and_written_once(db: Database) -> None:
    db.pool()
    task = db.parked()
    go_on = threading.Event()

    def talk(_payload: Any, context: TaskContext) -> None:
        context.emit("before")
        go_on.wait(60)
        for number in range(100):
            context.emit(number)

    async def main() -> None:
        async with working(db.dsn, function(talk)):
            await eventually(lambda: contents(db, task) == ["before"])
            await asyncio.to_thread(cut_all, db)
            go_on.set()
            await eventually(lambda: db.status(task)["finished_at"], seconds=15)

    asyncio.run(main())
    assert contents(db, task) == ["before", *range(100)]
    assert db.status(task)["attempt"] == 1


def test_parts_whose_answer_was_lost_are_not_written_twice(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_async = calls.run_on_async
    lost: list[str] = []

    async def lose_one_answer(connection: Any, call: Any) -> Any:
        answer = await run_on_async(connection, call)
        if "emissions" in call.parameters and not lost:
            lost.append("one")
            raise DatabaseError("the answer is lost")
        return answer

    monkeypatch.setattr(calls, "run_on_async", lose_one_answer)
    db.pool()
    task = db.parked(payload=10)
    run_all(db, function(count), [task])
    assert lost
    assert contents(db, task)[:-1] == list(range(10))


def test_an_attempt_that_lost_its_task_emits_into_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_async = calls.run_on_async
    fenced: list[Any] = []

    async def spy(connection: Any, call: Any) -> Any:
        answer = await run_on_async(connection, call)
        if "emissions" in call.parameters:
            fenced.extend(row for row in answer if not row.accepted)
        return answer

    monkeypatch.setattr(calls, "run_on_async", spy)
    db.pool()
    task = db.parked()
    go_on = threading.Event()
    ended = threading.Event()

    def talk(_payload: Any, context: TaskContext) -> None:
        context.emit("first")
        go_on.wait(60)
        for number in range(3000):  # more than fits in the buffer
            context.emit(number)
        ended.set()

    async def main() -> None:
        async with working(db.dsn, function(talk), concurrency=1):
            await eventually(lambda: contents(db, task) == ["first"])
            assert await asyncio.to_thread(db.value, "select pgpark.park_release(%s, 1)", task)
            assert await asyncio.to_thread(db.claimed, worker="other") == [task]
            go_on.set()
            await eventually(ended.is_set)

    asyncio.run(main())
    assert contents(db, task) == ["first"], "until the other emits"
    assert len(fenced) == 1, "it was not tried again and again"


def test_a_plain_handler_that_waits_for_room_does_not_hold_up_the_end(
    db: Database, connect: Any, start: Callable[..., Process]
) -> None:
    db.pool()
    task = db.parked(payload=1_000_000)
    worker = start("--handler", "tests.test_parts:count_in_thread", "--grace", "0")
    wait_for(lambda: contents(db, task))
    stalled = connect()
    stalled.connection.execute("begin")
    stalled.connection.execute("lock table pgpark.part")
    worker.signal()
    assert worker.exit_code(30) == 0


def test_a_plain_handler_that_waits_for_room_is_let_go_when_the_worker_gives_up(
    db: Database, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgpark.worker._GIVE_UP_SECS", 0.5)
    db.pool()
    db.parked()
    stalled = connect()
    full, ended = threading.Event(), threading.Event()

    def talk(_payload: Any, context: TaskContext) -> None:
        for number in range(1000):
            context.emit(number)
        full.set()
        for number in range(1000):
            context.emit(number)
        ended.set()

    async def main() -> None:
        async with working(db.dsn, function(talk), grace_secs=0.0):
            await eventually(lambda: db.stats()["running"])
            await eventually(full.is_set)
            assert not ended.is_set()

    stalled.connection.execute("begin")
    stalled.connection.execute("lock table pgpark.part")
    asyncio.run(main())
    assert ended.wait(10)


# -- commands --------------------------------------------------------------------------------------------------------


def test_a_command_emits_on_a_descriptor_of_its_own(db: Database) -> None:
    db.pool()
    task = db.parked()
    script = (
        r"""echo '{"content": "a"}' > /dev/fd/$PGPARK_PARTS_FD;"""
        r""" printf '{"kind": "progress", "content": {"value": 0.5}}\n\n{"content": "b"}' > /dev/fd/$PGPARK_PARTS_FD;"""
        r""" echo out"""
    )
    command = f"sh -c {quoted(script)}"
    assert run_all(db, CommandExecutor(command), [task]) == [("completed", None, "out\n")]
    assert contents(db, task) == ["a", {"value": 0.5}, "b"]


def quoted(script: str) -> str:
    return "'" + script.replace("'", "'\"'\"'") + "'"


def python(script: str) -> CommandExecutor:
    return CommandExecutor(f"{sys.executable} -c {quoted(script)}")


def test_lines_that_are_no_parts_are_passed_over(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    script = """
import os
out = os.fdopen(int(os.environ["PGPARK_PARTS_FD"]), "wb")
out.write(b'nonsense\\n{"content": 1}\\n[]\\n{"kind": "x", "content": 1}\\n{"content": 1, "x": 1}\\n\\xff\\xfe\\n')
out.write(b'{"content": "' + b"x" * 3_000_000 + b'"}\\n')
out.write(b'{"content": "' + b"x" * 1_048_577 + b'"}\\n')
out.write(b'{"content": "\\\\u0000"}\\n{"content": NaN}\\n' + b"[" * 100000 + b"\\n")
out.write(b'{"content": 2}\\n')
"""
    db.pool()
    task = db.parked()
    assert run_all(db, python(script), [task])[0][0] == "completed"
    assert contents(db, task) == [1, 2]
    assert "a line on PGPARK_PARTS_FD was passed over: " in caplog.text
    assert caplog.text.count("a line on PGPARK_PARTS_FD") == 5
    assert "lines on PGPARK_PARTS_FD were passed over" in caplog.text


def test_a_command_that_floods_waits_and_loses_nothing(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    put = PartBuffer.put
    waiting: list[int] = []

    def spy(buffer: PartBuffer, *part: Any) -> None:
        put(buffer, *part)
        waiting.append(buffer._count)

    monkeypatch.setattr(PartBuffer, "put", spy)
    script = """
import os
out = os.fdopen(int(os.environ["PGPARK_PARTS_FD"]), "w")
for number in range(20000):
    print('{"content": %d}' % number, file=out)
"""
    db.pool()
    task = db.parked()
    assert run_all(db, python(script), [task])[0][0] == "completed"
    assert contents(db, task) == list(range(20000))
    assert max(waiting) <= 1000


def test_a_process_that_keeps_the_descriptor_does_not_hold_up_the_outcome(db: Database) -> None:
    script = """
import os, subprocess, sys
fd = int(os.environ["PGPARK_PARTS_FD"])
os.write(fd, b'{"content": "a"}')
quiet = subprocess.DEVNULL
left = subprocess.Popen(["sleep", "20"], pass_fds=[fd], start_new_session=True, stdout=quiet, stderr=quiet, stdin=quiet)
print(left.pid)
"""
    db.pool()
    task = db.parked()
    began = time.monotonic()
    ((status, _, pid),) = run_all(db, python(script), [task])
    assert (status, time.monotonic() - began < 15) == ("completed", True)
    assert contents(db, task) == [], "its line never ended"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# -- following -------------------------------------------------------------------------------------------------------
