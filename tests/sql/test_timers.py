"""Leases, retries, run timeouts, deadlines and retention, with a clock that stands still until it is moved."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Database

pytestmark = pytest.mark.every_backend


@pytest.fixture
def frozen(db: Database) -> Database:
    db.freeze()
    return db


def running(db: Database, **arguments: Any) -> int:
    task = db.parked(**arguments)
    assert db.claimed() == [task]
    return task


def heartbeat(db: Database, tasks: list[int], worker: str = "w", pool: str = "gpu") -> set[int]:
    rows = db.rows("select * from pgpark.park_heartbeat(%s, %s, %s)", pool, worker, tasks)
    return {row["park_heartbeat"] for row in rows}


# -- leases ----------------------------------------------------------------------------------------------------------


def test_a_lapsed_lease_parks_the_task_in_its_old_place(frozen: Database) -> None:
    frozen.pool(max_units=1, lease_secs=30)
    first = running(frozen)
    second = frozen.parked()
    frozen.advance(29.9)
    assert frozen.claimed(worker="other") == []
    frozen.advance(0.1)
    assert [(row["task_id"], row["attempt"]) for row in frozen.claim(worker="other")] == [(first, 2)]
    assert not frozen.finish(first, attempt=1)
    assert frozen.finish(first, attempt=2)
    assert frozen.claimed() == [second]


def test_a_heartbeat_renews_exactly_the_named_tasks(frozen: Database) -> None:
    frozen.pool(lease_secs=30)
    kept, forgotten = frozen.parked(), frozen.parked()
    frozen.claim()
    frozen.advance(20)
    assert heartbeat(frozen, [kept]) == set()
    frozen.advance(20)
    assert frozen.maintain()["reclaimed"] == 1
    assert frozen.status(kept)["status"] == "running"
    assert frozen.status(forgotten)["status"] == "parked"


def test_a_heartbeat_names_what_is_no_longer_the_workers_own(frozen: Database) -> None:
    frozen.pool(lease_secs=30)
    mine, lost, done = running(frozen), running(frozen), running(frozen)
    frozen.finish(done)
    frozen.value("select pgpark.park_release(%s, 1)", lost)
    frozen.claim(worker="other")
    assert heartbeat(frozen, [mine, lost, done, 999]) == {lost, done, 999}


def test_an_empty_heartbeat_shows_the_worker_alive(frozen: Database) -> None:
    frozen.pool()
    assert frozen.stats()["workers"] == 0
    assert heartbeat(frozen, []) == set()
    assert frozen.stats()["workers"] == 1
    frozen.advance(3600)
    assert frozen.stats()["workers"] == 0


def test_a_heartbeat_saves_a_lease_that_lapsed_but_was_not_taken(frozen: Database) -> None:
    frozen.pool(lease_secs=30)
    task = running(frozen)
    frozen.advance(100)
    assert heartbeat(frozen, [task]) == set()
    assert frozen.maintain()["reclaimed"] == 0


def test_a_task_that_loses_its_workers_again_and_again_is_dropped(frozen: Database) -> None:
    frozen.pool(lease_secs=1, retry={"max_losses": 3})
    task = frozen.parked()
    for attempt in (1, 2, 3):
        assert [row["attempt"] for row in frozen.claim()] == [attempt]
        frozen.advance(1)
        frozen.maintain()
    assert frozen.outcome(task) == ("dropped", "lost worker")


def test_a_cancelled_task_whose_worker_is_gone_is_dropped(frozen: Database) -> None:
    frozen.pool(lease_secs=1)
    task = running(frozen)
    frozen.value("select pgpark.park_cancel(%s, 'no longer needed')", task)
    frozen.advance(1)
    assert frozen.claimed() == []
    assert frozen.outcome(task) == ("dropped", "no longer needed")


def test_a_lease_is_renewed_without_touching_an_index(db: Database) -> None:
    db.pool()
    task = running(db)
    heartbeat(db, [task])
    db.rows("select pg_stat_force_next_flush()") if db.connection.info.server_version >= 150000 else None
    (row,) = db.rows(
        "select count(*) as indexed from pg_index i join pg_attribute a on a.attrelid = i.indrelid"
        " and a.attnum = any (i.indkey) where i.indrelid = 'pgpark.task'::regclass and a.attname = 'lease_until'"
    )
    assert row["indexed"] == 0


# -- retries ---------------------------------------------------------------------------------------------------------


def test_a_failure_is_final_by_default(db: Database) -> None:
    db.pool()
    task = running(db)
    db.value("select pgpark.park_finish(%s, 1, 'failed', reason => 'boom')", task)
    assert db.outcome(task) == ("failed", "boom")


def test_a_failed_task_is_retried_after_a_growing_backoff(frozen: Database) -> None:
    frozen.pool(retry={"max_attempts": 4, "backoff_secs": 10, "backoff_factor": 3, "max_backoff_secs": 50})
    task = frozen.parked()
    for attempt, backoff in ((1, 10), (2, 30), (3, 50)):
        assert [row["attempt"] for row in frozen.claim()] == [attempt]
        assert frozen.finish(task, attempt, "failed")
        assert frozen.status(task)["status"] == "delayed"
        frozen.advance(backoff * 0.75 - 0.001)  # a random quarter at most is taken off
        assert frozen.claimed() == []
        frozen.advance(backoff * 0.25 + 0.001)
    assert frozen.claimed() == [task]
    frozen.finish(task, 4, "failed")
    assert frozen.outcome(task)[0] == "failed"
    assert frozen.stats()["retried"] == 3


def test_a_lost_worker_is_not_a_failed_attempt(frozen: Database) -> None:
    frozen.pool(lease_secs=1, retry={"max_attempts": 2, "max_losses": 10, "backoff_secs": 0})
    task = running(frozen)
    for _ in range(5):
        frozen.advance(1)
        assert frozen.claimed() == [task]
    assert frozen.finish(task, 6, "failed")
    assert frozen.claimed() == [task], "its first failure"
    frozen.finish(task, 7, "failed")
    assert frozen.outcome(task)[0] == "failed"


def test_a_retry_does_not_outlive_the_deadline(frozen: Database) -> None:
    frozen.pool(retry={"max_attempts": 3, "backoff_secs": 100})
    task = running(frozen, deadline=frozen.after(50))
    frozen.finish(task, 1, "failed")
    frozen.advance(50)
    frozen.maintain()
    assert frozen.outcome(task) == ("expired", "deadline_expired")


def test_a_huge_number_of_failures_does_not_overflow_the_backoff(frozen: Database) -> None:
    frozen.pool(retry={"max_attempts": 1000000, "backoff_factor": 1000000000, "backoff_secs": 1000000000})
    task = running(frozen)
    frozen.rows("update pgpark.task set failures = 9000 where task_id = %s returning 1", task)
    assert frozen.finish(task, 1, "failed")
    frozen.advance(300)
    assert frozen.claimed() == [task]


# -- run timeout -----------------------------------------------------------------------------------------------------


def test_a_task_that_runs_too_long_is_stopped_by_its_worker(frozen: Database) -> None:
    frozen.pool(run_timeout_secs=60, lease_secs=30)
    task = running(frozen)
    frozen.advance(29)
    assert heartbeat(frozen, [task]) == set()
    frozen.advance(29)
    assert heartbeat(frozen, [task]) == set()
    frozen.advance(2)
    assert heartbeat(frozen, [task]) == {task}
    assert frozen.finish(task, 1, "failed")
    assert frozen.outcome(task) == ("failed", "run_timeout")


def test_a_worker_that_does_not_stop_it_loses_it_with_the_lease(frozen: Database) -> None:
    frozen.pool(run_timeout_secs=60, lease_secs=30)
    task = running(frozen)
    for _ in range(5):
        frozen.advance(20)
        heartbeat(frozen, [task])
    frozen.maintain()
    assert frozen.outcome(task) == ("failed", "run_timeout")
    assert not frozen.finish(task, 1)


def test_a_timed_out_task_is_retried_like_any_failure(frozen: Database) -> None:
    frozen.pool(run_timeout_secs=5, lease_secs=1, retry={"max_attempts": 2, "backoff_secs": 0})
    task = running(frozen)
    frozen.advance(6)
    frozen.maintain()
    assert frozen.claimed() == [task]


# -- deadlines and maintenance ---------------------------------------------------------------------------------------


def test_prune_moves_what_expired_and_says_how_many(frozen: Database) -> None:
    frozen.pool("a")
    frozen.pool("b")
    late = [frozen.parked("a", deadline=frozen.after(1)), frozen.parked("b", deadline=frozen.after(1))]
    frozen.parked("a", run_at=frozen.after(1), deadline=frozen.after(2))
    frozen.advance(1)
    assert frozen.value("select pgpark.park_prune('a')") == 1
    assert frozen.value("select pgpark.park_prune()") == 1
    assert {frozen.outcome(task) for task in late} == {("expired", "deadline_expired")}
    frozen.advance(1)
    assert frozen.value("select pgpark.park_prune()") == 1, "a delayed task expires too"


def test_prune_moves_more_than_one_bite(frozen: Database) -> None:
    frozen.pool()
    frozen.rows(
        "select count(*) from pgpark.park_submit_many('gpu', (select jsonb_agg(jsonb_build_object("
        "'payload', n, 'deadline', pgpark._now() + interval '1 second')) from generate_series(1, 2500) n))"
    )
    frozen.advance(1)
    assert frozen.value("select pgpark.park_prune('gpu')") == 2500


def test_maintain_reports_each_timer_and_the_next(frozen: Database) -> None:
    frozen.pool(lease_secs=10, max_units=2)
    running(frozen, units=2)
    frozen.parked(units=2, deadline=frozen.after(5))
    frozen.parked(units=2, run_at=frozen.after(3), deadline=frozen.after(1000))
    report = frozen.maintain("gpu")
    assert report == {"expired": 0, "reclaimed": 0, "promoted": 0, "purged": 0, "next_due": frozen.after(3)}
    frozen.advance(3)
    report = frozen.maintain()
    assert (report["promoted"], report["next_due"]) == (1, frozen.after(2))
    frozen.advance(2)
    report = frozen.maintain()
    assert (report["expired"], report["next_due"]) == (1, frozen.after(5))
    frozen.advance(5)
    report = frozen.maintain()
    assert (report["reclaimed"], report["next_due"]) == (1, frozen.after(1))


def test_maintain_asks_to_look_again_in_a_second_while_a_task_could_start(frozen: Database) -> None:
    frozen.pool(max_units=2)
    assert frozen.maintain("gpu")["next_due"] is None
    frozen.parked(units=2)
    assert frozen.maintain("gpu")["next_due"] == frozen.after(1)
    frozen.claim()
    frozen.parked(units=2)
    assert frozen.maintain("gpu")["next_due"] == frozen.after(30), "nothing could start; the lease is next"
    frozen.rows("select pgpark.park_set_pool_state('gpu', 'paused')")
    assert frozen.maintain("gpu")["next_due"] == frozen.after(30)


def test_outcomes_are_purged_after_their_time_with_their_keys(frozen: Database) -> None:
    frozen.pool(mailbox={"ttl_secs": 100})
    task = running(frozen, idempotency_key="k")
    frozen.finish(task)
    frozen.advance(99)
    assert frozen.maintain()["purged"] == 0
    frozen.advance(1)
    assert frozen.maintain()["purged"] == 1
    assert frozen.rows("select * from pgpark.park_result(%s)", task) == []
    assert frozen.submit(idempotency_key="k")["reason"] is None


def test_the_tally_is_folded_without_losing_a_count(db: Database) -> None:
    db.pool()
    for _ in range(60):
        db.finish(running(db))
    db.maintain()
    assert db.value("select count(*) from pgpark.tally") < 45
    assert db.stats()["completed"] == 60
