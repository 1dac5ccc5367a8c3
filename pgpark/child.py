"""The process of a handler, `python -m pgpark.child FD LOG_LEVEL MODULE:FUNCTION`: started by processes.py, which has
the other end of the socket. Loads the handler once and runs the tasks that it is handed, one at a time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from typing import Any

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
from pgpark.logs import start_logging
from pgpark.models import Claimed, PartKind
from pgpark.parts import PartBuffer, checked


class _Line:
    """Our end of the socket: any thread may say something, one hears. A process that the handler forks has none, so
    that the worker sees when this one is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._saying = threading.Lock()
        os.register_at_fork(after_in_child=end.close)

    def say(self, frame: bytes) -> None:
        with self._saying:
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
    waits."""

    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line
        self.closed_for: str | None = None  # why the worker takes no more

    def put(self, kind: PartKind, content: Any) -> None:
        part = checked(kind, content)
        if self.closed_for is not None:
            raise BadInputError(self.closed_for)
        self._line.say(frame(PART, [kind, part.content]))


class _Child:
    """Runs tasks on the event loop of this process, while a thread listens to the worker."""

    def __init__(self, line: _Line, executor: FunctionExecutor) -> None:
        self._line = line
        self._executor = executor
        self._loop = asyncio.new_event_loop()
        self._outbox = _Outbox(line)
        self._context: TaskContext | None = None
        self._job: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Never returns."""
        threading.Thread(target=self._listen, name="pgpark-worker", daemon=True).start()
        self._loop.run_forever()

    def _listen(self) -> None:
        while True:
            kind, said = self._line.hear()
            if kind == NO_MORE:
                self._outbox.closed_for = said
            elif kind == STOP:
                if self._context is not None:
                    self._context.ask_to_stop()  # also while a handler blocks the loop
                self._loop.call_soon_threadsafe(self._stop)
            elif kind == TASK:
                self._outbox = _Outbox(self._line)
                self._context = TaskContext(said["pool"], Claimed.model_validate(said["task"]), parts=self._outbox)
                self._loop.call_soon_threadsafe(self._start, self._context)

    def _start(self, context: TaskContext) -> None:
        self._job = self._loop.create_task(self._do(context))

    def _stop(self) -> None:
        if self._executor.stoppable and self._job is not None:
            self._job.cancel()

    async def _do(self, context: TaskContext) -> None:
        try:
            said = framed(RESULT, result_json(await self._executor.run(context)))
        except asyncio.CancelledError:
            said = frame(CANCELLED)
        except BaseException as error:  # SystemExit too, and whatever a library derives from BaseException
            said = frame(FAILURE, shortened(one_line(error) if isinstance(error, HandlerError) else named(error)))
        self._line.say(said)


def main() -> None:
    descriptor, level, path = sys.argv[1:]
    start_logging(int(level))
    line = _Line(socket.socket(fileno=int(descriptor)))
    try:
        executor = FunctionExecutor(load_handler(path))
    except BadInputError as error:
        line.say(frame(BROKEN, one_line(error)))
        return
    line.say(frame(READY))
    _Child(line, executor).run()


if __name__ == "__main__":
    main()
