"""park_status, park_stats, park_explain: what they tell agrees with what happens."""

from __future__ import annotations

import random

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Database


def explained(db: Database) -> list[tuple[int, int | None, str]]:
    rows = db.rows("select * from pgpark.park_explain('gpu')")
    return [(row["task_id"], row["position"], row["why"]) for row in rows]


def test_status_follows_a_task_through_its_life(db: Database) -> None:
    db.pool(max_units=4)
    first, task = db.parked(units=4), db.parked(units=4, priority="low")
    status = db.status(task)
    assert (status["status"], status["position"], status["attempt"], status["started_at"]) == ("parked", 1, 0, None)
    db.claim()
    assert db.status(task)["position"] == 0
    db.finish(first)
    db.claim(worker="me")
    status = db.status(task)
    assert (status["status"], status["position"], status["attempt"], status["worker"]) == ("running", None, 1, "me")
    db.finish(task)
    status = db.status(task)
    assert (status["status"], status["pool"], status["priority"], status["units"]) == ("completed", "gpu", "low", 4)
    assert status["created_at"] <= status["started_at"] <= status["finished_at"]
    assert db.rows("select * from pgpark.park_status(4711)") == []


def test_position_is_the_order_of_starting(db: Database) -> None:
    db.pool(max_units=1)
    tasks = [db.parked(priority=word) for word in ("low", "high", "normal", "critical", "high", "low")]
    ranked = sorted(tasks, key=lambda task: db.status(task)["position"])
    assert [db.status(task)["position"] for task in ranked] == list(range(6))
    for task in ranked:
        assert db.claimed() == [task]
        db.finish(task)


def test_position_stops_counting_at_a_thousand(db: Database) -> None:
    db.pool()
    db.rows(
        "select from pgpark.park_submit_many('gpu', (select jsonb_agg('{\"payload\": 1}'::jsonb)"
        " from generate_series(1, 1001)))"
    )
    assert db.status(db.parked())["position"] == 1000
    assert db.status(db.value("select min(task_id) + 999 from pgpark.task"))["position"] == 999


@pytest.mark.parametrize(("depth", "places"), [(None, [0, 1, 2]), (2, [0, 1, None])])
def test_a_statement_submits_and_sees_the_place_in_line(db: Database, depth: int | None, places: list[int]) -> None:
    db.pool(max_queue_depth=depth)
    seen = [
        db.value(
            "select t.position from pgpark.park_submit('gpu', '1') s"
            " left join lateral pgpark.park_status(s.task_id) t on true"
        )
        for _ in range(3)
    ]
    assert seen == places
    assert db.stats()["parked"] == 3 - places.count(None)  # submitted once each


def test_stats_count_each_kind(db: Database) -> None:
    db.pool(max_units=10, retry={"max_attempts": 2, "backoff_secs": 100})
    done, failing, running = db.parked(units=3), db.parked(units=3), db.parked(units=4)
    db.claim(worker="one")
    db.finish(done)
    db.finish(failing, status="failed")
    db.parked(units=10)
    db.parked(run_at=db.after(100))
    dropped = db.parked()
    db.value("select pgpark.park_cancel(%s)", dropped)
    db.value("select pgpark.park_cancel(%s)", running)
    stats = db.stats()
    assert stats.pop("oldest_parked_secs") >= 0
    assert stats == {
        "pool": "gpu",
        "state": "active",
        "max_units": 10,
        "used_units": 4,
        "running": 1,
        "parked": 1,
        "delayed": 2,
        "workers": 1,
        "completed": 1,
        "failed": 0,
        "expired": 0,
        "dropped": 1,
        "retried": 1,
    }


def test_stats_tell_the_age_of_the_oldest_of_all_priorities(db: Database) -> None:
    db.pool()
    db.freeze()
    db.parked(priority="low")
    db.advance(50)
    db.parked(priority="critical")
    assert db.stats()["oldest_parked_secs"] == 50


def test_stats_do_not_grow_with_the_outcomes_kept(db: Database) -> None:
    db.pool()
    plan = db.value("select pg_get_functiondef('pgpark.park_stats'::regproc)")
    assert "mailbox" not in plan.split("$function$")[1]


