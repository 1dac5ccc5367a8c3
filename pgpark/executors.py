"""How a worker runs one task: a Python function (async, or plain in a thread) or a command. Knows nothing of Postgres.

An executor either returns the result, or raises; what it raises becomes the reason of a failed attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
import inspect
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from pgpark import telemetry
from pgpark.errors import BadInputError, one_line
from pgpark.models import Claimed, ClaimedRow
from pgpark.parts import PartBuffer, PartPipe

log = logging.getLogger("pgpark.worker")

TASK_THREAD = "pgpark-task-"  # how the threads of plain handlers are named, before the task id
_STDERR_KEPT = 1900
_TERMINATE_SECS = 5.0
_DRAIN_SECS = 0.5
_LOOK_SECS = 0.05
# What a program gets of the worker's environment: where things are, how to write, which devices to use. Everything else
# may be a secret.
_PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|PWD|TERM|TZ|LANG|LANGUAGE|LC_\w+|TMPDIR|TMP|TEMP"
    r"|XDG_(RUNTIME_DIR|CACHE_HOME|CONFIG_HOME|DATA_HOME)|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX"
    r"|PYTHON(PATH|HOME|UNBUFFERED|DONTWRITEBYTECODE|UTF8)|OMP_NUM_THREADS"
    r"|(CUDA|NVIDIA|HIP|ROCR)_VISIBLE_DEVICES|CUDA_(DEVICE_ORDER|HOME|PATH)|ZE_AFFINITY_MASK"
)


class HandlerError(Exception):
    """The attempt failed; the text is the reason that the client reads."""


class NotLoadedError(Exception):
    """The handler cannot be loaded any more, so the attempt has not begun. That is not the task's fault."""


class TaskContext:
    """What a handler may ask for as its second argument: the claimed `task`, its `pool`, whether to stop, and a way to
    tell a waiting client what there is so far. task: as it was claimed, or a row, of which a Claimed is made when
    somebody asks. parts: where what it emits goes."""

    def __init__(self, pool: str, task: Claimed | ClaimedRow, parts: PartBuffer | None = None) -> None:
        self.pool = pool
        self.parts = parts or PartBuffer()
        self._claimed = task
        self._stopping = False

    @property
    def task(self) -> Claimed:
        """The task as it was claimed. Raises HandlerError for a payload that Python cannot read."""
        if isinstance(self._claimed, ClaimedRow):
            self._claimed = Claimed.model_validate(self._claimed._asdict() | {"payload": self.payload})
        return self._claimed

    def claimed_row(self) -> dict[str, Any]:
        """The columns of the claimed task as JSON has them, but for the payload: that is its JSON text, unread."""
        if isinstance(self._claimed, ClaimedRow):
            return typing.cast("dict[str, Any]", to_jsonable_python(self._claimed._asdict()))
        rest = self._claimed.model_dump(mode="json", exclude={"payload"})
        return rest | {"payload": json.dumps(self._claimed.payload)}

    @property
    def task_id(self) -> int:
        """The id of the task."""
        return self._claimed.task_id

    @property
    def units(self) -> int:
        """How many units it holds."""
        return self._claimed.units

    @property
    def attempt(self) -> int:
        """Which attempt this is, from 1."""
        return self._claimed.attempt

    @property
    def payload(self) -> Any:
        """What was submitted. Raises HandlerError where Python cannot read it: nested too deeply, a number too long."""
        if not isinstance(self._claimed, ClaimedRow):
            return self._claimed.payload
        try:
            return json.loads(self._claimed.payload)
        except (ValueError, RecursionError) as error:
            raise HandlerError(f"the payload cannot be read: {one_line(error)}") from error

    @property
    def stopping(self) -> bool:
        """True once the task was cancelled, ran out of time, or the worker shuts down. Safe to ask from any thread."""
        return self._stopping

    def ask_to_stop(self) -> None:
        """Makes `stopping` true."""
        self._stopping = True

    def emit(self, content: Any) -> None:
        """Sends a partial result (a token, a chunk, any JSON value of at most 1 MiB) to whoever follows the task.

        Safe from any thread. It is buffered and written within about 50 ms, in order, before the outcome is. A plain
        handler waits here while 1000 parts or 4 MiB are not written yet. An async handler does not: it calls `drain`
        now and then. Does nothing once the attempt has lost its task. Raises BadInputError for what is no JSON or too
        large, and when the partial results of this attempt exceed 64 MiB, each counted with 100 bytes more than its
        JSON.
        """
        self.parts.put("partial", content)

    def progress(self, value: Any, message: str | None = None) -> None:
        """Says how far the task is, {"value": value, "message": message}: a fraction, or any JSON value. The last one
        replaces those before, so this may be called as often as you like, from any thread. Raises BadInputError."""
        self.parts.put("progress", {"value": value} | ({} if message is None else {"message": message}))

    async def drain(self) -> None:
        """In an async handler: waits while 1000 parts or 4 MiB are not written yet."""
        await self.parts.drain()


