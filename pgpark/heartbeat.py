"""Keeps a worker's leases alive from a thread and a connection of its own, so that a handler that blocks the event loop
does not lose the worker's tasks."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
from psycopg.rows import DictRow

from pgpark import calls, silence
from pgpark.database import connect
from pgpark.errors import UnknownPoolError, one_line

log = logging.getLogger("pgpark.worker")

_RETRY_SECS = 1.0
_FIRST_PATIENCE_SECS, _SHORTEST_PATIENCE_SECS = 10.0, 3.0


class Heartbeat:
    """Sends a heartbeat for the tasks of `held()` every third of the pool's lease, and hands what must stop to `stop`.

    Both speak of attempts by task id. `told` gets the settings of the pool each time, and `beat` the seconds
    to the next once one was answered, None if it was not. All are called from this object's thread.
    """

    def __init__(
        self,
        dsn: str,
        pool: str,
        worker: str,
        held: Callable[[], Mapping[int, int]],
        stop: Callable[[Mapping[int, int]], None],
        *,
        prepare: bool,
        told: Callable[[Mapping[str, Any]], None] = lambda _settings: None,
        beat: Callable[[float | None], None] = lambda _pause: None,
    ) -> None:
        self._dsn, self._pool, self._worker, self._prepare = dsn, pool, worker, prepare
        self._held, self._stop, self._told, self._beaten = held, stop, told, beat
        self._poked = threading.Event()
        self._patience = _FIRST_PATIENCE_SECS  # for an answer: one that comes later is of little use to the leases
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="pgpark-heartbeat", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def poke(self) -> None:
        """Sends the next heartbeat now: a task may have been cancelled."""
        self._poked.set()

    def end(self) -> None:
        """Ends the thread; returns at once."""
        self._ended = True
        self._poked.set()

    def _run(self) -> None:
        while not self._ended:
            try:
                with contextlib.closing(connect(self._dsn, prepare=self._prepare)) as connection:
                    self._beat(connection)
            except UnknownPoolError:
                return  # the worker's own loop says so and ends
            except Exception as error:  # whatever it is, the leases depend on trying again
                log.warning("heartbeat: %s", one_line(error))
                self._beaten(None)
            if not self._ended:
                self._poked.clear()
                self._poked.wait(_RETRY_SECS)

    def _beat(self, connection: psycopg.Connection[DictRow]) -> None:
        bound = 0.0
        while not self._ended:
            self._poked.clear()
            (pool,) = silence.run_on(connection, calls.pools(self._pool), self._patience)
            pause = float(pool.settings["lease_secs"]) / 3
            self._patience = max(pause, _SHORTEST_PATIENCE_SECS)
            if self._prepare and bound != self._patience:
                bound = self._patience
                silence.bound_server(connection, bound)
            self._told(pool.settings)
            held = self._held()
            stop = silence.run_on(connection, calls.heartbeat(self._pool, self._worker, list(held)), self._patience)
            self._beaten(pause)
            if stop:
                self._stop({task_id: held[task_id] for task_id in stop})
            self._poked.wait(pause)
