"""`pgpark apply`, `pgpark config schema`, and --pools: pools as a config file describes them, wherever they live."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgpark import cli
from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate
from tests.conftest import Database

# As its users have it.
EXAMPLE = (Path(__file__).parents[2] / "examples" / "scheduler-config.json").read_text(encoding="utf-8")


class Printed:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Pgpark = Callable[..., Printed]


@pytest.fixture
def pgpark(dsn: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Pgpark:
    """Runs a command in a folder of its own, with the test's database as the one that is given."""
    monkeypatch.setenv("PGPARK_DSN", dsn)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Printed:
        capfd.readouterr()
        code = cli.run(arguments)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Printed(code, out, err)

    return run


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Database]:
    """The embedded server of the example, kept running for the test."""
    with EmbeddedServer(tmp_path / "data" / "queues").use() as dsn:
        database = Database(dsn)
        migrate(database.connection)
        yield database
        database.connection.close()


def write(pools: dict[str, Any], name: str = "scheduler-config.json") -> str:
    Path(name).write_text(json.dumps({"pools": pools}))
    return name


def contents(database: Database) -> dict[str, list[Any]]:
    """Every row of every table, to compare."""
    tables = database.rows(
        "select format('%%I.%%I', schemaname, tablename) as name from pg_tables where schemaname = any (%s) order by 1",
        ["pgpark", "pgmq"],
    )
    return {row["name"]: database.rows(f"select * from {row['name']} t order by t::text") for row in tables}


# -- the whole file --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_users_file_works_unchanged_on_a_server_and_on_an_embedded_one(
    pgpark: Pgpark, db: Database, embedded: Database, tmp_path: Path
) -> None:
    Path("scheduler-config.json").write_text(EXAMPLE)
    dry = pgpark("apply", "scheduler-config.json", "--dry-run")
    home = tmp_path / "data" / "queues"
    assert dry.out.splitlines()[1] == f"tauri_local_llm would be created in the embedded server in {home}"
    assert (db.rows("select from pgpark.pool"), embedded.rows("select from pgpark.pool")) == ([], [])
    printed = pgpark("apply", "scheduler-config.json")
    assert (printed.code, printed.err) == (0, "")
    assert [line.split(" in ")[0] for line in printed.out.splitlines()] == [
        "llm_inference created",
        "tauri_local_llm created",
    ]
    again = pgpark("apply", "scheduler-config.json")
    assert [line.split(" in ")[0] for line in again.out.splitlines()] == [
        "llm_inference unchanged",
        "tauri_local_llm unchanged",
    ]
    assert db.value("select name from pgpark.pool") == "llm_inference"
    assert embedded.value("select name from pgpark.pool") == "tauri_local_llm"

    # --pools: each command finds the database of its pool.
    file = ("--pools", "scheduler-config.json")
    task = pgpark("submit", "tauri_local_llm", '{"x": 1}', *file).out.strip()
    assert embedded.stats("tauri_local_llm")["parked"] == 1
    assert pgpark("status", task, "--pool", "tauri_local_llm", *file).code == 0
    assert pgpark("cancel", task, "--pool", "tauri_local_llm", *file).code == 0
    refused = pgpark("status", task, *file)
    assert (refused.code, refused.err) == (
        2,
        "pgpark: scheduler-config.json: its pools live in 2 databases; name one with --pool: "
        "llm_inference, tauri_local_llm\n",
    )
    unknown = pgpark("submit", "tauri_llm", "1", *file)
    assert unknown.err == (
        "pgpark: scheduler-config.json: there is no pool 'tauri_llm' (did you mean tauri_local_llm?); "
        "there are llm_inference, tauri_local_llm\n"
    )


@pytest.mark.slow
def test_nothing_is_applied_anywhere_when_a_pool_of_another_database_is_wrong(
    pgpark: Pgpark, db: Database, embedded: Database
) -> None:
    queue = {"type": "yaque", "path": "data/queues"}
    before = contents(db), contents(embedded)
    for wrong in ("a", "z"):  # whichever comes first
        pools = {"m": {"max_units": 1}, "n": {"max_units": 1, "queue": queue}}
        pools |= {wrong: {"max_units": 0}, f"{wrong}2": {"max_units": 0, "queue": queue}}
        assert pgpark("apply", write(pools)).code == 2
        assert (contents(db), contents(embedded)) == before