class Executor(Protocol):
    """Runs tasks of one kind. `stoppable`: cancelling `run` really ends the work; else it must look at the context."""

    stoppable: bool

    async def run(self, context: TaskContext) -> Any:
        """Does the work of a task and returns its result. Raises HandlerError, or whatever the handler raised."""
        ...


class FunctionExecutor:
    """Calls `handler(payload)` or `handler(payload, context)`.

    An async handler runs on the worker's event loop, a plain one in a thread of its own. Where the first argument is
    annotated with a pydantic model, the payload is validated into it first.
    """

    def __init__(self, handler: Callable[..., Any]) -> None:
        self._handler = handler
        self._model = _payload_model(handler)
        self._takes_context = _takes_context(handler)
        # An object with an async __call__ is a handler too.
        self.stoppable = any(map(inspect.iscoroutinefunction, (handler, type(handler).__call__)))

    async def run(self, context: TaskContext) -> Any:
        # One that takes the context sees the payload of context.task.
        payload = context.task.payload if self._takes_context else context.payload
        if self._model is not None:
            try:
                payload = self._model.model_validate(payload)
            except ValidationError as error:
                raise HandlerError(f"payload does not fit {self._model.__name__}: {_problems(error)}") from error
        arguments = (payload, context) if self._takes_context else (payload,)
        if self.stoppable:
            home = os.getpid()
            try:
                result = await self._handler(*arguments)
            except BaseException as error:
                _leave_if_forked(home, error)
                raise
            _leave_if_forked(home)
            return result
        return await _in_thread(self._handler, arguments, name=f"{TASK_THREAD}{context.task_id}")


class CommandExecutor:
    """Runs a command without a shell: payload as JSON on standard input, result from standard output.

    Output that is JSON is the result as such, other output is a string. A non-zero exit fails the attempt with the end
    of standard error. When the program has ended, so do the processes that it left behind in its group.
    Its environment has PGPARK_TASK_ID, _ATTEMPT, _POOL, _UNITS and _TENANT, and of the worker's own what says where
    things are, how to write and which devices to use, and what `environment` names. All else may be a secret.
    Where the worker traces, TRACEPARENT and TRACESTATE are its trace context.
    PGPARK_PARTS_FD is the number of a file descriptor on which it may emit while it runs, a line each:
    {"content": "a token"} or {"kind": "progress", "content": {"value": 0.5}}.
    """

    stoppable = True

    def __init__(self, command: str, environment: Iterable[str] = ()) -> None:
        self._named = frozenset(environment)
        if unset := sorted(name for name in self._named if name not in os.environ):
            raise BadInputError(f"--exec-env {unset[0]}: there is no such variable in this worker's environment")
        try:
            self._argv = shlex.split(command)
        except ValueError as error:
            raise BadInputError(f"--exec {command!r} cannot be read: {error}") from error
        if not self._argv or shutil.which(self._argv[0]) is None:
            raise BadInputError(f"--exec: there is no program {self._argv[0] if self._argv else ''!r}")

    async def run(self, context: TaskContext) -> Any:
        payload = json.dumps(context.task.payload).encode()
        pipe = PartPipe(context.parts, context.task_id)
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                env=_environment(context, self._named) | {"PGPARK_PARTS_FD": str(pipe.descriptor)},
                pass_fds=[pipe.descriptor],
            )
        except BaseException:
            pipe.close()
            raise
        pipe.start()
        talk = asyncio.create_task(process.communicate(payload))
        try:
            # Not process.wait(): until Python 3.12 it waits for the pipes too, which a process left behind may hold.
            while not talk.done() and process.returncode is None:
                await asyncio.wait({talk}, timeout=_LOOK_SECS)
            await asyncio.wait({talk}, timeout=_DRAIN_SECS)
        finally:
            await _end(process)
            await pipe.finish(_DRAIN_SECS)
        await asyncio.wait({talk}, timeout=_DRAIN_SECS)
        if not talk.done():
            talk.cancel()
            raise HandlerError("a process that it left behind keeps its output open")
        output, errors = talk.result()
        if process.returncode != 0:
            tail = errors.decode(errors="replace").strip()[-_STDERR_KEPT:]
            raise HandlerError(f"exit {process.returncode}: {tail}" if tail else f"exit {process.returncode}")
        return _parsed(output.decode(errors="replace"))


