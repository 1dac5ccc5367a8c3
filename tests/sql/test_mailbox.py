"""park_fetch, park_ack, park_result: outcomes wait for whoever comes back."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.conftest import Database

pytestmark = pytest.mark.every_backend


def ended(db: Database, result: Any = None, **address: Any) -> int:
    task = db.parked(**address)
    db.claim()
    db.finish(task, result=result)
    return task


def fetched(db: Database, *arguments: Any) -> list[int]:
    listed = ", ".join("%s" for _ in arguments)
    return [row["task_id"] for row in db.rows(f"select * from pgpark.park_fetch({listed})", *arguments)]


def test_messages_are_addressed_by_tenant_user_and_session(db: Database) -> None:
    db.pool()
    one = ended(db, tenant="t", user_id="u", session_id="s")
    two = ended(db, tenant="t", user_id="u", session_id="s2")
    three = ended(db, tenant="t", user_id="u2", session_id="s")
    four = ended(db, tenant="t")
    ended(db, tenant="t2", user_id="u", session_id="s")
    assert fetched(db, "t") == [one, two, three, four]
    assert fetched(db, "t", "u") == [one, two]
    assert fetched(db, "t", "u", "s") == [one]
    assert fetched(db, "t", None, "s") == [one, three]
    assert fetched(db, "nobody") == []


def test_a_message_holds_the_result_and_where_it_came_from(db: Database) -> None:
    db.pool()
    task = ended(db, result={"text": "hello"}, tenant="t", user_id="u", session_id="s")
    (row,) = db.rows("select * from pgpark.park_fetch('t')")
    assert row == {
        "message_id": row["message_id"],
        "task_id": task,
        "pool": "gpu",
        "tenant": "t",
        "user_id": "u",
        "session_id": "s",
        "status": "completed",
        "reason": None,
        "payload": {"text": "hello"},
        "created_at": row["created_at"],
    }
    assert db.rows("select * from pgpark.park_result(%s)", task) == [row]


def test_fetch_leaves_the_messages_until_they_are_acknowledged(db: Database) -> None:
    db.pool()
    tasks = [ended(db, tenant="t") for _ in range(3)]
    assert fetched(db, "t") == fetched(db, "t") == tasks
    first = db.value("select min(message_id) from pgpark.park_fetch('t')")
    assert db.value("select pgpark.park_ack(%s)", [first, 12345]) == 1
    assert db.value("select pgpark.park_ack(%s)", [first]) == 0
    assert fetched(db, "t") == tasks[1:]


def test_since_and_max_messages_bound_a_fetch(db: Database) -> None:
    db.pool()
    db.freeze()
    first = ended(db, tenant="t")
    db.advance(10)
    later = db.after(0)
    rest = [ended(db, tenant="t") for _ in range(3)]
    assert fetched(db, "t", None, None, later) == rest
    assert fetched(db, "t", None, None, None, 2) == [first, rest[0]]


def test_a_task_without_a_tenant_is_found_by_its_id(db: Database) -> None:
    db.pool()
    task = ended(db, result=5)
    assert db.value("select payload from pgpark.park_result(%s)", task) == 5


def test_a_task_that_has_not_ended_has_no_result(db: Database) -> None:
    db.pool()
    assert db.rows("select * from pgpark.park_result(%s)", db.parked()) == []


def test_outcomes_outlive_their_pool(db: Database) -> None:
    db.pool()
    task = ended(db, result=1, tenant="t")
    db.rows("select pgpark.park_drop_pool('gpu')")
    assert fetched(db, "t") == [task]


@pytest.mark.parametrize(
    ("arguments", "message"), [("null", "tenant must not be null"), ("'t', max_messages => 0", "max_messages must be")]
)
def test_an_impossible_fetch_is_named(db: Database, arguments: str, message: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
        db.rows(f"select * from pgpark.park_fetch({arguments})")


def test_a_landing_outcome_notifies_with_the_task_id(db: Database, connect: Any) -> None:
    listener = connect()
    listener.connection.execute('listen "pgpark.mailbox"')
    db.pool()
    task = ended(db)
    (notice,) = listener.connection.notifies(timeout=5, stop_after=1)
    assert (notice.channel, notice.payload) == ("pgpark.mailbox", str(task))
