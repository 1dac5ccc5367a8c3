"""Who waits for what: one listening connection for all clients of a gateway, however many wait.

A route that waits holds a Watch, and no connection. A notification rings those whom it concerns; then they look for
themselves, as their token. A notification can get lost, so that everybody looks now and then all the same. While
somebody waits the timers are run here, since a deadline must end a wait even where no worker lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
from psycopg import AsyncConnection, sql

from pgpark import calls
from pgpark.calls import Call
from pgpark.database import connect_async
from pgpark.errors import NotGrantedError, PgparkError, one_line
from pgpark.gateway.connections import Connections
from pgpark.gateway.errors import GatewayError
from pgpark.gateway.settings import GatewaySettings
from pgpark.patience import BACKSTOP_SECS

log = logging.getLogger("pgpark.gateway")

_MAILBOX = "pgpark.mailbox"
_TASK, _POOL = "pgpark.task.", "pgpark.pool."
_FIRST_RETRY_SECS, _LONGEST_RETRY_SECS = 0.1, 5.0
_LISTEN_SECS = 1.0  # that somebody who is about to wait waits until we listen for it
_SHORTEST_TIMER_SECS = 0.2
_MOST_ADDRESSES = 500  # looked up at once; of more outcomes all mailboxes are told

Address = tuple[str, str | None, str | None]  # of a mailbox: tenant, user, session


class Watch:
    """Somebody who waits: rung when there may be something, or when the gateway stops."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.seen = 0  # of a pool's bell: how many rings had come when this one last looked
        self._bell = asyncio.Event()

    def ring(self) -> None:
        """Wakes it; it will look once, however often it was rung."""
        self._bell.set()

    async def wait(self, seconds: float) -> bool:
        """Whether it was rung within so many seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._bell.wait(), max(seconds, 0))
        rung = self._bell.is_set()
        self._bell.clear()
        return rung


class Hub:
    """The watches of a gateway; `run` keeps them told."""

    def __init__(self, connections: Connections, settings: GatewaySettings) -> None:
        self.stopping = False
        self._connections = connections
        self._settings = settings
        self._watches: dict[str, list[Watch]] = defaultdict(list)  # by channel
        self._tasks: dict[int, list[Watch]] = defaultdict(list)
        self._mailboxes: dict[str, list[tuple[Address, Watch]]] = defaultdict(list)  # by tenant
        self._rings: dict[str, int] = defaultdict(int)  # of each pool's channel
        self._count = 0
        self._heard: set[str] = {_MAILBOX}  # channels that we listen on
        self._listening = False
        self._changed = asyncio.Event()
        self._turn: asyncio.Future[None] | None = None  # ends when we listen on something new
        self._landed: set[int] = set()  # tasks whose outcome landed, for the mailboxes
        self._news = asyncio.Event()
        self._company = asyncio.Event()  # somebody waits
        self._fresh = asyncio.Event()  # somebody has begun to

    # -- for routes ----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def task(self, task_id: int, parts: bool = False) -> AsyncIterator[Watch]:
        """A watch for the outcome of a task, and for its parts."""
        with self._watching() as watch:
            self._tasks[task_id].append(watch)
            try:
                if parts:
                    async with self._on(f"{_TASK}{task_id}", watch):
                        yield watch
                else:
                    await self._listened({_MAILBOX})
                    yield watch
            finally:
                _remove(self._tasks, task_id, watch)

    @contextlib.asynccontextmanager
    async def mailbox(self, address: Address) -> AsyncIterator[Watch]:
        """A watch for the outcomes of a tenant, of one of its users or sessions."""
        with self._watching() as watch:
            self._mailboxes[address[0]].append((address, watch))
            try:
                await self._listened({_MAILBOX})
                yield watch
            finally:
                _remove(self._mailboxes, address[0], (address, watch))

    @contextlib.asynccontextmanager
    async def pool(self, name: str) -> AsyncIterator[Watch]:
        """A watch for tasks of a pool that may start. Notifications ring one such watch; see `pass_on`."""
        with self._watching() as watch:
            channel = f"{_POOL}{name}"
            try:
                async with self._on(channel, watch):
                    watch.seen = self._rings[channel]
                    yield watch
            finally:
                self.pass_on(name)  # it may have been rung and not have looked
                if channel not in self._watches:
                    self._rings.pop(channel, None)

    def looks(self, name: str, watch: Watch) -> None:
        """This watch of a pool is about to look, so it need not be rung for what was told so far."""
        watch.seen = self._rings[f"{_POOL}{name}"]

    def pass_on(self, name: str) -> None:
        """Rings another watch of a pool, if there is one that has not looked since the last notification."""
        channel = f"{_POOL}{name}"
        for watch in self._watches.get(channel, ()):
            if watch.seen < self._rings[channel]:
                return watch.ring()
        return None

    def stop(self) -> None:
        """Rings everybody, for the last time."""
        self.stopping = True
        self._ring_all()

    # -- keeping count -------------------------------------------------------------------------------------------

    def require_room(self) -> None:
        """Raises GatewayError where as many wait as may."""
        if self._count >= self._settings.max_streams:
            raise GatewayError(503, "busy", "too many clients wait for something here", "Try again.", retry_after=5)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[Watch]:
        self.require_room()
        self._count += 1
        self._company.set()
        self._fresh.set()
        watch = Watch(self)
        try:
            yield watch
        finally:
            self._count -= 1
            if not self._count:
                self._company.clear()

    @contextlib.asynccontextmanager
    async def _on(self, channel: str, watch: Watch) -> AsyncIterator[Watch]:
        self._watches[channel].append(watch)
        self._changed.set()
        try:
            await self._listened({_MAILBOX, channel})
            yield watch
        finally:
            _remove(self._watches, channel, watch)
            self._changed.set()

    async def _listened(self, channels: set[str]) -> None:
        """Returns when we listen on these, or it takes too long: then they are rung as soon as we do."""

        def listening() -> bool:
            return self._listening and channels <= self._heard

        until = time.monotonic() + _LISTEN_SECS
        while self._settings.listen and not listening() and time.monotonic() < until:
            if self._turn is None or self._turn.done():
                self._turn = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._turn}, timeout=until - time.monotonic())

    # -- ringing -------------------------------------------------------------------------------------------------

    def _ring_all(self) -> None:
        for watches in (*self._tasks.values(), *self._watches.values()):
            for watch in watches:
                watch.ring()
        self._ring_mailboxes()
        for channel in self._rings:
            self._rings[channel] += 1

    def _ring_mailboxes(self) -> None:
        for entries in self._mailboxes.values():
            for _, watch in entries:
                watch.ring()

    def _hear(self, channel: str, payload: str) -> None:
        if channel.startswith(_POOL):
            if payload != "cancel" and channel in self._watches:
                self._rings[channel] += 1
                self.pass_on(channel.removeprefix(_POOL))
            return
        text = payload if channel == _MAILBOX else channel.removeprefix(_TASK)
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            return  # anybody may send notifications
        for watch in self._tasks.get(int(text), ()):
            watch.ring()
        if channel == _MAILBOX and self._mailboxes:
            self._landed.add(int(text))
            self._news.set()

    # -- the work ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Never returns."""
        await asyncio.gather(self._listen(), self._address(), self._keep_time())

    async def _listen(self) -> None:
        retry_secs = _FIRST_RETRY_SECS
        while self._settings.listen:
            try:
                connection = await connect_async(self._settings.dsn)
                connection.add_notify_handler(lambda notice: self._hear(notice.channel, notice.payload))
                async with connection:
                    retry_secs = _FIRST_RETRY_SECS
                    await self._serve(connection)
            except (PgparkError, psycopg.Error, OSError) as error:
                log.warning("not listening, trying again: %s", one_line(error))
            self._listening = False
            await asyncio.sleep(retry_secs * random.uniform(0.5, 1))
            retry_secs = min(retry_secs * 2, _LONGEST_RETRY_SECS)

    async def _serve(self, connection: AsyncConnection[Any]) -> None:
        """Listens until the connection is lost, which is raised."""
        self._heard = set()
        began = False
        while True:
            self._changed.clear()
            wanted = {_MAILBOX, *self._watches}
            statements = [sql.SQL("listen {}").format(sql.Identifier(name)) for name in wanted - self._heard]
            statements += [sql.SQL("unlisten {}").format(sql.Identifier(name)) for name in self._heard - wanted]
            if statements:
                await connection.execute(sql.SQL("; ").join(statements))
                self._heard = wanted
                self._listening = True
                if self._turn is not None and not self._turn.done():
                    self._turn.set_result(None)
            if not began:
                began = True
                self._ring_all()  # something may have come while nobody listened
            connection.pgconn.consume_input()
            while (notice := connection.pgconn.notifies()) is not None:
                self._hear(notice.relname.decode(errors="replace"), notice.extra.decode(errors="replace"))
            await self._readable_or_changed(connection.fileno())

    async def _readable_or_changed(self, descriptor: int) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            loop.remove_reader(descriptor)

    async def _address(self) -> None:
        """Finds out whose outcomes have landed, and rings the mailboxes that they came to."""
        while True:
            await self._news.wait()
            self._news.clear()
            landed, self._landed = self._landed, set()
            if len(landed) > _MOST_ADDRESSES:
                self._ring_mailboxes()
                continue
            try:
                addresses = await self._connections.run(_addresses(list(landed)))
            except PgparkError as error:
                log.warning("cannot tell whose outcomes have landed: %s", one_line(error))
                self._ring_mailboxes()
                continue
            for tenant, user, session in addresses:
                for (_, wanted_user, wanted_session), watch in self._mailboxes.get(tenant, ()):
                    if wanted_user in (None, user) and wanted_session in (None, session):
                        watch.ring()

    async def _keep_time(self) -> None:
        """Runs the timers while somebody waits."""
        while True:
            await self._company.wait()
            try:
                due_in = (await self._connections.run(calls.maintain())).due_in_secs
            except NotGrantedError as error:
                log.warning("the timers are left to others: %s", one_line(error))
                return
            except PgparkError as error:
                log.debug("the timers did not run: %s", one_line(error))
                due_in = None
            self._fresh.clear()
            await asyncio.sleep(_SHORTEST_TIMER_SECS)
            with contextlib.suppress(asyncio.TimeoutError):  # a newcomer's deadline may be sooner than all we know of
                pause = BACKSTOP_SECS if due_in is None else min(due_in, BACKSTOP_SECS)
                await asyncio.wait_for(self._fresh.wait(), max(pause - _SHORTEST_TIMER_SECS, 0))


def _addresses(task_ids: list[int]) -> Call[list[Address]]:
    """The addresses of those of these tasks that have ended, without their results."""
    statement = sql.SQL(
        "select distinct r.tenant, r.user_id, r.session_id from unnest(cast(%(task_ids)s as bigint[])) w (task_id)"
        " cross join lateral pgpark.park_result(w.task_id) r where r.tenant is not null"
    ).format()
    return Call(
        statement,
        {"task_ids": task_ids},
        lambda rows: [(row["tenant"], row["user_id"], row["session_id"]) for row in rows],
    )


def _remove(watches: dict[Any, list[Any]], key: Any, watch: Any) -> None:
    watches[key].remove(watch)
    if not watches[key]:
        del watches[key]
