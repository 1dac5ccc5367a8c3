"""A lot under load: clients that submit, worker processes, a look at the capacity every few milliseconds, and at the
end the audit that every scenario ends in."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg

from pgpark import Client, PgparkError, calls
from pgpark.database import connect
from pgpark.migrate import migrate
from tests import accounts
from tests.conftest import wait_for

ROOT = Path(__file__).parents[2]
# Leases short enough to lapse while one watches; lost attempts cost nothing here, but for poison.
CONFIG: dict[str, Any] = {
    "max_units": 12,
    "audit": True,
    "max_queue_depth": 40,
    "lease_secs": 1.5,
    "max_bypass": 3,
    "retry": {"max_attempts": 3, "max_losses": 1000, "backoff_secs": 0.1},
}
_SETTLE_SECS = 120


class Worker:
    """`pgpark worker gpu`, as a process."""

    def __init__(self, dsn: str, name: str, *options: str, **environment: str) -> None:
        self.name = name
        self.dsn = dsn
        command = [sys.executable, "-m", "pgpark", "worker", "gpu", "--name", name, *options]
        self._log = tempfile.TemporaryFile("a+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=os.environ | {"PGPARK_DSN": dsn} | environment, stderr=self._log, cwd=ROOT
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def logged(self) -> str:
        """All that it logged."""
        self._log.seek(0)
        return self._log.read()

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()


class Submitter(threading.Thread):
    """Submits tasks of 1 to 6 units, each until it is known to be accepted, over whatever connection there is."""

    def __init__(self, dsn: str, name: str, secs: float, extra: Callable[[int], dict[str, Any]]) -> None:
        super().__init__(daemon=True)
        self._dsn, self._name, self._secs, self._extra = dsn, name, secs, extra
        self._random = random.Random(name)
        self.accepted: dict[int, int] = {}  # the number in the payload, by task
        self.lost = 0  # connections
        self.halt = threading.Event()

    def run(self) -> None:
        numbers = itertools.count(1)
        number = next(numbers)
        asked = False  # for this number, and the answer was lost
        while asked or not self.halt.is_set():
            try:
                with Client(self._dsn) as park:
                    while asked or not self.halt.is_set():
                        asked = True
                        if self._submit(park, number):
                            number = next(numbers)
                        asked = False
            except (PgparkError, psycopg.Error):
                self.lost += 1
                time.sleep(0.05)

    def _submit(self, park: Client, number: int) -> bool:
        payload = {"n": number, "secs": self._random.uniform(0, 2 * self._secs)} | self._extra(number)
        submitted = park.run(
            calls.submit(
                "gpu",
                payload,
                units=1 + number % 6,
                priority=("low", "normal", "high", "critical")[number % 4],
                tenant=self._name,
                idempotency_key=f"{self._name}-{number}",
            )
        )
        if submitted.task_id is None:  # the lot is full
            self.halt.wait(0.1)
            return False
        self.accepted[submitted.task_id] = number
        return True


class Observer(threading.Thread):
    """Looks again and again whether more units run than there are."""

    LOOK = """
        select coalesce(sum(t.units), 0), p.max_units
        from pgpark.pool p
        left join pgpark.task t on t.pool_id = p.pool_id and t.state in ('running', 'cancelling')
        group by p.pool_id"""

    def __init__(self, dsn: str) -> None:
        super().__init__(daemon=True)
        self._dsn = dsn
        self.looks = 0
        self.over: list[tuple[Any, ...]] = []
        self.most = 0
        self.halt = threading.Event()

    def run(self) -> None:
        while not self.halt.wait(0.1):
            with contextlib.suppress(psycopg.Error), psycopg.connect(self._dsn, autocommit=True) as connection:
                while not self.halt.wait(0.03):
                    rows = connection.execute(self.LOOK).fetchall()
                    self.looks += 1
                    self.most = max([self.most, *(int(used) for used, _ in rows)])
                    self.over += [row for row in rows if row[0] > row[1]]


class Lot:
    """A pool `gpu` under load. dsn: how the clients and the audit reach it; worker_dsn: how the workers do."""

    def __init__(
        self,
        dsn: str,
        *,
        worker_dsn: str | None = None,
        workers: int = 2,
        submitters: int = 2,
        secs: float = 0.1,
        handler: str = "work",
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        extra: Callable[[int], dict[str, Any]] = lambda _number: {},
        config: dict[str, Any] | None = None,
    ) -> None:
        self.dsn = dsn
        self.worker_dsn = worker_dsn or dsn
        self.events: Counter[str] = Counter()
        self.gone: list[str] = []  # workers that ended without being killed
        self._options = ("--handler", f"tests.chaos.handlers:{handler}", *options)
        self._environment = environment or {}
        with contextlib.closing(connect(dsn)) as connection:
            migrate(connection)
            calls.run_on(connection, calls.put_pool("gpu", CONFIG | (config or {})))
        self._observer = Observer(dsn)
        self._submitters = [Submitter(dsn, f"s{n}", secs, extra) for n in range(submitters)]
        self.workers = [self.worker(f"w{n}") for n in range(workers)]

    def worker(self, name: str, dsn: str | None = None) -> Worker:
        """Another worker, for the caller to put among `workers`."""
        return Worker(dsn or self.worker_dsn, name, *self._options, **self._environment)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Lot]:
        """Under load; on leaving, all are stopped, whatever happened."""
        try:
            for thread in (self._observer, *self._submitters):
                thread.start()
            wait_for(lambda: self._present() >= {worker.name for worker in self.workers}, what="for the workers")
            self.progress()
            yield self
        finally:
            for submitter in self._submitters:
                submitter.halt.set()
            self._observer.halt.set()
            for worker in self.workers:
                worker.kill()

    def _present(self) -> set[str]:
        with psycopg.connect(self.dsn) as connection:
            return {str(name) for (name,) in connection.execute("select worker from pgpark.worker").fetchall()}

    def ended(self) -> int | None:
        """How many tasks have ended; None while nobody can tell."""
        with contextlib.suppress(psycopg.Error), psycopg.connect(self.dsn, connect_timeout=5) as connection:
            return int(connection.execute("select count(*) from pgpark.mailbox").fetchall()[0][0])
        return None

    def replace_dead(self) -> None:
        """Starts a new worker for each that has died, of the same name, as a supervisor would."""
        for place, worker in enumerate(self.workers):
            if not worker.alive:
                if worker.process.returncode != -signal.SIGKILL:
                    self.gone.append(f"{worker.name} ended with {worker.process.returncode}: {worker.logged()[-500:]}")
                self.events["workers replaced"] += 1
                self.workers[place] = self.worker(worker.name, worker.dsn)

    def progress(self, tasks: int = 1, seconds: float = 60) -> None:
        """Waits until so many more tasks have ended."""
        before: list[int] = []

        def enough() -> bool:
            self.replace_dead()
            ended = self.ended()
            before.extend([] if before or ended is None else [ended])
            return ended is not None and ended >= before[0] + tasks

        wait_for(enough, seconds, "for tasks to end")

    def break_for(self, minutes: float, event: Callable[[], None], *, at_least: int = 3) -> None:
        """Does it again and again, each time after some tasks have ended since the last time."""
        until = time.monotonic() + 60 * minutes
        done = 0
        while done < at_least or time.monotonic() < until:
            event()
            done += 1
            self.progress(random.randint(1, 5))

    def settle(self, *, losses: bool = False) -> Counter[str]:
        """No more is submitted and nothing broken: all tasks end, the workers leave when they are asked to, and the
        accounts balance. Returns how many ended in which way, and what was survived.

        losses: tasks may end otherwise than completed, and workers by themselves.
        """
        for submitter in self._submitters:
            submitter.halt.set()
            submitter.join(30)
            assert not submitter.is_alive(), "a client hangs"
        accepted = {task: number for submitter in self._submitters for task, number in submitter.accepted.items()}
        wait_for(lambda: self.replace_dead() or self._empty(), _SETTLE_SECS, "for all tasks to end")
        for worker in self.workers:
            worker.process.send_signal(signal.SIGTERM)
        codes = {worker.process.wait(30) for worker in self.workers}
        assert losses or codes <= {0, -signal.SIGTERM}, (
            f"{codes}; one that has only just been started is not ready to leave"
        )
        self._observer.halt.set()
        self._observer.join(10)
        assert self._observer.looks, "nobody looked"
        assert not self._observer.over, f"over capacity: {self._observer.over[:3]}"
        faults = accounts.faults(self.dsn)
        assert faults == [], f"{len(faults)} faults: {faults[:3]}"
        with contextlib.closing(connect(self.dsn)) as connection:
            assert calls.run_on(connection, calls.doctor()) == []
        outcomes = accounts.outcomes(self.dsn, accepted)
        self._check_answers(accepted)
        assert losses or outcomes == {"completed": len(accepted)}, outcomes
        assert losses or not self.gone, self.gone
        found = Counter({"tasks": len(accepted), "most units": self._observer.most, **outcomes, **self.events})
        found["connections lost by clients"] = sum(submitter.lost for submitter in self._submitters)
        sys.stdout.write(f"\n  {', '.join(f'{what}: {count}' for what, count in found.items() if count)}\n")
        return found

    def _empty(self) -> bool:
        with psycopg.connect(self.dsn) as connection:
            return connection.execute("select from pgpark.task limit 1").rowcount == 0

    def _check_answers(self, accepted: dict[int, int]) -> None:
        with psycopg.connect(self.dsn) as connection:
            rows = connection.execute(
                "select task_id, payload from pgpark.mailbox where status = 'completed'"
            ).fetchall()
        wrong = [(task, payload) for task, payload in rows if payload != {"n": accepted[task]}]
        assert not wrong, f"another task's answer: {wrong[:3]}"
