"""Writes what the tasks of a worker emit: at once when somebody begins to, then in batches for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import Any

import psycopg

from pgpark import calls
from pgpark.errors import BadInputError, PgparkError, one_line
from pgpark.executors import TaskContext
from pgpark.lane import Lane

log = logging.getLogger("pgpark.worker")

_FLUSH_SECS = 0.05
_RETRY_SECS = 1.0
_MOST_AT_ONCE = 1000  # parts of a statement, and a batch more

Batch = tuple[TaskContext, dict[str, Any], int]


class Flusher:
    """Writes the buffers of `contexts()`, one statement at a time. All of it runs on the worker's event loop."""

    def __init__(self, contexts: Callable[[], Iterable[TaskContext]]) -> None:
        self._contexts = contexts
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # once somebody writes
        self._turn = asyncio.Lock()  # what is on its way must have arrived before an outcome may follow

    def announce(self) -> None:
        """What a context calls, from any thread, when there is something to write."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the worker has gone
                self._loop.call_soon_threadsafe(self._news.set)

    async def run(self, lane: Lane, lost: Callable[[], None]) -> None:
        """Writes whatever comes, until the connection is lost; then calls `lost`."""
        self._loop = asyncio.get_running_loop()
        self._news.set()  # what came before, or a lost connection has left
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self.flush(lane, self._contexts(), until_empty=False)
            except (PgparkError, psycopg.Error, OSError) as error:
                log.warning("parts cannot be written, trying again: %s", one_line(error))
                lost()
                if lane.lost:
                    return
                self._news.set()
                await asyncio.sleep(_RETRY_SECS)
            await asyncio.sleep(_FLUSH_SECS)

    async def flush(self, lane: Lane, contexts: Iterable[TaskContext], until_empty: bool = True) -> None:
        """Writes what these contexts hold: all of it, or a batch of each, and then the rest after a pause.

        Raises the errors of pgpark.errors; what was not written is kept.
        """
        async with self._turn:
            waiting = list(contexts)
            while waiting:
                batches: list[Batch] = []
                for context in waiting:
                    first, parts = context.parts.batch()
                    if parts:
                        emission = {
                            "task_id": context.task_id,
                            "attempt": context.attempt,
                            "parts": parts,
                            "first": first,
                        }
                        batches.append((context, emission, len(parts)))
                await self._write_in_bites(lane, batches)
                waiting = [context for context, *_ in batches]
                if not until_empty:
                    if any(context.parts.holds for context in waiting):
                        self._news.set()
                    return

    async def _write_in_bites(self, lane: Lane, batches: list[Batch]) -> None:
        bite: list[Batch] = []
        size = 0
        for batch in batches:
            bite.append(batch)
            size += batch[2]
            if size >= _MOST_AT_ONCE:
                await self._write(lane, bite)
                bite, size = [], 0
        await self._write(lane, bite)

    async def _write(self, lane: Lane, batches: list[Batch]) -> None:
        if not batches:
            return
        try:
            rows = await lane.run(calls.emit_many([emission for _, emission, _ in batches]))
        except BadInputError as error:
            if len(batches) == 1:
                context = batches[0][0]
                log.warning("task %d: a part cannot be stored: %s", context.task_id, one_line(error))
                context.parts.refuse(f"a part cannot be stored: {one_line(error)}")
                return
            for batch in batches:  # one at a time, so that it is the culprit's alone
                await self._write(lane, [batch])
            return
        for (context, *_), row in zip(batches, rows, strict=True):
            if row.accepted:
                context.parts.wrote()
            else:
                context.parts.discard()  # no longer ours; it is being stopped anyway