def test_one_database_named_in_two_ways_is_changed_in_one_transaction(pgpark: Pgpark, db: Database) -> None:
    pools = {"a": {"max_units": 1}, "b": {"max_units": 1, "database": f"{db.dsn} application_name=b"}}
    assert pgpark("apply", write(pools)).code == 0
    assert [row["name"] for row in db.rows("select name from pgpark.pool order by 1")] == ["a", "b"]
    assert "database" not in db.value("select config from pgpark.pool where name = 'b'"), (
        "a DSN is not for the database"
    )


def test_a_change_is_printed_setting_by_setting(pgpark: Pgpark, db: Database) -> None:
    db.pool("gpu", max_queue_depth=5)
    db.pool("other")
    before = contents(db)
    file = write({"gpu": {"max_units": 30, "retry": {"max_attempts": 3}}, "new": {"max_units": 1}})
    where = f"in {psycopg.conninfo.conninfo_to_dict(db.dsn)['host']}/{db.connection.info.dbname}"
    dry = pgpark("apply", file, "--dry-run")
    assert dry.out.splitlines() == [
        f"gpu would be changed {where}",
        "  max_queue_depth: 5 -> none",
        "  max_units: 24 -> 30",
        "  retry.max_attempts: 1 -> 3",
        f"new would be created {where}",
    ]
    assert contents(db) == before, "a dry run changes nothing"
    (gpu, new) = map(json.loads, pgpark("apply", file, "--json").out.splitlines())
    assert (gpu["result"], new["result"]) == ("changed", "created")
    assert {"key": "max_units", "before": 24, "after": 30} in gpu["changes"]
    assert db.stats("gpu")["max_units"] == 30
    assert db.stats("other")["max_units"] == 24, "a pool that the file does not name is left alone"


def test_what_is_no_setting_of_the_pool_itself_is_applied_too(pgpark: Pgpark, db: Database) -> None:
    notifier = {"type": "http", "base_url": "https://x.example.com"}
    for pool in ({"max_units": 24}, {"max_units": 24, "mailbox": {"notifier": notifier}}, {"max_units": 24}):
        assert pgpark("apply", write({"gpu": pool})).code == 0
        assert db.value("select config from pgpark.pool") == pool


def test_nothing_is_applied_when_the_second_pool_is_wrong(pgpark: Pgpark, db: Database) -> None:
    db.pool("gpu")
    before = contents(db)
    assert pgpark("apply", write({"gpu": {"max_units": 30}, "z": {"max_units": 0}})).code == 2
    assert contents(db) == before


def test_nothing_is_applied_when_a_pool_is_refused_only_while_it_is_made(pgpark: Pgpark, db: Database) -> None:
    db.rows("select pgmq.create('taken')")
    before = contents(db)
    printed = pgpark("apply", write({"a": {"max_units": 1}, "taken": {"max_units": 1}}))
    assert (printed.code, contents(db)) == (2, before)
    assert printed.err.startswith("pgpark: scheduler-config.json: ")
    twice = {"a": {"max_units": 1, "queue": {"queue_name": "q"}}, "b": {"max_units": 1, "queue": {"queue_name": "q"}}}
    assert pgpark("apply", write(twice)).code == 2, "each alone is possible"
    assert contents(db) == before


def test_a_database_without_pgpark_says_what_to_run(pgpark: Pgpark, empty_databases: Callable[[], str]) -> None:
    printed = pgpark("apply", write({"a": {"max_units": 1}, "b": {"max_units": 1, "database": empty_databases()}}))
    assert printed.code == 3
    assert printed.err.startswith("pgpark: scheduler-config.json: b: the database pgpark_test_")
    assert printed.err.endswith("has no pgpark yet; run: pgpark migrate\n")


def test_a_password_is_not_shown(pgpark: Pgpark, db: Database) -> None:
    for dsn in (
        f"{db.dsn} password=hunter2 port=1",
        "postgresql://me:hunter2@[bad",
        "postgresql://me:hunter2@h.invalid/x",
    ):
        printed = pgpark("apply", write({"a": {"max_units": 1, "database": dsn}}))
        assert printed.code == 3
        assert "hunter2" not in printed.out + printed.err
    header = {"base_url": "https://x.example.com", "auth_header": "Bearer hunter2\n"}
    printed = pgpark("apply", write({"a": {"max_units": 1, "mailbox": {"notifier": header}}}))
    assert printed.code == 2
    assert "hunter2" not in printed.out + printed.err


