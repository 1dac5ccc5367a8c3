"""Handlers of the worker processes in tests/chaos. A payload is {"n": its number, "secs": how long it takes}."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from typing import Any

from pgpark import TaskContext


async def work(payload: dict[str, Any]) -> dict[str, Any]:
    await asyncio.sleep(payload["secs"])
    return {"n": payload["n"]}


async def misbehave(payload: dict[str, Any], context: TaskContext) -> dict[str, Any]:
    """Works, unless the payload names a vice, which the first attempt has (`always`: each)."""
    if context.attempt == 1 or payload.get("always"):
        VICES.get(payload.get("vice", ""), lambda: None)()
    return await work(payload)


def _leak() -> None:
    """Takes memory without end; at 256 MiB it is killed, as the kernel would do it somewhat later."""
    kept = []
    while len(kept) < 16:
        kept.append(bytearray(16 << 20))
    os.kill(os.getpid(), signal.SIGKILL)


def _fork() -> None:
    """Both processes go on from here."""
    os.fork()


VICES = {
    "blocks the loop": lambda: time.sleep(2),
    "never returns": lambda: time.sleep(3600),
    "leaks": _leak,
    "exits": lambda: os._exit(7),
    "segfaults": lambda: ctypes.string_at(0),
    "forks": _fork,
}
