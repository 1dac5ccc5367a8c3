"""What is measured: counts that are those of what happened, in any snapshot, and a history by minute."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Database

Open = Callable[[], Database]
BOUNDS = "select pgpark._bounds()"


def metrics(db: Database, pool: str | None = "gpu") -> dict[str, float]:
    """By name and labels as Prometheus writes them, without the pool."""
    return {
        row["metric"] + "".join(f"{{{key}={value}}}" for key, value in row["labels"].items()): row["value"]
        for row in db.rows("select * from pgpark.park_metrics(%s)", pool)
    }


def counters(found: dict[str, float]) -> dict[str, float]:
    ends = ("_total", "_count", "_sum", "_bucket")
    return {name: value for name, value in found.items() if name.split("{")[0].endswith(ends)}


def fold(db: Database) -> None:
    db.rows("select pgpark._fold_tally(pool_id) from pgpark.pool")


def history(db: Database, period: str = "1 hour", step: str = "1 minute", pool: str | None = "gpu") -> list[Any]:
    return db.rows("select * from pgpark.park_history(%s, %s, %s)", pool, period, step)


def test_counts_are_those_of_what_happened_however_they_are_folded(db: Database) -> None:
    """Random work, with retries, losses, releases, cancels and deadlines; compared after each step."""
    db.freeze()
    db.pool(max_units=6, max_bypass=2, lease_secs=20, retry={"max_attempts": 2, "backoff_secs": 3, "max_losses": 2})
    choose = random.Random(7)
    waits: list[float] = []
    runs: list[float] = []
    truth: Counter[str] = Counter()
    since: dict[int, float] = {}
    running: dict[int, tuple[int, float]] = {}  # attempt, start
    now = 0.0
    before: dict[str, float] = {}
    for _ in range(250):
        step = choose.choice(
            ["submit", "submit", "claim", "finish", "finish", "fail", "release", "cancel", "time", "fold", "lapse"]
        )
        if step == "submit":
            task = db.parked(units=choose.randint(1, 4))
            since[task] = now
        elif step == "claim":
            for row in db.claim(max_tasks=choose.randint(1, 4)):
                waits.append(now - since[row["task_id"]])
                running[row["task_id"]] = (row["attempt"], now)
                truth["started"] += 1
        elif step in ("finish", "fail") and running:
            task = choose.choice(list(running))
            attempt, start = running.pop(task)
            runs.append(now - start)
            status = "completed" if step == "finish" else "failed"
            assert db.finish(task, attempt, status)
            state = db.status(task)
            if state["status"] == "delayed":
                truth["retried"] += 1
                since[task] = now + db.value(
                    "select date_part('epoch', run_at - pgpark._now()) from pgpark.task where task_id = %s", task
                )
            else:
                truth[state["status"]] += 1
        elif step == "release" and running:
            task = choose.choice(list(running))
            attempt, start = running.pop(task)
            assert db.value("select pgpark.park_release(%s, %s)", task, attempt)
            since[task] = now
            if db.status(task)["status"] == "dropped":  # it was being cancelled
                truth["dropped"] += 1
                runs.append(now - start)
        elif step == "cancel" and since:
            task = choose.choice(list(since))
            if db.value("select pgpark.park_cancel(%s)", task) == "dropped":
                truth["dropped"] += 1
        elif step == "time":
            moved = choose.choice([0.003, 0.5, 4, 15])
            db.rows("select pgpark.park_heartbeat('gpu', 'w', %s)", list(running))
            db.advance(moved)
            now += moved
            if cancelled := [t for t in running if db.status(t)["status"] == "cancelling"]:
                for task in cancelled:
                    attempt, start = running.pop(task)
                    runs.append(now - start)
                    assert db.finish(task, attempt, "dropped")
                    truth["dropped"] += 1
        elif step == "lapse" and choose.random() < 0.3:
            stopping = {t for t in running if db.status(t)["status"] == "cancelling"}
            db.advance(21)
            now += 21
            db.maintain("gpu")
            for task, (_, start) in running.items():
                truth["lost"] += 1
                since[task] = now
                if db.status(task)["status"] == "dropped":
                    truth["dropped"] += 1
                    if task in stopping:
                        runs.append(now - start)
            running.clear()
        elif step == "fold":
            fold(db)
        found = metrics(db)
        assert found["pgpark_started_total"] == found["pgpark_wait_seconds_count"] == truth["started"]
        for outcome in ("completed", "failed", "expired", "dropped"):
            assert found[f"pgpark_outcomes_total{{outcome={outcome}}}"] == truth[outcome], outcome
        assert found["pgpark_retries_total"] == truth["retried"]
        assert found["pgpark_lost_leases_total"] == truth["lost"]
        assert found["pgpark_run_seconds_count"] == len(runs)
        assert found["pgpark_wait_seconds_sum"] == pytest.approx(sum(waits), rel=1e-5, abs=1e-3)
        assert found["pgpark_run_seconds_sum"] == pytest.approx(sum(runs), rel=1e-5, abs=1e-3)
        assert all(value >= before.get(name, 0) for name, value in counters(found).items())
        before = counters(found)
    assert min(truth.values()) > 0 and len(truth) == 6, truth
    for bound in db.value(BOUNDS):
        label = f"{{le={bound:g}}}"
        assert found["pgpark_wait_seconds_bucket" + label] == sum(wait <= bound + 1e-4 for wait in waits), label
        assert found["pgpark_run_seconds_bucket" + label] == sum(run <= bound + 1e-4 for run in runs), label
    told = history(db, "2 days", "1 day")
    assert sum(row["started"] for row in told) == truth["started"]
    assert sum(row["lost"] for row in told) == truth["lost"]
