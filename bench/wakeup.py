"""How soon an idle worker starts a task: from the call of submit, with its commit, to the first line of the handler.

Run: python bench/wakeup.py [--tasks 300] [--dsn DSN]; without a DSN on an embedded server of its own, fsync on. A
worker process waits on LISTEN with a poll of ten minutes; tasks are submitted one by one at random moments. For
comparison, in the same run: the time from a bare NOTIFY to its arrival in a listening connection of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
from server import chosen_server

from pgpark import Client, calls
from pgpark.database import connect
from pgpark.migrate import migrate

POOL = "pgpark_bench_wakeup"


async def stamp(_payload: Any) -> int:
    """The handler: when it started."""
    return time.time_ns()


def bare_notify(dsn: str, count: int) -> list[float]:
    """Milliseconds from the commit of a NOTIFY to its arrival elsewhere."""
    took: list[float] = []
    arrived = threading.Event()
    with connect(dsn) as sender, connect(dsn) as listener:
        listener.execute("listen pgpark_bench")

        def listen() -> None:
            for _ in listener.notifies(stop_after=count):
                took[-1] = (time.perf_counter() - took[-1]) * 1000
                arrived.set()

        thread = threading.Thread(target=listen)
        thread.start()
        for _ in range(count):
            pause()
            arrived.clear()
            took.append(time.perf_counter())
            sender.execute("notify pgpark_bench")
            arrived.wait()
        thread.join()
    return took


def wake_ups(dsn: str, count: int) -> list[float]:
    """Milliseconds from calling submit, its commit included, to the start of the handler."""
    took = []
    command = [sys.executable, "-m", "pgpark", "worker", POOL, "--handler", "wakeup:stamp", "--poll-secs", "600"]
    environment = os.environ | {"PGPARK_DSN": dsn}
    worker = subprocess.Popen(command, env=environment, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    try:
        with Client(dsn) as park:
            park.run(calls.put_pool(POOL, {"max_units": 8}))
            wait_until(lambda: park.run(calls.stats(POOL))[0].workers == 1)
            for _ in range(count):
                pause()
                before = time.time_ns()
                task = park.run(calls.submit(POOL, {}, units=8)).task_id
                assert task is not None
                message = park.wait(task, timeout=30)
                assert message is not None
                took.append((message.payload - before) / 1e6)
    finally:
        worker.terminate()
        worker.wait()
        with contextlib.suppress(psycopg.Error), connect(dsn) as connection:
            calls.run_on(connection, calls.drop_pool(POOL, force=True))
    return took


def pause() -> None:
    time.sleep(random.uniform(0.005, 0.04))


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "the worker did not start"
        time.sleep(0.02)


def line(what: str, took: list[float]) -> str:
    ranked = sorted(took)
    return f"{what:48}{statistics.median(ranked):8.2f}{ranked[int(len(ranked) * 0.99)]:8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dsn", default=os.environ.get("PGPARK_DSN"))
    parser.add_argument("--tasks", type=int, default=300)
    arguments = parser.parse_args()
    with chosen_server(arguments.dsn) as dsn:
        with connect(dsn) as connection:
            migrate(connection)
            version = connection.info.parameter_status("server_version")
        print(f"PostgreSQL {version}, {os.cpu_count()} cores, {arguments.tasks} tasks")
        print(f"{'milliseconds':48}  median     p99")
        print(line("submit called to handler started, idle worker", wake_ups(dsn, arguments.tasks)))
        print(line("bare NOTIFY to its arrival", bare_notify(dsn, arguments.tasks)))


if __name__ == "__main__":
    main()
