"""The process of a handler: started by processes.py, which has the other end of the socket. Loads the handler once and
runs the tasks that it is handed, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
from typing import Any

from pgpark import logs, telemetry
from pgpark.errors import BadInputError, one_line
from pgpark.executors import FunctionExecutor, HandlerError, TaskContext, load_handler
from pgpark.frames import (
    BROKEN,
    CANCELLED,
    FAILURE,
    HEADER,
    NO_MORE,
    PART,
    READY,
    RESULT,
    STOP,
    TASK,
    frame,
    framed,
)
from pgpark.hands import named, result_json, shortened
from pgpark.loops import end_with_forks
from pgpark.models import ClaimedRow, PartKind
from pgpark.parts import PartBuffer, checked

log = logging.getLogger("pgpark.worker")

_PR_SET_PDEATHSIG = 1


class _Line:
    """Our end of the socket: any thread may say something, one hears. Nothing that the handler starts has it, so that
    the worker sees when this process is gone."""

    def __init__(self, end: socket.socket) -> None:
        end.set_inheritable(False)
        self._end = end
        self._saying = threading.Lock()
        self._task = 0  # counted
        os.register_at_fork(after_in_child=end.close)

    def begin(self) -> int:
        """A task begins; returns its number."""
        with self._saying:
            self._task += 1
            return self._task

    def say(self, frame: bytes, task: int | None = None) -> None:
        """task: the number of the one that it belongs to; nothing is said once that has ended."""
        with self._saying:
            if task in (None, self._task):
                self._end.sendall(frame)

    def say_last(self, frame: bytes) -> None:
        """The outcome of a task, after which nothing of it may be said."""
        with self._saying:
            self._task += 1
            self._end.sendall(frame)

    def hear(self) -> tuple[bytes, Any]:
        """The next frame. Where there is none the worker has gone: ends the process, and what it has started."""
        kind, size = HEADER.unpack(self._read(HEADER.size))
        return kind, json.loads(self._read(size))

    def _read(self, size: int) -> bytes:
        read = bytearray()
        while len(read) < size:
            try:
                more = self._end.recv(size - len(read))
            except OSError:
                more = b""
            if not more:
                os.killpg(0, signal.SIGKILL)
            read += more
        return bytes(read)


class _Outbox(PartBuffer):
    """Of one task: hands each part to the worker at once, which keeps and bounds them. While it does not read, putting
    waits. Does nothing once the task has ended."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line
        self._task = line.begin()
        self.closed_for: str | None = None  # why the worker takes no more

    def put(self, kind: PartKind, content: Any) -> None:
        part = checked(kind, content)
        if self.closed_for is not None:
            raise BadInputError(self.closed_for)
        self._line.say(frame(PART, [kind, part.content]), self._task)


class _Child:
    """Runs tasks on the event loop of this process, while a thread listens to the worker."""

    def __init__(self, line: _Line, executor: FunctionExecutor) -> None:
        self._line = line
        self._executor = executor
        self._loop = asyncio.new_event_loop()
        self._context: TaskContext | None = None
        self._outbox: _Outbox | None = None
        self._job: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Never returns."""
        end_with_forks(self._loop)
        threading.Thread(target=self._listen, name="pgpark-worker", daemon=True).start()
        self._loop.run_forever()

    def _listen(self) -> None:
        try:
            while True:
                self._heed(*self._line.hear())
        finally:  # whatever it is, nobody would hear the worker any more
            os._exit(1)

    def _heed(self, kind: bytes, said: Any) -> None:
        if kind == NO_MORE and self._outbox is not None:
            self._outbox.closed_for = said
        elif kind == STOP:
            if self._context is not None:
                self._context.ask_to_stop()  # also while a handler blocks the loop
            self._loop.call_soon_threadsafe(self._stop)
        elif kind == TASK:
            self._outbox = _Outbox(self._line)
            self._context = TaskContext(said["pool"], ClaimedRow(**said["task"]), self._outbox)
            self._loop.call_soon_threadsafe(self._start, self._context, said["trace"])

    def _start(self, context: TaskContext, trace: telemetry.Carrier) -> None:
        self._job = self._loop.create_task(self._do(context, trace))

    def _stop(self) -> None:
        if self._executor.stoppable and self._job is not None:
            self._job.cancel()

    async def _do(self, context: TaskContext, trace: telemetry.Carrier) -> None:
        logs.about_task(context.task_id, context.attempt, context.pool)
        try:
            with telemetry.attached(trace):
                said = framed(RESULT, result_json(await self._executor.run(context)))
        except asyncio.CancelledError:
            said = frame(CANCELLED)
        except BaseException as error:  # SystemExit too, and whatever a library derives from BaseException
            said = frame(FAILURE, shortened(one_line(error) if isinstance(error, HandlerError) else named(error)))
            log.debug("task %d", context.task_id, exc_info=error)
        try:
            self._line.say_last(said)
        except OSError:  # the worker has gone, or the handler has closed what is not its own
            os._exit(1)
        if trace:  # this process may be killed at any time now
            await asyncio.to_thread(telemetry.flush)


def main() -> None:
    """Arguments: a descriptor, how to log, the process id of the worker, MODULE:FUNCTION."""
    descriptor, logging_, worker, path = sys.argv[1:]
    _end_with(int(worker))
    _leave_signals_to_the_worker()
    logs.start_like(logging_)
    line = _Line(socket.socket(fileno=int(descriptor)))
    try:
        telemetry.configure()
        executor = FunctionExecutor(load_handler(path))
    except BadInputError as error:
        line.say(frame(BROKEN, one_line(error)))
        return
    line.say(frame(READY))
    _Child(line, executor).run()


def _end_with(worker: int) -> None:
    """On Linux, has the kernel kill this process when the worker is gone, even while a handler holds the interpreter.
    Elsewhere the end of the socket says so, once a thread can run."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != worker:
            os._exit(1)


def _leave_signals_to_the_worker() -> None:
    """A signal to all processes of a service is the worker's to heed: it gives handlers their grace."""
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def reset() -> None:  # what the handler forks can be ended as usual
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)

    for kind in kinds:
        signal.signal(kind, lambda *_: None)  # not SIG_IGN, which programs that it starts would inherit
    os.register_at_fork(after_in_child=reset)
