"""An event loop at its end, and calls into it from other threads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import Any

from pgpark.executors import TASK_THREAD

_LAST_UNWIND_SECS = 1.0


def wound_up(loop: asyncio.AbstractEventLoop) -> bool:
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


def end_with_forks(loop: asyncio.AbstractEventLoop) -> None:
    """Ends each process that is forked from this one as soon as it comes back to the loop, which is another's."""
    os.register_at_fork(after_in_child=lambda: call_soon(loop, os._exit, 1))


def call_soon(loop: asyncio.AbstractEventLoop, callback: Any, *arguments: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to stop
        loop.call_soon_threadsafe(callback, *arguments)
