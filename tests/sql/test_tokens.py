"""Tokens: what a transaction may do that acts for one, how often, and for how long."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.conftest import Background, Database
from tests.roles import Roles, refused, roles  # noqa: F401

UNKNOWN = psycopg.errors.InvalidAuthorizationSpecification


def made(db: Database, *kinds: str, name: str = "t", **scope: Any) -> str:
    """A new token; returns the hash of its secret."""
    arguments = {"name": name, "kinds": list(kinds)} | scope
    named = ", ".join(f"{key} => %s" for key in arguments)
    secret = db.value(f"select pgpark.park_create_token({named})", *arguments.values())
    return hashlib.sha256(secret.encode()).hexdigest()


@pytest.fixture
def acting(connect: Callable[[], Database]) -> Callable[[str], Database]:
    """Sessions of the owner of the schema in a transaction that acts for a token."""

    def enter(token_hash: str) -> Database:
        session = connect()
        session.connection.execute("begin")
        session.rows("select * from pgpark.park_enter(%s)", token_hash)
        return session

    return enter


def test_a_token_binds_even_the_owner(db: Database, acting: Callable[[str], Database]) -> None:
    db.pool()
    foreign = db.parked(tenant="rival")
    session = acting(made(db, "producer", tenants=["a"]))
    own = session.parked(tenant="a")
    assert session.status(own)["status"] == "parked"
    assert session.rows("select * from pgpark.park_status(%s)", foreign) == []
    assert session.value("select pgpark.park_cancel(%s)", foreign) == "unknown"
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
        session.submit(tenant="rival")
    assert str(caught.value.diag.message_primary) == "token 't' may not submit to pool 'gpu' for tenant 'rival'"
    assert caught.value.diag.message_hint == "It is for: producer of tenants a."


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("producer", "select * from pgpark.park_claim('gpu', 'w')"),
        ("producer", "select pgpark.park_set_pool_state('gpu', 'paused')"),
        ("worker", "select * from pgpark.park_submit('gpu', '{}')"),
        ("worker", "select * from pgpark.park_fetch('a')"),
        ("worker", "select pgpark.park_put_pool('gpu', '{\"max_units\": 9}')"),
        ("reader", "select * from pgpark.park_submit('gpu', '{}')"),
        ("reader", "select * from pgpark.park_follow('a')"),
        ("reader", "select pgpark.park_change_pool('gpu', '{\"max_units\": 9}')"),
        ("reader", "select pgpark.park_create_token('mine', '{admin}')"),
        ("worker", "select * from pgpark.park_tokens()"),
        ("producer", "select pgpark.park_revoke_token('t')"),
        ("reader", "select pgpark.park_grant('postgres', 'reader')"),
    ],
)
def test_a_kind_of_token_opens_what_a_role_of_that_kind_may(
    db: Database, acting: Callable[[str], Database], kind: str, call: str
) -> None:
    db.pool()
    session = acting(made(db, kind))
    refused(lambda: session.rows(call), "token 't' may not")


def test_several_kinds_add_up(db: Database, acting: Callable[[str], Database]) -> None:
    db.pool()
    session = acting(made(db, "producer", "reader", tenants=["a"]))
    session.parked(tenant="a")
    assert session.stats()["parked"] == 1
    refused(lambda: session.submit(tenant="b"))


def test_a_token_of_a_pool_knows_no_other(db: Database, acting: Callable[[str], Database]) -> None:
    db.pool("gpu")
    db.pool("cpu")
    foreign = db.parked("cpu", tenant="a")
    session = acting(made(db, "producer", "worker", pools=["gpu"]))
    assert session.rows("select * from pgpark.park_status(%s)", foreign) == []
    assert [row["pool"] for row in session.rows("select * from pgpark.park_stats()")] == ["gpu"]
    refused(lambda: session.claim("cpu"))


def test_a_token_gives_a_role_nothing_that_it_may_not_do_itself(
    db: Database,
    roles: Roles,  # noqa: F811
) -> None:
    db.pool()
    session = roles.granted("producer", ["a"])
    admin = made(db, "admin")
    session.connection.execute("begin")
    session.rows("select * from pgpark.park_enter(%s)", admin)
    session.parked(tenant="a")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"^role "):
        session.submit(tenant="rival")


@pytest.mark.parametrize("forged", ["x", "none", "' or true --", "0" * 64, "ADMIN"])
def test_a_forged_setting_only_loses_rights(db: Database, forged: str) -> None:
    db.pool()
    task = db.parked(tenant="a")
    db.rows("select set_config('pgpark.token', %s, false)", forged)
    assert db.rows("select * from pgpark.park_status(%s)", task) == []
    with pytest.raises(UNKNOWN, match="unknown token"):
        db.submit()
    db.rows("select set_config('pgpark.token', '', false)")
    assert db.status(task)["status"] == "parked"


def test_a_token_is_left_with_the_transaction(db: Database, acting: Callable[[str], Database]) -> None:
    db.pool()
    session = acting(made(db, "reader"))
    session.connection.execute("commit")
    session.parked()


@pytest.mark.parametrize("nobody", ["", None, "0" * 64, "A" * 64])
def test_an_unknown_token_cannot_enter_and_leaves_no_rights(db: Database, nobody: str | None) -> None:
    db.pool()
    with pytest.raises(UNKNOWN):
        db.rows("select * from pgpark.park_enter(%s)", nobody)
    with pytest.raises(UNKNOWN):
        db.rows("select * from pgpark.park_admit(%s)", nobody)


def test_what_is_revoked_is_of_no_use_at_once(db: Database, acting: Callable[[str], Database]) -> None:
    db.pool()
    token = made(db, "producer")
    session = acting(token)
    session.parked()
    assert db.value("select pgpark.park_revoke_token('t')") is True
    with pytest.raises(UNKNOWN):
        session.submit()
    with pytest.raises(UNKNOWN):
        acting(token)
    assert db.value("select pgpark.park_revoke_token('t')") is False


def test_a_token_expires(db: Database, acting: Callable[[str], Database]) -> None:
    db.pool()
    db.freeze()
    token = made(db, "producer", expires_at=db.after(60))
    session = acting(token)
    session.parked()
    db.advance(61)
    with pytest.raises(UNKNOWN):
        session.submit()
    with pytest.raises(UNKNOWN):
        acting(token)
    db.advance(40 * 86400)
    made(db, "reader", name="other")
    assert [row["name"] for row in db.rows("select name from pgpark.park_tokens()")] == ["other"]


def test_a_limit_lets_a_burst_through_and_then_keeps_the_pace(db: Database) -> None:
    db.freeze()
    token = made(db, "producer", requests_per_sec=2.0, burst=3)

    def admitted() -> Any:
        (row,) = db.rows("select * from pgpark.park_admit(%s)", token)
        assert row["limited"]
        return row["admitted"] or row["retry_after_secs"]

    assert [admitted() for _ in range(4)] == [True, True, True, 0.5]
    db.advance(0.5)
    assert [admitted() for _ in range(2)] == [True, 0.5]
    db.advance(3600)
    assert [admitted() for _ in range(4)] == [True, True, True, 0.5]


def test_a_clock_that_is_set_back_does_not_shut_a_token_out(db: Database) -> None:
    db.freeze()
    token = made(db, "producer", requests_per_sec=2.0, burst=3)
    admit = "select admitted from pgpark.park_admit(%s)"
    assert [db.value(admit, token) for _ in range(4)] == [True, True, True, False]
    db.advance(-3600)
    assert [db.value(admit, token) for _ in range(4)] == [True, True, True, False]
    db.advance(0.5)
    assert db.value(admit, token)


def test_requests_of_one_token_at_once_do_not_exceed_its_limit(
    db: Database, connect: Callable[[], Database], background: Callable[[Database, Callable[[], Any]], Background]
) -> None:
    db.freeze()
    token = made(db, "producer", requests_per_sec=1.0, burst=1)
    admit = "select admitted from pgpark.park_admit(%s)"
    db.connection.execute("begin")
    assert db.value(admit, token)
    other = connect()
    waiting = background(other, lambda: other.value(admit, token)).wait_until_blocked()
    db.connection.execute("commit")
    assert waiting.result() is False


def test_a_token_without_a_limit_is_noted_once_a_minute(db: Database) -> None:
    db.freeze()
    token = made(db, "producer")
    used = []
    for seconds in (0, 30, 31):
        db.advance(seconds)
        (row,) = db.rows("select * from pgpark.park_admit(%s)", token)
        assert (row["admitted"], row["limited"]) == (True, False)
        used.append(db.value("select used_at from pgpark.park_tokens()"))
    assert used[0] == used[1] < used[2]


def test_the_secret_is_nowhere(db: Database) -> None:
    secret = db.value("select pgpark.park_create_token('t', '{reader}')")
    assert secret.startswith("park_") and len(secret) == 48
    assert secret not in str(db.rows("select * from pgpark.token"))
    assert secret not in str(db.rows("select * from pgpark.park_tokens()"))
    assert secret != db.value("select pgpark.park_create_token('u', '{reader}')")


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        ({"name": ""}, "22023", "token name '' is not possible"),
        ({"name": "a\nb"}, "22023", "token name 'a b' is not possible"),
        ({"kinds": []}, "22023", "kinds must be a plain list"),
        ({"kinds": ["king"]}, "22023", "unknown kind of access 'king'"),
        ({"kinds": ["worker"], "tenants": ["a"]}, "22023", "tenants go with producer, not with worker"),
        ({"kinds": ["admin"], "pools": ["gpu"]}, "22023", "an admin has all pools"),
        ({"kinds": ["producer", "admin"], "tenants": ["a"]}, "22023", "an admin has all pools"),
        ({"pools": ["typo"]}, "42704", "unknown pool 'typo'"),
        ({"expires_at": "2001-01-01"}, "22023", "expires_at must be in the future"),
        ({"requests_per_sec": 0.0}, "22023", "requests_per_sec must be from"),
        ({"requests_per_sec": float("nan")}, "22023", "requests_per_sec must be from"),
        ({"burst": 3}, "22023", "burst goes with requests_per_sec"),
        ({"requests_per_sec": 1.0, "burst": 0}, "22023", "burst must be from"),
        ({"name": "taken"}, "42710", "there is a token 'taken' already"),
    ],
)
def test_a_token_that_makes_no_sense_is_refused(
    db: Database, arguments: dict[str, Any], state: str, message: str
) -> None:
    db.pool()
    made(db, "reader", name="taken")
    given = {"name": "new", "kinds": ["reader"]} | arguments
    with pytest.raises(psycopg.Error, match=message) as caught:
        made(db, *given.pop("kinds"), **given)
    assert caught.value.sqlstate == state


# -- following a mailbox ---------------------------------------------------------------------------------------------


def ended(db: Database, tenant: str = "a") -> int:
    task = db.parked(tenant=tenant)
    db.claim()
    db.finish(task)
    return task


def follow(db: Database, bookmark: str | None, most: int = 50) -> tuple[list[int], str | None]:
    rows = db.rows("select * from pgpark.park_follow('a', %s, max_messages => %s)", bookmark, most)
    return [row["task_id"] for row in rows], rows[-1]["bookmark"] if rows else bookmark


def test_following_gives_each_outcome_once(db: Database) -> None:
    db.pool()
    tasks = [ended(db) for _ in range(5)]
    ended(db, "b")
    seen, bookmark = [], None
    while True:
        found, bookmark = follow(db, bookmark, 2)
        if not found:
            break
        seen += found
    assert seen == tasks
    later = ended(db)
    assert follow(db, bookmark)[0] == [later]


def test_numbers_of_a_bookmark_are_decimal(db: Database) -> None:
    db.pool()
    task = ended(db)
    assert follow(db, "0.0.00399.")[0] == [task]


def test_an_outcome_that_is_committed_late_is_not_lost(db: Database, connect: Callable[[], Database]) -> None:
    """It has a lower number than one that was seen already."""
    db.pool()
    slow, quick = db.parked(tenant="a"), db.parked(tenant="a")
    db.claim()
    other = connect()
    other.connection.execute("begin")
    other.finish(slow)
    db.finish(quick)
    found, bookmark = follow(db, None)
    assert found == [quick]
    assert follow(db, bookmark)[0] == []
    other.connection.execute("commit")
    found, bookmark = follow(db, bookmark)
    assert found == [slow]
    assert follow(db, bookmark)[0] == []


def all_followed(db: Database, bookmark: str | None) -> tuple[list[int], str | None]:
    seen: list[int] = []
    while True:
        found, bookmark = follow(db, bookmark, 100)
        if not found:
            return seen, bookmark
        seen += found
        assert len(bookmark or "") < 4000


def test_an_outcome_that_is_committed_very_late_is_not_lost_either(
    db: Database, connect: Callable[[], Database]
) -> None:
    """Many others land meanwhile, more than a bookmark holds, also while an unrelated transaction stays open."""
    db.pool(max_units=1000)
    slow = db.parked(tenant="a")
    tasks = [db.parked(tenant="a") for _ in range(450)]
    db.claim(max_tasks=1000)
    busy, other = connect(), connect()
    busy.connection.execute("begin")
    busy.rows("select pg_current_xact_id()")
    other.connection.execute("begin")
    other.finish(slow)
    db.rows("select * from pgpark.park_finish_many(%s)", Jsonb([{"task_id": task, "attempt": 1} for task in tasks]))
    before, bookmark = all_followed(db, None)
    assert before == tasks[:200]  # and no more, until that is over
    other.connection.execute("commit")
    after, bookmark = all_followed(db, bookmark)
    assert sorted(after) == [slow, *tasks[200:]]
    assert follow(db, bookmark)[0] == []


def test_a_bookmark_does_not_grow_without_end(db: Database, connect: Callable[[], Database]) -> None:
    db.pool(max_units=1000)
    other = connect()
    other.connection.execute("begin")
    other.rows("select pg_current_xact_id()")  # somebody is busy for long
    tasks = [db.parked(tenant="a") for _ in range(450)]
    db.claim(max_tasks=1000)
    db.rows("select * from pgpark.park_finish_many(%s)", Jsonb([{"task_id": task, "attempt": 1} for task in tasks]))
    assert all_followed(db, None)[0] == tasks


@pytest.mark.parametrize(
    "bookmark", ["", "x", "1.2.3", "1.2.3.4;", "-1.0.0.", "1.2.3." + ",".join("1" * 300), "9" * 50]
)
def test_a_bookmark_that_is_none_is_refused(db: Database, bookmark: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="bookmark"):
        follow(db, bookmark)
