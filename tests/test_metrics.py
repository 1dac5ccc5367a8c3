"""What Prometheus reads of a worker and its pool."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from pgpark import Worker, WorkerSettings, exporter
from pgpark.errors import UnknownPoolError
from pgpark.executors import FunctionExecutor
from pgpark.exporter import PoolNumbers, serving
from pgpark.measures import WorkerMeasures
from pgpark.metrics import POOL_FAMILIES, WORKER_FAMILIES
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


@contextlib.contextmanager
def told(dsn: str) -> Iterator[str]:
    """The address of a worker that has begun, does nothing, and tells of its pool."""
    idle = Worker(WorkerSettings(dsn, "gpu", name="w"), FunctionExecutor(print))
    idle._begun = True
    with serving(idle, "127.0.0.1", 0, PoolNumbers(dsn, "gpu")) as port:
        yield f"http://127.0.0.1:{port}"


def got(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def test_a_worker_tells_what_a_gateway_would_of_its_pool(db: Database) -> None:
    db.pool(max_units=10)
    db.pool("other")
    db.parked(units=3, priority="high")
    with told(db.dsn) as url:
        families = list(parsed(got(url + "/metrics")))
    samples = {(sample.name, *sample.labels.items()): sample.value for family in families for sample in family.samples}
    assert {family.name for family in families} == POOL_FAMILIES.keys() | WORKER_FAMILIES.keys()
    assert {sample.labels["pool"] for family in families for sample in family.samples} == {"gpu"}
    assert samples["pgpark_capacity_units", ("pool", "gpu")] == 10
    assert samples["pgpark_parked_tasks", ("pool", "gpu"), ("priority", "high")] == 1
    assert samples["pgpark_demand_units", ("pool", "gpu")] == 3


def test_a_database_that_does_not_answer_takes_only_the_pools_numbers(
    db: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    db.pool()
    monkeypatch.setattr(exporter, "_FRESH_SECS", 0.0)
    with told(db.dsn) as url:
        assert "pgpark_capacity_units{" in got(url + "/metrics")
        with psycopg.connect(db.dsn) as other:
            other.execute("lock table pgpark.tally")
            monkeypatch.setattr(exporter, "_PATIENCE_SECS", 0.2)
            for _ in range(2):
                text = got(url + "/metrics")
                assert "pgpark_worker_concurrency{" in text
                assert "pgpark_capacity_units" not in text
            assert got(url + "/health") == "alive\n"
            asking = "select count(*) from pg_stat_activity where query ~ 'park_metrics' and state = 'active'"
            assert db.value(asking + " and pid <> pg_backend_pid()") == 1
        assert wait_for(lambda: "pgpark_capacity_units{" in got(url + "/metrics"))
    assert [record.message for record in caplog.records if "no metrics" in record.message] == [
        "no metrics of pool gpu: no answer of the database within 0.2 s"
    ]


def test_what_is_not_there_says_what_is(db: Database) -> None:
    with told(db.dsn) as url, pytest.raises(urllib.error.HTTPError) as refused:
        got(url + "/")
    assert (refused.value.code, refused.value.read()) == (404, b"there are /metrics and /health\n")


def test_scrapes_close_together_ask_the_database_once(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    db.pool()
    monkeypatch.setattr(exporter, "_FRESH_SECS", 600.0)
    with told(db.dsn) as url:
        before = got(url + "/metrics")
        db.parked()
        assert [line for line in got(url + "/metrics").splitlines() if "demand_units" in line] == [
            line for line in before.splitlines() if "demand_units" in line
        ]


def worker(db: Database, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pgpark", "worker", "gpu", "--exec", "true", "--dsn", db.dsn, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment or None)


@pytest.mark.parametrize("options", [[], ["--no-metrics-pool"]])
def test_the_command_serves_metrics_and_says_where(db: Database, options: list[str]) -> None:
    db.pool()
    with worker(db, "--metrics-port", "0", *options) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "metrics on" in line)
            text = got(re.findall(r"http://127\.0\.0\.1:\d+/metrics", line)[0])
            assert 'pgpark_worker_concurrency{pool="gpu"} 8.0' in text
            assert ('pgpark_capacity_units{pool="gpu"}' in text) == (not options)
        finally:
            process.terminate()
        assert process.wait(30) == 0


def test_a_worker_is_well_from_when_it_has_begun(db: Database) -> None:
    """Else a rollout takes a worker that ends for want of a pool for a good one, and an old one away for it."""
    settings = WorkerSettings(dsn=db.dsn, pool="gpu", name="w")
    working = Worker(settings, FunctionExecutor(lambda payload: payload))

    async def work() -> None:
        serving_it = asyncio.create_task(working.serve())
        await asyncio.to_thread(wait_for, lambda: working.begun)
        assert await asyncio.to_thread(got, url + "/health") == "alive\n"
        working.stop()
        await serving_it

    with serving(working, "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}"
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError) as refused:
                got(url + "/health")
            assert refused.value.code == 503
            with contextlib.suppress(UnknownPoolError):
                asyncio.run(working.serve())
        db.pool()
        asyncio.run(work())


def test_a_crowd_at_the_door_keeps_nobody_out() -> None:
    server = exporter._Server("127.0.0.1", 0, None)  # looks at none of them
    with contextlib.ExitStack() as stack:
        stack.callback(server.server_close)
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port), timeout=5))


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
