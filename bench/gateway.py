"""What tokens and the gateway cost, in turns in one run: python bench/gateway.py

First what the look at the setting pgpark.token adds to a call without a token; then tasks submitted a second by several
clients through park_submit, each on a connection of its own, and through POST of one `pgpark serve`. Medians of rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import httpx
import psycopg
import psycopg.rows

from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate

ROUNDS, CALLS = 21, 10_000
CLIENTS, SECS = 8, 4.0
BEFORE = "select pgpark._caller() <> current_user"
AFTER = f"{BEFORE} or pgpark._token() <> ''"


def look_at_the_setting(connection: psycopg.Connection[psycopg.rows.DictRow]) -> None:
    """_is_stranger(), which every call asks, as it was before there were tokens, and as it is."""
    took: dict[str, list[float]] = {BEFORE: [], AFTER: []}
    loop = "do $$ declare x boolean; begin for i in 1..{} loop x := pgpark._is_stranger(); end loop; end $$"
    for turn in range(2 * ROUNDS):
        body = (BEFORE, AFTER)[turn % 2]
        head = "create or replace function pgpark._is_stranger() returns boolean language sql stable"
        connection.execute(f"{head} as $${body}$$".encode())
        connection.execute(loop.format(100).encode())
        began = time.perf_counter()
        connection.execute(loop.format(CALLS).encode())
        took[body].append((time.perf_counter() - began) / CALLS * 1e6)
    before, after = (statistics.median(took[body]) for body in (BEFORE, AFTER))
    print(f"_is_stranger, asked by every call: {before:.2f} us before, {after:.2f} us with the look")


async def per_second(submit: Callable[[int], AbstractAsyncContextManager[Callable[[], Awaitable[object]]]]) -> float:
    """How often `submit` is done a second by all clients."""
    until, done = time.perf_counter() + SECS, 0

    async def client(number: int) -> None:
        nonlocal done
        async with submit(number) as once:
            while time.perf_counter() < until:
                await once()
                done += 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return done / SECS


async def submits(dsn: str, url: str, token: str) -> None:
    @contextlib.asynccontextmanager
    async def by_sql(_number: int):
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            yield lambda: connection.execute("select * from pgpark.park_submit('gpu', '{\"n\": 1}')")

    @contextlib.asynccontextmanager
    async def by_http(_number: int):
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {token}"}) as client:
            yield lambda: client.post("pools/gpu/tasks", json={"payload": {"n": 1}})

    rates: dict[str, list[float]] = {"park_submit": [], "POST": []}
    for _ in range(3):
        rates["park_submit"].append(await per_second(by_sql))
        rates["POST"].append(await per_second(by_http))
    sql, http = (statistics.median(rates[way]) for way in rates)
    print(f"{CLIENTS} clients: park_submit {sql:.0f} tasks/s, POST {http:.0f} tasks/s ({http / sql:.2f} of it)")


def main() -> None:
    with tempfile.TemporaryDirectory() as home, EmbeddedServer(home).use() as dsn:
        with psycopg.connect(dsn, autocommit=True, row_factory=psycopg.rows.dict_row) as connection:
            migrate(connection)
            connection.execute("select pgpark.park_put_pool('gpu', '{\"max_units\": 24}')")
            look_at_the_setting(connection)
        gateway = subprocess.Popen(
            [sys.executable, "-m", "pgpark", "serve", "--port", "0", "--drain", "0"],
            env=os.environ | {"PGPARK_DSN": dsn},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert gateway.stdout is not None
        url, _, token = gateway.stdout.readline().strip().partition("#token=")
        try:
            asyncio.run(submits(dsn, url, token))
        finally:
            gateway.terminate()
            gateway.wait(30)


if __name__ == "__main__":
    main()
