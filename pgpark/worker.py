"""The worker: claims what fits, runs it, finishes in batches, and sleeps until there may be more.

Thin by design: what may start, what a failure means and who holds what is decided by the SQL functions. One coroutine
(`_conduct`) does all the talking; handlers run beside it and leave their outcomes for its next round.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import secrets
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import DictRow
from pydantic_core import to_jsonable_python

from pgpark import calls
from pgpark.database import connect, connect_async, require_migrated
from pgpark.errors import BadInputError, DatabaseError, NotMigratedError, PgparkError, one_line
from pgpark.executors import TASK_THREAD, Executor, HandlerError, TaskContext
from pgpark.flusher import Flusher
from pgpark.heartbeat import Heartbeat
from pgpark.models import Claimed, Finished
from pgpark.notifier import NotifierSettings, NotifierThread

log = logging.getLogger("pgpark.worker")

_FINISH_BATCH = 500
_LARGEST_RESULT = 100_000_000  # bytes; a jsonb value ends at 256 MiB
_REASON_KEPT = 2000
_SHORTEST_SLEEP_SECS = 0.05
_FIRST_RETRY_SECS, _LONGEST_RETRY_SECS = 0.1, 5.0
_UNWIND_SECS, _LAST_UNWIND_SECS = 1.5, 1.0
_GIVE_UP_SECS = 10.0


def default_name() -> str:
    """A worker name that no other worker has: host, process, and a few random letters."""
    return f"{socket.gethostname()[:100]}-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class WorkerSettings:
    """units: this worker's own capacity (None: only the pool's counts). concurrency: most tasks at once. listen: wait
    for notifications; else look every `poll_secs`. poll_secs: how often to look all the same. grace_secs: how long
    running tasks may go on after SIGTERM. notifier: deliver callbacks too, if the pool has a notifier."""

    dsn: str
    pool: str
    name: str = field(default_factory=default_name)
    units: int | None = None
    concurrency: int = 8
    listen: bool = True
    poll_secs: float = 30.0
    grace_secs: float = 30.0
    notifier: bool = True


@dataclass
class _Run:
    """A task in the hands of this worker, from its claim until its outcome is written."""

    context: TaskContext
    job: asyncio.Task[None] | None = None
    outcome: dict[str, Any] | None = None
    asked_to_stop: bool = False

    def final_outcome(self) -> dict[str, Any]:
        """The outcome, once the parts are written; a failure when they could not be: a reader would miss something."""
        outcome = self.outcome or {}
        if (refusal := self.context.parts.refusal) is not None and outcome.get("status") == "completed":
            return {name: outcome[name] for name in ("task_id", "attempt")} | _failed(refusal)
        return outcome


class Worker:
    """Works for one pool until it is asked to stop."""

    def __init__(self, settings: WorkerSettings, executor: Executor) -> None:
        self._settings = settings
        self._executor = executor
        self._runs: dict[int, _Run] = {}  # by task id; read by the heartbeat's thread too
        self._wake = asyncio.Event()
        self._flusher = Flusher(lambda: [run.context for run in self._runs.values()])
        self._stopping = False
        self._hurried = False
        self._given_up = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._main_pid = 0

    def run(self) -> bool:
        """Works until SIGTERM, SIGINT or SIGHUP; call from the main thread. Raises the errors of `serve`.

        Returns False when handlers that cannot be stopped are still at it: their tasks are released, so the process
        should end at once (`os._exit`) rather than wait for them.
        """
        loop = asyncio.new_event_loop()
        try:
            for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.add_signal_handler(kind, self.stop)
            loop.run_until_complete(self.serve())
        finally:
            clean = _wound_up(loop)
        return clean

    async def serve(self) -> None:
        """Works until `stop` is called.

        Raises BadInputError, UnknownPoolError, NotMigratedError or DatabaseError when it cannot start, and
        UnknownPoolError when the pool is dropped. A connection that is lost later is made again.
        """
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._check)
        settings = self._settings
        callbacks = NotifierThread(
            NotifierSettings(settings.dsn, settings.pool, listen=settings.listen, poll_secs=settings.poll_secs)
        )
        heartbeat = Heartbeat(
            self._settings.dsn,
            self._settings.pool,
            self._settings.name,
            held=lambda: {task_id: run.context.task.attempt for task_id, run in dict(self._runs).items()},
            stop=lambda attempts: _call_soon(loop, self._stop_attempts, attempts),
            prepare=self._settings.listen,
            told=callbacks.follow if settings.notifier else lambda _settings: None,
        )
        heartbeat.start()
        if self._settings.listen:
            self._spawn(self._listen(heartbeat))
        log.info("worker %s waits for tasks of pool %s", self._settings.name, self._settings.pool)
        conducting = asyncio.create_task(self._keep_conducting())
        given_up = asyncio.create_task(self._given_up.wait())
        try:
            await asyncio.wait({conducting, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if conducting.done():
                conducting.result()
            else:
                log.warning("the database does not answer; the leases of %d tasks will lapse", len(self._runs))
        finally:
            heartbeat.end()
            for run in self._runs.values():
                run.context.parts.discard()  # a plain handler may be waiting there
            await asyncio.to_thread(callbacks.end, _LAST_UNWIND_SECS if self._hurried else _GIVE_UP_SECS)
            for job in (conducting, given_up, *self._background, *(run.job for run in self._runs.values() if run.job)):
                job.cancel()
        log.info("worker %s has stopped", self._settings.name)

    def stop(self) -> None:
        """Claims no more and lets running tasks finish for `grace_secs`, then releases them. A second call: at once."""
        if self._stopping:
            self._hurry()
        else:
            self._stopping = True
            asyncio.get_running_loop().call_later(self._settings.grace_secs, self._hurry)
            log.info("stopping: %d running tasks have %g s", len(self._runs), self._settings.grace_secs)
        self._wake.set()

    def _check(self) -> None:
        """Raises what makes working impossible from the start."""
        settings = self._settings
        with contextlib.closing(connect(settings.dsn, prepare=settings.listen)) as connection:
            require_migrated(connection)
            calls.run_on(connection, calls.pools(settings.pool))
            calls.run_on(connection, calls.heartbeat(settings.pool, settings.name, []))

    # -- the talking ---------------------------------------------------------------------------------------------

    async def _keep_conducting(self) -> None:
        retry_secs = _FIRST_RETRY_SECS
        lost = False
        while True:
            try:
                connection = await connect_async(self._settings.dsn, prepare=self._settings.listen)
                async with connection:
                    if lost:
                        log.info("connected to the database again")
                    self._main_pid = connection.info.backend_pid
                    retry_secs = _FIRST_RETRY_SECS
                    flushing = asyncio.create_task(self._flusher.run(connection, lost=self._wake.set))
                    try:
                        await self._conduct(connection)
                    finally:
                        flushing.cancel()
                return
            except (BadInputError, NotMigratedError):
                raise
            except (PgparkError, psycopg.Error, OSError) as error:
                lost = True
                log.warning("lost the database, trying again: %s", one_line(error))
                if self._hurried:
                    return  # the leases lapse by themselves
            await asyncio.sleep(retry_secs * random.uniform(0.5, 1))
            retry_secs = min(retry_secs * 2, _LONGEST_RETRY_SECS)

    async def _conduct(self, connection: psycopg.AsyncConnection[DictRow]) -> None:
        """Rounds of: write outcomes, claim, sleep. Returns when the worker has stopped and everything is written."""
        while True:
            self._wake.clear()
            await self._write_outcomes(connection)
            if self._hurried:
                return await self._release_all(connection)
            if self._stopping:
                if not self._runs:
                    return None
                await self._wake.wait()
                continue
            await self._claim(connection)
            if not self._wake.is_set():
                await self._sleep(connection)

    async def _claim(self, connection: psycopg.AsyncConnection[DictRow]) -> None:
        while (slots := self._settings.concurrency - len(self._runs)) > 0:
            tasks = await calls.run_on_async(
                connection, calls.claim(self._settings.pool, self._settings.name, slots, self._settings.units)
            )
            for task in tasks:
                self._start(task)
            if len(tasks) < slots:
                return

    async def _sleep(self, connection: psycopg.AsyncConnection[DictRow]) -> None:
        """Until something may have changed: a notification, a handler that ended, a timer, the backstop."""
        timers = await calls.run_on_async(connection, calls.maintain(self._settings.pool))
        if timers.expired or timers.reclaimed or timers.promoted:
            return
        seconds = self._settings.poll_secs
        if timers.due_in_secs is not None:
            seconds = min(seconds, max(timers.due_in_secs, _SHORTEST_SLEEP_SECS))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    async def _write_outcomes(self, connection: psycopg.AsyncConnection[DictRow]) -> None:
        """Writes what is ready; a run stays in our hands until its outcome is written or fenced off."""
        while ended := [run for run in self._runs.values() if run.outcome is not None][:_FINISH_BATCH]:
            await self._flusher.flush(connection, [run.context for run in ended])
            ready = [run.final_outcome() for run in ended]
            try:
                written = await calls.run_on_async(connection, calls.finish_many(ready))
            except BadInputError:
                written = [row for outcome in ready for row in await self._write_alone(connection, outcome)]
            for row in written:
                self._runs.pop(row.task_id, None)
                if not row.accepted:
                    log.warning("task %d: its outcome came too late, the task was no longer ours", row.task_id)

    async def _write_alone(
        self, connection: psycopg.AsyncConnection[DictRow], outcome: dict[str, Any]
    ) -> list[Finished]:
        """One outcome at a time, after a batch was refused: what the database cannot store has failed."""
        try:
            return await calls.run_on_async(connection, calls.finish_many([outcome]))
        except BadInputError as error:
            refused = {
                "task_id": outcome["task_id"],
                "attempt": outcome["attempt"],
                "status": "failed",
                "reason": f"the result cannot be stored: {one_line(error)}"[:_REASON_KEPT],
            }
            return await calls.run_on_async(connection, calls.finish_many([refused]))

    async def _release_all(self, connection: psycopg.AsyncConnection[DictRow]) -> None:
        """Gives back what is still running, after a moment for handlers to unwind."""
        for patience in (_UNWIND_SECS, _LAST_UNWIND_SECS) if self._executor.stoppable else ():
            jobs = [run.job for run in self._runs.values() if run.job is not None and not run.job.done()]
            if jobs:
                await asyncio.wait(jobs, timeout=patience)
            for job in jobs:
                job.cancel()  # of one that is not done, for the second time: a command is killed now
        await self._write_outcomes(connection)
        for task_id, run in list(self._runs.items()):
            if run.outcome is not None:  # it ended meanwhile, and its answer is kept
                continue
            run.context.parts.discard()
            await calls.run_on_async(connection, calls.release(task_id, run.context.task.attempt))
            del self._runs[task_id]
            log.info("task %d: released", task_id)
        await self._write_outcomes(connection)

    async def _listen(self, heartbeat: Heartbeat) -> None:
        """Turns notifications into wake-ups. Those of our own connection say nothing new: after each statement that
        sends one, `_conduct` claims anyway."""
        channel = sql.Identifier(f"pgpark.pool.{self._settings.pool}")
        while True:
            try:
                connection = await connect_async(self._settings.dsn)
                async with connection:
                    await connection.execute(sql.SQL("listen {}").format(channel))
                    self._wake.set()  # something may have come while nobody listened
                    async for notice in connection.notifies():
                        if notice.payload == "cancel":
                            heartbeat.poke()
                        elif notice.pid != self._main_pid:
                            self._wake.set()
            except (DatabaseError, psycopg.Error, OSError) as error:
                log.warning("not listening, trying again: %s", one_line(error))
            await asyncio.sleep(_LONGEST_RETRY_SECS * random.uniform(0.1, 0.5))

    # -- the running ---------------------------------------------------------------------------------------------

    def _start(self, task: Claimed) -> None:
        if (earlier := self._runs.get(task.task_id)) is not None:  # lost while we were cut off, and ours again
            self._ask_to_stop(earlier)
            earlier.context.parts.discard()
        run = _Run(TaskContext(self._settings.pool, task, self._flusher.announcer()))
        self._runs[task.task_id] = run
        run.job = asyncio.create_task(self._do(run))

    async def _do(self, run: _Run) -> None:
        """Runs one task and leaves its outcome to be written."""
        task = run.context.task
        outcome: dict[str, Any] = {"task_id": task.task_id, "attempt": task.attempt, "status": "completed"}
        try:
            outcome["result"] = _jsonable(await self._executor.run(run.context))
        except asyncio.CancelledError:
            if self._hurried:
                return  # released, not failed
            # Without a reason the database gives its own: cancelled, or run_timeout.
            outcome |= {"status": "failed"} if run.asked_to_stop else _failed("CancelledError")
        except BaseException as error:  # SystemExit too, and whatever a library derives from BaseException
            outcome |= _failed(one_line(error) if isinstance(error, HandlerError) else _named(error))
            log.warning("task %d, attempt %d: %s", task.task_id, task.attempt, outcome["reason"])
            log.debug("task %d", task.task_id, exc_info=error)
        log.debug("task %d, attempt %d: %s", task.task_id, task.attempt, outcome["status"])
        run.context.parts.seal()
        run.outcome = outcome
        self._wake.set()

    def _stop_attempts(self, attempts: Mapping[int, int]) -> None:
        """Stops attempts, by task id, that were cancelled, ran out of time, or went to another worker."""
        for task_id, attempt in attempts.items():
            run = self._runs.get(task_id)
            if run is not None and run.context.task.attempt == attempt and run.outcome is None:
                if not run.asked_to_stop:
                    log.info("task %d: asked to stop", task_id)
                self._ask_to_stop(run)

    def _ask_to_stop(self, run: _Run) -> None:
        if run.asked_to_stop:
            return
        run.asked_to_stop = True
        run.context.ask_to_stop()
        if self._executor.stoppable and run.job is not None:
            run.job.cancel()

    def _hurry(self) -> None:
        if not self._hurried:
            asyncio.get_running_loop().call_later(_GIVE_UP_SECS, self._given_up.set)
        self._hurried = True
        for run in self._runs.values():
            if run.outcome is None:
                self._ask_to_stop(run)
        self._wake.set()

    def _spawn(self, coroutine: Any) -> None:
        job: asyncio.Task[None] = asyncio.create_task(coroutine)
        self._background.add(job)
        job.add_done_callback(self._ended)

    def _ended(self, job: asyncio.Task[None]) -> None:
        self._background.discard(job)
        if not job.cancelled() and (error := job.exception()) is not None:
            log.error("not listening any more, only looking every %g s: %s", self._settings.poll_secs, _named(error))


def _jsonable(value: Any) -> Any:
    """A result as plain JSON values; models, dataclasses, times and the like are converted."""
    try:
        plain = to_jsonable_python(value)
        size = len(json.dumps(plain, allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise HandlerError(f"the result is not JSON: {one_line(error)}") from error
    if size > _LARGEST_RESULT:
        raise HandlerError(f"the result is too large: {size} bytes as JSON, at most {_LARGEST_RESULT} can be stored")
    return plain


def _failed(reason: str) -> dict[str, str]:
    """A failure with this reason; of a long one the beginning and the end are kept."""
    clean = reason.encode("utf-8", "replace").decode().replace("\0", "")
    if len(clean) > _REASON_KEPT:
        clean = f"{clean[: _REASON_KEPT // 2]} [...] {clean[-_REASON_KEPT // 2 :]}"
    return {"status": "failed", "reason": clean}


def _wound_up(loop: asyncio.AbstractEventLoop) -> bool:
    """Ends what is left on a loop; False if something does not end."""
    pending = asyncio.all_tasks(loop)
    for job in pending:
        job.cancel()
    if pending:
        loop.run_until_complete(asyncio.wait(pending, timeout=_LAST_UNWIND_SECS))
    if any(not job.done() for job in pending) or any(t.name.startswith(TASK_THREAD) for t in threading.enumerate()):
        return False
    try:
        loop.run_until_complete(asyncio.wait_for(loop.shutdown_default_executor(), _LAST_UNWIND_SECS))
    except asyncio.TimeoutError:
        return False
    loop.close()
    return True


def _named(error: BaseException) -> str:
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Any, *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to stop
        loop.call_soon_threadsafe(callback, *arguments)