def load_handler(path: str) -> Callable[..., Any]:
    """The function that `package.module:function` names. Raises BadInputError."""
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise BadInputError(f"--handler {path!r} must look like package.module:function")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # so that a file in the present folder is found, as with `python -m`
    try:
        handler: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            handler = getattr(handler, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module does when it is imported, sys.exit() included
        log.debug("importing %s", path, exc_info=True)
        raise BadInputError(
            f"--handler {path!r} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    if not callable(handler):
        raise BadInputError(f"--handler {path!r} is not a function")
    return typing.cast("Callable[..., Any]", handler)


def _payload_model(handler: Callable[..., Any]) -> type[BaseModel] | None:
    try:
        parameters = list(inspect.signature(handler).parameters.values())
        hints = typing.get_type_hints(handler if inspect.isroutine(handler) else type(handler).__call__)
    except (TypeError, ValueError, NameError):
        return None
    hint = hints.get(parameters[0].name) if parameters else None
    return hint if isinstance(hint, type) and issubclass(hint, BaseModel) else None


def _takes_context(handler: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in places if p.default is p.empty]
    if (not places and not any(p.kind is p.VAR_POSITIONAL for p in parameters)) or len(needed) > 2:
        raise BadInputError(f"the handler {handler!r} must take (payload) or (payload, context)")
    return len(needed) == 2


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'payload'}: {problem['msg']}" for problem in error.errors()
    )


async def _in_thread(handler: Callable[..., Any], arguments: tuple[Any, ...], name: str) -> Any:
    """Runs a plain function in a daemon thread of its own, so that one that never returns cannot hold up the exit."""
    loop = asyncio.get_running_loop()
    home = os.getpid()
    done: asyncio.Future[tuple[bool, Any]] = loop.create_future()

    def settle(succeeded: bool, value: Any) -> None:
        if not done.done():
            done.set_result((succeeded, value))

    def body() -> None:
        succeeded, value = True, None
        try:
            value = handler(*arguments)
        except BaseException as error:  # SystemExit too: it ends the task, not the worker
            succeeded, value = False, error
            _leave_if_forked(home, error)
        _leave_if_forked(home)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has gone
            loop.call_soon_threadsafe(settle, succeeded, value)

    within = contextvars.copy_context()  # what is logged there belongs to the task, and so do spans
    threading.Thread(target=within.run, args=(body,), name=name, daemon=True).start()
    succeeded, value = await done
    if succeeded:
        return value
    raise HandlerError(f"{type(value).__name__}: {value}") from value


def _leave_if_forked(home: int, error: BaseException | None = None) -> None:
    """Ends a process that a handler has forked and that went on here: this code, and its connections, are another's.
    One that leaves by sys.exit() has its exit code."""
    if os.getpid() == home:
        return
    code = error.code if isinstance(error, SystemExit) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code if isinstance(code, int) else 1)


def _environment(context: TaskContext, named: frozenset[str]) -> dict[str, str]:
    task = context.task
    return {name: value for name, value in os.environ.items() if name in named or _PASSED_ON.fullmatch(name)} | {
        "PGPARK_TASK_ID": str(task.task_id),
        "PGPARK_ATTEMPT": str(task.attempt),
        "PGPARK_POOL": context.pool,
        "PGPARK_UNITS": str(task.units),
        "PGPARK_TENANT": task.tenant or "",
        **{name.upper(): value for name, value in telemetry.carrier().items()},
    }


def _parsed(output: str) -> Any:
    if not output.strip():
        return None
    try:
        return json.loads(output)
    except ValueError:
        return output


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends a process, asked first and then killed, and whatever is left in its group."""
    if process.returncode is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(asyncio.CancelledError):  # a second cancel: no more patience
            for _ in range(round(_TERMINATE_SECS / _LOOK_SECS)):
                if process.returncode is not None:
                    break
                await asyncio.sleep(_LOOK_SECS)
    _signal_group(process, signal.SIGKILL)
    while process.returncode is None:
        await asyncio.sleep(_LOOK_SECS)


def _signal_group(process: asyncio.subprocess.Process, kind: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, kind)
