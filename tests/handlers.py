"""Handlers for the worker's tests, named on its command line as tests.handlers:NAME."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
import threading
import time
from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel

from pgpark import TaskContext


async def echo(payload: Any) -> Any:
    return payload


def echo_in_thread(payload: Any) -> dict[str, Any]:
    return {"payload": payload, "thread": threading.current_thread().name}


async def sleep(payload: dict[str, float]) -> float:
    await asyncio.sleep(payload["secs"])
    return payload["secs"]


async def started_at(_payload: Any) -> str:
    return datetime.now(timezone.utc).isoformat()


def fail(payload: Any) -> None:
    raise ValueError(f"cannot do {payload}")


async def leave(_payload: Any) -> None:
    sys.exit(3)


async def block_the_loop(payload: dict[str, float]) -> str:
    time.sleep(payload["secs"])
    return "done"


async def tell_then_sleep(payload: dict[str, Any], context: TaskContext) -> str:
    for part in payload["parts"]:
        context.emit(f"{part}{context.task.attempt}")
    await asyncio.sleep(payload["secs"] if context.task.attempt == 1 else 0)
    return "done"


def wait_for_stop(_payload: Any, context: TaskContext) -> str:
    while not context.stopping:
        time.sleep(0.01)
    return "stopped politely"


def never_returns(_payload: Any) -> None:
    time.sleep(3600)


def kill_worker(_payload: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def length_of_text(payload: Any) -> int:
    return len(repr(payload))


def exit_at_once(_payload: Any) -> None:
    os._exit(7)


def segfault(_payload: Any) -> None:
    ctypes.string_at(0)


def own_process(payload: Any) -> dict[str, Any]:
    return {"payload": payload, "process": os.getpid()}


def fork(_payload: Any) -> str:
    """Both processes go on from here."""
    return "child" if os.fork() == 0 else "parent"


async def fork_on_the_loop(payload: Any) -> str:
    return fork(payload)


async def fork_and_await_what_is_under_way(_payload: Any) -> str:
    under_way = asyncio.create_task(asyncio.sleep(0.2))
    await asyncio.sleep(0)
    forked = os.fork() == 0
    await under_way
    return "child" if forked else "parent"


async def emit_what_cannot_be_read(payload: int, context: TaskContext) -> int:
    if payload == 1:
        sys.set_int_max_str_digits(0)
        context.emit(10**5000)
    return payload


async def emit_too_late(payload: Any, context: TaskContext) -> Any:
    async def later() -> None:
        await asyncio.sleep(0.1)
        context.emit(f"of {payload}")

    if payload == 1:
        KEPT.append(asyncio.create_task(later()))
    else:
        await asyncio.sleep(0.5)
    return payload


KEPT: list[Any] = []  # what must not be collected


def leave_a_program_behind(_payload: Any) -> None:
    os.system("sleep 30 &")
    os._exit(7)


def terminate_own_process(payload: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    return payload


def hold_the_interpreter(_payload: Any) -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


async def first_crash_then_tell(payload: str, context: TaskContext) -> str:
    context.emit(payload)
    if context.task.attempt == 1:
        await asyncio.sleep(0)
        os._exit(1)
    return payload


async def emit_too_much(size: int, context: TaskContext) -> None:
    while True:
        context.emit("x" * size)


async def not_json(payload: str) -> Any:
    values = {"nan": float("nan"), "object": object(), "nul": "a\0b", "surrogate": "\ud800"}
    return values.get(payload, datetime(2030, 1, 1))


class Prompt(BaseModel):
    text: str
    tokens: int = 10


class Answer(BaseModel):
    text: str
    tenant: str | None


async def typed(prompt: Prompt, context: TaskContext) -> Answer:
    return Answer(text=prompt.text * prompt.tokens, tenant=context.task.tenant)


class NotAnException(BaseException):
    """What some libraries raise: derived from BaseException, and its text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError


async def raise_base(_payload: Any) -> None:
    raise NotAnException


async def swallow_cancellation(_payload: Any) -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


def takes_nothing() -> None:
    pass


not_a_function = 5


def _active() -> dict[str, str]:
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return {"trace": trace.format_trace_id(context.trace_id), "span": trace.format_span_id(context.span_id)}


async def active_span(_payload: Any) -> dict[str, str]:
    await asyncio.sleep(0)
    return _active()


def active_span_in_thread(_payload: Any) -> dict[str, str]:
    return _active()


def own_span(_payload: Any) -> None:
    from opentelemetry import trace

    with trace.get_tracer("mine").start_as_current_span("mine"):
        pass


def logs_and_fails(_payload: Any) -> None:
    log = logging.getLogger("mine")
    log.warning("at it", extra={"step": 2, "odd": object(), "nan": float("nan")})
    raise ValueError("no more")
