"""The worker, in this process and as a process: handlers, leases, stopping, losing the database."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from pgpark import Worker, WorkerSettings
from pgpark.errors import BadInputError, NotMigratedError, UnknownPoolError
from pgpark.executors import CommandExecutor, Executor, FunctionExecutor
from pgpark.heartbeat import Heartbeat
from tests import handlers
from tests.conftest import Database, wait_for


@contextlib.asynccontextmanager
async def working(dsn: str, executor: Executor, **settings: Any) -> AsyncIterator[Worker]:
    """A worker in this process, stopped on leaving."""
    worker = Worker(WorkerSettings(dsn=dsn, **{"pool": "gpu", "grace_secs": 5.0} | settings), executor)
    serving = asyncio.create_task(worker.serve())
    try:
        yield worker
    finally:
        if not serving.done():
            worker.stop()
        await serving


async def eventually(condition: Callable[[], Any], seconds: float = 60) -> Any:
    return await asyncio.to_thread(wait_for, condition, seconds)


def run_all(db: Database, executor: Executor, tasks: list[int], **settings: Any) -> list[Any]:
    """Works until these tasks have ended; returns their (status, reason, payload)."""

    def outcomes() -> list[Any]:
        return db.rows("select task_id, status, reason, payload from pgpark.mailbox where task_id = any (%s)", tasks)

    async def main() -> None:
        async with working(db.dsn, executor, **settings):
            await eventually(lambda: len(outcomes()) == len(tasks))

    asyncio.run(main())
    by_id = {row["task_id"]: (row["status"], row["reason"], row["payload"]) for row in outcomes()}
    return [by_id[task] for task in tasks]


def function(handler: Callable[..., Any]) -> FunctionExecutor:
    return FunctionExecutor(handler)


# -- handlers --------------------------------------------------------------------------------------------------------


def test_an_async_handlers_result_lands_in_the_mailbox(db: Database) -> None:
    db.pool()
    task = db.parked(payload={"x": [1, None, "é"]})
    assert run_all(db, function(handlers.echo), [task]) == [("completed", None, {"x": [1, None, "é"]})]


def test_a_plain_handler_runs_in_a_thread_of_its_own(db: Database) -> None:
    db.pool()
    task = db.parked(payload=5)
    ((_, _, payload),) = run_all(db, function(handlers.echo_in_thread), [task])
    assert payload == {"payload": 5, "thread": f"pgpark-task-{task}"}


def test_a_payload_is_validated_into_the_model_of_the_annotation(db: Database) -> None:
    db.pool()
    good, bad = db.parked(payload={"text": "a", "tokens": 3}, tenant="t"), db.parked(payload={"tokens": "x"})
    outcomes = run_all(db, function(handlers.typed), [good, bad])
    assert outcomes[0] == ("completed", None, {"text": "aaa", "tenant": "t"})
    assert outcomes[1][0] == "failed"
    assert outcomes[1][1].startswith("payload does not fit Prompt: text: Field required; tokens: ")


def test_an_exception_becomes_the_reason(db: Database) -> None:
    db.pool()
    task = db.parked(payload="that")
    assert run_all(db, function(handlers.fail), [task]) == [("failed", "ValueError: cannot do that", None)]


def test_sys_exit_in_a_handler_ends_the_task_and_not_the_worker(db: Database) -> None:
    db.pool()
    tasks = [db.parked(), db.parked()]
    assert [outcome[0] for outcome in run_all(db, function(handlers.leave), tasks)] == ["failed", "failed"]


@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        ("nan", "failed", "the result is not JSON: Out of range float values are not JSON compliant"),
        ("object", "failed", "the result is not JSON: Unable to serialize unknown type"),
        ("nul", "failed", "the result cannot be stored: "),
        ("surrogate", "failed", "the result "),
        ("time", "completed", None),
    ],
)
def test_a_result_that_cannot_be_stored_fails_its_task_alone(
    db: Database, kind: str, status: str, reason: str | None
) -> None:
    db.pool()
    bad, good = db.parked(payload=kind), db.parked(payload="time")
    outcomes = run_all(db, function(handlers.not_json), [bad, good])
    assert outcomes[0][0] == status
    assert str(outcomes[0][1]).startswith(str(reason))
    assert outcomes[1][0] == "completed"


def test_whatever_a_handler_raises_fails_its_task(db: Database) -> None:
    db.pool()
    task = db.parked()
    assert run_all(db, function(handlers.raise_base), [task]) == [("failed", "NotAnException: NotAnException", None)]


def test_a_long_reason_keeps_its_beginning_and_its_end(db: Database) -> None:
    db.pool()
    task = db.parked(payload="x" * 5000 + " the end")
    ((_, reason, _),) = run_all(db, function(handlers.fail), [task])
    assert reason.startswith("ValueError: cannot do xxx")
    assert reason.endswith("the end")
    assert len(reason) < 2100


@pytest.mark.parametrize("handler", ["fork", "fork_on_the_loop", "fork_and_await_what_is_under_way"])
def test_a_process_that_a_handler_has_forked_does_not_go_on_as_a_worker(
    db: Database, start: Callable[..., Process], handler: str
) -> None:
    db.pool()
    tasks = [db.parked() for _ in range(20)]
    worker = start("--handler", f"tests.handlers:{handler}")
    wait_for(lambda: db.stats()["completed"] == len(tasks))
    worker.signal()
    assert worker.exit_code() == 0
    assert {db.value("select payload from pgpark.park_result(%s)", task) for task in tasks} == {"parent"}
    assert {db.status(task)["attempt"] for task in tasks} == {1}
    assert worker.process.stderr is not None
    assert "came too late" not in worker.process.stderr.read()


def test_a_failed_task_is_retried(db: Database) -> None:
    db.pool(retry={"max_attempts": 3, "backoff_secs": 0})
    task = db.parked()
    assert run_all(db, function(handlers.fail), [task])[0][0] == "failed"
    assert db.status(task)["attempt"] == 3


@pytest.mark.parametrize(
    ("command", "status", "reason", "payload"),
    [
        ("cat", "completed", None, {"a": 1}),
        ("echo plain text", "completed", None, "plain text\n"),
        ("true", "completed", None, None),
        ("sh -c 'echo oh no >&2; exit 7'", "failed", "exit 7: oh no", None),
        ("false", "failed", "exit 1", None),
        ("sh -c 'echo $PGPARK_POOL $PGPARK_ATTEMPT'", "completed", None, "gpu 1\n"),
        ("printf '%s' '$(date); `date`'", "completed", None, "$(date); `date`"),
    ],
)
def test_a_command_gets_the_payload_and_gives_the_result(
    db: Database, command: str, status: str, reason: str | None, payload: Any
) -> None:
    db.pool()
    task = db.parked(payload={"a": 1})
    assert run_all(db, CommandExecutor(command), [task]) == [(status, reason, payload)]


def test_only_the_end_of_a_long_standard_error_is_kept(db: Database) -> None:
    db.pool()
    task = db.parked()
    command = f'{sys.executable} -c \'import sys; sys.exit("x" * 100000 + "the end")\''
    ((status, reason, _),) = run_all(db, CommandExecutor(command), [task])
    assert status == "failed"
    assert len(reason) <= 2100
    assert reason.endswith("the end")


@pytest.mark.parametrize("redirect", ["", ">/dev/null 2>&1"])
def test_processes_that_a_command_leaves_behind_end_with_it(db: Database, redirect: str) -> None:
    db.pool()
    marker = f"32{random.randrange(10**6)}"
    task = db.parked()
    outcome = run_all(db, CommandExecutor(f"sh -c 'sleep {marker} {redirect} & echo done'"), [task])
    assert outcome == [("completed", None, "done\n")]
    wait_for(lambda: not sleeping(marker), seconds=5)


def test_a_command_gets_of_the_environment_what_is_no_secret_or_was_named(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGPARK_DSN", "PGPASSWORD", "OPENAI_API_KEY", "NVIDIA_API_KEY", "DATABASE_URL"):
        monkeypatch.setenv(name, "secret")
    for name in ("CUDA_VISIBLE_DEVICES", "LC_ALL", "MODEL"):
        monkeypatch.setenv(name, "C")
    db.pool()
    ((_, _, output),) = run_all(db, CommandExecutor("env", ["MODEL"]), [db.parked()])
    assert "secret" not in output
    assert {"PGPARK_POOL=gpu", "CUDA_VISIBLE_DEVICES=C", "LC_ALL=C", "MODEL=C"} <= set(output.splitlines())


def test_a_variable_that_is_not_there_cannot_be_passed_on() -> None:
    with pytest.raises(BadInputError, match="--exec-env NO_SUCH: there is no such variable"):
        CommandExecutor("env", ["NO_SUCH"])


# -- waking up -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_500_tasks_submitted_at_random_moments_start_without_waiting_for_the_poll(db: Database, connect: Any) -> None:
    db.pool(max_units=8)
    submitter = connect()
    dice = random.Random(3)

    def submit_all() -> None:
        for _ in range(500):
            submitter.parked(units=dice.randint(1, 8), priority=dice.choice(["low", "high"]))
            time.sleep(dice.choice([0, 0, 0.002, 0.01]))

    async def main() -> None:
        async with (
            working(db.dsn, function(handlers.echo), poll_secs=600),
            working(db.dsn, function(handlers.echo), poll_secs=600),
        ):
            await asyncio.to_thread(submit_all)
            await eventually(lambda: db.stats()["completed"] == 500, seconds=60)

    asyncio.run(main())
    waits = db.rows("select extract(epoch from started_at - submitted_at)::float8 as secs from pgpark.mailbox")
    assert max(row["secs"] for row in waits) < 30, "a start that waited for the poll took ten minutes"


def test_an_idle_worker_starts_a_task_within_milliseconds(db: Database) -> None:
    """Measured by bench/latency.py; here only that no timer lies between (the poll is a minute)."""
    db.pool()
    waits: list[float] = []

    async def main() -> None:
        async with working(db.dsn, function(handlers.started_at), poll_secs=60):
            await eventually(lambda: db.stats()["workers"] == 1)
            for _ in range(30):
                await asyncio.sleep(0.03)
                submitted = datetime.now().timestamp()
                task = await asyncio.to_thread(db.parked)
                row = await eventually(lambda task=task: db.rows("select payload from pgpark.park_result(%s)", task))
                waits.append(datetime.fromisoformat(row[0]["payload"]).timestamp() - submitted)

    asyncio.run(main())
    assert statistics.median(waits) < 1


def test_a_delayed_task_starts_when_it_is_due(db: Database) -> None:
    db.pool()

    async def main() -> None:
        async with working(db.dsn, function(handlers.echo), poll_secs=600):
            await eventually(lambda: db.stats()["workers"] == 1)
            due = db.after(0.5)
            task = await asyncio.to_thread(db.parked, run_at=due)
            await eventually(lambda: db.rows("select from pgpark.park_result(%s)", task), seconds=10)
            assert db.value("select started_at - %s > '0'::interval from pgpark.mailbox", due)

    asyncio.run(main())


def test_a_deadline_passes_while_the_worker_is_full(db: Database) -> None:
    db.pool(max_units=1)
    db.parked(payload={"secs": 3})

    async def main() -> None:
        async with working(db.dsn, function(handlers.sleep), poll_secs=600):
            late = await asyncio.to_thread(db.parked, payload={"secs": 0}, deadline=db.after(0.3))
            await eventually(lambda: db.rows("select from pgpark.park_result(%s)", late), seconds=2)
            assert db.outcome(late) == ("expired", "deadline_expired")

    asyncio.run(main())


def test_polling_works_without_notifications(db: Database) -> None:
    db.pool()

    async def main() -> None:
        async with working(db.dsn, function(handlers.echo), listen=False, poll_secs=0.05):
            await eventually(lambda: db.stats()["workers"] == 1)
            task = await asyncio.to_thread(db.parked)
            await eventually(lambda: db.rows("select from pgpark.park_result(%s)", task))
            assert db.value("select count(*) from pg_stat_activity where query ilike 'listen%%'") == 0

    asyncio.run(main())


def test_units_and_concurrency_bound_what_a_worker_holds(db: Database) -> None:
    db.pool(max_units=100)
    for _ in range(6):
        db.parked(units=4, payload={"secs": 30})

    async def main() -> None:
        async with (
            working(db.dsn, function(handlers.sleep), units=10, name="small", grace_secs=0.0),
            working(db.dsn, function(handlers.sleep), concurrency=3, name="three", grace_secs=0.0),
        ):
            await eventually(lambda: db.stats()["running"] == 5)
            held = db.rows("select worker, count(*) from pgpark.task where state = 'running' group by 1 order by 1")
            assert [(row["worker"], row["count"]) for row in held] == [("small", 2), ("three", 3)]

    asyncio.run(main())


# -- leases and stopping ---------------------------------------------------------------------------------------------


def test_a_handler_that_blocks_the_event_loop_keeps_its_task(db: Database) -> None:
    db.pool(lease_secs=0.6)
    task = db.parked(payload={"secs": 2.5})
    assert run_all(db, function(handlers.block_the_loop), [task]) == [("completed", None, "done")]
    assert db.status(task)["attempt"] == 1


def test_a_cancelled_task_is_stopped_at_once(db: Database) -> None:
    db.pool(lease_secs=300)
    task = db.parked(payload={"secs": 60})

    async def main() -> None:
        async with working(db.dsn, function(handlers.sleep)):
            await eventually(lambda: db.status(task)["status"] == "running")
            assert await asyncio.to_thread(db.value, "select pgpark.park_cancel(%s, 'enough')", task) == "cancelling"
            await eventually(lambda: db.status(task)["status"] == "dropped", seconds=5)

    asyncio.run(main())
    assert db.outcome(task) == ("dropped", "enough")


def test_a_cancelled_command_is_killed_with_its_children(db: Database) -> None:
    db.pool(lease_secs=300)
    marker = f"31{random.randrange(10**6)}"
    task = db.parked()

    async def main() -> None:
        async with working(db.dsn, CommandExecutor(f"sh -c 'sleep {marker} & wait'")):
            await eventually(lambda: sleeping(marker))
            await asyncio.to_thread(db.value, "select pgpark.park_cancel(%s)", task)
            await eventually(lambda: db.status(task)["status"] == "dropped", seconds=10)
            await eventually(lambda: not sleeping(marker), seconds=5)

    asyncio.run(main())


def sleeping(marker: str) -> bool:
    return subprocess.run(["pgrep", "-f", f"^sleep {marker}$"], capture_output=True).returncode == 0


def test_a_plain_handler_can_ask_whether_to_stop(db: Database) -> None:
    db.pool()
    task = db.parked()

    async def main() -> None:
        async with working(db.dsn, function(handlers.wait_for_stop)):
            await eventually(lambda: db.status(task)["status"] == "running")
            await asyncio.to_thread(db.value, "select pgpark.park_cancel(%s)", task)
            await eventually(lambda: db.status(task)["finished_at"], seconds=5)

    asyncio.run(main())
    assert db.outcome(task)[0] == "completed", "it returned an answer, which is kept"


def test_a_task_past_its_run_timeout_is_stopped(db: Database) -> None:
    db.pool(run_timeout_secs=0.5, lease_secs=0.6)
    task = db.parked(payload={"secs": 60})
    assert run_all(db, function(handlers.sleep), [task]) == [("failed", "run_timeout", None)]


def test_an_outcome_is_written_after_the_connection_was_lost(db: Database) -> None:
    db.pool()
    task = db.parked(payload={"secs": 1})

    async def main() -> None:
        async with working(db.dsn, function(handlers.sleep)):
            await eventually(lambda: db.status(task)["status"] == "running")
            await asyncio.to_thread(cut_all, db)
            await eventually(lambda: db.status(task)["finished_at"], seconds=15)

    asyncio.run(main())
    assert db.outcome(task)[0] == "completed"
    assert db.status(task)["attempt"] == 1


def cut_all(db: Database) -> None:
    db.rows(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        " and pid <> pg_backend_pid()"
    )


def test_a_worker_that_lost_its_connection_listens_again(db: Database) -> None:
    db.pool()

    async def main() -> None:
        async with working(db.dsn, function(handlers.echo), poll_secs=600):
            await eventually(lambda: db.stats()["workers"] == 1)
            await asyncio.to_thread(cut_all, db)
            for _ in range(3):
                task = await asyncio.to_thread(db.parked)
                await eventually(lambda task=task: db.status(task)["finished_at"], seconds=15)

    asyncio.run(main())


def test_a_late_outcome_is_given_up_when_the_fence_says_so(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    db.pool()
    task = db.parked(payload={"secs": 1})

    async def main() -> None:
        async with working(db.dsn, function(handlers.sleep), name="slow", concurrency=1):
            await eventually(lambda: db.status(task)["status"] == "running")
            assert await asyncio.to_thread(db.value, "select pgpark.park_release(%s, 1)", task)
            assert await asyncio.to_thread(db.claimed, worker="other") == [task]
            await eventually(lambda: "its outcome came too late" in caplog.text)

    asyncio.run(main())
    assert db.status(task)["worker"] == "other"


def test_a_stop_for_an_earlier_attempt_does_not_hit_the_present_one(db: Database) -> None:
    db.pool()
    task = db.parked(payload={"secs": 0.5})

    async def main() -> None:
        async with working(db.dsn, function(handlers.sleep)) as worker:
            await eventually(lambda: db.status(task)["status"] == "running")
            worker._stop_attempts({task: 0})

    asyncio.run(main())
    assert db.outcome(task) == ("completed", None)


def test_a_heartbeat_that_cannot_reach_the_database_tries_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    beat = Heartbeat("host=127.0.0.1 port=1", "gpu", "w", held=dict, stop=lambda _: None, prepare=True)
    beat.start()
    wait_for(lambda: "heartbeat: cannot connect" in caplog.text)
    beat.poke()
    time.sleep(0.5)
    beat.end()
    assert len(caplog.records) <= 3


# -- as a process ----------------------------------------------------------------------------------------------------


class Process:
    """`pgpark worker gpu` with these options."""

    def __init__(self, dsn: str, *options: str, pool: str = "gpu") -> None:
        command = [sys.executable, "-m", "pgpark", "worker", pool, *options]
        self.process = subprocess.Popen(
            command, env=os.environ | {"PGPARK_DSN": dsn}, stderr=subprocess.PIPE, text=True
        )

    def signal(self, kind: int = signal.SIGTERM) -> None:
        self.process.send_signal(kind)

    def exit_code(self, seconds: float = 60) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def start(dsn: str) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*options: str, **kwargs: Any) -> Process:
        started.append(Process(dsn, *options, **kwargs))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_sigterm_lets_running_tasks_finish_and_claims_no_more(db: Database, start: Callable[..., Process]) -> None:
    db.pool(max_units=1)
    running, waiting = db.parked(payload={"secs": 1.5}), db.parked(payload={"secs": 0})
    worker = start("--handler", "tests.handlers:sleep", "--grace", "20")
    wait_for(lambda: db.status(running)["status"] == "running")
    worker.signal()
    assert worker.exit_code() == 0
    assert db.outcome(running) == ("completed", None)
    assert db.status(waiting)["status"] == "parked"


def test_after_the_grace_the_rest_is_released_to_its_old_place(db: Database, start: Callable[..., Process]) -> None:
    db.pool(max_units=1)
    running = db.parked(payload={"secs": 60})
    db.parked(payload={"secs": 0})
    worker = start("--handler", "tests.handlers:sleep", "--grace", "0.5")
    wait_for(lambda: db.status(running)["status"] == "running")
    worker.signal()
    assert worker.exit_code() == 0
    assert db.claimed() == [running], "before the one behind it"
    assert (db.status(running)["status"], db.status(running)["attempt"]) == ("running", 2)
    assert db.value("select failures + losses from pgpark.task where task_id = %s", running) == 0


@pytest.mark.parametrize("handler", ["sleep", "never_returns", "swallow_cancellation"])
def test_a_second_sigterm_releases_at_once(db: Database, start: Callable[..., Process], handler: str) -> None:
    db.pool()
    task = db.parked(payload={"secs": 600})
    worker = start("--handler", f"tests.handlers:{handler}", "--grace", "600")
    wait_for(lambda: db.status(task)["status"] == "running")
    worker.signal()
    worker.signal(signal.SIGINT)
    assert worker.exit_code() == 0
    assert db.status(task)["status"] == "parked"


def test_a_killed_worker_loses_its_tasks_to_another(db: Database, start: Callable[..., Process]) -> None:
    db.pool(lease_secs=1)
    task = db.parked(payload={"secs": 2})
    worker = start("--handler", "tests.handlers:sleep", "--name", "first")
    wait_for(lambda: db.status(task)["status"] == "running")
    worker.signal(signal.SIGKILL)
    start("--handler", "tests.handlers:sleep", "--name", "second")
    wait_for(lambda: db.status(task)["finished_at"])
    status = db.status(task)
    assert (status["status"], status["worker"], status["attempt"]) == ("completed", "second", 2)


def test_a_task_that_kills_its_workers_is_dropped(db: Database, start: Callable[..., Process]) -> None:
    db.pool(lease_secs=0.5, retry={"max_losses": 2})
    task = db.parked()
    for _ in range(2):
        assert start("--handler", "tests.handlers:kill_worker").exit_code() == -signal.SIGKILL
    wait_for(lambda: db.maintain() and db.status(task)["finished_at"])
    assert db.outcome(task) == ("dropped", "lost worker")


@pytest.mark.parametrize("handler", ["sleep", "swallow_cancellation"])
def test_a_worker_can_be_stopped_while_the_database_does_not_answer(
    db: Database, connect: Any, start: Callable[..., Process], handler: str
) -> None:
    db.pool()
    task = db.parked(payload={"secs": 600})
    worker = start("--handler", f"tests.handlers:{handler}", "--grace", "0")
    wait_for(lambda: db.status(task)["status"] == "running")
    stalled = connect()
    stalled.connection.execute("begin")
    stalled.connection.execute("lock table pgpark.task")
    worker.signal()
    assert worker.exit_code(30) == 0


def test_a_worker_ends_when_its_pool_is_dropped(db: Database, start: Callable[..., Process]) -> None:
    db.pool()
    worker = start("--handler", "tests.handlers:echo")
    wait_for(lambda: db.stats()["workers"] == 1)
    db.rows("select pgpark.park_drop_pool('gpu')")
    assert worker.exit_code() == 2
    assert worker.process.stderr is not None
    assert worker.process.stderr.read().splitlines()[-1].startswith("pgpark: unknown pool 'gpu'")


# -- bad input -------------------------------------------------------------------------------------------------------


async def serve(dsn: str, pool: str = "gpu") -> None:
    await Worker(WorkerSettings(dsn=dsn, pool=pool), function(handlers.echo)).serve()


def test_a_worker_for_an_unknown_pool_does_not_start(dsn: str) -> None:
    with pytest.raises(UnknownPoolError, match=r"unknown pool 'gpu'\. There are no pools yet"):
        asyncio.run(serve(dsn))


def test_a_worker_on_a_database_without_pgpark_says_what_to_run(empty_databases: Callable[[], str]) -> None:
    with pytest.raises(NotMigratedError, match="run: pgpark migrate"):
        asyncio.run(serve(empty_databases()))


def test_a_handler_with_the_wrong_arguments_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"must take \(payload\) or \(payload, context\)"):
        FunctionExecutor(handlers.takes_nothing)


@pytest.mark.parametrize(
    ("command", "message"), [("nonesuch --x", "there is no program 'nonesuch'"), ("'", "cannot be")]
)
def test_a_command_that_cannot_run_is_refused(command: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        CommandExecutor(command)