def test_explain_says_why_each_task_is_not_running(db: Database) -> None:
    db.pool(max_units=10, max_bypass=1)
    db.parked(units=6)
    db.claim()
    head, small, held = db.parked(units=5), db.parked(units=2), db.parked(units=1)
    delayed = db.parked(run_at=db.after(100))
    assert explained(db) == [
        (head, 0, "no units"),
        (small, 1, "may start"),
        (held, 2, "held for head"),
        (delayed, None, "delayed"),
    ]
    assert db.claimed() == [small], "as it was told"
    assert explained(db)[1] == (held, 1, "held for head")


def test_explain_tells_a_paused_pool(db: Database) -> None:
    db.pool()
    task = db.parked()
    db.rows("select pgpark.park_set_pool_state('gpu', 'paused')")
    assert explained(db) == [(task, 0, "paused")]


def test_explain_tells_when_only_the_workers_are_too_small(db: Database) -> None:
    db.pool(max_units=100)
    db.claim(worker="small", max_units=10)
    task = db.parked(units=20)
    assert explained(db) == [(task, 0, "worker capacity")]
    db.claim(worker="large", max_units=15)
    assert explained(db) == [(task, 0, "worker capacity")]
    db.rows("select pgpark.park_heartbeat('gpu', 'unlimited', '{}')")
    assert explained(db) == [(task, 0, "may start")]


def test_explain_passes_over_what_ends_at_the_next_claim(db: Database) -> None:
    db.pool(max_units=20)
    db.freeze()
    late, large = db.parked(deadline=db.after(5)), db.parked(units=20)
    db.advance(5)
    task = db.parked()
    assert explained(db) == [(large, 0, "may start"), (task, 1, "no units")]
    assert late not in db.claimed()


@pytest.mark.parametrize("limit", ["0", "-1", "null"])
def test_explain_names_an_impossible_limit(db: Database, limit: str) -> None:
    db.pool()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="max_tasks must be at least 1"):
        db.rows(f"select * from pgpark.park_explain('gpu', {limit})")


@pytest.mark.parametrize("fairness", ["fifo", "tenant"])
def test_the_first_of_many_lanes_are_those_of_all_that_is_in_them(db: Database, fairness: str) -> None:
    """Lanes long and short, ahead of one another or side by side; some of their tenants are at their limits."""
    choose = random.Random(3)
    db.pool(max_units=1000, fairness=fairness, tenants={f"t{number}": {"max_units": 3} for number in range(12)})
    for number in range(6):
        db.parked(tenant=f"t{number}", units=3, priority="critical")
    db.claim()
    for number in (*[0] * 30, *[7] * 30, *(choose.randrange(12) for _ in range(200))):
        db.parked(tenant=f"t{number}", units=choose.randint(1, 3), priority=choose.choice(["low", "normal", "high"]))
    for most in (1, 2, 5, 13, 40, 100, 250, 400):
        first = db.rows("select l.* from pgpark.pool p, pgpark._first_of_lanes(p, now(), %s) l", most)
        every = db.rows("select l.* from pgpark.pool p, pgpark._read_lanes(p, now(), 1000, 1000) l limit %s", most)
        ranked = [(row["task_id"], row["tenant"], row["in_line"]) for row in first]
        assert ranked == [(row["task_id"], row["tenant"], row["in_line"]) for row in every], most


def test_an_explanation_reads_no_more_of_many_lanes_than_of_a_few(db: Database) -> None:
    read = {}
    for tenants in (5, 100):
        name = f"of_{tenants}"
        db.pool(name, max_units=10, tenants={f"t{number}": {"max_units": 1} for number in range(tenants)})
        tasks = [{"payload": 1, "tenant": f"t{number % tenants}"} for number in range(4000)]
        db.rows("select from pgpark.park_submit_many(%s, %s)", name, Jsonb(tasks))
        db.rows("select from pgpark.park_explain(%s, 40)", name)  # so that what the session caches is there
        with db.connection.transaction():
            seen = "select idx_tup_fetch from pg_stat_xact_user_tables where relid = 'pgpark.task'::regclass"
            before = db.value(seen)
            assert len(db.rows("select from pgpark.park_explain(%s, 40)", name)) == 40
            read[tenants] = db.value(seen) - before
    assert read[100] < 2000, read
