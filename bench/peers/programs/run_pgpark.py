"""Submits to pgpark, and works for it in a plain loop over its SQL functions: see peers/pgpark.py."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import psycopg
import talk
from psycopg.types.json import Jsonb

POOL = "bench"
BULK = 1000
RESULT = {"ok": True}


def submit() -> None:
    payload = talk.options()["payload"]
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:

        def one(count: int) -> None:
            for _ in range(count):
                connection.execute("select task_id from pgpark.park_submit(%s, %s)", [POOL, Jsonb(payload)])

        def bulk(count: int) -> None:
            for size in talk.chunks(count, BULK):
                tasks = json.dumps([{"payload": payload}] * size)
                connection.execute("select task_id from pgpark.park_submit_many(%s, %s::jsonb)", [POOL, tasks])

        talk.serve(one, bulk)


def work() -> None:
    chosen = talk.options()
    handler, batch = talk.handler(chosen), chosen["batch"]
    name = f"loop-{os.getpid()}"
    next_ = (
        "select task_id, attempt, payload from pgpark.park_next(%s, %s, outcomes => %s::jsonb, max_tasks => %s)"
        " where not fenced"
    )
    outcomes: list[dict[str, Any]] = []
    with psycopg.connect(os.environ["BENCH_DSN"], autocommit=True) as connection:
        connection.execute(f'listen "pgpark.pool.{POOL}"')
        talk.wait_for_go()
        while True:
            tasks = connection.execute(next_, [POOL, name, json.dumps(outcomes), batch]).fetchall()
            outcomes = [{"task_id": task, "attempt": attempt, "result": RESULT} for task, attempt, _ in tasks]
            for _ in tasks:
                handler()
            if not tasks:
                for _ in connection.notifies(timeout=1, stop_after=1):
                    pass


if __name__ == "__main__":
    {"submit": submit, "work": work}[sys.argv[1]]()
