"""An earlier release as a program of its own, and a database full of tasks that only its functions have touched."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from tests.upgrades.keep import RELEASES, ROOT

# Migrations that no kept release ends with, and why.
NEVER_RELEASED = {
    "0003": "edited before anything was released with it; migrate refuses a database with its first form",
    "0004": "came together with 0005",
    "0007": "came together with 0008",
    "0010": "came together with 0013",
    "0011": "came together with 0013",
    "0012": "came together with 0013",
}
KEPT = sorted(file.stem for file in RELEASES.glob("*.zip"))


@dataclass(frozen=True)
class Release:
    """A kept release, unpacked in a folder."""

    number: str
    folder: Path

    @classmethod
    def unpacked(cls, number: str, folder: Path) -> Release:
        with zipfile.ZipFile(RELEASES / f"{number}.zip") as archive:
            archive.extractall(folder)
        return cls(number, folder)

    def python(self, *arguments: str) -> str:
        """What Python prints that has this release as its pgpark."""
        command = [sys.executable, *arguments]
        done = subprocess.run(command, **self._surroundings(), capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def worker(self, dsn: str, log: Path, *options: str) -> subprocess.Popen[bytes]:
        """A worker process for the pool gpu; what it says goes to `log`."""
        handler = "tests.upgrades.handlers:wait_for_file"
        command = [sys.executable, "-m", "pgpark", "worker", "gpu", "--dsn", dsn, "--handler", handler, *options]
        with log.open("wb") as out:
            return subprocess.Popen(command, **self._surroundings(), stdout=out, stderr=subprocess.STDOUT)

    def _surroundings(self) -> dict[str, Any]:
        path = os.pathsep.join(map(str, dict.fromkeys([self.folder, ROOT])))
        return {"cwd": self.folder, "env": os.environ | {"PYTHONPATH": path}}


PRESENT = Release("present", ROOT)

# Pools, and the first release that knows what they say. Delays and leases are long: the clock is moved later.
_COMMON = {
    "max_units": 8,
    "max_queue_depth": 40,
    "lease_secs": 100_000,
    "retry": {"max_attempts": 3, "backoff_secs": 1000},
}
_NOTIFIER = {"type": "http", "base_url": "http://127.0.0.1:9/"}
POOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpu": ("0001", {}),
    "unlogged": ("0001", {"queue": {"type": "in_memory"}}),
    "fair": ("0002", {"fairness": "tenant", "tenants": {"t": {"weight": 2, "max_units": 7}}}),
    "forgetful": ("0005", {"queue": {"type": "in_memory"}, "mailbox": {"storage": {"type": "in_memory"}}}),
    "tables": (
        "0005",
        {
            "queue": {"type": "postgres_custom", "table": "my_payloads"},
            "mailbox": {"storage": {"type": "postgres", "table": "my_outcomes"}},
        },
    ),
    "stream": ("0005", {"queue": {"type": "yaque"}}),
    "calling": ("0005", {"mailbox": {"notifier": _NOTIFIER}}),
}


@dataclass
class Lot:
    """What a pool held before the upgrade. Task ids by what became of the task; payloads and statuses by id."""

    pool: str
    tasks: dict[str, int] = field(default_factory=dict)
    payloads: dict[int, Any] = field(default_factory=dict)
    statuses: dict[int, DictRow] = field(default_factory=dict)
    has_parts: bool = False


class Filler:
    """Takes tasks of one pool into every state, by the functions of whatever release is in the database."""

    def __init__(self, connection: psycopg.Connection[DictRow], pool: str) -> None:
        self._connection = connection
        self.lot = Lot(pool)

    def fill(self) -> Lot:
        for name in ("completed", "failed", "parts", "running", "cancelling", "retrying", "released"):
            self._submit(name)
            self._claim(self.lot.tasks[name])
        self._value(
            "select pgpark.park_finish(%s, 1, result => %s)", self.lot.tasks["completed"], Jsonb({"answer": 42})
        )
        self._value("select pgpark.park_finish(%s, 1, 'dropped', reason => 'no')", self.lot.tasks["failed"])
        if self._value("select to_regprocedure('pgpark.park_emit(bigint,int,jsonb,int)') is not null"):
            parts = Jsonb([{"content": "to"}, {"content": "ken"}])
            self.lot.has_parts = self._value("select pgpark.park_emit(%s, 1, %s)", self.lot.tasks["parts"], parts)
        assert self._value("select pgpark.park_cancel(%s)", self.lot.tasks["cancelling"]) == "cancelling"
        self._value("select pgpark.park_finish(%s, 1, 'failed', reason => 'again')", self.lot.tasks["retrying"])
        self._value("select pgpark.park_release(%s, 1)", self.lot.tasks["released"])
        self._submit("keyed", "idempotency_key => 'key'")
        self._submit("delayed", "run_at => clock_timestamp() + interval '1000 seconds'")
        self._submit("late", "deadline => clock_timestamp() + interval '1000 seconds'")
        self._submit("in time", "deadline => clock_timestamp() + interval '10 days'")
        for number, priority in enumerate(("low", "normal", "high", "critical")):
            self._submit(priority, f"priority => '{priority}', units => {number + 1}")
        for task in self.lot.payloads:
            (self.lot.statuses[task],) = self._rows("select * from pgpark.park_status(%s)", task)
        return self.lot

    def _submit(self, name: str, *arguments: str) -> None:
        number = len(self.lot.payloads)
        row = ", ".join(["%s, %s", "tenant => 't'", "user_id => 'u'", *arguments])
        (answer,) = self._rows(f"select * from pgpark.park_submit({row})", self.lot.pool, Jsonb({"n": number}))
        assert answer["accepted"], answer
        self.lot.tasks[name] = answer["task_id"]
        self.lot.payloads[answer["task_id"]] = {"n": number}

    def _claim(self, task: int) -> None:
        claimed = self._rows("select task_id from pgpark.park_claim(%s, 'w')", self.lot.pool)
        assert claimed == [{"task_id": task}]

    def _rows(self, statement: str, *parameters: Any) -> list[DictRow]:
        return self._connection.execute(statement.encode(), parameters or None).fetchall()

    def _value(self, statement: str, *parameters: Any) -> Any:
        ((value,),) = [row.values() for row in self._rows(statement, *parameters)]
        return value


def fill(dsn: str, release: Release) -> Iterator[Lot]:
    """Makes every kind of pool that the release knows, with tasks in every state."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        for pool, (since, config) in POOLS.items():
            if release.number >= since:
                connection.execute("select pgpark.park_put_pool(%s, %s)", [pool, Jsonb(_COMMON | config)])
                yield Filler(connection, pool).fill()
