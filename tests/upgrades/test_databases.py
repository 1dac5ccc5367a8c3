"""A database of each kept release, with tasks in every state, is migrated: everything is there, and works on."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from pgpark import migrate
from pgpark.errors import MigrationError
from tests import accounts
from tests.conftest import Database
from tests.test_migrate import CATALOG, catalog, migrated
from tests.upgrades.conftest import copy_of
from tests.upgrades.keep import RELEASES, keep, newest
from tests.upgrades.releases import KEPT, NEVER_RELEASED, POOLS, Lot, Release, fill

NewDatabase = Callable[..., str]

# Of every function that others call: what goes in (type, name, default), and what comes out.
SIGNATURES = """
    select p.proname as name,
           coalesce((select jsonb_agg(jsonb_build_array(format_type(i.type, null), p.proargnames[i.n],
                                                        pg_get_function_arg_default(p.oid, i.n::int)) order by i.n)
                     from unnest(p.proargtypes::oid[]) with ordinality as i (type, n)), '[]') as arguments,
           coalesce((select jsonb_agg(jsonb_build_array(format_type(o.type, null), p.proargnames[o.n]) order by o.n)
                     from unnest(p.proallargtypes, p.proargmodes) with ordinality as o (type, mode, n)
                     where o.mode in ('o', 'b', 't')),
                    (select jsonb_agg(jsonb_build_array(format_type(a.atttypid, null), a.attname) order by a.attnum)
                     from pg_type t
                     join pg_attribute a on a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
                     where t.oid = p.prorettype and t.typtype = 'c'),
                    jsonb_build_array(jsonb_build_array(format_type(p.prorettype, null), null))) as results,
           p.proretset as many
    from pg_proc p
    where p.pronamespace = 'pgpark'::regnamespace and starts_with(p.proname, 'park_')"""

# A client of any release. Prints what it was told.
CLIENT = """
import sys
import pgpark
from pgpark import Client, calls
print(pgpark.__file__)
with Client(sys.argv[1]) as park:
    print(park.run(calls.put_pool("old", {"max_units": 2})))
    first = park.run(calls.submit("old", {"n": 1}, tenant="c", user_id="u", idempotency_key="k"))
    print(first.status, park.run(calls.submit("old", 2, tenant="c", idempotency_key="k")).reason)
    print([row.accepted for row in park.run(calls.submit_many("old", [{"payload": 3}, {"payload": 4}]))])
    print(park.run(calls.explain("old"))[0].why, park.run(calls.status(first.task_id)).position)
    (task,) = park.run(calls.claim("old", "w"))
    print(task.payload, task.attempt, park.run(calls.heartbeat("old", "w", [task.task_id])))
    print(park.run(calls.finish(task.task_id, task.attempt, result="done")), park.run(calls.finish(task.task_id, 1)))
    second, third = park.run(calls.claim("old", "w", 2))
    print(park.run(calls.release(second.task_id, 1)), park.run(calls.cancel(third.task_id)))
    print([row.accepted for row in park.run(calls.finish_many([{"task_id": third.task_id, "attempt": 1}]))])
    (message,) = park.run(calls.fetch("c", "u"))
    print(message.payload, park.run(calls.result(first.task_id)).status, park.run(calls.ack([message.message_id])))
    park.run(calls.maintain()), park.run(calls.prune("old"))
    (stats,) = park.run(calls.stats("old"))
    print(stats.parked, stats.running, stats.completed, park.run(calls.pools("old"))[0].state)
    park.run(calls.set_pool_state("old", "draining"))
    park.run(calls.drop_pool("old", force=True))