# -- wrong files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "complaint"),
    [
        ({"max_units": "24"}, "max_units must be a whole number from 1 to 1000000000, not \"24\""),
        ({"max_units": 0}, "max_units must be a whole number from 1 to 1000000000, not 0"),
        ({"max_units": True}, "max_units must be a whole number from 1 to 1000000000, not true"),
        ({}, "max_units is missing"),
        ({"max_units": 1, "max_queue_dept": 1}, "max_queue_dept is no key of a pool (did you mean max_queue_depth?)"),
        ({"max_units": 1, "queue": {"type": "pgmq"}}, "queue.type must be one of in_memory, postgres_custom, postgres"),
        ({"max_units": 1, "queue": {"typ": "yaque"}}, "queue.typ is no key of a pool (did you mean type?)"),
        ({"max_units": 1, "queue": {"type": "yaque", "path": 5}}, "queue.path must be a text on one line"),
        ({"max_units": 1, "database": 5}, "database must be a text on one line"),
        ({"max_units": "${NO_SUCH}"}, "max_units needs the variable NO_SUCH, which is not set"),
        ({"max_units": 1, "resource_kind": "${A B}"}, "resource_kind: a variable must look like ${NAME}"),
        ({"max_units": 1, "resource_kind": "${A"}, "resource_kind has a ${ without its }"),
        ({"max_units": "${KIND}"}, "max_units must be a whole number from 1 to 1000000000, not \"gpu_vram\""),
        ([], ": the config must be a JSON object, not array"),
    ],
)  # fmt: skip
def test_a_wrong_pool_is_one_line_with_file_and_path(
    pgpark: Pgpark, db: Database, monkeypatch: pytest.MonkeyPatch, pool: Any, complaint: str
) -> None:
    monkeypatch.setenv("KIND", "gpu_vram")
    printed = pgpark("apply", write({"fine": {"max_units": 1}, "llm_inference": pool}))
    assert (printed.code, printed.out) == (2, "")
    dot = "" if complaint.startswith(":") else "."
    assert printed.err.startswith(f"pgpark: scheduler-config.json: pools.llm_inference{dot}{complaint}")
    assert printed.err.count("\n") == 1
    assert db.rows("select from pgpark.pool") == []


# -- the schema ------------------------------------------------------------------------------------------------------


def test_the_schema_that_is_printed_is_the_one_that_the_database_makes(pgpark: Pgpark, db: Database) -> None:
    """To renew the file: write what `select pgpark.park_config_schema()` returns, with an indent of two."""
    made = db.value("select pgpark.park_config_schema()")
    printed = pgpark("config", "schema")
    assert printed.out == json.dumps(made, indent=2) + "\n"


def test_every_key_has_words(db: Database) -> None:
    assert db.rows("select path from pgpark._config_keys() except select path from pgpark._config_words()") == []
    assert db.rows("select path from pgpark._config_words() except select path from pgpark._config_keys()") == []


def test_the_defaults_of_the_schema_are_those_of_a_pool(db: Database) -> None:
    db.pool("gpu", tenants={"t": {}})
    settings = db.value("select settings from pgpark.park_pools('gpu')")
    for row in db.rows("select path, default_value from pgpark._config_words() where default_value is not null"):
        value: Any = settings
        for key in row["path"].replace("*", "t").split("."):
            value = (value or {}).get(key, {})
        assert value in (row["default_value"], {}), row["path"]


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"max_units": "${UNITS:-24}"}, True),
        ({"max_units": "24"}, False),
        ({"max_units": 0}, False),
        ({"max_unit": 5}, False),
        ({"archive": None}, True),
        ({"tenants": {"acme": {"weight": 2}, "": {"max_units": 1}}}, True),
        ({"tenants": {"acme": {"wight": 2}}}, False),
        ({"queue": {"type": "postgres_custom", "table": "t"}}, True),
        ({"queue": {"type": "in_memory", "table": "t"}}, False),
        ({"queue": {"queue_name": "q"}}, True),
        ({"queue": {"stream": "q"}}, False),
        ({"queue": {"type": "yaque", "stream": "q-${HOST}"}}, True),
        ({"queue": {"type": "pgmq"}}, False),
        ({"mailbox": {"notifier": {"auth_header": "x"}}}, False),
    ],
)
def test_editors_see_what_the_database_says(pgpark: Pgpark, db: Database, change: dict[str, Any], valid: bool) -> None:
    import jsonschema

    schema = json.loads(pgpark("config", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    example = json.loads(EXAMPLE)
    example["pools"]["llm_inference"] |= change
    assert jsonschema.Draft202012Validator(schema).is_valid(example) == valid
    if "${" not in json.dumps(change):
        pool = json.dumps(example["pools"]["llm_inference"])
        try:
            db.rows("select pgpark._check_config('llm_inference', %s)", pool)
        except psycopg.Error:
            assert not valid
        else:
            assert valid
