"""What a database does for pgpark, measured in a minute: `pgpark bench`.

Everything happens in a pool of its own, which is removed afterwards with its queue and its outcomes, whatever ended
the run. A run that was killed leaves its pool behind; the next run removes it.
"""

from __future__ import annotations

import contextlib
import math
import queue
import random
import re
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import psycopg
from psycopg import sql
from psycopg.rows import DictRow

from pgpark import calls
from pgpark.client import Client
from pgpark.database import connect
from pgpark.errors import DatabaseError, UnknownPoolError, translated
from pgpark.models import Claimed, Row

T = TypeVar("T")
Connection = psycopg.Connection[DictRow]

PAYLOAD = {"data": "x" * 189}  # 200 bytes as text
RESULT = {"ok": True}
SETTINGS = ("fsync", "synchronous_commit")
_POOL = re.compile("pgpark_bench_[0-9a-f]{8}")
_LOCK = 1885826934  # the first half of an advisory lock
_BULK = 1_000  # tasks of one park_submit_many
_SAMPLES = 100  # of each latency
_WORK_SECS = 0.02  # how long the task of a sample runs, so that its client is waiting when it ends,
_TRIPS_TO_WAIT = 5  # and as many round trips on top
_STOP_SECS = 2.0
_LOST_SECS = 10.0  # a notification that has not come by then does not come


@dataclass(frozen=True)
class Plan:
    """What to measure with: `tasks` in all, `batch` of them a claim, so many worker connections, and at most `seconds`
    for each measurement. listen: False behind a pooler in transaction mode; then nothing is measured that waits."""

    tasks: int = 20_000
    batch: int = 100
    workers: int = 1
    seconds: float = 8.0
    listen: bool = True


class Measured(Row):
    """A measurement. `count` is of tasks, or of samples of a latency, which have no rate; the percentiles are of one
    call, or of the time that was waited."""

    measure: str
    count: int
    per_sec: float | None
    p50_ms: float
    p99_ms: float


