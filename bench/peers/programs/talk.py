"""What the Python programs share: the lines of peers/processes.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def options() -> dict[str, Any]:
    """The second argument; the first is `submit` or `work`."""
    return dict(json.loads(sys.argv[2]))


def counter(step: int) -> Callable[[], None]:
    """A handler that says `c N` at every `step`th call."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls % step == 0:
            os.write(1, b"c %d\n" % calls)

    return count


def stamp() -> None:
    os.write(1, b"s %d\n" % time.monotonic_ns())


def handler(chosen: dict[str, Any]) -> Callable[[], None]:
    return stamp if chosen["handler"] == "stamp" else counter(chosen["step"])


def wait_for_go() -> None:
    """Says that the worker is ready, and waits until it may begin."""
    say("ready")
    if sys.stdin.readline().strip() != "go":
        sys.exit("no go")


def end_by(stop: Callable[[], Any]) -> None:
    """At SIGTERM calls `stop` and ends: a server that is left in a long read goes on reading for nobody."""

    def ended(_signal: int, _frame: Any) -> None:
        stop()
        os._exit(0)

    signal.signal(signal.SIGTERM, ended)


def serve(one: Callable[[int], None], bulk: Callable[[int], None]) -> None:
    """Submits what it is told to, until its standard input ends."""
    say("ready")
    for line in sys.stdin:
        how, count = line.split()
        submit = one if how == "one" else bulk
        began = time.monotonic_ns()
        submit(int(count))
        say(f"done {began} {time.monotonic_ns()}")


async def serve_async(one: Callable[[int], Awaitable[Any]], bulk: Callable[[int], Awaitable[Any]]) -> None:
    """The same for asyncio."""
    say("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        how, count = line.split()
        submit = one if how == "one" else bulk
        began = time.monotonic_ns()
        await submit(int(count))
        say(f"done {began} {time.monotonic_ns()}")


def chunks(count: int, size: int) -> list[int]:
    """How large each of the batches is that `count` makes."""
    return [min(size, count - start) for start in range(0, count, size)]
