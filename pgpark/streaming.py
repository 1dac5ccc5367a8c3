"""Following one task: its parts as they come, then its outcome. Client.stream and AsyncClient.stream are this."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import AsyncGenerator, Iterator

import psycopg
from psycopg import sql

from pgpark import calls
from pgpark.database import connect, connect_async
from pgpark.errors import translated
from pgpark.models import Maintained, Message, Part

# A notification is a hint that can get lost (a pooler, a failover): look again this often all the same.
_BACKSTOP_SECS = 5.0
_SHORTEST_WAIT_SECS = 0.05
_PAGE = 100  # parts, each of at most 1 MiB


def stream(dsn: str, task_id: int, timeout: float | None = None) -> Iterator[Part | Message]:
    """Yields the parts of a task that are kept, then those that come, and last its outcome; see Client.stream."""
    following = _Following(task_id, timeout)
    with contextlib.closing(connect(dsn)) as connection:
        try:
            for statement in following.listen:
                connection.execute(statement)
            while True:
                timers = calls.run_on(connection, calls.maintain())  # a deadline must end it even without workers
                known = calls.run_on(connection, calls.status(task_id)) is not None
                woken = True
                while woken:
                    message = calls.run_on(connection, calls.result(task_id))  # before the parts, which precede it
                    more = True
                    while more:
                        page = calls.run_on(connection, calls.parts(task_id, following.after, _PAGE))
                        yield from page
                        more = following.has_more(page)
                    if message is not None:
                        yield message
                    if message is not None or not known or following.over:
                        return
                    with contextlib.closing(connection.notifies(timeout=following.pause(timers))) as notices:
                        woken = any(following.concerns(notice) for notice in notices)
        except psycopg.Error as error:
            raise translated(error) from error


async def stream_async(dsn: str, task_id: int, timeout: float | None = None) -> AsyncGenerator[Part | Message, None]:
    """The same for asyncio."""
    following = _Following(task_id, timeout)
    async with await connect_async(dsn) as connection:
        try:
            for statement in following.listen:
                await connection.execute(statement)
            while True:
                timers = await calls.run_on_async(connection, calls.maintain())
                known = await calls.run_on_async(connection, calls.status(task_id)) is not None
                woken = True
                while woken:
                    message = await calls.run_on_async(connection, calls.result(task_id))
                    more = True
                    while more:
                        page = await calls.run_on_async(connection, calls.parts(task_id, following.after, _PAGE))
                        for part in page:
                            yield part
                        more = following.has_more(page)
                    if message is not None:
                        yield message
                    if message is not None or not known or following.over:
                        return
                    async with contextlib.aclosing(connection.notifies(timeout=following.pause(timers))) as notices:
                        woken = False
                        async for notice in notices:
                            if woken := following.concerns(notice):
                                break
        except psycopg.Error as error:
            raise translated(error) from error


class _Following:
    """How far a stream is, and how long it may still last."""

    def __init__(self, task_id: int, timeout: float | None) -> None:
        self.after = 0
        self._task_id = task_id
        self._channel = f"pgpark.task.{task_id}"
        self._until = math.inf if timeout is None else time.monotonic() + timeout

    @property
    def listen(self) -> list[sql.Composed]:
        """Statements: parts are told on the task's own channel, its outcome on that of the mailbox."""
        return [sql.SQL("listen {}").format(sql.Identifier(channel)) for channel in (self._channel, "pgpark.mailbox")]

    def has_more(self, page: list[Part]) -> bool:
        """Notes that this page was read; whether there may be another one."""
        if page:
            self.after = page[-1].number
        return len(page) == _PAGE

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._until

    def concerns(self, notice: psycopg.Notify) -> bool:
        return notice.channel == self._channel or notice.payload == str(self._task_id)

    def pause(self, timers: Maintained) -> float:
        """Seconds to wait for a notification: until a timer is due, somebody should look again, or the time is up."""
        due = _BACKSTOP_SECS if timers.due_in_secs is None else max(timers.due_in_secs, _SHORTEST_WAIT_SECS)
        return min(due, _BACKSTOP_SECS, max(self._until - time.monotonic(), 0))
