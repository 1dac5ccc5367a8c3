"""A network between workers and server that can be slow, hang with its connections open, or drop them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any

from tests.chaos.postmaster import free_port

CHUNK = 1 << 16


class Proxy:
    """Forwards TCP connections to a port of this machine. `close` ends it."""

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self.delay = 0.0  # seconds, each way
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._deaf: set[asyncio.Task[Any]] = set()  # connections that hang for good
        self._links: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(asyncio.start_server(self._serve, "127.0.0.1", self.port))

    def hang(self) -> None:
        """Nothing goes through any more, on connections old and new, until `resume`."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def resume(self) -> None:
        """What was held back goes through now."""
        self._loop.call_soon_threadsafe(self._flows.set)

    def forget(self) -> int:
        """The present connections stay open, but nothing will ever go through them again. Returns how many."""
        return int(self._do(self._forget()))

    def drop(self) -> int:
        """Closes all connections. Returns how many."""
        return int(self._do(self._drop()))

    def close(self) -> None:
        self.drop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _forget(self) -> int:
        forgotten = self._links - self._deaf
        self._deaf |= forgotten
        return len(forgotten)

    async def _drop(self) -> int:
        links = list(self._links)
        for link in links:
            link.cancel()
        if links:
            await asyncio.wait(links)
        return len(links)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
                try:
                    ways = {
                        asyncio.create_task(self._forward(link, reader, server_writer)),
                        asyncio.create_task(self._forward(link, server_reader, writer)),
                    }
                    try:
                        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for way in ways:
                            way.cancel()
                        await asyncio.wait(ways)
                finally:
                    server_writer.transport.abort()
        finally:
            writer.transport.abort()
            self._links.discard(link)
            self._deaf.discard(link)

    async def _forward(self, link: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK):
                await asyncio.sleep(self.delay)
                await self._flows.wait()
                if link not in self._deaf:
                    writer.write(chunk)
                    await writer.drain()