"""
ANSWERS = """\
created
parked duplicate
[True, True]
may start 0
{'n': 1} 1 []
True False
True cancelling
[True]
done completed 1
1 0 2 active
"""


@dataclass(frozen=True)
class Filled:
    """A database nobody is connected to, to be copied, and what its pools held when the upgrade began."""

    dsn: str
    lots: list[Lot]


@pytest.fixture(scope="module")
def old(release: Release, made: str, empty_databases: NewDatabase) -> Filled:
    """A database as the release made and filled it."""
    dsn = copy_of(made, empty_databases)
    return Filled(dsn, list(fill(dsn, release)))


@pytest.fixture(scope="module")
def upgraded(old: Filled, empty_databases: NewDatabase) -> Filled:
    """A copy of it, migrated."""
    dsn = copy_of(old.dsn, empty_databases)
    migrated(dsn)
    return Filled(dsn, old.lots)


def contents(dsn: str) -> dict[str, list[Any]]:
    """Every row of every table of pgpark and pgmq."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        tables = connection.execute(
            "select oid::regclass::text as name from pg_class"
            " where relkind = 'r' and relnamespace in ('pgpark'::regnamespace, 'pgmq'::regnamespace)"
        ).fetchall()
        return {
            row["name"]: connection.execute(f"select t::text from {row['name']} t order by 1".encode()).fetchall()
            for row in tables
        }


def signatures(dsn: str) -> dict[str, DictRow]:
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        rows = connection.execute(SIGNATURES).fetchall()
    assert len(rows) == len({row["name"] for row in rows}), "a public function is there in two forms"
    return {row["name"]: row for row in rows}


# -- the kept releases -----------------------------------------------------------------------------------------------


def test_every_release_before_this_one_is_kept() -> None:
    """Who adds a migration keeps the release before it: python -m tests.upgrades.keep."""
    numbers = {file.name[len("migrations/") :][:4] for file in migrate.sql_files() if file.runs_once}
    assert numbers - {newest()} <= {*KEPT, *NEVER_RELEASED}


def test_a_release_is_kept_the_same_whoever_does_it(release: Release, tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(keep(release.folder, tmp_path)) as again,
        zipfile.ZipFile(RELEASES / f"{release.number}.zip") as kept,
    ):
        ours, theirs = (
            [(i.filename, i.date_time, i.external_attr, i.CRC) for i in z.infolist()] for z in (again, kept)
        )
    assert ours == theirs


# -- their databases -------------------------------------------------------------------------------------------------


def test_the_schema_is_that_of_a_new_database(upgraded: Filled, empty_databases: NewDatabase) -> None:
    fresh = empty_databases()
    migrated(fresh)
    with psycopg.connect(fresh, autocommit=True) as connection:
        for lot in upgraded.lots:  # they bring tables of their own
            config = POOLS[lot.pool][1] | {"max_units": 8}
            connection.execute("select pgpark.park_put_pool(%s, %s)", [lot.pool, Jsonb(config)])
    ours, theirs = catalog(upgraded.dsn), catalog(fresh)
    for what in CATALOG:
        assert ours[what] == theirs[what], what


def test_every_task_is_where_it_was(upgraded: Filled) -> None:
    assert accounts.faults(upgraded.dsn) == []
    with psycopg.connect(upgraded.dsn, autocommit=True, row_factory=dict_row) as connection:
        for lot in upgraded.lots:
            for task, before in lot.statuses.items():
                (now,) = connection.execute("select * from pgpark.park_status(%s)", [task]).fetchall()
                assert {name: now[name] for name in before} == before


def test_every_task_ends_in_its_one_outcome(upgraded: Filled, empty_databases: NewDatabase) -> None:
    dsn = copy_of(upgraded.dsn, empty_databases)
    db = Database(dsn)
    try:
        db.freeze()
        ids = [task for lot in upgraded.lots for task in [*lot.payloads, *goes_on_as_before(db, lot)]]
        db.advance(5000)
        for lot in upgraded.lots:
            db.maintain(lot.pool)
            work_off(db, lot.pool)
            check_outcomes(db, lot)
        fetched = db.rows("select task_id from pgpark.park_fetch('t', 'u', max_messages => 1000)")
        assert sorted(row["task_id"] for row in fetched) == sorted(
            task for lot in upgraded.lots for task in lot.payloads
        )
        accounts.outcomes(dsn, ids)
        assert accounts.faults(dsn) == []
    finally:
        db.close()


