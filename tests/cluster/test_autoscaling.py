"""KEDA, played: the query of docker/kubernetes/keda/, asked as the reader that it is asked as, and the replicas that
the ScaledObject makes of its answer, as real worker processes. What KEDA and the horizontal autoscaler do with time
(polling, cooling down, stabilization) is left out: each look acts at once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from tests.cluster.manifests import environment, of_kind, the
from tests.compose import ROOT
from tests.conftest import Database, wait_for
from tests.test_neighbours import acting_as

_TOLERANCE = 0.1  # of the horizontal autoscaler: closer to the target than this, it leaves things as they are


@dataclass
class Autoscaler:
    """Runs as many workers as the ScaledObject of the example would."""

    dsn: str
    reader: psycopg.Connection[Any]
    graces: Iterator[str]  # of the workers, in the order in which they come
    folder: Path
    workers: list[subprocess.Popen[str]] = field(default_factory=list)
    gone: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        return the("example", "ScaledObject", "pgpark-worker")["spec"]

    @property
    def trigger(self) -> dict[str, str]:
        return dict(self.spec["triggers"][0]["metadata"])

    def demand(self) -> float:
        """What the query answers the reader."""
        ((answer,),) = self.reader.execute(self.trigger["query"].encode()).fetchall()
        return float(answer)

    def wanted(self, now: int) -> int:
        """How many replicas KEDA (none or some) and the autoscaler (how many) would want, when there are so many."""
        demand = self.demand()
        if demand <= float(self.trigger["activationTargetQueryValue"]):
            return int(self.spec["minReplicaCount"])
        if not now:
            return 1
        per_worker = demand / float(self.trigger["targetQueryValue"])
        if abs(per_worker / now - 1) <= _TOLERANCE:
            return now
        return min(max(math.ceil(per_worker), 1), int(self.spec["maxReplicaCount"]))

    def look(self) -> int:
        """Starts or stops what is needed; returns how many are left. The oldest go first: those that have the most to
        do."""
        wanted = self.wanted(len(self.workers))
        while len(self.workers) < wanted:
            self.workers.append(self._start())
        while len(self.workers) > wanted:
            self.gone.append(self.workers.pop(0))
            self.gone[-1].send_signal(signal.SIGTERM)
        return wanted

    def settle(self) -> int:
        """Looks until nothing changes."""
        while (before := len(self.workers)) != self.look():
            assert before != len(self.workers)
        return len(self.workers)

    def _start(self) -> subprocess.Popen[str]:
        (container,) = the("example", "Deployment", "pgpark-worker")["spec"]["template"]["spec"]["containers"]
        given = {name: value for name, value in os.environ.items() if not name.startswith("PGPARK_")}
        given |= environment("example", container)
        given |= {
            "PGPARK_DSN": self.dsn,
            "PGPARK_WORKER_HANDLER": "tests.cluster.handlers:wait_for_gate",
            "PGPARK_WORKER_GRACE": next(self.graces),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "pgpark", *container["args"]]
        return subprocess.Popen(command, env=given, cwd=self.folder, text=True, stderr=subprocess.PIPE)


@contextmanager
def autoscaler(db: Database, role: str, folder: Path, graces: Sequence[str] = ()) -> Iterator[Autoscaler]:
    """With the pools of the example."""
    (config,) = (found for name, found in of_kind("example", "ConfigMap").items() if name.startswith("pgpark-pools"))
    for name, pool in json.loads(config["data"]["scheduler-config.json"])["pools"].items():
        db.pool(name, **pool)
    db.rows("select pgpark.park_grant(%s, 'reader')", role)
    with psycopg.connect(acting_as(db.dsn, role), autocommit=True) as reader:
        scaler = Autoscaler(db.dsn, reader, iter(graces), folder)
        try:
            yield scaler
        finally:
            for worker in [*scaler.workers, *scaler.gone]:
                worker.kill()
                worker.communicate()


def test_the_query_answers_a_reader_with_the_units_that_run_and_wait(db: Database, role: str, tmp_path: Path) -> None:
    with autoscaler(db, role, tmp_path) as scaler:
        assert scaler.demand() == 0
        for units in (60, 8, 3):
            db.parked(units=units)
        assert scaler.demand() == 71
        ((task,), rest) = (db.claimed(max_tasks=1), db.claimed())
        assert not rest  # 60 of 64 units run, and 8 do not fit
        assert scaler.demand() == 71
        db.finish(task)
        assert scaler.demand() == 11


def test_tasks_for_later_wake_nobody_until_their_time_has_come(db: Database, role: str, tmp_path: Path) -> None:
    """With no worker there, nobody parks them when they are due: the query must see it by itself."""
    db.freeze()
    with autoscaler(db, role, tmp_path) as scaler:
        db.parked(units=5, run_at=db.after(60))
        assert (scaler.demand(), scaler.wanted(now=0)) == (0, 0)
        db.advance(61)
        assert (scaler.demand(), scaler.wanted(now=0)) == (5, 1)


def test_replicas_are_what_holds_the_demand_and_never_more_than_the_pool_is_large(
    db: Database, role: str, tmp_path: Path
) -> None:
    with autoscaler(db, role, tmp_path) as scaler:
        for submitted, replicas in ((16, 1), (17, 2), (48, 3), (49, 4), (1000, 4)):
            db.rows("select pgpark.park_drop_pool('gpu', force => true)")
            db.pool(max_units=1000)
            db.parked(units=submitted)
            assert scaler.wanted(now=6) == replicas, submitted


def test_workers_come_with_the_work_and_go_with_it_and_nothing_is_lost(db: Database, role: str, tmp_path: Path) -> None:
    gates = [tmp_path / f"gate {number}" for number in range(10)]
    with autoscaler(db, role, tmp_path, graces=("60", "0", "60", "60")) as scaler:
        assert scaler.settle() == 0
        tasks = [db.parked(units=4, payload={"gate": str(gate)}) for gate in gates]
        assert scaler.look() == 1  # from none, there is one first
        assert scaler.settle() == 3  # 40 units, 16 each
        wait_for(lambda: db.stats()["running"] == 10)
        assert scaler.settle() == 3  # what runs is wanted too

        for gate in gates[3:]:
            gate.touch()
        wait_for(lambda: scaler.demand() == 12)
        assert scaler.settle() == 1  # two go: one that may end what it has, and one that may not
        assert scaler.gone[1].wait(60) == 0
        wait_for(lambda: db.stats()["running"] == 3)  # what that one had is with the one that is left
        for gate in gates[:3]:
            gate.touch()
        wait_for(lambda: db.stats()["completed"] == 10)
        assert scaler.settle() == 0
        assert [worker.wait(60) for worker in scaler.gone] == [0] * 3  # else one of them might take the next

        tasks.append(db.parked(units=4, payload={"gate": str(gates[0])}))  # and again from none
        assert scaler.settle() == 1
        wait_for(lambda: db.stats()["completed"] == 11)
        assert scaler.settle() == 0
        assert [worker.wait(60) for worker in scaler.gone] == [0] * 4
    assert [db.outcome(task) for task in tasks] == [("completed", None)] * 11
    assert db.stats()["retried"] == 0
