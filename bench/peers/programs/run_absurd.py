"""Submits to and works for absurd with its Python SDK: see peers/absurd.py."""

from __future__ import annotations

import os
import sys
from typing import Any

import psycopg
import talk
from absurd_sdk import Absurd

QUEUE = "bench"
BULK = 1000


def install() -> None:
    import absurdctl

    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        connection.execute(absurdctl.BUNDLED_SCHEMA_SQL.encode())
        Absurd(connection, queue_name=QUEUE).create_queue(QUEUE)


def submit() -> None:
    payload = talk.options()["payload"]
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        app = Absurd(connection, queue_name=QUEUE)

        @app.register_task(name="bench")
        def task(_params: Any, _context: Any) -> None: ...

        def one(count: int) -> None:
            for _ in range(count):
                app.spawn("bench", payload)

        def bulk(count: int) -> None:
            for size in talk.chunks(count, BULK):
                with connection.transaction():
                    for _ in range(size):
                        app.spawn("bench", payload)

        talk.serve(one, bulk)


def work() -> None:
    chosen = talk.options()
    handler = talk.handler(chosen)
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        app = Absurd(connection, queue_name=QUEUE)

        @app.register_task(name="bench")
        def task(_params: Any, _context: Any) -> dict[str, bool]:
            handler()
            return {"ok": True}

        talk.wait_for_go()
        app.start_worker(batch_size=chosen["batch"], poll_interval=chosen["poll_secs"])


if __name__ == "__main__":
    {"install": install, "submit": submit, "work": work}[sys.argv[1]]()
