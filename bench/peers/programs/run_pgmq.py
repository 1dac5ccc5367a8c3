"""Submits to and reads from raw pgmq with psycopg: see peers/pgmq.py."""

from __future__ import annotations

import os
import sys

import psycopg
import talk
from psycopg.types.json import Jsonb

QUEUE = "bench"
BULK = 1000
VISIBILITY_SECS = 300


def submit() -> None:
    message = Jsonb(talk.options()["payload"])
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:

        def one(count: int) -> None:
            for _ in range(count):
                connection.execute("select pgmq.send(%s, %s)", [QUEUE, message])

        def bulk(count: int) -> None:
            for size in talk.chunks(count, BULK):
                connection.execute("select pgmq.send_batch(%s, %s)", [QUEUE, [message] * size])

        talk.serve(one, bulk)


def work() -> None:
    chosen = talk.options()
    handler, batch = talk.handler(chosen), chosen["batch"]
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        talk.end_by(connection.cancel)
        talk.wait_for_go()
        while True:
            read = "select msg_id, message from pgmq.read(%s, %s, %s)"
            messages = connection.execute(read, [QUEUE, VISIBILITY_SECS, batch]).fetchall()
            if not messages:
                read = "select msg_id, message from pgmq.read_with_poll(%s, %s, %s, 5, 10)"
                messages = connection.execute(read, [QUEUE, VISIBILITY_SECS, batch]).fetchall()
            for _ in messages:
                handler()
            if batch == 1:
                for number, _ in messages:
                    connection.execute("select pgmq.delete(%s, %s::bigint)", [QUEUE, number])
            elif messages:
                connection.execute("select pgmq.delete(%s, %s::bigint[])", [QUEUE, [number for number, _ in messages]])


if __name__ == "__main__":
    {"submit": submit, "work": work}[sys.argv[1]]()
