"""What is measured: counts that are those of what happened, in any snapshot, and a history by minute."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
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


def test_counts_never_go_back_while_many_work_fold_and_read(db: Database, connect: Open) -> None:
    """Each reading is of one moment: what started is what has a wait, and no less than before."""
    db.pool(max_units=1000)
    rounds, workers = 60, 3
    db.rows(
        "select count(*) from pgpark.park_submit_many('gpu', (select jsonb_agg('{\"payload\": 1}'::jsonb)"
        " from generate_series(1, %s)))",
        rounds * workers * 2,
    )
    over = threading.Event()
    failures: list[BaseException] = []

    def work(session: Database, name: str) -> None:
        for number in range(rounds):
            for row in session.claim(worker=name, max_tasks=2):
                session.finish(row["task_id"], status="completed" if number % 3 else "dropped")
            if number % 5 == 0:
                fold(session)

    def read(session: Database) -> None:
        before: dict[str, float] = {}
        while not over.is_set():
            found = counters(metrics(session))
            assert all(value >= before.get(name, 0) for name, value in found.items())
            assert found["pgpark_started_total"] == found["pgpark_wait_seconds_bucket{le=+Inf}"]
            ended = sum(found[f"pgpark_outcomes_total{{outcome={kind}}}"] for kind in ("completed", "dropped"))
            assert ended == found["pgpark_run_seconds_count"] <= found["pgpark_started_total"]
            before = found

    def guarded(job: Callable[..., None], *arguments: Any) -> None:
        try:
            job(*arguments)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=guarded, args=(read, connect())) for _ in range(2)]
    hands = [threading.Thread(target=guarded, args=(work, connect(), f"w{n}")) for n in range(workers)]
    for thread in (*readers, *hands):
        thread.start()
    for thread in hands:
        thread.join()
    over.set()
    for thread in readers:
        thread.join()
    assert failures == []
    found = metrics(db)
    assert found["pgpark_started_total"] == found["pgpark_run_seconds_count"] == rounds * workers * 2
    assert db.value("select sum(units) from pgpark.tally") == 0


def test_history_has_each_minute_as_it_was_also_when_it_is_folded_and_gone(db: Database) -> None:
    db.freeze()
    db.connection.execute("update pgpark._test_clock set now = '2030-01-01 12:00:00Z'")
    db.pool(max_units=100)
    for minute, wait in enumerate((1, 20, 100)):
        for run in (2, 4, 6):
            task = db.parked()
            db.advance(wait / 10)
            assert db.claimed() == [task]
            db.advance(run)
            db.finish(task)
        if minute == 1:
            db.rows(
                "select count(*) from pgpark.park_submit('gpu', '1', deadline => pgpark._now() + interval '1 second')"
            )
            db.advance(2)
            db.maintain("gpu")
        db.connection.execute(
            "update pgpark._test_clock set now = '2030-01-01 12:00:00Z'::timestamptz + %s * interval '1 minute'",
            [minute + 1],
        )
        before = history(db)
        fold(db)
        assert history(db) == before
        told = db.value("select count(*) from pgpark.history")
        assert told == minute + 1, "a minute that is over is told once"
    rows = [row for row in history(db) if row["started"] or row["expired"]]
    assert [(row["at"].minute, row["started"], row["completed"], row["expired"]) for row in rows] == [
        (0, 3, 3, 0), (1, 3, 3, 1), (2, 3, 3, 0),
    ]  # fmt: skip
    assert [row["wait_mean_secs"] for row in rows] == pytest.approx([0.1, 2, 10])
    assert [row["run_mean_secs"] for row in rows] == pytest.approx([4, 4, 4])
    # Of three waits in one bucket the median lies in its middle, and of runs of 2, 4 and 6 s in that from 2.5 to 5.
    assert [row["wait_p50_secs"] for row in rows] == pytest.approx([0.075, 1.75, 7.5])
    assert [row["run_p50_secs"] for row in rows] == pytest.approx([3.75, 3.75, 3.75])
    (half,) = history(db, "10 minutes", "10 minutes")
    assert (half["started"], half["completed"], half["wait_mean_secs"]) == (9, 9, pytest.approx(12.1 / 3))


def test_history_has_a_row_for_each_step_and_pool_also_where_nothing_was(db: Database) -> None:
    db.pool("gpu")
    db.pool("cpu")
    rows = history(db, "3 hours", "5 minutes", pool=None)
    assert [row["pool"] for row in rows] == ["cpu"] * 36 + ["gpu"] * 36
    times = [row["at"] for row in rows[:36]]
    assert {(after - before).total_seconds() for before, after in itertools.pairwise(times)} == {300}
    assert times[-1] <= db.after(0) < times[-1] + (times[1] - times[0])
    assert all(row["started"] == 0 and row["wait_p50_secs"] is None for row in rows)


def test_the_history_of_a_pool_reads_no_rows_of_others(db: Database) -> None:
    db.freeze()
    for name in ("cpu", "gpu", "tpu"):
        db.pool(name)
    db.connection.execute(
        "insert into pgpark.history (pool_id, minute, completed, failed, expired, dropped, retried, lost, counts,"
        " wait_secs, run_secs) select p.pool_id, pgpark._minute(pgpark._now()) - n * interval '1 minute',"
        " 1, 0, 0, 0, 0, 0, array_fill(1::bigint, array[44]), 1, 1 from pgpark.pool p, generate_series(1, 2000) n"
    )
    db.connection.execute("vacuum analyze pgpark.history")
    for name in ("cpu", "gpu", "tpu"):
        history(db, pool=name)  # so that what the session caches is there
        with db.connection.transaction():
            seen = "select idx_tup_fetch from pg_stat_xact_user_tables where relid = 'pgpark.history'::regclass"
            before = db.value(seen)
            assert sum(row["completed"] for row in history(db, pool=name)) == 59
            assert db.value(seen) - before < 100, name


@pytest.mark.parametrize(
    ("period", "step", "complaint"),
    [
        ("1 hour", "10 seconds", "step must be whole minutes"),
        ("1 hour", "90 seconds", "step must be whole minutes"),
        ("1 hour", None, "step must be whole minutes"),
        ("3 days", "1 hour", "period must be more than nothing"),
        ("-1 hour", "1 minute", "period must be more than nothing"),
    ],
)
def test_history_says_what_is_wrong_with_a_period(db: Database, period: str, step: str | None, complaint: str) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=complaint):
        db.rows("select * from pgpark.park_history('gpu', %s, %s)", period, step)


def test_history_is_forgotten_after_two_days_and_totals_are_not(db: Database) -> None:
    db.freeze()
    db.pool()
    db.finish(db.parked() and db.claimed()[0])
    db.advance(120)
    fold(db)
    assert db.value("select count(*) from pgpark.history") == 1
    db.advance(2 * 86400 - 240)
    db.maintain("gpu")
    assert db.value("select count(*) from pgpark.history") == 1
    db.advance(240)
    db.maintain("gpu")
    assert db.value("select count(*) from pgpark.history") == 0
    assert metrics(db)["pgpark_started_total"] == 1


def test_a_task_waits_from_when_it_could_start(db: Database) -> None:
    """By its run_at, the end of its backoff, or when it parked again; not from its submit."""
    db.freeze()
    db.pool(max_units=1, lease_secs=600, retry={"max_attempts": 2, "backoff_secs": 100, "backoff_factor": 1})
    task = db.parked(run_at=db.after(1000))
    db.advance(1007)
    assert db.claimed() == [task]  # waited 7
    db.advance(50)
    db.rows("select pgpark.park_release(%s, 1)", task)
    db.advance(5)
    assert db.claimed() == [task]  # 5
    db.finish(task, 2, "failed")
    due = db.value("select run_at - pgpark._now() from pgpark.task").total_seconds()
    db.advance(due + 3)
    assert db.claimed() == [task]  # 3
    db.advance(601)
    assert db.maintain("gpu")["reclaimed"] == 1
    db.advance(2)
    assert metrics(db)["pgpark_oldest_parked_seconds"] == 2
    assert db.claimed() == [task]  # 2
    assert metrics(db)["pgpark_wait_seconds_sum"] == pytest.approx(7 + 5 + 3 + 2, abs=1e-3)


@pytest.mark.parametrize("fairness", ["fifo", "tenant"])
def test_gauges_are_those_of_the_tasks(db: Database, fairness: str) -> None:
    db.freeze()
    db.pool(max_units=10, fairness=fairness, tenants={"limited": {"max_units": 2}})
    for priority, units, tenant in [("high", 6, "a"), ("normal", 5, "b"), ("low", 3, "a"), ("low", 2, "limited")]:
        db.parked(priority=priority, units=units, tenant=tenant)
        db.advance(1)
    db.parked(run_at=db.after(60))
    db.claim()
    found = metrics(db)
    assert found["pgpark_used_units"] == 6
    assert db.value("select pgpark.park_demand('gpu')") == found["pgpark_demand_units"] == 6 + 5 + 3 + 2
    assert [found[f"pgpark_parked_tasks{{priority={word}}}"] for word in ("low", "normal", "high", "critical")] == [
        2,
        1,
        0,
        0,
    ]
    assert (found["pgpark_running_tasks"], found["pgpark_delayed_tasks"], found["pgpark_workers"]) == (1, 1, 1)
    assert found["pgpark_oldest_parked_seconds"] == 3
    assert found["pgpark_overdue_seconds"] == 0
    db.advance(75)
    assert metrics(db)["pgpark_overdue_seconds"] == 45, "a lease of 30 seconds has lapsed"


def test_what_is_parked_is_counted_by_priority_up_to_a_bound_for_each(db: Database) -> None:
    """Also where one lane alone has more of a priority than are counted."""
    db.pool(max_units=10, tenants={"acme": {"max_units": 1}, "globex": {"max_units": 1}})
    for tenant, priority, tasks in (("acme", "critical", 7), ("globex", "low", 3), (None, "low", 1), (None, "high", 6)):
        for _ in range(tasks):
            db.parked(tenant=tenant, priority=priority)
    counted = "select pgpark._parked_by_priority(pool_id, %s) from pgpark.pool"
    assert db.value(counted, 5) == [4, 0, 5, 5]
    assert db.value(counted, 100) == [4, 0, 6, 7]


def test_a_tenant_at_its_limit_demands_no_more(db: Database) -> None:
    """However much it has parked: no worker more would start any of that."""
    db.pool(max_units=100, tenants={"acme": {"max_units": 5}, "globex": {"max_units": 8}, "": {"max_units": 7}})
    demand = "select pgpark.park_demand('gpu')"
    for _ in range(20):
        db.parked(tenant="acme", units=2, priority="high")
        db.parked(tenant="other", units=2)
    assert db.value(demand) == 5 + 40
    assert len(db.claim(max_tasks=2)) == 2
    assert db.value(demand) == 4 + 1 + 40
    db.parked(tenant="globex", units=3)
    db.parked(units=4), db.parked(units=5)
    assert db.value(demand) == metrics(db)["pgpark_demand_units"] == 4 + 1 + 40 + 3 + 7
    db.pool(max_units=100, tenants={})
    assert db.value(demand) == 40 + 40 + 3 + 9


def test_callbacks_are_looked_through_only_for_pools_that_send_some(db: Database) -> None:
    notifier = {"type": "http", "base_url": "http://localhost:1"}
    for name in ("cpu", "gpu", "tpu"):
        db.pool(name, mailbox={"notifier": notifier} if name == "gpu" else {})
    db.value("select pgpark.park_cancel(%s)", db.parked(tenant="t"))
    scans = "select idx_scan + seq_scan from pg_stat_xact_user_tables where relid = 'pgmq.q_pgpark_outbox'::regclass"
    with db.connection.transaction():
        before = db.value(scans)
        assert [metrics(db, name)["pgpark_callbacks_due"] for name in ("cpu", "gpu", "tpu")] == [0, 1, 0]
        assert db.value(scans) - before == 1


def test_callbacks_are_counted_by_what_came_of_them(db: Database) -> None:
    db.pool(mailbox={"notifier": {"type": "http", "base_url": "http://localhost:1", "max_attempts": 2}})
    for _ in range(3):
        db.parked(tenant="t")
    for task in db.claimed():
        db.finish(task)
    assert metrics(db)["pgpark_callbacks_due"] == 3
    first, second, third = (row["callback_id"] for row in db.rows("select * from pgpark.park_callbacks(3)"))
    done = "select pgpark.park_callback_done(%s, 1, %s)"
    assert [db.value(done, *answer) for answer in ((first, 200), (second, 503), (third, 400))] == [
        "delivered",
        "retry",
        "dead",
    ]
    assert db.value(done, third, 200) == "delivered", "late, but it has arrived"
    found = metrics(db)
    assert [found[f"pgpark_callbacks_total{{result={word}}}"] for word in ("delivered", "retry", "dead")] == [2, 1, 1]
    assert found["pgpark_callbacks_due"] == 0


def test_rows_of_an_older_release_count_and_have_no_history(db: Database) -> None:
    """As a migration finds them: without a time, and without waits."""
    db.pool()
    db.rows("insert into pgpark.tally (pool_id, completed, retried) select pool_id, 40, 2 from pgpark.pool returning 1")
    db.finish(db.parked() and db.claimed()[0])
    for _ in range(2):
        found = metrics(db)
        assert found["pgpark_outcomes_total{outcome=completed}"] == db.stats()["completed"] == 41
        assert found["pgpark_retries_total"] == 2
        assert sum(row["completed"] for row in history(db)) == 1
        fold(db)


def test_a_pool_that_is_dropped_takes_its_history_along(db: Database) -> None:
    db.freeze()
    db.pool()
    db.finish(db.parked() and db.claimed()[0])
    db.advance(61)
    fold(db)
    db.rows("select pgpark.park_drop_pool('gpu')")
    assert db.value("select (select count(*) from pgpark.history) + (select count(*) from pgpark.tally)") == 0


def test_what_reads_measures_is_not_compiled_at_each_call(db: Database) -> None:
    """Before PostgreSQL 18 that took seconds: plans without sequential scans seem dear to it."""
    settings = "select proconfig from pg_proc where pronamespace = 'pgpark'::regnamespace and proname = %s"
    for name in ("park_metrics", "park_history", "park_demand", "_fold_tally"):
        assert "jit=off" in db.value(settings, name), name
