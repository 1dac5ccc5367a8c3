"""The worker: claims what fits, runs it, finishes in batches, and sleeps until there may be more.

Thin by design: what may start, what a failure means and who holds what is decided by the SQL functions. Two coroutines
do the talking, each on a connection of its own (a lane, lane.py); handlers run beside them and leave their outcomes
for the next round. A round writes what has ended and claims as much anew, in one transaction. The first lane does
rounds and nothing else, so it is free when a task comes. The second looks after the timers and the parts of tasks; of
a worker with many tasks at once it also does rounds while the first is busy, so that server and Python overlap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg

from pgpark import calls, logs, silence, telemetry
from pgpark.bell import FIRST, SECOND, Bell
from pgpark.clock import Clock
from pgpark.database import connect, connect_async, require_migrated
from pgpark.errors import BadInputError, DatabaseError, NotMigratedError, PgparkError, one_line
from pgpark.executors import Executor, HandlerError, NotLoadedError, TaskContext
from pgpark.flusher import Flusher
from pgpark.hands import Hands, Run, named, result_json, shortened
from pgpark.heartbeat import Heartbeat
from pgpark.lane import Lane
from pgpark.listener import listen
from pgpark.loops import call_soon, end_with_forks, wound_up
from pgpark.measures import WorkerMeasures
from pgpark.models import ClaimedRow
from pgpark.notifier import NotifierSettings, NotifierThread
from pgpark.parts import PartBuffer

log = logging.getLogger("pgpark.worker")

_FINISH_BATCH = 500
_OVERLAP_FROM = 16  # tasks at once from which on two rounds at a time pay
_FIRST_RETRY_SECS, _LONGEST_RETRY_SECS = 0.1, 5.0
_UNWIND_SECS, _LAST_UNWIND_SECS = 1.5, 1.0
_GIVE_UP_SECS = 10.0

Job = asyncio.Task[None]


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


class Worker:
    """Works for one pool until it is asked to stop."""

    def __init__(self, settings: WorkerSettings, executor: Executor) -> None:
        self._settings = settings
        self._executor = executor
        self._hands = Hands(settings.concurrency)
        self.measures = WorkerMeasures()
        self._flusher = Flusher(lambda: [run.context for run in self._hands.runs()])
        self._overlapping = settings.concurrency >= _OVERLAP_FROM
        self._share = min(_FINISH_BATCH, -(-settings.concurrency // (2 if self._overlapping else 1)))
        self._bell = Bell(second_helps=self._overlapping)
        self._hungry = True  # there may be tasks to claim
        self._rounds = 0  # under way
        self._clock = Clock(settings.poll_secs)
        self._stopping = False
        self._hurried = False
        self._begun = False  # the database was there, and had the pool
        self._over = False  # the first lane has ended
        self._given_up = asyncio.Event()
        self._useless: NotLoadedError | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._pids: dict[int, int] = {}  # of the server, by lane
        self._traced: telemetry.Attempts | None = None

    @property
    def pool(self) -> str:
        """The pool that it works for."""
        return self._settings.pool

    @property
    def concurrency(self) -> int:
        """How many tasks it takes at once, at most."""
        return self._settings.concurrency

    @property
    def begun(self) -> bool:
        """Whether it found all that it needs to work, which it looks for once."""
        return self._begun

    def held(self) -> list[int]:
        """The units of each task in its hands. May be called from any thread."""
        return [run.context.units for run in self._hands.runs()]

    def run(self) -> bool:
        """Works until SIGTERM, SIGINT or SIGHUP; call from the main thread. Raises the errors of `serve`.

        Returns False when handlers that cannot be stopped are still at it: their tasks are released, so the process
        should end at once (`os._exit`) rather than wait for them.
        """
        loop = asyncio.new_event_loop()
        end_with_forks(loop)
        try:
            for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.add_signal_handler(kind, self.stop)
            loop.run_until_complete(self.serve())
        finally:
            clean = wound_up(loop)
        return clean

    async def serve(self) -> None:
        """Works until `stop` is called.

        Raises BadInputError, UnknownPoolError, NotMigratedError or DatabaseError when it cannot start,
        UnknownPoolError when the pool is dropped, and BadInputError when the handler cannot be loaded any more, after
        what still ran has ended. A connection that is lost later is made again.
        """
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._check)
        self._begun = True
        settings = self._settings
        self._traced = telemetry.attempts(settings.pool, settings.name)
        callbacks = NotifierThread(
            NotifierSettings(settings.dsn, settings.pool, listen=settings.listen, poll_secs=settings.poll_secs),
            self.measures.callback,
        )
        heartbeat = Heartbeat(
            settings.dsn,
            settings.pool,
            settings.name,
            held=self._hands.attempts,
            stop=lambda attempts: call_soon(loop, self._stop_attempts, attempts),
            prepare=settings.listen,
            told=callbacks.follow if settings.notifier else lambda _settings: None,
            beat=self.measures.beat,
        )
        heartbeat.start()
        if settings.listen:
            self._spawn(self._listen(heartbeat))
        log.info("worker %s waits for tasks of pool %s", settings.name, settings.pool)
        conducting = asyncio.create_task(self._keep(FIRST, self._conduct))
        assisting = asyncio.create_task(self._keep(SECOND, self._assist))
        given_up = asyncio.create_task(self._given_up.wait())
        try:
            await self._until_over(conducting, assisting, given_up)
            if self._useless is not None:
                raise BadInputError(str(self._useless))
        finally:
            heartbeat.end()
            runs = self._hands.runs()
            for run in runs:
                run.context.parts.discard()  # a plain handler may be waiting there
            await asyncio.to_thread(callbacks.end, _LAST_UNWIND_SECS if self._hurried else _GIVE_UP_SECS)
            self._over = True
            self._bell.wake_all()
            await asyncio.wait({assisting}, timeout=_LAST_UNWIND_SECS)  # a statement may be under way
            if assisting.done() and not assisting.cancelled():
                assisting.exception()  # what happens to it now is no matter any more
            jobs = [run.job for run in runs if run.job is not None]
            for job in (conducting, assisting, given_up, *self._background, *jobs):
                job.cancel()
        log.info("worker %s has stopped", settings.name)

    async def _until_over(self, conducting: Job, assisting: Job, given_up: asyncio.Task[Any]) -> None:
        waiting: set[asyncio.Task[Any]] = {conducting, assisting, given_up}
        while not conducting.done() and not given_up.done():
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if assisting.done():
                waiting.discard(assisting)
                assisting.result()  # raises what ends the worker
        if conducting.done():
            conducting.result()
        else:
            log.warning("the database does not answer; the leases of %d tasks will lapse", len(self._hands))

    def stop(self) -> None:
        """Claims no more and lets running tasks finish for `grace_secs`, then releases them. A second call: at once."""
        if self._stopping:
            self._hurry()
        else:
            self._stopping = True
            asyncio.get_running_loop().call_later(self._settings.grace_secs, self._hurry)
            log.info("stopping: %d running tasks have %g s", len(self._hands), self._settings.grace_secs)
        self._bell.wake_all()

    def _check(self) -> None:
        """Raises what makes working impossible from the start."""
        settings = self._settings
        with contextlib.closing(connect(settings.dsn, prepare=settings.listen)) as connection:
            require_migrated(connection)
            calls.run_on(connection, calls.pools(settings.pool))
            calls.run_on(connection, calls.heartbeat(settings.pool, settings.name, []))

    # -- the talking ---------------------------------------------------------------------------------------------

    async def _keep(self, place: int, talk: Callable[[Lane], Coroutine[Any, Any, None]]) -> None:
        """Talks over a lane, and over another one when that is lost."""
        settings = self._settings
        patience = silence.longest(settings.dsn)
        retry_secs = _FIRST_RETRY_SECS
        lost = False
        while True:
            try:
                connection = await connect_async(settings.dsn, prepare=settings.listen)
                async with connection:
                    if lost:
                        log.info("connected to the database again")
                    if patience is not None and settings.listen:
                        await silence.bound_server_async(connection, patience)
                    lane = Lane(connection, settings.pool, settings.name, settings.units, patience)
                    self._pids[place] = lane.pid
                    self.measures.lanes.add(place)
                    retry_secs = _FIRST_RETRY_SECS
                    await talk(lane)
                return
            except (BadInputError, NotMigratedError):
                raise
            except (PgparkError, psycopg.Error, OSError) as error:
                lost = True
                self.measures.reconnects += 1
                log.warning("lost the database, trying again: %s", one_line(error))
                if self._hurried:
                    return  # the leases lapse by themselves
            finally:
                self.measures.lanes.discard(place)
            await asyncio.sleep(retry_secs * random.uniform(0.5, 1))
            retry_secs = min(retry_secs * 2, _LONGEST_RETRY_SECS)

    async def _conduct(self, lane: Lane) -> None:
        """The first lane: rounds. Returns when the worker has stopped and everything is written."""
        self._hungry = True
        while True:
            if self._hurried and not self._rounds:
                return await self._release_all(lane)
            if not self._hurried and self._may_do_round():
                await self._round(lane)
            elif self._stopping and not self._rounds and not self._hands.any_at_work():
                return await self._release_all(lane)
            else:
                await self._bell.sleep(FIRST)

    async def _assist(self, lane: Lane) -> None:
        """The second lane: the timers, the parts of running tasks, and rounds while the first lane is busy."""
        self._clock.look_by(0)
        flushing = asyncio.create_task(self._flusher.run(lane, lost=lambda: self._bell.wake(SECOND)))
        try:
            while True:
                if lane.lost:
                    raise DatabaseError("the connection is closed")
                if self._over:
                    return
                if self._stopping:
                    await self._bell.sleep(SECOND)
                elif self._overlapping and self._may_do_round():
                    await self._round(lane)
                elif self._clock.time_to_look():
                    await self._look(lane)
                else:
                    await self._bell.sleep(SECOND, until=self._clock.look_at)
        finally:
            flushing.cancel()

    async def _look(self, lane: Lane) -> None:
        """Does what the timers have made due."""
        if self._clock.overslept():
            self._look_for_tasks()
        self._clock.looking()
        timers = await lane.run(calls.maintain(self._settings.pool))
        any_due = bool(timers.expired or timers.reclaimed or timers.promoted)
        self._clock.looked(0 if any_due else timers.due_in_secs)
        if any_due:
            self._look_for_tasks()

    def _may_do_round(self) -> bool:
        return self._hands.any_ended or (self._hungry and not self._stopping and self._hands.free() > 0)

    async def _round(self, lane: Lane) -> None:
        """Writes what has ended and claims as much anew. A run stays in our hands until its outcome is written."""
        writing = self._hands.take_ended(self._share)
        slots = 0 if self._stopping else max(self._hands.free(), 0)
        if slots:
            self._hungry = False  # what is heard from here on comes after this claim
        self._hands.ask_for(slots)
        self._rounds += 1
        if self._may_do_round():
            self._bell.ring()
        try:
            if with_parts := [run.context for run in writing if run.context.parts.holds]:
                await self._flusher.flush(lane, with_parts)
            claimed = await self._exchange(lane, writing, slots)
            traces = await self._traced.traces(lane, claimed) if self._traced and claimed else {}
            for row in claimed:
                self._start(row, traces.get(row.task_id, {}))
            if len(claimed) == slots:  # there may be more; and where none were claimed, units may be free now
                self._hungry = True
            if writing or claimed:
                self._changed()
        except BaseException:
            self._hungry = True
            raise
        finally:
            self._hands.ask_for(-slots)
            self._hands.give_back(writing)
            self._rounds -= 1
            if self._stopping or self._may_do_round():
                self._bell.ring()

    async def _exchange(self, lane: Lane, writing: list[Run], slots: int) -> list[ClaimedRow]:
        """Outcomes for tasks: together where that is possible."""
        if writing and slots:
            outcomes = [run.final_outcome() for run in writing]
            if (answer := await lane.finish_and_claim(outcomes, slots)) is not None:
                fenced, claimed = answer
                self._settle(writing, [(run.task_id, run.attempt) not in fenced for run in writing])
                return claimed
        if writing:
            await self._write(lane, writing)
        return await lane.claim(slots) if slots else []

    async def _write(self, lane: Lane, writing: list[Run]) -> None:
        """Writes outcomes; where one is refused, each alone: what the database cannot store has failed."""
        try:
            self._settle(writing, await lane.finish([run.final_outcome() for run in writing]))
        except BadInputError as error:
            if len(writing) > 1:
                for run in writing:
                    await self._write(lane, [run])
                return
            (run,) = writing
            run.fail(shortened(f"the result cannot be stored: {one_line(error)}"))
            self._settle(writing, await lane.finish([run.final_outcome()]))

    def _settle(self, written: list[Run], accepted: list[bool]) -> None:
        for run, ours in zip(written, accepted, strict=True):
            self._hands.let_go(run)
            if ours:
                self.measures.outcomes["completed" if run.completed else "failed"] += 1
            else:
                self.measures.fenced += 1
                text = "task %d: its outcome came too late, the task was no longer ours"
                log.warning(text, run.task_id, extra=logs.fields(run.task_id, run.attempt))

    async def _release_all(self, lane: Lane) -> None:
        """Gives back what is still running, after a moment for handlers to unwind."""
        for patience in (_UNWIND_SECS, _LAST_UNWIND_SECS) if self._executor.stoppable else ():
            jobs = [run.job for run in self._hands.runs() if run.job is not None and not run.job.done()]
            if jobs:
                await asyncio.wait(jobs, timeout=patience)
            for job in jobs:
                job.cancel()  # of one that is not done, for the second time: a command is killed now
        await self._write_rest(lane)
        for run in self._hands.runs():
            if run.outcome is not None:  # it ended meanwhile, and its answer is kept
                continue
            run.context.parts.discard()
            await lane.run(calls.release(run.task_id, run.attempt))
            self._hands.let_go(run)
            self.measures.outcomes["released"] += 1
            log.info("task %d: released", run.task_id, extra=logs.fields(run.task_id, run.attempt))
        await self._write_rest(lane)

    async def _write_rest(self, lane: Lane) -> None:
        while self._hands.any_ended:
            await self._round(lane)

    async def _listen(self, heartbeat: Heartbeat) -> None:
        """Turns notifications into wake-ups. Those of our own lanes say nothing new: a round that sends one claims
        anyway, or leaves the worker hungry."""

        def began() -> None:
            heartbeat.poke()
            self._look_for_tasks()

        def heard(message: str, pid: int) -> None:
            if message == "cancel":
                heartbeat.poke()
            elif pid not in self._pids.values():
                self._look_for_tasks()
                self._changed()

        await listen(self._settings.dsn, self._settings.pool, began, heard)

    def _look_for_tasks(self) -> None:
        """There may be tasks to claim."""
        self._hungry = True
        if self._may_do_round():
            self._bell.ring()

    def _changed(self) -> None:
        """Timers may be due at other times now."""
        if self._clock.changed():
            self._bell.wake(SECOND)

    # -- the running ---------------------------------------------------------------------------------------------

    def _start(self, row: ClaimedRow, trace: telemetry.Carrier) -> None:
        if (earlier := self._hands.get(row.task_id)) is not None:  # lost while we were cut off, and ours again
            self._ask_to_stop(earlier)
            earlier.context.parts.discard()
        run = Run(row.task_id, row.attempt, TaskContext(self._settings.pool, row, PartBuffer(self._flusher.announce)))
        self._hands.hold(run)
        self.measures.claimed += 1
        run.job = asyncio.create_task(self._do(run, row, trace))

    async def _do(self, run: Run, row: ClaimedRow, trace: telemetry.Carrier) -> None:
        """Runs one task, and says in logs and traces that it does."""
        logs.about_task(run.task_id, run.attempt, self._settings.pool)
        with self._traced.span(run, row, trace) if self._traced else contextlib.nullcontext():
            await self._attempt(run)

    async def _attempt(self, run: Run) -> None:
        """Runs one task and leaves its outcome to be written."""
        began = time.perf_counter()
        try:
            run.complete(result_json(await self._executor.run(run.context)))
        except asyncio.CancelledError:
            if self._hurried:
                return  # released, not failed
            run.fail(None if run.asked_to_stop else "CancelledError")
        except NotLoadedError as error:
            self._resign(error)
            return  # released
        except BaseException as error:  # SystemExit too, and whatever a library derives from BaseException
            reason = shortened(one_line(error) if isinstance(error, HandlerError) else named(error))
            run.fail(reason)
            if self._traced:
                self._traced.failed(error)
            log.warning("task %d, attempt %d: %s", run.task_id, run.attempt, reason)
            log.debug("task %d", run.task_id, exc_info=error)
        finally:
            self.measures.ran(time.perf_counter() - began)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("task %d, attempt %d: %s", run.task_id, run.attempt, "completed" if run.completed else "failed")
        run.context.parts.seal()
        if self._hands.ended(run):
            self._bell.ring()

    def _resign(self, error: NotLoadedError) -> None:
        """Stops: whoever cannot do any task must not go on claiming them."""
        if self._useless is None:
            self._useless = error
            log.critical("%s; no use to go on", error)
        if not self._stopping:
            self.stop()
        self._bell.wake_all()

    def _stop_attempts(self, attempts: Mapping[int, int]) -> None:
        """Stops attempts, by task id, that were cancelled, ran out of time, or went to another worker."""
        for run in self._hands.without_outcome(attempts):
            if not run.asked_to_stop:
                log.info("task %d: asked to stop", run.task_id, extra=logs.fields(run.task_id, run.attempt))
                self.measures.stops += 1
            self._ask_to_stop(run)

    def _ask_to_stop(self, run: Run) -> None:
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
        for run in self._hands.runs():
            if run.outcome is None:
                self._ask_to_stop(run)
        self._bell.wake_all()

    def _spawn(self, coroutine: Any) -> None:
        job: Job = asyncio.create_task(coroutine)
        self._background.add(job)
        job.add_done_callback(self._ended)

    def _ended(self, job: Job) -> None:
        self._background.discard(job)
        if not job.cancelled() and (error := job.exception()) is not None:
            log.error("not listening any more, only looking every %g s: %s", self._settings.poll_secs, named(error))