def goes_on_as_before(db: Database, lot: Lot) -> list[int]:
    """What the worker and the clients of before do next; returns tasks that were submitted."""
    tasks, pool = lot.tasks, lot.pool
    assert db.stats(pool)["used_units"] == 3
    assert db.rows("select park_heartbeat as id from pgpark.park_heartbeat(%s, 'w', %s)", pool, held(lot)) == [
        {"id": tasks["cancelling"]}
    ]
    assert not db.finish(tasks["running"], 2)
    assert db.finish(tasks["running"], 1, result={"n": 3})
    assert not db.finish(tasks["running"], 1)
    assert db.finish(tasks["cancelling"], 1, "failed")
    assert not db.finish(tasks["retrying"], 1)
    again = db.submit(pool, tenant="t", idempotency_key="key")
    assert (again["task_id"], again["reason"]) == (tasks["keyed"], "duplicate")
    other = db.submit(pool, tenant="another", idempotency_key="key")
    assert other["reason"] is None, "a key is its tenant's own"
    return [other["task_id"]]


def held(lot: Lot) -> list[int]:
    return [lot.tasks[name] for name in ("parts", "running", "cancelling")]


def work_off(db: Database, pool: str) -> None:
    while claimed := db.claim(pool):
        assert db.stats(pool)["used_units"] <= 8
        for row in claimed:
            assert db.finish(row["task_id"], row["attempt"], result=row["payload"])


def check_outcomes(db: Database, lot: Lot) -> None:
    tasks = lot.tasks
    assert db.finish(tasks["parts"], 1, result=lot.payloads[tasks["parts"]])
    if lot.has_parts:
        parts = db.rows("select content from pgpark.park_parts(%s)", tasks["parts"])
        assert parts == [{"content": "to"}, {"content": "ken"}]
    wanted: dict[int, Any] = {task: ("completed", None, payload) for task, payload in lot.payloads.items()}
    wanted[tasks["completed"]] = ("completed", None, {"answer": 42})
    wanted[tasks["running"]] = ("completed", None, {"n": 3})
    wanted[tasks["failed"]] = ("dropped", "no", None)
    wanted[tasks["cancelling"]] = ("dropped", "cancelled", None)
    wanted[tasks["late"]] = ("expired", "deadline_expired", None)
    found = {}
    for task in wanted:
        (row,) = db.rows("select * from pgpark.park_result(%s)", task)
        found[task] = (row["status"], row["reason"], row["payload"])
    assert found == wanted
    if lot.pool == "calling":
        due = db.rows("select task_id from pgpark.park_callbacks(100, %s)", lot.pool)
        assert sorted(row["task_id"] for row in due if row["task_id"] in wanted) == sorted(wanted)


@pytest.mark.oldest_and_newest
def test_a_migration_that_fails_at_any_step_leaves_everything_as_it_was(
    old: Filled, empty_databases: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = copy_of(old.dsn, empty_databases)
    before = catalog(dsn), contents(dsn)
    files = migrate.sql_files()
    fails = migrate.SqlFile("migrations/9999_fails.sql", "select 1 / 0", "0")
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        pending = [
            place for place, file in enumerate(files) if file in migrate.plan(connection).files and file.runs_once
        ]
        for place in [*pending, sum(file.runs_once for file in files), len(files)]:
            monkeypatch.setattr(migrate, "sql_files", lambda place=place: (*files[:place], fails, *files[place:]))
            with pytest.raises(MigrationError, match=r"9999_fails\.sql: division by zero\. Nothing was changed\.$"):
                migrate.migrate(connection)
    assert (catalog(dsn), contents(dsn)) == before


# -- their clients ---------------------------------------------------------------------------------------------------


def test_every_public_function_keeps_its_signature(old: Filled, upgraded: Filled) -> None:
    """Arguments may be added at the end, with defaults, and columns at the end of what is returned."""
    before, now = signatures(old.dsn), signatures(upgraded.dsn)
    for name, was in before.items():
        assert name in now, name
        arguments, results = now[name]["arguments"], now[name]["results"]
        assert arguments[: len(was["arguments"])] == was["arguments"], name
        assert all(default is not None for _, _, default in arguments[len(was["arguments"]) :]), name
        assert results[: len(was["results"])] == was["results"], name
        assert now[name]["many"] == was["many"], name


def test_its_client_works_on_the_new_schema(release: Release, upgraded: Filled, empty_databases: NewDatabase) -> None:
    program, answers = release.python("-c", CLIENT, copy_of(upgraded.dsn, empty_databases)).split("\n", 1)
    assert Path(program).is_relative_to(release.folder), "this is not the release"
    assert answers == ANSWERS