class _Clock:
    """Times calls until there is no time left."""

    def __init__(self, seconds: float) -> None:
        self._began = time.perf_counter()
        self._until = self._began + seconds
        self._took: list[float] = []

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self._until

    def time(self, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        returned = call()
        self._took.append(time.perf_counter() - started)
        return returned

    def add(self, seconds: float) -> None:
        self._took.append(seconds)

    def measured(self, measure: str, tasks: int) -> Measured:
        """Of a rate."""
        return self._row(measure, tasks, tasks / (time.perf_counter() - self._began))

    def sampled(self, measure: str) -> Measured:
        """Of a latency."""
        return self._row(measure, len(self._took), None)

    def _row(self, measure: str, count: int, per_sec: float | None) -> Measured:
        ranked = sorted(self._took)
        p99 = ranked[math.ceil(len(ranked) * 0.99) - 1]
        return Measured(
            measure=measure, count=count, per_sec=per_sec, p50_ms=1000 * statistics.median(ranked), p99_ms=1000 * p99
        )


def measure(dsn: str, plan: Plan, tell: Callable[[str], None]) -> list[Measured]:
    """Measures the database of a DSN, which has pgpark, and returns a row for each thing measured.

    tell: gets a line about what is under way, and about what an earlier run left behind. Raises the errors of
    pgpark.errors, and psycopg.Error; the pool is removed all the same.
    """
    with contextlib.closing(connect(dsn, prepare=plan.listen)) as connection:
        _clear_away(connection, plan, tell)
        with _own_pool(dsn, connection, plan, tell) as pool:
            bench = _Bench(dsn, connection, pool, plan)
            measured = []
            for what, step in bench.steps():
                tell(f"{what} ...")
                measured += step()
            return measured


class _Bench:
    """The measurements, in the order of `steps`."""

    def __init__(self, dsn: str, connection: Connection, pool: str, plan: Plan) -> None:
        self._dsn = dsn
        self._connection = connection
        self._pool = pool
        self._plan = plan
        self._task = {"payload": PAYLOAD, "tenant": pool}
        self._round_trip = 0.0  # seconds

    def steps(self) -> Iterator[tuple[str, Callable[[], list[Measured]]]]:
        yield "one round trip", self.round_trips
        if self._plan.listen:
            yield "one notification", self.notifications
            yield "waking a worker, and a client", self.latencies
        yield "submitting one by one", self.submit_one_by_one
        yield "claiming and finishing one by one", self.one_at_a_time
        yield "submitting in bulk", self.submit_in_bulk
        yield "draining", self.drain

    def round_trips(self) -> list[Measured]:
        clock = _Clock(self._plan.seconds)
        for _ in _while(clock, _SAMPLES):
            clock.time(lambda: self._connection.execute("select 1").fetchone())
        measured = clock.sampled("select_1")
        self._round_trip = measured.p50_ms / 1000
        return [measured]

    def notifications(self) -> list[Measured]:
        """From the call of a bare NOTIFY, which is a transaction, until another connection has heard it."""
        clock = _Clock(self._plan.seconds)
        with contextlib.closing(_listening(self._dsn, self._pool)) as listener:
            for _ in _while(clock, _SAMPLES):
                _pause()
                started = time.perf_counter()
                self._connection.execute("select pg_notify(%s, '')", [self._pool])
                if not list(listener.notifies(timeout=_LOST_SECS, stop_after=1)):
                    raise DatabaseError(
                        "a notification did not arrive, as behind a pooler in transaction mode; measure with --poll"
                    )
                clock.add(time.perf_counter() - started)
        return [clock.sampled("notify")]

    def latencies(self) -> list[Measured]:
        """From the answer to submit until a waiting connection has claimed the task; from the answer to finish until a
        waiting client has the result."""
        claimed, answered = _Clock(self._plan.seconds), _Clock(self._plan.seconds)
        worker = _Waiter(self._pool, _WORK_SECS + _TRIPS_TO_WAIT * self._round_trip)
        with (
            Client(self._dsn) as client,
            contextlib.closing(_listening(self._dsn, f"pgpark.pool.{self._pool}")) as connection,
            _Aside(connection, worker.serve) as aside,
        ):
            for _ in _while(claimed, _SAMPLES):
                _pause()
                task = client.run(calls.submit(self._pool, PAYLOAD, tenant=self._pool)).task_id
                submitted = time.perf_counter()
                assert task is not None
                message = client.wait(task, timeout=_LOST_SECS)
                arrived = time.perf_counter()
                aside.check()
                if message is None:
                    raise DatabaseError(f"task {task} was submitted and has not ended {_LOST_SECS:g} s later")
                claimed_at, finished_at = worker.took.get(timeout=_LOST_SECS)  # its client may have been faster
                claimed.add(max(claimed_at - submitted, 0))
                answered.add(max(arrived - finished_at, 0))
        return [claimed.sampled("submit_to_claim"), answered.sampled("finish_to_client")]

    def submit_one_by_one(self) -> list[Measured]:
        clock = _Clock(self._plan.seconds)
        done = 0
        for _ in _while(clock, max(self._plan.tasks // 10, 1)):
            clock.time(lambda: self._run(calls.submit(self._pool, PAYLOAD, tenant=self._pool)))
            done += 1
        return [clock.measured("submit_one_by_one", done)]

    def one_at_a_time(self) -> list[Measured]:
        """What was submitted one by one, claimed and finished so too, on one connection."""
        clock = _Clock(self._plan.seconds)
        done = 0
        for _ in _while(clock, max(self._plan.tasks // 10, 1)):
            taken = clock.time(lambda: _work(self._connection, self._pool, "bench", 1))
            if not taken:  # it was faster than submitting
                break
            done += taken
        return [clock.measured("claim_and_finish_one_by_one", done)]

    def submit_in_bulk(self) -> list[Measured]:
        clock, done = _Clock(self._plan.seconds), 0
        while done < self._plan.tasks and not clock.over:
            tasks = [self._task] * min(_BULK, self._plan.tasks - done)
            call = calls.submit_many(self._pool, tasks)
            clock.time(partial(self._run, call))
            done += len(tasks)
        return [clock.measured("submit_in_bulk", done)]

    def drain(self) -> list[Measured]:
        """All that is parked, claimed and finished a batch at a time by the worker connections together."""
        done: list[int] = []
        with contextlib.ExitStack() as stack:
            connections = [
                stack.enter_context(contextlib.closing(connect(self._dsn, prepare=self._plan.listen)))
                for _ in range(self._plan.workers)
            ]
            clock = _Clock(self._plan.seconds)

            def drain(connection: Connection, stop: threading.Event) -> None:
                name = f"bench {connection.info.backend_pid}"
                while not stop.is_set() and not clock.over:
                    taken = clock.time(partial(_work, connection, self._pool, name, self._plan.batch))
                    if not taken:
                        return
                    done.append(taken)

            threads = [stack.enter_context(_Aside(connection, drain)) for connection in connections]
            for thread in threads:
                thread.join()
            measured = clock.measured("drain", sum(done))
        return [measured]

    def _run(self, call: calls.Call[T]) -> T:
        return calls.run_on(self._connection, call)


class _Aside:
    """Work on a connection in a thread, from entering to leaving; its error is raised by `join` and `check`."""

    def __init__(self, connection: Connection, work: Callable[[Connection, threading.Event], None]) -> None:
        self._connection = connection
        self._work = work
        self._stop = threading.Event()
        self._error: Exception | None = None
        # Thread.join tells that a living thread has ended once Ctrl-C has interrupted it (Python before 3.13).
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def join(self) -> None:
        """Waits until the work is done."""
        self._done.wait()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work(self._connection, self._stop)
        except Exception as error:
            self._error = error
        finally:
            self._done.set()

    def __enter__(self) -> _Aside:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while not self._done.wait(_STOP_SECS):  # in a statement that waits for somebody's lock
            self._connection.cancel()


class _Waiter:
    """A worker that waits for a task, claims it, and finishes it after so many seconds."""

    def __init__(self, pool: str, secs: float) -> None:
        self.took: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()  # when claim and finish were answered
        self._pool = pool
        self._secs = secs

    def serve(self, connection: Connection, stop: threading.Event) -> None:
        while not stop.is_set():
            if list(connection.notifies(timeout=0.2, stop_after=1)):  # a list: a loop would keep the connection busy
                self._take(connection, stop)

    def _take(self, connection: Connection, stop: threading.Event) -> None:
        for task in calls.run_on(connection, calls.claim(self._pool, "bench")):
            claimed = time.perf_counter()
            stop.wait(self._secs)
            calls.run_on(connection, calls.finish(task.task_id, task.attempt, result=RESULT))
            self.took.put((claimed, time.perf_counter()))


def _listening(dsn: str, channel: str) -> Connection:
    connection = connect(dsn)
    connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
    return connection


def _work(connection: Connection, pool: str, worker: str, batch: int) -> int:
    """Claims up to a batch and finishes it; returns how many tasks those were."""
    tasks = calls.run_on(connection, calls.claim(pool, worker, batch))
    if len(tasks) == 1:
        calls.run_on(connection, calls.finish(tasks[0].task_id, tasks[0].attempt, result=RESULT))
    elif tasks:
        calls.run_on(connection, calls.finish_many([_outcome(task) for task in tasks]))
    return len(tasks)


def _outcome(task: Claimed) -> dict[str, Any]:
    return {"task_id": task.task_id, "attempt": task.attempt, "result": RESULT}


def _while(clock: _Clock, most: int) -> Iterator[int]:
    """Counts from 1 while there is time; at least once."""
    for nth in range(1, most + 1):
        yield nth
        if clock.over:
            return


def _pause() -> None:
    """So that nothing falls into step with a timer of the server or of the network."""
    time.sleep(random.uniform(0.002, 0.01))


@contextlib.contextmanager
def _own_pool(dsn: str, connection: Connection, plan: Plan, tell: Callable[[str], None]) -> Iterator[str]:
    """A pool that exists for as long as it is used, and a lock that says so to other runs."""
    pool = f"pgpark_bench_{secrets.token_hex(4)}"
    try:
        connection.execute("select pg_advisory_lock_shared(%s, hashtext(%s))", [_LOCK, pool])
        calls.run_on(connection, calls.put_pool(pool, {"max_units": 1_000_000}))
        yield pool
    finally:
        tell("removing its pool ...")
        with contextlib.closing(connect(dsn, prepare=plan.listen)) as another:  # this one may be in a call
            _remove(another, pool)


def _clear_away(connection: Connection, plan: Plan, tell: Callable[[str], None]) -> None:
    """Removes the pools of runs that were killed; where a lock cannot tell which those are, it names them."""
    for pool in _left_behind(connection):
        if not plan.listen:
            tell(f"pool {pool} is of another run; if that was killed: pgpark pool drop {pool} --force")
            continue
        row = connection.execute("select pg_try_advisory_lock(%s, hashtext(%s)) as alone", [_LOCK, pool]).fetchone()
        if row is None or not row["alone"]:
            tell("another pgpark bench is under way in this database; the figures of both will suffer")
            continue
        try:
            _remove(connection, pool)
        finally:
            connection.execute("select pg_advisory_unlock(%s, hashtext(%s))", [_LOCK, pool])
        tell(f"removed pool {pool}, which a run that was killed left behind")


def _left_behind(connection: Connection) -> Sequence[str]:
    return [info.name for info in calls.run_on(connection, calls.pools()) if _POOL.fullmatch(info.name)]


def _remove(connection: Connection, pool: str) -> None:
    """Drops a pool and takes its outcomes out of the mailbox, in one transaction: all of it is gone, or none."""
    try:
        with connection.transaction(), contextlib.suppress(UnknownPoolError):
            with connection.transaction():
                calls.run_on(connection, calls.drop_pool(pool, force=True))
            connection.execute(
                "select pgpark.park_ack(array("
                "select message_id from pgpark.park_fetch(%s, max_messages => 2147483647)))",
                [pool],
            )
    except psycopg.Error as error:
        raise translated(error) from error
