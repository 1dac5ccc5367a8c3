"""Submits to and works for pgqueuer with asyncpg: see peers/pgqueuer.py."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import timedelta

import asyncpg
import talk
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

BULK = 1000


async def install() -> None:
    queries = Queries(AsyncpgDriver(await asyncpg.connect()))
    await queries.install()
    await queries.optimize_autovacuum()


async def submit() -> None:
    payload = json.dumps(talk.options()["payload"]).encode()
    queries = Queries(AsyncpgDriver(await asyncpg.connect()))

    async def one(count: int) -> None:
        for _ in range(count):
            await queries.enqueue("bench", payload)

    async def bulk(count: int) -> None:
        for size in talk.chunks(count, BULK):
            await queries.enqueue(["bench"] * size, [payload] * size, [0] * size)

    await talk.serve_async(one, bulk)


async def work() -> None:
    chosen = talk.options()
    handler = talk.handler(chosen)
    queuer = PgQueuer.from_asyncpg_connection(await asyncpg.connect())

    @queuer.entrypoint("bench")
    async def handle(_job: Job) -> None:
        handler()

    await asyncio.to_thread(talk.wait_for_go)
    await queuer.run(batch_size=chosen["batch"], dequeue_timeout=timedelta(seconds=30))


if __name__ == "__main__":
    uvloop.run({"install": install, "submit": submit, "work": work}[sys.argv[1]]())
    os._exit(0)
