"""A database that goes away and comes back, and one that is not there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from pgpark.gateway.settings import GatewaySettings
from tests.conftest import Database, Server, wait_for
from tests.gateway.conftest import Gateway
from tests.gateway.test_live import events


@pytest.fixture
def door(server: Server, db: Database) -> Iterator[Callable[[bool], None]]:
    """Closes the database to everybody and ends all connections, or opens it again."""
    name = db.connection.info.dbname
    with psycopg.connect(server.admin, autocommit=True) as admin:

        def set_open(open_: bool) -> None:
            allow = sql.SQL("alter database {} allow_connections {}").format(sql.Identifier(name), sql.Literal(open_))
            admin.execute(allow)
            if not open_:
                admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])

        yield set_open
        set_open(True)


def test_while_the_database_is_away_it_says_so_and_then_goes_on(
    db: Database, gateways: Callable[..., Gateway], door: Callable[[bool], None], connect: Callable[[], Database]
) -> None:
    db.pool()
    gateway = gateways(connection_secs=0.5, look_secs=1.0)
    client = gateway.client()
    task = db.parked(tenant="a")
    stream = events(gateway.client(), f"/pools/gpu/tasks/{task}/events", max_secs=60)
    assert next(stream)[0] == "status"

    door(False)
    for _ in range(3):
        answer = client.post("/pools/gpu/tasks", json={"payload": 1})
        assert (answer.status_code, answer.headers["Retry-After"] > "0") == (503, True)
        assert answer.json()["error"]["code"] in {"unavailable", "busy"}
        assert "pgpark_test" not in answer.text  # neither the server nor the database is named
        assert answer.elapsed.total_seconds() < 5
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200

    door(True)
    wait_for(lambda: client.get("/ready").status_code == 200)
    assert client.post("/pools/gpu/tasks", json={"payload": 1}).status_code == 202
    again = connect()
    again.claim()
    again.finish(task, result="kept")
    rest = list(stream)  # the same stream, over the same connection
    assert [kind for kind, _, _ in rest][-1] == "outcome"


def test_connections_that_were_lost_are_found_out_once(db: Database, gateways: Callable[..., Gateway]) -> None:
    gateway = gateways()
    client = gateway.client()
    assert client.get("/pools").status_code == 200
    db.rows("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> %s",
            db.connection.info.backend_pid)  # fmt: skip
    answers = [client.get("/pools").status_code for _ in range(5)]
    assert answers[1:] == [200] * 4


def test_a_database_that_is_not_migrated_is_not_ready(empty_databases: Callable[[], str], db: Database) -> None:
    gateway = Gateway(db, GatewaySettings(empty_databases()))
    try:
        client = gateway.client(secret="park_x")
        assert client.get("/health").status_code == 200
        for path in ("/ready", "/pools"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    finally:
        gateway.close()
