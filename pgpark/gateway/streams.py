"""Server-Sent Events, and waiting while a client is there.

A stream is a generator of events; it ends when its client leaves, its time is up, its token is of no more use, or the
gateway stops. A failing database does not end it: it looks again later.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from pgpark.errors import DatabaseError, NotGrantedError, PgparkError
from pgpark.gateway.errors import from_pgpark
from pgpark.gateway.hub import Watch
from pgpark.gateway.settings import GatewaySettings

T = TypeVar("T")
_RETRY_MILLISECONDS = (1000, 4000)  # clients of a gateway that stops come back spread over this time


@dataclass(frozen=True)
class News:
    """What a look has found. again_in: seconds until there may be more that nobody tells of; over: there is no more."""

    events: list[str]
    again_in: float | None = None
    over: bool = False


Look: TypeAlias = Callable[[], Awaitable[News]]


def event(kind: str, data: str, identity: str | None = None) -> str:
    """An event; data: JSON text without line breaks."""
    return f"event: {kind}\n" + (f"id: {identity}\n" if identity is not None else "") + f"data: {data}\n\n"


class EventStream(Response):
    """A response of events, until they end or the client leaves. An error before the first event is an answer yet."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pump = asyncio.ensure_future(self._pump(first, send))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({pump, left}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            for job in (pump, left):
                job.cancel()
            await asyncio.wait({pump, left})

    async def _pump(self, first: str, send: Send) -> None:
        async with contextlib.aclosing(self._events) as events:
            await send({"type": "http.response.body", "body": first.encode(), "more_body": True})
            async for text in events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def following(
    watch: Watch,
    settings: GatewaySettings,
    max_secs: float | None,
    look: Look,
) -> AsyncGenerator[str, None]:
    """The events of a stream. look: gives the next; it is asked again when the client has taken those."""
    until = None if max_secs is None else time.monotonic() + max_secs
    yield ": pgpark\n\n"
    failures = 0
    while True:
        try:
            news = await look()
            failures = 0
        except PgparkError as error:
            if not isinstance(error, DatabaseError) or isinstance(error, NotGrantedError):
                yield event("error", bytes(from_pgpark(error).response().body).decode())
                return
            failures += 1
            news = News([": the database cannot be used now\n\n"], again_in=2.0**failures)
        for text in news.events:
            yield text
        if news.over:
            return
        pause = settings.look_secs if news.again_in is None else min(news.again_in, settings.look_secs)
        look_at = time.monotonic() + pause * random.uniform(0.7, 1)
        rung = False
        while not rung:
            now = time.monotonic()
            if watch.hub.stopping:
                yield f"retry: {random.randint(*_RETRY_MILLISECONDS)}\n: this gateway stops\n\n"
                return
            if until is not None and now >= until:
                return
            if now >= look_at:
                break
            pause = min(settings.heartbeat_secs, look_at - now, *([until - now] if until is not None else []))
            rung = await watch.wait(pause)
            if not rung:
                yield ":\n\n"


async def unless_gone(request: Request, waiting: Awaitable[T]) -> T | None:
    """What is waited for, or None if the client leaves first."""
    wanted = asyncio.ensure_future(waiting)
    left = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({wanted, left}, return_when=asyncio.FIRST_COMPLETED)
        return wanted.result() if wanted.done() else None
    finally:
        for job in (wanted, left):
            job.cancel()
        await asyncio.wait({wanted, left})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
