"""`build_pools`: the pools of a config file as objects, wherever each of them lives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from pgpark.apply import Applied, ordered, reconcile, served
from pgpark.config import Config, load
from pgpark.database import options
from pgpark.errors import UnknownPoolError
from pgpark.places import Place
from pgpark.pool import AsyncPool, Database, Pool
from pgpark.waiting import listening

log = logging.getLogger("pgpark.pools")
PoolT = TypeVar("PoolT", Pool, AsyncPool)
_CLOSE_SECS = 5.0
_CONNECTION_SECS = 10.0  # that a call waits for one of the connections


def build_pools(
    file: str | Path | Mapping[str, Any],
    *,
    dsn: str | None = None,
    home: str | Path | None = None,
    apply: bool = False,
    max_connections: int = 10,
    poll: bool = False,
) -> Pools:
    """The pools of a config file (or of its content as a mapping), by name: `build_pools(file)["gpu"].submit(...)`.

    Pools that are not there yet are created; existing ones are changed only if `apply`, else a warning is logged where
    they differ. dsn, home: where pools live that do not say so themselves (default: PGPARK_DSN, PGPARK_HOME, else the
    embedded server in .pgpark). max_connections: for each database; who waits for a result needs none. poll: for DSNs
    that lead to a pooler in transaction mode: prepare no statements, and look each second instead of listening.
    Close it, or use it in a `with`: embedded servers stop when nobody uses them.
    Raises BadInputError naming file and path, NotMigratedError, DatabaseError.
    """
    return Pools(file, Place.of(dsn, home), apply, max_connections, poll)


def build_pools_async(
    file: str | Path | Mapping[str, Any],
    *,
    dsn: str | None = None,
    home: str | Path | None = None,
    apply: bool = False,
    max_connections: int = 10,
    poll: bool = False,
) -> AsyncPools:
    """The same for asyncio: `async with build_pools_async(file) as pools`, or `await build_pools_async(file)`."""
    return AsyncPools(file, Place.of(dsn, home), apply, max_connections, poll)


class _Opened:
    """Databases that are in use, until `close`, or until nobody holds this any more, or the program ends."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()
        self.close = weakref.finalize(self, _close, os.getpid(), self.stack)


def _close(pid: int, stack: contextlib.ExitStack) -> None:
    if os.getpid() == pid:  # not in a fork, which shares the connections
        stack.close()


class _Named(Mapping[str, PoolT]):
    """Pools by name."""

    _pools: dict[str, PoolT]
    _file: str

    def __getitem__(self, name: str) -> PoolT:
        try:
            return self._pools[name]
        except KeyError:
            there = ", ".join(self._pools) or "none: these pools are not open"
            raise _NoPoolError(f"{self._file}: there is no pool {name!r}; there are {there}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)


class _NoPoolError(UnknownPoolError, KeyError):
    """What a mapping raises, as an error of ours."""

    __str__ = Exception.__str__


class Pools(_Named[Pool]):
    """The pools of a config file by name; made by `build_pools`."""

    def __init__(
        self, file: str | Path | Mapping[str, Any], given: Place, apply: bool, max_connections: int, poll: bool
    ) -> None:
        self._opened = _Opened()

        def connections(dsn: str) -> ConnectionPool[Any]:
            pool: ConnectionPool[Any] = ConnectionPool(
                dsn,
                kwargs=options(dsn, prepare=not poll) | {"row_factory": dict_row},
                min_size=1,
                max_size=max_connections,
                timeout=_CONNECTION_SECS,
                check=ConnectionPool.check_connection,
                open=True,
            )
            self._opened.stack.callback(pool.close, _CLOSE_SECS)
            return pool

        try:
            self._file, self._pools = _open(Pool, self._opened, file, given, apply, poll, connections)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes connections, and stops embedded servers that nobody else uses."""
        self._opened.close()

    def __enter__(self) -> Pools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncPools(_Named[AsyncPool]):
    """The pools of a config file for asyncio; made by `build_pools_async`. They open when awaited or entered."""

    def __init__(
        self, file: str | Path | Mapping[str, Any], given: Place, apply: bool, max_connections: int, poll: bool
    ) -> None:
        self._opened = _Opened()
        self._content, self._given, self._apply, self._max_connections = file, given, apply, max_connections
        self._poll = poll
        self._connections: list[AsyncConnectionPool[Any]] = []
        self._file, self._pools = "config", {}

    async def open(self) -> None:
        """Opens them; see build_pools."""
        try:
            self._file, self._pools = await asyncio.to_thread(
                _open, AsyncPool, self._opened, self._content, self._given, self._apply, self._poll, self._connect
            )
            for pool in self._connections:
                await pool.open()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Closes connections, and stops embedded servers that nobody else uses."""
        for pool in self._connections:
            await pool.close(_CLOSE_SECS)
        await asyncio.to_thread(self._opened.close)

    def _connect(self, dsn: str) -> AsyncConnectionPool[Any]:
        pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
            dsn,
            kwargs=options(dsn, prepare=not self._poll) | {"row_factory": dict_row},
            min_size=1,
            max_size=self._max_connections,
            timeout=_CONNECTION_SECS,
            check=AsyncConnectionPool.check_connection,
            open=False,
        )
        self._connections.append(pool)
        return pool

    def __await__(self) -> Generator[Any, None, AsyncPools]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncPools:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _open(
    kind: type[PoolT],
    opened: _Opened,
    file: str | Path | Mapping[str, Any],
    given: Place,
    apply: bool,
    poll: bool,
    connections: Callable[[str], Any],
) -> tuple[str, dict[str, PoolT]]:
    """Starts what must be started, creates what is missing, and makes the pools."""
    config = load(file)
    where = config.places(given)
    stack = opened.stack
    dsns = {place: stack.enter_context(served(config, where, place)) for place in ordered(where)}
    for pool in reconcile(config, where, dsns, create=True, change=apply):
        _report(config, pool, apply)
    databases = {
        place: Database(dsn, connections(dsn), stack.enter_context(listening(dsn, poll)), opened, poll)
        for place, dsn in dsns.items()
    }
    return config.file, {name: kind(name, databases[place]) for name, place in where.items()}


def _report(config: Config, pool: Applied, apply: bool) -> None:
    if pool.result == "changed" and not apply:
        keys = ", ".join(change.key for change in pool.changes)
        log.warning("pool %s is not as %s says (%s); run: pgpark apply %s", pool.pool, config.file, keys, config.file)
    elif pool.result != "unchanged":
        log.info("pool %s %s in %s", pool.pool, pool.result, pool.place)
