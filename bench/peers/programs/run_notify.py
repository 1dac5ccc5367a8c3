"""Sends notifications, and stamps those that arrive: see peers/notify.py."""

from __future__ import annotations

import asyncio
import os
import sys

import psycopg
import talk
from psycopg.types.json import Jsonb

CHANNEL = "pgpark_bench"
ALONE = f"notify {CHANNEL}"
WITH_ROW = f"""
with noted as (insert into bench_note (payload) values (%s) returning 1)
select pg_notify('{CHANNEL}', '') from noted
"""


def submit() -> None:
    chosen = talk.options()
    payload = Jsonb(chosen["payload"])
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:

        def send(count: int) -> None:
            for _ in range(count):
                if chosen["insert"]:
                    connection.execute(WITH_ROW, [payload])
                else:
                    connection.execute(ALONE)

        talk.serve(send, send)


def listen() -> None:
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        connection.execute(f"listen {CHANNEL}")
        talk.wait_for_go()
        for _ in connection.notifies():
            talk.stamp()


async def listen_async() -> None:
    async with await psycopg.AsyncConnection.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        await connection.execute(f"listen {CHANNEL}")
        await asyncio.to_thread(talk.wait_for_go)
        async for _ in connection.notifies():
            talk.stamp()


if __name__ == "__main__":
    if sys.argv[1] == "submit":
        submit()
    elif talk.options()["listener"] == "asyncio":
        asyncio.run(listen_async())
    else:
        listen()
