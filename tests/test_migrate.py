"""pgpark migrate: once, twice, many at once, by script; and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row

from pgpark import migrate
from pgpark.errors import MigrationError
from tests.conftest import Database, psql

NewDatabase = Callable[[], str]

# Everything that makes a schema: columns, constraints, indexes, functions with body, settings and comment, types,
# sequences, privileges, comments, and the ledger.
CATALOG = {
    "columns": """
        select table_schema, table_name, column_name, data_type, column_default, is_nullable, identity_generation
        from information_schema.columns where table_schema in ('pgpark', 'pgmq') order by 1, 2, ordinal_position""",
    "constraints": """
        select conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        from pg_constraint where connamespace in ('pgpark'::regnamespace, 'pgmq'::regnamespace) order by 1, 2""",
    "indexes": """
        select tablename, indexname, indexdef
        from pg_indexes where schemaname in ('pgpark', 'pgmq') order by 2""",
    "functions": """
        select p.oid::regprocedure::text, pg_get_functiondef(p.oid), obj_description(p.oid, 'pg_proc'), proacl
        from pg_proc p
        where pronamespace in ('pgpark'::regnamespace, 'pgmq'::regnamespace) and prokind = 'f' order by 1""",
    "relations": """
        select oid::regclass::text, relkind, relpersistence, reloptions, obj_description(oid, 'pg_class'),
          coalesce(relacl, acldefault(case relkind when 'S' then 's' else 'r' end::"char", relowner)) as relacl
        from pg_class where relnamespace in ('pgpark'::regnamespace, 'pgmq'::regnamespace) order by 1""",
    "ledger": "select name, hash from pgpark.migration order by 1",
    "blueprint": "select * from pgpark.blueprint order by kind, object",
}


@contextlib.contextmanager
def connected(dsn: str) -> Iterator[psycopg.Connection[DictRow]]:
    with contextlib.closing(psycopg.connect(dsn, autocommit=True, row_factory=dict_row)) as connection:
        yield connection


def catalog(dsn: str) -> dict[str, list[DictRow]]:
    """All of it; of an older release what there is."""
    with connected(dsn) as connection:
        recorded = connection.execute("select from pg_class where relname = 'blueprint'").rowcount
        queries = {what: query for what, query in CATALOG.items() if what != "blueprint" or recorded}
        return {what: connection.execute(query).fetchall() for what, query in queries.items()}


def migrated(dsn: str) -> migrate.Plan:
    with connected(dsn) as connection:
        return migrate.migrate(connection)


def test_an_empty_database_gets_everything_and_a_second_run_nothing(empty_databases: NewDatabase) -> None:
    dsn = empty_databases()
    first = migrated(dsn)
    assert first.install_pgmq
    assert [file.name for file in first.files] == [file.name for file in migrate.sql_files()]
    before = catalog(dsn)
    assert migrated(dsn).empty
    assert catalog(dsn) == before


def test_ten_at_once_end_the_same(empty_databases: NewDatabase) -> None:
    alone, together = empty_databases(), empty_databases()
    migrated(alone)
    with ThreadPoolExecutor(10) as threads:
        plans = list(threads.map(migrated, [together] * 10))
    assert sorted(plan.empty for plan in plans) == [False] + [True] * 9
    assert catalog(together) == catalog(alone)


def test_the_script_makes_the_same_schema_as_migrate(empty_databases: NewDatabase, tmp_path: Path) -> None:
    by_migrate, by_script = empty_databases(), empty_databases()
    migrated(by_migrate)
    file = tmp_path / "pgpark.sql"
    file.write_text(migrate.script())
    command = [psql(), "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-f", str(file), by_script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    ours, theirs = catalog(by_migrate), catalog(by_script)
    for what in CATALOG:
        assert ours[what] == theirs[what], what
        assert ours[what], f"nothing was compared in {what}"
    assert migrated(by_script).empty


def test_a_queue_system_that_is_there_already_is_kept(empty_databases: NewDatabase) -> None:
    dsn = empty_databases()
    with connected(dsn) as connection:
        connection.execute(migrate.pgmq_script().encode())
        connection.execute("select pgmq.create('mine'), pgmq.send('mine', '{}')")
    assert not migrated(dsn).install_pgmq
    with connected(dsn) as connection:
        assert connection.execute("select count(*) as n from pgmq.q_mine").fetchall() == [{"n": 1}]


def test_a_changed_function_file_is_applied_again(empty_databases: NewDatabase, monkeypatch: Any) -> None:
    dsn = empty_databases()
    migrated(dsn)
    files = migrate.sql_files()
    last = dataclasses.replace(files[-1], text=files[-1].text + "\n-- changed\n", hash="f" * 64)
    monkeypatch.setattr(migrate, "sql_files", lambda: (*files[:-1], last))
    assert [file.name for file in migrated(dsn).files] == [last.name]
    assert migrated(dsn).empty


def test_leases_do_not_lapse_during_a_migration(db: Database) -> None:
    """However long it takes: workers cannot renew them meanwhile."""
    db.pool(lease_secs=30)
    task = db.parked()
    db.claim()
    db.rows("update pgpark.task set lease_until = now() - interval '1 hour' returning 1")
    db.rows("update pgpark.front set next_lapse = '-infinity' returning 1")
    db.rows("delete from pgpark.migration where name = 'functions/stats.sql' returning 1")
    assert not migrated(db.dsn).empty
    assert db.maintain()["reclaimed"] == 0
    assert db.finish(task)


def test_a_helper_may_change_its_signature(empty_databases: NewDatabase, monkeypatch: Any) -> None:
    dsn = empty_databases()
    old = "create or replace function pgpark._probe(a int) returns int language sql as 'select 1';"
    new = "create or replace function pgpark._probe(a int, b int) returns text language sql as 'select null::text';"
    files = migrate.sql_files()
    for text, arguments in ((old, "a integer"), (new, "a integer, b integer")):
        probe = migrate.SqlFile("functions/zz_probe.sql", text, text)
        monkeypatch.setattr(migrate, "sql_files", lambda probe=probe: (*files, probe))
        migrated(dsn)
        with connected(dsn) as connection:
            found = connection.execute(
                "select pg_get_function_arguments(oid) as arguments from pg_proc where proname = '_probe'"
            ).fetchall()
        assert found == [{"arguments": arguments}]


def test_an_edited_migration_is_an_error_naming_the_file(empty_databases: NewDatabase, monkeypatch: Any) -> None:
    dsn = empty_databases()
    migrated(dsn)
    first, *rest = migrate.sql_files()
    monkeypatch.setattr(migrate, "sql_files", lambda: (dataclasses.replace(first, hash="f" * 64), *rest))
    with pytest.raises(MigrationError, match=r"sql/migrations/0001_tables\.sql was edited after it was applied"):
        migrated(dsn)


def test_a_database_of_a_newer_pgpark_is_left_alone(empty_databases: NewDatabase) -> None:
    dsn = empty_databases()
    migrated(dsn)
    with connected(dsn) as connection:
        connection.execute("insert into pgpark.migration (name, hash) values ('migrations/9999_future.sql', 'x')")
    with pytest.raises(MigrationError, match=r"migrated by a newer pgpark \(migrations/9999_future\.sql is unknown"):
        migrated(dsn)


def test_a_failing_migration_leaves_the_database_as_it_was(empty_databases: NewDatabase, monkeypatch: Any) -> None:
    dsn = empty_databases()
    migrated(dsn)
    before = catalog(dsn)
    text = "create table pgpark.half (x int); select 1 / 0;"
    broken = migrate.SqlFile("migrations/9999_broken.sql", text, "f" * 64)
    files = migrate.sql_files()
    monkeypatch.setattr(migrate, "sql_files", lambda: (*files, broken))
    with pytest.raises(MigrationError, match=r"9999_broken\.sql: division by zero\. Nothing was changed"):
        migrated(dsn)
    assert catalog(dsn) == before


def test_a_helper_that_no_release_makes_any_more_is_dropped(empty_databases: NewDatabase) -> None:
    dsn = empty_databases()
    migrated(dsn)
    with connected(dsn) as connection:
        connection.execute("create function pgpark._old(int) returns int language sql as 'select $1'")
        connection.execute("update pgpark.migration set name = 'functions/old.sql' where name = 'functions/stats.sql'")
    migrated(dsn)
    with connected(dsn) as connection:
        left = connection.execute("select from pg_proc where proname = '_old'").rowcount
        noted = connection.execute("select from pgpark.migration where name = 'functions/old.sql'").rowcount
        assert (left, noted) == (0, 0)


def test_a_pgmq_without_what_we_need_is_refused_naming_the_version(empty_databases: NewDatabase) -> None:
    dsn = empty_databases()
    with connected(dsn) as connection:
        connection.execute("create schema pgmq")
    with pytest.raises(MigrationError, match=r"holds an installation older than pgmq 1\.5\.0, which pgpark needs"):
        migrated(dsn)
    with connected(dsn) as connection:
        assert connection.execute("select to_regnamespace('pgpark') as here").fetchall() == [{"here": None}]


def test_an_old_extension_is_refused_naming_both_versions(empty_databases: NewDatabase) -> None:
    """The extension is not on every test server, so its row in the catalog is put there by hand."""
    dsn = empty_databases()
    with connected(dsn) as connection:
        connection.execute(
            "insert into pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)"
            " select 424242, 'pgmq', 10, 'public'::regnamespace, false, '1.4.4'"
        )
    with pytest.raises(MigrationError, match=r"pgmq 1\.4\.4 is too old: pgpark needs pgmq 1\.5\.0 or newer"):
        migrated(dsn)


def test_every_public_function_has_a_comment(empty_databases: NewDatabase) -> None:
    dsn = empty_databases()
    migrated(dsn)
    with connected(dsn) as connection:
        bare = connection.execute(
            "select proname from pg_proc where pronamespace = 'pgpark'::regnamespace and proname like 'park\\_%'"
            " and obj_description(oid, 'pg_proc') is null"
        ).fetchall()
        paths = connection.execute(
            "select proname from pg_proc p join pg_language l on l.oid = prolang and lanname = 'plpgsql'"
            " where pronamespace = 'pgpark'::regnamespace and 'search_path=pgpark, pg_temp' <> all (proconfig)"
        ).fetchall()
    assert (bare, paths) == ([], [])


def test_the_released_migrations_are_unchanged() -> None:
    """A migration is never edited once it is released: a change goes into a new file, and its hash is added here."""
    released = {
        "migrations/0001_tables.sql": "19755486fff42c15806b02a6078ba4532b64574b64e78c7fe886115a062ebc69",
        "migrations/0002_order_of_starting.sql": "e481c396b6ddd5be12f4617e6e20d8392b57aa70bcb182a94d8c6f1532f3dbcc",
        "migrations/0003_backends.sql": "ead2d33b2de87b85870e763382436a003f3f66c57bb2a3229cf9a1d7789ad8f3",
        "migrations/0004_callbacks.sql": "68f20312ae3a93573409464c20295496e19a98d4671c5c49daf48b73e55823a2",
        "migrations/0005_parts.sql": "c95fc0bd7cdbbcb6489eb4e440a7a4593240cd49c45d6e5ab030223809a50655",
        "migrations/0006_flat.sql": "6afea7756fa006d53a1f2ae0a58f62830097dced0e4ddb633a5f264c29fef7ea",
        "migrations/0007_access.sql": "2ccbf9e1479546274ae0040a5bb18ae6fdb7a752623981048361552e5578bebd",
        "migrations/0008_horizon.sql": "4f87f0b6e78084a05fc0d401878d9dd2b00767d28a31bfe797ad9e18426b7b67",
        "migrations/0009_blueprint.sql": "0719a5d5429f32f2106dee5f32a08dc73b3d4d724a07840f999db0bcada054c3",
        "migrations/0010_tokens.sql": "6195c0355572d40c8362067e3392bb1cbd04354194a725b5a9c4f34a78c981da",
        "migrations/0011_measures.sql": "c84015f611b78c814eae622564c5450bca68ac3f84d786fa3d401a294f041cc3",
        "migrations/0013_retry.sql": "144024388597c641ea564721844339aee774bf448aea4cf3a86b3a1a5bdc067b",
        "migrations/0012_audit.sql": "236583edb5426aaae5c6b9a42b3c0e0202843f07806880ca7f72b9bdd9e3bfbc",
    }
    found = {file.name: file.hash for file in migrate.sql_files() if file.runs_once}
    assert {name: found.get(name) for name in released} == released
