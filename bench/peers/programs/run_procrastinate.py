"""Submits to and works for procrastinate: see peers/procrastinate.py."""

from __future__ import annotations

import asyncio
import logging
import sys

import talk
from procrastinate import App, PsycopgConnector

BULK = 1000


def make_app(connections: int) -> App:
    return App(connector=PsycopgConnector(min_size=connections, max_size=connections))


async def install() -> None:
    app = make_app(1)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def submit() -> None:
    payload = talk.options()["payload"]
    app = make_app(1)

    @app.task(name="bench")
    async def task(data: str) -> None: ...

    async def one(count: int) -> None:
        for _ in range(count):
            await task.defer_async(**payload)

    async def bulk(count: int) -> None:
        for size in talk.chunks(count, BULK):
            await task.batch_defer_async(*[payload] * size)

    async with app.open_async():
        await talk.serve_async(one, bulk)


async def work() -> None:
    chosen = talk.options()
    handler = talk.handler(chosen)
    app = make_app(chosen["connections"])

    @app.task(name="bench")
    async def task(data: str) -> None:  # noqa: ARG001
        handler()

    async with app.open_async():
        await asyncio.to_thread(talk.wait_for_go)
        await app.run_worker_async(concurrency=chosen["concurrency"], delete_jobs="always")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    asyncio.run({"install": install, "submit": submit, "work": work}[sys.argv[1]]())
