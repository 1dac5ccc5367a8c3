"""The audit: what it tells of each task, who may read it, how it is kept, and by which ways it is found."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests import accounts
from tests.conftest import Background, Database
from tests.roles import Roles, roles
from tests.sql.test_plans import explained

__all__ = ["roles"]  # a fixture

Run = Callable[[Database, Callable[[], Any]], Background]
DAY = 86400


def freeze_at_noon(db: Database) -> None:
    """So that only what is advanced by hours comes into another day."""
    db.freeze()
    of_day = db.value("select extract(epoch from (pgpark._now() at time zone 'UTC')::time)::int")
    db.advance((DAY * 3 // 2 - of_day) % DAY)


def rows(db: Database, **filters: Any) -> list[dict[str, Any]]:
    """What park_audit says, oldest first."""
    listed = ", ".join(f"{name} => %({name})s" for name in filters)
    found = db.connection.execute(f"select * from pgpark.park_audit({listed})", filters).fetchall()
    return list(reversed(found))


def story(db: Database, task: int) -> list[tuple[str, str | None]]:
    """Events of a task with their reasons."""
    return [(row["event"], row["reason"]) for row in rows(db, task_id=task)]


def events(db: Database, **filters: Any) -> list[str]:
    return [row["event"] for row in rows(db, **filters)]


def days(db: Database) -> list[str]:
    """The partitions that are there."""
    return [
        row["name"]
        for row in db.rows(
            "select inhrelid::regclass::text as name from pg_inherits"
            " where inhparent = 'pgpark.audit'::regclass order by 1"
        )
    ]


def write_by_hand(db: Database, days_: int, a_day: int) -> None:
    """So many events on each of the days before now: of 10 pools, 50 tenants, and tasks of 4 events."""
    db.rows(
        "select pgpark._add_audit_days(pgpark._audit_day(pgpark._now()) - %s * interval '24 hours', %s)", days_, days_
    )
    db.connection.execute(
        f"""
        insert into pgpark.audit (at, event, pool, task_id, attempt, worker, tenant, priority, units)
        select date_trunc('day', pgpark._now(), 'UTC') - d * interval '24 hours' + n * interval '24 hours' / {a_day},
               (array['submitted', 'started', case when n % 500 = 2 then 'failed' else 'completed' end,
                      'lost'])[1 + n % 4],
               'p' || n / 4 % 10, d * 1000000 + n / 4, 1, 'w', 't' || n / 4 % 50, 1, 1
        from generate_series(1, {days_}) d, generate_series(0, {a_day} - 1) n"""
    )


# -- what it tells ---------------------------------------------------------------------------------------------------


@pytest.mark.every_backend
def test_it_tells_what_happened_to_a_task_with_time_worker_and_tenant(db: Database) -> None:
    db.pool(audit=True)
    freeze_at_noon(db)
    task = db.parked(tenant="acme", priority="high", units=3)
    db.advance(2)
    db.claim(worker="w1")
    db.advance(5)
    db.finish(task, result={"secret": 42})
    begin = rows(db)[0]["at"]
    told = [
        (row["event"], (row["at"] - begin).total_seconds(), row["attempt"], row["worker"])
        for row in rows(db, task_id=task)
    ]
    assert told == [("submitted", 0, None, None), ("started", 2, 1, "w1"), ("completed", 7, 1, "w1")]
    for row in rows(db, task_id=task):
        assert (row["pool"], row["tenant"], row["priority"], row["units"]) == ("gpu", "acme", "high", 3)
    assert accounts.faults(db.dsn) == []


def test_a_pool_without_it_writes_nothing(db: Database) -> None:
    db.pool()
    db.finish(db.parked() and db.claimed()[0])
    assert rows(db) == []
    assert days(db) == ["pgpark.audit_rest"]


def test_each_failed_attempt_is_told_with_its_reason(db: Database) -> None:
    db.pool(
        audit=True, retry={"max_attempts": 3, "backoff_secs": 0, "max_losses": 5}, run_timeout_secs=10, lease_secs=5
    )
    freeze_at_noon(db)
    task = db.parked()
    db.claim(worker="w1")
    db.rows("select pgpark.park_finish(%s, 1, 'failed', null, 'no memory')", task)
    db.advance(1)
    db.claim(worker="w2")
    db.advance(20)
    db.maintain()
    db.advance(1)
    db.claim(worker="w3")
    db.rows("select pgpark.park_finish(%s, 3, 'failed', null, %s)", task, "x" * 2000)
    assert story(db, task) == [
        ("submitted", None),
        ("started", None),
        ("retried", "no memory"),
        ("started", None),
        ("retried", "run_timeout"),
        ("started", None),
        ("failed", "x" * 500),
    ]
    assert [row["worker"] for row in rows(db, task_id=task)] == [None, "w1", "w1", "w2", "w2", "w3", "w3"]
    assert accounts.faults(db.dsn) == []


def test_released_lost_cancelled_expired_and_dropped_are_told(db: Database) -> None:
    db.pool(audit=True, lease_secs=5, max_queue_depth=2, overflow="drop_lowest")
    freeze_at_noon(db)
    task = db.parked()
    db.claim(worker="w1")
    db.rows("select pgpark.park_release(%s, 1)", task)
    db.claim(worker="w2")
    db.advance(6)
    db.maintain()
    db.claim(worker="w3")
    db.rows("select pgpark.park_cancel(%s, 'enough')", task)
    db.finish(task, 3, "failed")
    assert [(row["event"], row["worker"], row["reason"]) for row in rows(db, task_id=task)] == [
        ("submitted", None, None),
        ("started", "w1", None),
        ("released", "w1", None),
        ("started", "w2", None),
        ("lost", "w2", None),
        ("started", "w3", None),
        ("cancelling", "w3", "enough"),
        ("dropped", "w3", "enough"),
    ]
    late, low = db.parked(deadline=db.after(1)), db.parked(priority="low")
    db.parked(priority="high")
    db.advance(2)
    db.maintain()
    assert story(db, low) == [("submitted", None), ("dropped", "overflow")]
    assert story(db, late) == [("submitted", None), ("expired", "deadline_expired")]
    assert accounts.faults(db.dsn) == []


def test_a_refused_task_is_told_although_nothing_else_is_kept(db: Database) -> None:
    db.pool(audit=True, max_units=4, max_queue_depth=1)
    assert not db.submit(units=5, tenant="acme", priority="low")["accepted"]
    tasks = [{"payload": 1, "idempotency_key": "a"}, {"payload": 2, "idempotency_key": "a"}, {"payload": 3, "units": 2}]
    answers = db.rows("select reason from pgpark.park_submit_many('gpu', %s)", Jsonb(tasks))
    assert [row["reason"] for row in answers] == [None, "duplicate", "queue_full"]
    refused = [row for row in rows(db) if row["event"] == "rejected"]
    assert [(row["task_id"], row["reason"], row["units"]) for row in refused] == [
        (None, "too_large", 5),
        (None, "queue_full", 2),
    ]
    assert (refused[0]["tenant"], refused[0]["priority"]) == ("acme", "low")
    assert events(db, pool="gpu") == ["rejected", "submitted", "rejected"]
    db.pool("plain", audit=True, max_units=4)
    db.submit("plain", units=5)
    assert events(db, pool="plain") == ["rejected"]


def test_what_is_rolled_back_is_not_told(db: Database) -> None:
    db.pool(audit=True)
    db.connection.execute("begin")
    db.parked()
    db.submit(units=100)
    db.connection.execute("rollback")
    assert rows(db) == []


def test_there_is_no_payload_in_it(db: Database) -> None:
    columns = db.rows("select attname from pg_attribute where attrelid = 'pgpark.audit_event'::regclass and attnum > 0")
    expected = "event_id at event pool task_id attempt worker tenant priority units reason"
    assert [row["attname"] for row in columns] == expected.split()


def test_it_outlives_its_pool_and_tells_how_that_ended(db: Database) -> None:
    db.pool(audit=True)
    task = db.parked()
    db.rows("select pgpark.park_drop_pool('gpu', force => true)")
    assert story(db, task) == [("submitted", None), ("dropped", "pool_dropped")]


# -- reading ---------------------------------------------------------------------------------------------------------


def test_filters_narrow_it_and_pages_neither_overlap_nor_miss(db: Database) -> None:
    freeze_at_noon(db)
    db.pool(audit=True)
    db.pool("cpu", audit=True)
    for pool, tenant in (("gpu", "a"), ("gpu", "b"), ("cpu", "a")):
        for _ in range(5):
            db.parked(pool, tenant=tenant)  # all at one time
    middle = db.after(1)
    db.advance(1)
    db.finish(db.claimed("gpu", max_tasks=1)[0])
    assert len(rows(db)) == 17
    assert len(rows(db, pool="gpu")) == 12
    assert len(rows(db, tenant="a")) == 12
    assert events(db, pool="gpu", tenant="a", since=middle) == ["started", "completed"]
    assert len(rows(db, until=middle)) == 15
    assert events(db, event="completed") == ["completed"]
    assert events(db, pool="cpu", event="failed") == []
    seen, page = [], rows(db, max_events=4)
    while page:
        seen += list(reversed(page))
        db.parked("cpu")  # what comes meanwhile moves nothing
        page = rows(db, max_events=4, until=page[0]["at"], before=page[0]["event_id"])
    assert [row["event_id"] for row in seen] == list(range(17, 0, -1))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"event": "finished"}, "unknown event 'finished'; use submitted, rejected, started"),
        ({"max_events": 0}, "max_events must be at least 1, not 0"),
        ({"before": 7}, "before goes with until"),
    ],
)
def test_a_bad_argument_is_an_error(db: Database, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=re.escape(complaint)):
        rows(db, **arguments)


def test_readers_see_their_pools_and_producers_their_tenants(db: Database, roles: Roles) -> None:
    for pool in ("gpu", "cpu"):
        db.pool(pool, audit=True)
    mine, other = db.parked("gpu", tenant="a"), db.parked("gpu", tenant="b")
    db.parked("cpu", tenant="a")
    db.parked("cpu")
    assert len(rows(roles.granted("admin"))) == 4
    assert len(rows(roles.granted("reader"))) == 4
    bound = roles.granted("reader", pools=["cpu"])
    assert {row["pool"] for row in rows(bound)} == {"cpu"}
    assert rows(bound, task_id=mine) == []
    producer = roles.granted("producer", tenants=["a"])
    assert [row["pool"] for row in rows(producer, tenant="a")] == ["gpu", "cpu"]
    assert events(producer, task_id=mine) == ["submitted"]
    assert rows(producer, task_id=other) == []
    for refused in ({}, {"tenant": "b"}, {"pool": "gpu"}):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="may not read the audit"):
            rows(producer, **refused)
    with pytest.raises(
        psycopg.errors.InsufficientPrivilege, match="may not read the audit of pool 'gpu' for all tenants"
    ):
        rows(bound, pool="gpu")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        rows(roles.granted("worker"))


def test_a_reader_is_not_told_what_handlers_said(db: Database, roles: Roles) -> None:
    db.pool(audit=True, max_units=5, retry={"max_attempts": 2})
    task = db.parked(tenant="a")
    db.claim()
    said = "select pgpark.park_finish(%s, 1, 'failed', null, 'customer 42 has no card')"
    assert db.value(said, task)
    db.rows("select pgpark.park_cancel(%s, 'card 42 was stolen')", task)
    assert not db.submit(units=9, tenant="a")["accepted"]
    told = [(row["event"], row["reason"]) for row in rows(roles.granted("reader")) if row["reason"]]
    assert told == [("rejected", "too_large")]
    assert [row["reason"] for row in rows(roles.granted("reader"), task_id=task)] == [None] * 4
    for session in (roles.granted("producer", tenants=["a"]), roles.granted("admin")):
        assert {"customer 42 has no card", "card 42 was stolen", "too_large"} <= {
            row["reason"] for row in rows(session, tenant="a")
        }
        assert "customer 42 has no card" in str(rows(session, task_id=task))


def test_each_way_to_ask_walks_an_index_and_only_days_of_the_period(db: Database) -> None:
    write_by_hand(db, days_=12, a_day=1000)
    try:
        db.connection.execute("load 'auto_explain'")
    except psycopg.errors.UndefinedFile:
        pytest.skip("this server has no auto_explain")
    options = {"log_analyze": "on", "log_buffers": "on", "log_format": "json", "log_level": "notice"}
    for setting, value in (options | {"log_nested_statements": "on"}).items():
        db.rows("select set_config(%s, %s, false)", f"auto_explain.{setting}", value)
    begin, end = (db.value("select pgpark._audit_day(pgpark._now()) - %s * interval '24 hours'", n) for n in (8, 5))
    ways = {
        "task_id": {"task_id": 6_000_123},
        "tenant": {"tenant": "t7"},
        "pool": {"pool": "p3", "since": begin, "until": end},
        "trouble": {"pool": "p2", "event": "failed"},
        "pkey": {"since": begin, "until": end},
    }
    names = {
        "task_id": "task_id_idx",
        "tenant": "tenant_at",
        "pool": "pool_at",
        "trouble": "pool_event",
        "pkey": "_pkey",
    }
    wanted = {day[len("pgpark.") :] for day in days(db)}
    for way, filters in ways.items():
        plans = explained(db, lambda filters=filters: rows(db, **filters))  # type: ignore[misc]
        walks = [scan for scan in plans.scans if scan[1].startswith("audit_")]
        assert walks
        assert {kind for kind, _, _ in walks} <= {"Index Scan", "Index Only Scan"}, way
        assert all(names[way] in index or (table == "audit_rest") for _, table, index in walks), (way, walks)
        within = {table for _, table, _ in walks}
        assert within == wanted or ("since" in filters and len(within) == 3), (way, within)
        assert plans.buffers < 300, way  # of which most is the first page of each day


# -- keeping ---------------------------------------------------------------------------------------------------------


def clean(name: str) -> str:
    return name.removeprefix("pgpark.audit_")


def test_days_are_made_a_week_ahead(db: Database) -> None:
    freeze_at_noon(db)
    db.pool(audit=True)
    first = days(db)
    assert len(first) == 1 + 8, "today, a week, and what has no day"
    db.advance(5 * DAY)
    db.maintain()
    assert len(days(db)) == 1 + 8 + 5
    db.parked()
    assert db.rows("select from pgpark.audit_rest") == []
    assert db.rows("select * from pgpark._audit_lag(pgpark._now())") == []


def test_a_session_in_another_time_zone_makes_the_same_days(db: Database) -> None:
    freeze_at_noon(db)
    db.rows("select set_config('TimeZone', 'Asia/Kolkata', false), set_config('DateStyle', 'SQL, DMY', false)")
    db.rows(
        "update pgpark._test_clock set now = '2031-05-01 12:00:00+00' returning 1"
    )  # there it is five and a half later
    db.pool(audit=True)
    db.rows("select set_config('TimeZone', 'UTC', false), set_config('DateStyle', 'ISO', false)")
    bounds = db.rows(
        "select c.relname, pg_get_expr(c.relpartbound, c.oid) as bounds from pg_class c"
        " where c.relname ~ '^audit_2[0-9]{7}$'"
    )
    assert sorted(row["relname"] for row in bounds) == [f"audit_2031050{day}" for day in range(1, 9)]
    for row in bounds:
        found = re.findall(r"(\d+)-(\d+)-(\d+) 00:00:00\+00", row["bounds"])
        assert len(found) == 2, row
        assert "audit_" + "".join(found[0]) == row["relname"]


def test_without_maintenance_events_are_found_and_go_when_their_time_comes(db: Database) -> None:
    freeze_at_noon(db)
    db.pool(audit=True, audit_days=10)
    db.advance(20 * DAY)
    task = db.parked()
    assert db.rows("select count(*) from pgpark.audit_rest") == [{"count": 1}]
    assert events(db, task_id=task) == ["submitted"]
    (lag,) = db.rows("select problem, mend from pgpark._audit_lag(pgpark._now()) where problem = 'audit without days'")
    for statement in lag["mend"].split("\n"):
        db.connection.execute(statement.encode())
    assert db.rows("select from pgpark._audit_lag(pgpark._now())") == []
    db.parked()  # today goes there until midnight
    db.advance(DAY)
    db.parked()
    assert db.rows("select count(*) from pgpark.audit_rest") == [{"count": 2}]
    db.advance(10 * DAY)
    db.maintain()
    assert db.rows("select from pgpark.audit_rest") == []
    assert len(rows(db)) == 1


def test_where_events_have_no_day_days_are_made_one_by_one(db: Database) -> None:
    """Each keeps writers waiting while Postgres looks through those events."""
    freeze_at_noon(db)
    db.pool(audit=True)
    db.advance(20 * DAY)
    db.parked()
    before = len(days(db))
    made = []
    for _ in range(8):
        db.maintain()
        made.append(len(days(db)) - before)
        db.advance(60)
    assert made == [1, 2, 3, 4, 5, 6, 7, 7]


def test_days_go_when_no_pool_wants_them(db: Database) -> None:
    freeze_at_noon(db)
    db.pool("short", audit=True, audit_days=3)
    db.pool("long", audit=True, audit_days=6)
    db.pool("none")
    db.parked("short")
    (gone,) = db.rows("select pgpark._audit_table(pgpark._now()) as name")
    for _ in range(6):
        db.advance(DAY)
        db.maintain()
        assert len(rows(db)) == 1
    db.advance(DAY)
    db.maintain()
    assert rows(db) == []
    assert db.value("select to_regclass('pgpark.' || %s)", gone["name"]) is None
    db.pool("long", audit=False, audit_days=6)
    before = len(days(db))
    db.advance(60)
    db.maintain()
    assert len(days(db)) == before, "its audit_days still count"
    db.pool("long", audit=False)
    db.advance(60)
    db.maintain()
    assert len(days(db)) == before - 3


def test_a_wish_for_ages_is_no_error(db: Database) -> None:
    db.pool(audit=True, audit_days=1_000_000_000)
    db.maintain()
    assert db.rows("select from pgpark.park_doctor()") == []


def test_making_days_keeps_nobody_waiting(db: Database, connect: Callable[[], Database]) -> None:
    freeze_at_noon(db)
    db.pool(audit=True)
    task = db.parked()
    db.advance(DAY)
    other = connect()
    other.rows("select set_config('lock_timeout', '2s', false)")
    db.connection.execute("begin")
    db.maintain()
    assert len(days(db)) == 10
    other.parked()
    assert other.claimed() == [task, task + 1]
    other.finish(task)
    assert len(events(other, since=other.after(-5), until=other.after(5))) == 4
    db.connection.execute("commit")


def test_a_day_that_somebody_reads_is_dropped_later_and_nobody_waits_long(
    db: Database, connect: Callable[[], Database]
) -> None:
    freeze_at_noon(db)
    db.pool(audit=True, audit_days=1)
    db.parked()
    reader = connect()
    reader.connection.execute("begin")
    assert len(rows(reader, since=reader.after(-5), until=reader.after(5))) == 1
    db.advance(3 * DAY)
    count = len(days(db)) + 3
    db.maintain()
    assert len(days(db)) == count, "the reader is at it"
    reader.connection.execute("commit")
    db.maintain()
    assert len(days(db)) == count, "a minute has to pass"
    db.advance(60)
    db.maintain()
    assert len(days(db)) == count - 2


def test_who_only_submits_or_is_bound_to_pools_drops_no_day(db: Database, roles: Roles) -> None:
    freeze_at_noon(db)
    db.pool(audit=True, audit_days=1)
    sessions = [roles.granted("producer"), roles.granted("worker", pools=["gpu"]), roles.granted("worker")]
    db.advance(3 * DAY)
    db.rows("select pgpark._add_audit_days(pgpark._now(), 1)")
    kept = []
    for session in sessions:
        session.maintain()
        kept.append(len(days(db)))
        db.advance(60)
    assert kept == [12, 12, 10]


def test_many_may_maintain_and_make_pools_at_once(
    db: Database, connect: Callable[[], Database], background: Run
) -> None:
    db.pool()
    db.rows("update pgpark.audit_upkeep set next_look = 'epoch' returning 1")
    others = [connect() for _ in range(6)]
    names = [f"p{uuid.uuid4().hex[:6]}" for _ in others]
    running = [
        background(other, lambda other=other, name=name: (other.pool(name, audit=True), other.maintain()))
        for other, name in zip(others, names, strict=True)
    ]
    for run in running:
        run.result()
    assert len(days(db)) == 9
    assert db.rows("select from pgpark.park_doctor()") == []


def test_a_table_of_a_users_with_the_name_of_a_day_is_left_alone(db: Database) -> None:
    freeze_at_noon(db)
    name = db.value("select pgpark._audit_table(pgpark._now())")
    db.pool("mine", queue={"type": "postgres_custom", "table": name}, audit=True)
    task = db.parked("mine")
    assert events(db, task_id=task) == ["submitted"]
    assert db.rows("select count(*) from pgpark.audit_rest") == [{"count": 1}]
    assert len(days(db)) == 8
