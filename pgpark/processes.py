"""Handlers in processes of their own: one that crashes, leaks or blocks takes only its own task with it.

A process (child.py) loads the handler once and runs one task at a time. One that dies fails the attempt that it ran,
and the next task gets a new one. When the worker is gone, its processes see the end of their sockets and leave. Knows
nothing of Postgres. Why so: docs/decisions/0018.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

from pgpark import logs, telemetry
from pgpark.errors import BadInputError
from pgpark.executors import HandlerError, NotLoadedError, TaskContext
from pgpark.frames import BROKEN, CANCELLED, FAILURE, HEADER, NO_MORE, PART, READY, RESULT, STOP, TASK, frame

_STOP_SECS = 5.0
_END_SECS = 1.0
# Not `-m`, which would look for modules in other places than this process does.
_MAIN = "import sys; sys.path[:] = {path!r}; from pgpark.child import main; main()"


class ProcessExecutor:
    """Calls the handler that `module:function` names in as many processes as there are tasks at once. They end with
    this process, or by `close`.

    Any handler can be stopped: it is asked, as it would be within the worker, and after five seconds its process is
    killed. Results, parts and reasons are as from FunctionExecutor. Where its process dies, the attempt fails with what
    is known of the death; where it cannot load the handler any more, the attempt has not begun (NotLoadedError).
    """

    stoppable = True

    def __init__(self, path: str) -> None:
        """Starts the first process, so that a handler that cannot be loaded is known at once. Raises BadInputError."""
        self._path = path
        first = _Process(path)
        self._processes = {first}
        try:
            first.wait_until_loaded()
        except BaseException:
            self.close()
            raise
        self._idle = [first]

    async def run(self, context: TaskContext) -> Any:
        process = self._one()
        try:
            return await process.run(context)
        finally:
            if process.idle:
                self._idle.append(process)
            else:
                process.kill()
                self._processes.discard(process)

    def _one(self) -> _Process:
        """The process that was idle the shortest: its caches are warm. A new one if there is none."""
        while self._idle:
            process = self._idle.pop()
            if process.lives():
                return process
            process.kill()
            self._processes.discard(process)
        process = _Process(self._path)
        self._processes.add(process)
        return process

    def close(self) -> None:
        """Kills all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.reap()
        self._processes.clear()


class _Process:
    """A process, and our end of the socket to it. `idle`: it has the handler loaded and no task, and all that it said
    of the last one has been read; only such a one may be given a task."""

    def __init__(self, path: str) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _MAIN.format(path=sys.path),
                    str(theirs.fileno()),
                    logs.settings(),
                    str(os.getpid()),
                    path,
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the worker's to handle
            )
        self.idle = False
        self._loaded = False
        self._saying = asyncio.Lock()

    def wait_until_loaded(self) -> None:
        """Blocks until the handler is loaded. Raises BadInputError when it cannot be."""
        with self._socket.makefile("rb") as end:
            if len(header := end.read(HEADER.size)) < HEADER.size:
                raise BadInputError(f"--handler: its process {_death(self._popen.wait())} while it was loaded")
            kind, size = HEADER.unpack(header)
            said = json.loads(end.read(size))
        if kind == BROKEN:
            raise BadInputError(said)
        self._loaded = self.idle = True

    def lives(self) -> bool:
        """Whether it has not died meanwhile."""
        return self._popen.poll() is None

    async def run(self, context: TaskContext) -> Any:
        """Runs a task. Raises HandlerError, also when the process dies, and NotLoadedError."""
        self.idle = False
        self._socket.setblocking(False)
        talk = asyncio.create_task(self._talk(context))
        try:
            await asyncio.wait({talk})
        except asyncio.CancelledError:
            asking = asyncio.create_task(self._say(frame(STOP)))
            with contextlib.suppress(asyncio.CancelledError):  # a second cancel: no more patience
                await asyncio.wait({talk}, timeout=_STOP_SECS)
            if not talk.done():
                for job in (talk, asking):
                    job.cancel()
                await asyncio.wait({talk, asking})
                raise
        try:
            return talk.result()
        except EOFError:
            death = await self._end()
            if not self._loaded:
                raise NotLoadedError(f"--handler: its process {death} while it was loaded") from None
            raise HandlerError(f"the handler's process {death}") from None

    async def _talk(self, context: TaskContext) -> Any:
        """Hands over the task and takes what comes back until it has ended. Raises EOFError when it is gone."""
        if not self._loaded:
            await self._hear_that_it_is_loaded()
            if context.stopping:
                self.idle = True
                raise asyncio.CancelledError
        task = {"pool": context.pool, "task": context.claimed_row(), "trace": telemetry.carrier()}
        await self._say(frame(TASK, task))
        while True:
            kind, said = await self._hear()
            if kind == PART:
                await self._take(context, said)
                continue
            self.idle = True
            if kind == RESULT:
                return said
            if kind == FAILURE:
                raise HandlerError(said)
            assert kind == CANCELLED
            raise asyncio.CancelledError

    async def _hear_that_it_is_loaded(self) -> None:
        kind, said = await self._hear()
        if kind == BROKEN:
            raise NotLoadedError(said)
        assert kind == READY
        self._loaded = True

    async def _take(self, context: TaskContext, part: Any) -> None:
        try:
            context.parts.put(*part)
        except BadInputError as error:
            context.parts.refuse(str(error))  # so that the attempt fails even if it emits no more
            await self._say(frame(NO_MORE, str(error)))
        await context.parts.drain()  # meanwhile nothing is read, so that a handler that emits too fast waits

    async def _say(self, frame: bytes) -> None:
        """A process that is gone hears nothing; it is who listens to it that finds out."""
        async with self._saying:
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().sock_sendall(self._socket, frame)

    async def _hear(self) -> tuple[bytes, Any]:
        kind, size = HEADER.unpack(await self._receive(HEADER.size))
        return kind, json.loads(await self._receive(size))

    async def _receive(self, size: int) -> bytearray:
        received = bytearray(size)
        rest = memoryview(received)
        while rest:
            try:
                count = await asyncio.get_running_loop().sock_recv_into(self._socket, rest)
            except OSError:
                count = 0
            if not count:
                raise EOFError
            rest = rest[count:]
        return received

    async def _end(self) -> str:
        """How the process ended, which has closed its end; it is killed if it lives on."""
        try:
            return _death(await asyncio.to_thread(self._popen.wait, _END_SECS))
        except subprocess.TimeoutExpired:
            return "closed its connection to the worker, and was killed"

    def kill(self) -> None:
        """Ends the process and whatever is left in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._socket.close()

    def reap(self) -> None:
        """Waits until a process that was killed has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in a driver
            self._popen.wait(_END_SECS)


def _death(code: int) -> str:
    if code >= 0:
        return f"exited with {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}{', as when memory runs out' if name == 'SIGKILL' else ''}"
