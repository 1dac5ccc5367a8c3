"""Following one task: its parts as they come, then its outcome. Client.stream and AsyncClient.stream are this."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator

import psycopg
from psycopg import sql

from pgpark import calls
from pgpark.database import connect, connect_async
from pgpark.errors import translated
from pgpark.models import Message, Part
from pgpark.patience import Patience

_PAGE = 100  # parts, each of at most 1 MiB


def stream(dsn: str, task_id: int, timeout: float | None = None, poll: bool = False) -> Iterator[Part | Message]:
    """Yields the parts of a task that are kept, then those that come, and last its outcome; see Client.stream."""
    following, patience = _Following(task_id, poll), Patience(timeout, poll)
    with contextlib.closing(connect(dsn, prepare=False)) as connection:
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
                    if message is not None or not known or patience.over:
                        return
                    with contextlib.closing(connection.notifies(timeout=patience.pause(timers))) as notices:
                        woken = any(following.concerns(notice) for notice in notices)
        except psycopg.Error as error:
            raise translated(error) from error


async def stream_async(
    dsn: str, task_id: int, timeout: float | None = None, poll: bool = False
) -> AsyncGenerator[Part | Message, None]:
    """The same for asyncio."""
    following, patience = _Following(task_id, poll), Patience(timeout, poll)
    async with await connect_async(dsn, prepare=False) as connection:
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
                    if message is not None or not known or patience.over:
                        return
                    async with contextlib.aclosing(connection.notifies(timeout=patience.pause(timers))) as notices:
                        woken = False
                        async for notice in notices:
                            if woken := following.concerns(notice):
                                break
        except psycopg.Error as error:
            raise translated(error) from error


class _Following:
    """How far a stream is, and which notifications concern it."""

    def __init__(self, task_id: int, poll: bool) -> None:
        self.after = 0
        self._poll = poll
        self._task_id = task_id
        self._channel = f"pgpark.task.{task_id}"

    @property
    def listen(self) -> list[sql.Composed]:
        """Statements: parts are told on the task's own channel, its outcome on that of the mailbox."""
        channels = () if self._poll else (self._channel, "pgpark.mailbox")
        return [sql.SQL("listen {}").format(sql.Identifier(channel)) for channel in channels]

    def has_more(self, page: list[Part]) -> bool:
        """Notes that this page was read; whether there may be another one."""
        if page:
            self.after = page[-1].number
        return len(page) == _PAGE

    def concerns(self, notice: psycopg.Notify) -> bool:
        """Whether it tells of this task."""
        return notice.channel == self._channel or notice.payload == str(self._task_id)
