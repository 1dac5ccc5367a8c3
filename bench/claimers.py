"""Worker connections, each in a process of its own, so that one Python's lock does not bound what many do.

A claimer claims up to `batch` tasks, finishes them, and goes on until its time is up. Nothing else: no heartbeats, no
listening, no handler.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

import psycopg
from lots import CLAIM, finish

from pgpark.database import connect
from pgpark.errors import PgparkError, one_line

_PATIENCE_SECS = 120.0


class Order(NamedTuple):
    """What a claimer should do: `seconds` long, `batch` tasks at a time."""

    dsn: str
    pool: str
    batch: int
    seconds: float


class Done(NamedTuple):
    """How many tasks it finished, and when it ended, by time.monotonic(), which processes of a machine share."""

    tasks: int
    ended: float


class Claimers:
    """Processes that wait for orders; made by `claimers`."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for nth in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, f"claimer {nth}"), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, orders: Sequence[Order]) -> float:
        """Lets as many claimers as there are orders work at once; returns tasks per second of all together."""
        pipes = self._pipes[: len(orders)]
        for pipe, order in zip(pipes, orders, strict=True):
            pipe.send(order)
        for pipe in pipes:
            self._hear(pipe)  # it is connected, and has done one task to warm up
        started = time.monotonic()
        for pipe in pipes:
            pipe.send(started)
        done = [self._hear(pipe) for pipe in pipes]
        return sum(one.tasks for one in done) / (max(one.ended for one in done) - started)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends its process
        for process in self._processes:
            process.join(_PATIENCE_SECS)

    def _hear(self, pipe: Connection) -> Done:
        if not pipe.poll(_PATIENCE_SECS):
            raise RuntimeError(f"a claimer said nothing for {_PATIENCE_SECS:g} s")
        said = pipe.recv()
        if isinstance(said, str):
            raise RuntimeError(said)
        assert isinstance(said, Done)
        return said


@contextlib.contextmanager
def claimers(count: int) -> Iterator[Claimers]:
    crew = Claimers(count)
    try:
        yield crew
    finally:
        crew.close()


def _serve(pipe: Connection, name: str) -> None:
    """The life of a claimer process: one order after another until the pipe is closed."""
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            order = pipe.recv()
            try:
                _obey(pipe, name, order)
            except (psycopg.Error, PgparkError, RuntimeError) as error:
                pipe.send(f"{name}: {one_line(error)}")


def _obey(pipe: Connection, name: str, order: Order) -> None:
    with connect(order.dsn) as connection:
        for _ in range(6):  # so that psycopg has prepared both statements
            _claim_and_finish(connection, name, order.pool, order.batch)
        pipe.send(Done(0, 0.0))
        until = pipe.recv() + order.seconds
        tasks = 0
        while time.monotonic() < until:
            done = _claim_and_finish(connection, name, order.pool, order.batch)
            if not done:
                raise RuntimeError(f"pool {order.pool} ran dry after {tasks} tasks of one connection")
            tasks += done
        pipe.send(Done(tasks, time.monotonic()))


def _claim_and_finish(connection: psycopg.Connection[dict[str, object]], name: str, pool: str, batch: int) -> int:
    held = connection.execute(CLAIM, [pool, name, batch]).fetchall()
    if held:
        finish(connection, held)
    return len(held)
