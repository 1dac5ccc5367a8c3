"""What claims, submits and looks do in a crowd: index access only, and no more pages than in an empty lot.

A pool with a million parked tasks of ten thousand tenants, half of them of one tenant at its limit, a tenth past their
deadline, and a hundred thousand delayed. Each statement that a call runs is explained (analyze, buffers) by
auto_explain, which sends the plans as notices. The pages of each: pytest -n 0 -s tests/sql/test_plans.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from pgpark.migrate import migrate
from tests.conftest import Database

PARKED, DELAYED, LATE, TENANTS = 1_000_000, 100_000, 100_000, 10_000
LEDGER = {"task", "mailbox", "tenant", "tenant_service", "submission_key"}

pytestmark = pytest.mark.slow


@dataclass
class Plans:
    """What auto_explain told of the statements of one call."""

    buffers: int = 0
    compiled: int = 0  # statements that JIT compiled, which takes longer than to run them
    scans: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, node: dict[str, Any]) -> None:
        if "Relation Name" in node and node["Node Type"] != "ModifyTable":
            self.scans.append((node["Node Type"], node["Relation Name"], node.get("Index Name", "")))
        for child in node.get("Plans", []):
            self.add(child)


def explained(db: Database, call: Callable[[], Any]) -> Plans:
    """Runs a call and gathers the plan of every statement in it; rolled back."""
    plans = Plans()

    def listen(diagnostic: psycopg.errors.Diagnostic) -> None:
        message = diagnostic.message_primary or ""
        if "plan:" in message:
            told = json.loads(message.split("plan:", 1)[1])
            plan = told["Plan"]
            plans.add(plan)
            plans.compiled += "JIT" in told
            plans.buffers = max(plans.buffers, plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])

    call()  # warms up what a session caches: catalogs, plans
    db.connection.add_notice_handler(listen)
    db.rows("select set_config('auto_explain.log_min_duration', '0', false)")
    try:
        call()
    finally:
        db.rows("select set_config('auto_explain.log_min_duration', '-1', false)")
        db.connection.remove_notice_handler(listen)
    assert plans.scans, "auto_explain told nothing"
    return plans


def park_by_hand(db: Database, count: int, **columns: str) -> None:
    """Writes tasks and their messages as submit does, many at once; columns: SQL by the number n."""
    row = {
        "task_id": "task_id",
        "pool_id": "(select pool_id from pgpark.pool)",
        "msg_id": "msg_id",
        "state": "'parked'",
        "priority": "1",
        "units": "1",
        "created_at": "clock_timestamp()",
    } | columns
    db.connection.execute(
        f"""with parked as (
          insert into pgpark.task ({", ".join(row)})
          select {", ".join(row.values())}
          from (select n, nextval('pgpark.task_task_id_seq') as task_id, nextval('pgmq.q_gpu_msg_id_seq') as msg_id
                from generate_series(1, {count}) n) numbered
          returning task_id, msg_id)
        insert into pgmq.q_gpu (msg_id, vt, message) overriding system value
        select msg_id, 'infinity', jsonb_build_object('metadata', jsonb_build_object('task_id', task_id), 'payload', 1)
        from parked"""
    )


def crowd(dsn: str, scale: float) -> Database:
    db = Database(dsn)
    db.pool(
        max_units=100,
        max_bypass=8,
        max_queue_depth=10 * PARKED,
        fairness="tenant",
        tenants={"limited": {"max_units": 4, "weight": 2}},
    )
    for _ in range(4):
        db.parked(tenant="limited", priority="critical")
    assert len(db.claim()) == 4, "it is at its limit now"
    tenant = f"'t' || n % {TENANTS}"
    fair = {"tenant": tenant, "share": tenant, "start_tag": f"n / {TENANTS}"}
    late = {"deadline": "clock_timestamp() - n * interval '1 second'", "priority": "2"}
    limited = {name: "'limited'" for name in ("tenant", "share", "lane")}
    park_by_hand(db, int(LATE * scale), **fair | late)
    park_by_hand(db, int(PARKED / 2 * scale), **limited, start_tag="n / 2.0", priority="1 + n % 2")
    park_by_hand(db, int((PARKED / 2 - LATE) * scale), **fair, deadline="clock_timestamp() + n * interval '1 hour'")
    delayed = {"state": "'delayed'", "run_at": "clock_timestamp() + n * interval '1 hour'"}
    park_by_hand(db, int(DELAYED * scale), tenant=tenant, **delayed)
    db.pool(**db.value("select config from pgpark.park_pools('gpu')") | {"max_queue_depth": 20 * PARKED})  # counts anew
    return db


def explain_all(db: Database) -> None:
    """Lets auto_explain tell of every statement, once its log_min_duration is set."""
    try:
        db.connection.execute("load 'auto_explain'")
    except psycopg.errors.UndefinedFile:
        pytest.skip("this server has no auto_explain")
    for setting, value in {
        "log_analyze": "on",
        "log_buffers": "on",
        "log_timing": "off",
        "log_format": "json",
        "log_level": "notice",
        "log_nested_statements": "on",
    }.items():
        db.rows("select set_config(%s, %s, false)", f"auto_explain.{setting}", value)
    db.rows("select set_config('jit', 'on', false)")  # says nothing where the server has none


@pytest.fixture
def lots(empty_databases: Callable[[], str]) -> Iterator[dict[str, Database]]:
    """A crowded lot, and one with a thousandth of that."""
    made = {}
    for name, scale in {"crowded": 1.0, "small": 0.001}.items():
        dsn = empty_databases()
        with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
            migrate(connection)
        made[name] = crowd(dsn, scale)
        explain_all(made[name])
    yield made
    for db in made.values():
        db.close()


def calls(db: Database) -> dict[str, Callable[[], Any]]:
    batch = Jsonb([{"payload": 1, "tenant": f"t{number}"} for number in range(100)])
    parked = db.value("select max(task_id) from pgpark.task where state = 'parked' and tenant <> 'limited'")

    running = db.rows("select task_id, attempt from pgpark.task where state = 'running' and tenant <> 'limited'")
    live = [row["task_id"] for row in db.rows("select task_id from pgpark.task order by 1 desc limit 2")]

    return {
        "a claim of one task": lambda: db.claim(max_tasks=1),
        "a claim of ten tasks": lambda: db.claim(max_tasks=10),
        "a claim past a head": lambda: (db.parked(units=97, priority="critical"), db.claim(max_tasks=1)),
        "a submit": lambda: db.parked(tenant="t5"),
        "a submit of the tenant at its limit": lambda: db.parked(tenant="limited"),
        "a submit of a hundred tasks": lambda: db.rows("select from pgpark.park_submit_many('gpu', %s)", batch),
        "finding ten tasks to drop": lambda: db.rows(
            "select from pgpark._lock_lowest((select pool_id from pgpark.pool), 3::smallint, 10)"
        ),
        "a finish": lambda: db.finish(*running.pop().values()),
        "a cancel": lambda: db.value("select pgpark.park_cancel(%s)", live.pop()),
        "a status": lambda: db.status(parked),
        "an explanation": lambda: db.rows("select from pgpark.park_explain('gpu')"),
        "the picture of the lot": lambda: db.value("select pgpark.park_lot('gpu')"),
        "the picture of all lots": lambda: db.value("select pgpark.park_lot()"),
        "the metrics": lambda: db.rows("select * from pgpark.park_metrics('gpu')"),
        "raising the floors": lambda: db.rows("select pgpark._raise_floors(p, now()) from pgpark.pool p"),
    }


# The most pages that a call may touch, whatever waits: hits and reads of shared buffers, of all its statements.
PAGES = {
    "a claim of one task": 400,
    "a claim of ten tasks": 900,
    "a claim past a head": 400,
    "a submit": 150,
    "a submit of the tenant at its limit": 150,
    "a submit of a hundred tasks": 6_000,
    "finding ten tasks to drop": 600,
    "a finish": 150,
    "a cancel": 150,
    "a status": 300,
    "an explanation": 300,
    "the picture of the lot": 1_500,
    "the picture of all lots": 600,
    "the metrics": 5_000,  # of up to 100,000 tasks of each priority, counted in the index alone
    "raising the floors": 200,
}
PAGES_OF_A_BITE = 60_000  # of up to 1,500 late tasks, each of them a row, a message and an outcome


def scanned_otherwise(plans: Plans) -> set[tuple[str, str, str]]:
    """Scans of the ledger by other ways than an index, or the place of a row that an index has told."""
    return {scan for scan in plans.scans if scan[1] in LEDGER and "Index" not in scan[0] and scan[0] != "Tid Scan"}


def test_calls_walk_indexes_and_touch_no_more_pages_in_a_crowd(lots: dict[str, Database]) -> None:
    plans = explained(lots["crowded"], lambda: lots["crowded"].claim(max_tasks=1))
    assert scanned_otherwise(plans) == set(), "a claim that finds a hundred thousand late tasks"
    sys.stdout.write(f"a claim with a bite of late tasks: {plans.buffers} pages\n")
    assert plans.buffers <= PAGES_OF_A_BITE

    for db in lots.values():
        db.value("select pgpark.park_prune()")
        db.connection.execute("vacuum pgpark.task")  # as autovacuum does; until then each walk passes dead entries
    pages = {}
    for name in PAGES:
        for lot, db in lots.items():
            plans = explained(db, calls(db)[name])
            assert scanned_otherwise(plans) == set(), f"{name} in the {lot} lot"
            assert plans.compiled == 0, f"{name} in the {lot} lot"
            pages[name, lot] = plans.buffers
        sys.stdout.write(
            f"{name}: {pages[name, 'crowded']} pages in the crowd, {pages[name, 'small']} in a small lot\n"
        )
    for name, most in PAGES.items():
        assert pages[name, "crowded"] <= most, name


def test_what_is_asked_before_a_call_of_a_stranger_is_not_compiled(db: Database) -> None:
    """Rights are looked up in tables of a few rows, which are scanned, also where a caller has switched scans off."""
    explain_all(db)
    db.pool()
    tasks = [db.parked(tenant="a") for _ in range(3)]
    db.claim(max_tasks=2)
    db.finish(tasks[0])
    secret = db.value("select pgpark.park_create_token('t', '{producer,worker,reader}')")
    db.rows("select set_config('pgpark.token', encode(sha256(convert_to(%s, 'UTF8')), 'hex'), false)", secret)
    for call in (
        "select from pgpark.park_fetch('a')",
        "select from pgpark.park_follow('a')",
        f"select from pgpark.park_parts({tasks[1]})",
        f"select from pgpark.park_result({tasks[0]})",
        f"select from pgpark.park_status({tasks[2]})",
        f"select pgpark.park_cancel({tasks[2]})",
        f"select pgpark.park_heartbeat('gpu', 'w', '{{{tasks[1]}}}')",
        f"select pgpark.park_emit({tasks[1]}, 1, '[{{\"content\": 1}}]')",
        f"select pgpark.park_finish({tasks[1]}, 1)",
        "select from pgpark.park_claim('gpu', 'w')",
        "select pgpark.park_ack('{1}')",
        "select from pgpark.park_stats()",
        "select from pgpark.park_lot('gpu')",
        "select from pgpark.park_explain('gpu')",
        "select from pgpark.park_history('gpu')",
        "select from pgpark.park_metrics()",
    ):
        assert explained(db, lambda call=call: db.rows(call)).compiled == 0, call  # type: ignore[misc]
