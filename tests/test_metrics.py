"""A worker's own metrics, as Prometheus reads them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families as parsed

from pgpark import Worker, WorkerSettings
from pgpark.executors import FunctionExecutor
from pgpark.measures import WorkerMeasures
from pgpark.metrics import WORKER_FAMILIES, serving
from tests.conftest import Database, wait_for


@contextlib.asynccontextmanager
async def served(
    db: Database, handler: Callable[..., Any], **settings: Any
) -> AsyncIterator[Callable[[], dict[str, float]]]:
    """A worker in this process, and its metrics: by name and labels, but for the pool."""
    worker = Worker(WorkerSettings(db.dsn, "gpu", name="w", **settings), FunctionExecutor(handler))
    with serving(worker, "127.0.0.1", 0) as port:
        working = asyncio.create_task(worker.serve())

        def scrape() -> dict[str, float]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                families = list(parsed(answer.read().decode()))
            assert {family.name for family in families} == set(WORKER_FAMILIES)
            assert all(sample.labels.pop("pool") == "gpu" for family in families for sample in family.samples)
            return {
                sample.name.removeprefix("pgpark_worker_")
                + "".join(f" {key}={value}" for key, value in sample.labels.items()): sample.value
                for family in families
                for sample in family.samples
            }

        try:
            yield scrape
        finally:
            worker.stop()
            worker.stop()
            await working


async def eventually(condition: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(wait_for, condition)


def test_a_worker_tells_what_it_holds_and_what_became_of_it(db: Database) -> None:
    db.pool(max_units=10)
    for payload in ("good", "good", "bad", "long"):
        db.parked(payload=payload, units=3 if payload == "long" else 1)

    async def handler(payload: str) -> None:
        if payload == "bad":
            raise ValueError(payload)
        if payload == "long":
            await asyncio.sleep(600)

    async def main() -> None:
        async with served(db, handler, concurrency=5) as scrape:
            await eventually(lambda: db.stats()["completed"] == 2 and db.stats()["failed"] == 1)
            await eventually(lambda: scrape()["running_tasks"] == 1)
            found = scrape()
            assert found["held_units"] == 3
            assert found["concurrency"] == 5
            assert found["claimed_total"] == 4
            assert found["outcomes_total outcome=completed"] == 2
            assert found["outcomes_total outcome=failed"] == 1
            assert found["handler_seconds_count"] == found["handler_seconds_bucket le=+Inf"] == 3
            assert await eventually(lambda: scrape()["heartbeats_total result=sent"])
            assert found["connections"] == 2
            assert found["heartbeat_late_seconds"] == 0

    asyncio.run(main())


def test_a_worker_counts_what_it_has_lost(db: Database) -> None:
    db.pool()
    task = db.parked()
    finish = asyncio.Event()

    async def handler(_payload: Any) -> None:
        await finish.wait()

    async def main() -> None:
        async with served(db, handler) as scrape:
            await eventually(lambda: scrape()["running_tasks"] == 1)
            assert db.finish(task)  # behind its back
            db.rows("select pg_terminate_backend(pid) from pg_stat_activity where query ~ 'park_(maintain|claim)'")
            finish.set()
            await eventually(lambda: scrape()["fenced_total"] == 1)
            await eventually(lambda: scrape()["reconnects_total"] >= 1 and scrape()["connections"] == 2)

    asyncio.run(main())


def test_a_heartbeat_is_late_when_no_answer_comes_in_time() -> None:
    measures = WorkerMeasures()
    measures.beat(1000)
    assert measures.heartbeat_late() == 0
    measures.beat(-30)
    assert 29 < measures.heartbeat_late() < 40
    measures.beat(None)
    assert measures.heartbeat_late() > 29
    assert measures.heartbeats == {"sent": 2, "failed": 1}


def test_a_run_is_counted_in_each_bucket_that_it_fits() -> None:
    measures = WorkerMeasures()
    for secs in (0.005, 0.006, 7, 100_000):
        measures.ran(secs)
    counts = measures.cumulated()
    assert [counts[bound] for bound in ("0.005", "0.01", "5", "10", "86400", "+Inf")] == [1, 2, 2, 3, 3, 4]


def worker(db: Database, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pgpark", "worker", "gpu", "--exec", "true", "--dsn", db.dsn, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment or None)


def test_the_command_serves_metrics_and_says_where(db: Database) -> None:
    db.pool()
    with worker(db, "--metrics-port", "0") as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "metrics on" in line)
            url = re.findall(r"http://127\.0\.0\.1:\d+/metrics", line)[0]
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert b'pgpark_worker_concurrency{pool="gpu"} 8.0' in answer.read()
        finally:
            process.terminate()
        assert process.wait(30) == 0


def test_a_port_that_is_taken_is_one_line(db: Database) -> None:
    db.pool()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with worker(db, "--metrics-port", str(port)) as process:
            _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        2, f"pgpark: cannot serve metrics on 127.0.0.1, port {port}: Address already in use\n",
    )  # fmt: skip


def test_without_the_extra_a_worker_says_what_to_install(db: Database, tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError('gone', name='prometheus_client')\n")
    with worker(db, "--metrics-port", "0", PYTHONPATH=str(tmp_path)) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].endswith(
        "prometheus_client is not installed; --metrics-port needs: pip install 'pgpark[gateway]'"
    )
