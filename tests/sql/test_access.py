"""Who may do what: each kind of access from SQL, and what a role tries beyond what it was granted.

Every attacker is a role of its own in a session whose session_user it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from tests.conftest import Background, Database
from tests.roles import DENIED, Roles, refused, rival, roles

__all__ = ["rival", "roles"]  # fixtures

KINDS = ("producer", "worker", "reader", "admin")
# Beside public functions, what every role that has access may call.
CLOCK = "_now"


def public_functions(db: Database) -> set[str]:
    rows = db.rows(
        "select proname from pg_proc where pronamespace = 'pgpark'::regnamespace and proname like 'park\\_%%'",
    )
    return {row["proname"] for row in rows}


def callable_by(session: Database) -> set[str]:
    rows = session.rows(
        "select proname from pg_proc f join pg_namespace n on n.oid = f.pronamespace"
        " where n.nspname = 'pgpark' and has_schema_privilege(n.oid, 'usage')"
        " and has_function_privilege(f.oid, 'execute')"
    )
    return {row["proname"] for row in rows}


# -- the walls -------------------------------------------------------------------------------------------------------


def test_every_public_function_runs_as_the_owner_with_a_path_of_its_own(db: Database) -> None:
    loose = db.rows(
        "select proname from pg_proc where pronamespace = 'pgpark'::regnamespace and proname like 'park\\_%%'"
        " and not (prosecdef and 'search_path=pgpark, pg_temp' = any (proconfig))"
    )
    assert loose == []
    lent = db.rows(
        "select proname from pg_proc where pronamespace = 'pgpark'::regnamespace and proname like '\\_%%' and prosecdef"
    )
    assert lent == []  # a helper runs as whoever calls it, so that the rights are lent in one place


def test_every_public_function_is_somebodys(db: Database) -> None:
    assert {row["name"] for row in db.rows("select name from pgpark._calls()")} == public_functions(db)


def test_a_role_that_was_granted_nothing_can_do_nothing(db: Database, roles: Roles) -> None:
    db.pool()
    nobody = roles.session(roles.make())
    assert callable_by(nobody) == set()
    refused(lambda: nobody.rows("select pgpark.park_stats()"), "permission denied for schema pgpark")
    refused(lambda: nobody.rows("select * from pgmq.q_gpu"), "permission denied for schema pgmq")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_access_opens_its_functions_and_nothing_else(db: Database, roles: Roles, kind: str) -> None:
    db.pool()
    session = roles.granted(kind)
    expected = {
        row["name"]
        for row in db.rows("select name, kinds from pgpark._calls()")
        if kind == "admin" or kind in row["kinds"]
    }
    assert callable_by(session) == expected | {CLOCK}
    relations = session.rows(
        "select c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where n.nspname in ('pgpark', 'pgmq') and c.relkind in ('r', 'p', 'v', 'S')"
        " and (case when c.relkind = 'S' then has_sequence_privilege(c.oid, 'usage, select, update')"
        "      else has_table_privilege(c.oid, 'select, insert, update, delete, truncate, references, trigger') end)"
    )
    assert relations == []
    for statement in (
        "select * from pgpark.task",
        "delete from pgpark.mailbox",
        "update pgpark.pool set max_units = 1000",
        "do $$ begin lock table pgpark.pool in access share mode; end $$",
        "do $$ begin lock table pgpark.door_1 in access exclusive mode; end $$",
        "select nextval('pgpark.task_task_id_seq')",
        "select pgpark._conclude_all(array[1], 'dropped', 'x')",
        "select * from pgmq.read('gpu', 0, 1)",
        "insert into pgpark.access values (session_user::regrole, 'admin', null, null)",
        "create table pgpark.mine ()",
        "create function pgpark._caller() returns name language sql as 'select $$postgres$$::name'",
        "alter function pgpark._caller() owner to current_user",
    ):
        with pytest.raises(DENIED):
            session.connection.execute(statement)


def test_a_migration_closes_what_it_makes_and_keeps_what_was_granted(db: Database, roles: Roles) -> None:
    from pgpark.migrate import migrate

    session = roles.granted("reader")
    before = callable_by(session)
    db.rows("delete from pgpark.migration where name like 'functions/%%' returning 1")
    db.connection.execute("grant execute on all functions in schema pgpark to public")
    db.connection.execute("grant select on all tables in schema pgpark to public")
    assert not migrate(db.connection).empty
    assert callable_by(session) == before
    assert callable_by(roles.session(roles.make())) == set()
    refused(lambda: session.rows("select * from pgpark.mailbox"))


# -- producers -------------------------------------------------------------------------------------------------------


def test_a_producer_of_a_tenant_does_all_that_a_client_does(db: Database, roles: Roles) -> None:
    db.pool()
    producer = roles.granted("producer", ["a", "b"])
    task, other = producer.parked(tenant="a"), producer.parked(tenant="b")
    rows = producer.rows("select * from pgpark.park_submit_many('gpu', %s)", Jsonb([{"payload": 1, "tenant": "a"}]))
    assert [row["status"] for row in rows] == ["parked"]
    assert producer.status(task)["position"] == 0
    assert producer.value("select pgpark.park_cancel(%s)", other) == "dropped"
    db.claim(max_tasks=1)
    db.rows("select pgpark.park_emit(%s, 1, %s)", task, Jsonb([{"content": "a token"}]))
    assert len(producer.rows("select * from pgpark.park_parts(%s)", task)) == 1
    db.finish(task, result="mine")
    (message,) = producer.rows("select * from pgpark.park_fetch('a')")
    assert message["payload"] == "mine"
    assert len(producer.rows("select * from pgpark.park_fetch_of('gpu', 'a')")) == 1
    assert producer.outcome(task) == ("completed", None)
    assert producer.value("select pgpark.park_ack(%s)", [message["message_id"]]) == 1
    producer.maintain()


def test_another_tenants_tasks_are_to_a_producer_as_if_they_were_not_there(
    db: Database, roles: Roles, rival: dict[str, int]
) -> None:
    producer = roles.granted("producer", ["a"])
    message = db.value("select message_id from pgpark.mailbox where task_id = %s", rival["done"])
    for task in (*rival.values(), 987654321):
        assert producer.rows("select * from pgpark.park_status(%s)", task) == []
        assert producer.rows("select * from pgpark.park_result(%s)", task) == []
        assert producer.rows("select * from pgpark.park_parts(%s)", task) == []
        assert producer.value("select pgpark.park_cancel(%s)", task) == "unknown"
    assert producer.value("select pgpark.park_ack(%s)", [message]) == 0
    assert db.status(rival["running"])["status"] == "running"
    assert db.status(rival["parked"])["status"] == "parked"
    assert db.outcome(rival["done"]) == ("completed", None)


@pytest.mark.usefixtures("rival")
def test_a_producer_can_neither_submit_nor_fetch_for_another_tenant(db: Database, roles: Roles) -> None:
    producer = roles.granted("producer", ["a"])
    refused(lambda: producer.submit(tenant="rival"), "may not submit to pool 'gpu' for tenant 'rival'")
    refused(lambda: producer.submit(), "may not submit to pool 'gpu' without a tenant")
    mixed = [{"payload": 1, "tenant": "a"}, {"payload": 1, "tenant": "rival"}]
    refused(lambda: producer.rows("select * from pgpark.park_submit_many('gpu', %s)", Jsonb(mixed)), "rival")
    refused(lambda: producer.rows("select * from pgpark.park_fetch('rival')"), "may not fetch for tenant 'rival'")
    refused(lambda: producer.rows("select * from pgpark.park_fetch_of('gpu', 'rival')"))
    refused(lambda: producer.rows("select * from pgpark.park_stats()"), "may not see numbers of pools")
    assert db.value("select count(*) from pgpark.task") == 2


def test_the_refusal_says_what_is_granted(db: Database, roles: Roles) -> None:
    db.pool()
    producer = roles.granted("producer", ["a", "b"], ["gpu"])
    with pytest.raises(DENIED) as caught:
        producer.submit(tenant="c")
    assert caught.value.diag.message_hint == (
        "Granted to it: producer of tenants a, b in pools gpu. Who may change that: pgpark grant."
    )


def test_an_idempotency_key_is_the_tenants_own(db: Database, roles: Roles, rival: dict[str, int]) -> None:
    producer = roles.granted("producer", ["a"])
    mine = producer.submit(tenant="a", idempotency_key="k")
    assert (mine["status"], mine["reason"]) == ("parked", None)
    assert producer.submit(tenant="a", idempotency_key="k")["task_id"] == mine["task_id"]
    assert db.submit(tenant="rival", idempotency_key="k")["task_id"] == rival["done"]
    tasks = [{"payload": 1, "tenant": tenant, "idempotency_key": "n"} for tenant in ("a", "b", "a")]
    rows = db.rows("select * from pgpark.park_submit_many('gpu', %s)", Jsonb(tasks))
    assert [row["reason"] for row in rows] == [None, None, "duplicate"]
    assert rows[2]["task_id"] == rows[0]["task_id"]


def test_a_producer_of_a_pool_uses_no_other(db: Database, roles: Roles) -> None:
    db.pool()
    db.pool("cpu")
    producer = roles.granted("producer", pools=["cpu"])
    task = producer.parked("cpu", tenant="a")
    refused(lambda: producer.submit("gpu"), "may not submit to pool 'gpu'")
    refused(lambda: producer.rows("select * from pgpark.park_submit_many('gpu', '[]')"), "may not submit to pool 'gpu'")
    foreign = db.parked("gpu", tenant="a")
    assert producer.rows("select * from pgpark.park_status(%s)", foreign) == []
    for pool, own in (("gpu", foreign), ("cpu", task)):
        db.claim(pool)
        db.finish(own)
    assert [row["task_id"] for row in producer.rows("select * from pgpark.park_fetch('a')")] == [task]
    assert [row["pool"] for row in producer.rows("select * from pgpark.park_stats()")] == ["cpu"]
    with pytest.raises(DENIED):
        producer.rows("select * from pgpark.park_fetch_of('gpu', 'a')")


def test_a_producer_without_tenants_may_submit_for_any(db: Database, roles: Roles) -> None:
    db.pool()
    producer = roles.granted("producer")
    for task in (producer.parked(tenant="a"), producer.parked()):
        assert producer.status(task)["status"] == "parked"
    refused(lambda: producer.rows("select * from pgpark.park_claim('gpu', 'w')"), "permission denied for function")


# -- workers ---------------------------------------------------------------------------------------------------------


def test_a_worker_of_a_pool_lives_its_whole_life_there(db: Database, roles: Roles) -> None:
    db.pool(mailbox={"notifier": {"type": "http", "base_url": "http://localhost:1"}})
    tasks = [db.parked(tenant="a", payload=n) for n in range(5)]
    worker = roles.granted("worker", pools=["gpu"])
    rows = worker.claim(max_tasks=4)
    assert [(row["task_id"], row["payload"]) for row in rows] == list(zip(tasks, range(4), strict=False))
    assert worker.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", tasks[:4]) == []
    assert worker.value("select pgpark.park_emit(%s, 1, %s)", tasks[0], Jsonb([{"content": 1}])) is True
    assert worker.finish(tasks[0], result="x") is True
    assert worker.value("select pgpark.park_release(%s, 1)", tasks[1]) is True
    outcomes = Jsonb([{"task_id": tasks[2], "attempt": 1}])
    assert worker.rows("select * from pgpark.park_finish_many(%s)", outcomes)[0]["accepted"] is True
    outcomes = Jsonb([{"task_id": tasks[3], "attempt": 1}])
    taken = worker.rows("select * from pgpark.park_next('gpu', 'w', %s, 10)", outcomes)
    assert [row["task_id"] for row in taken] == [tasks[1], tasks[4]]
    worker.maintain("gpu")
    callbacks = worker.rows("select * from pgpark.park_callbacks()")
    assert len(callbacks) == 3
    done = "select pgpark.park_callback_done(%s, %s, 200)"
    assert worker.value(done, callbacks[0]["callback_id"], callbacks[0]["attempt"]) == "delivered"
    assert worker.stats()["running"] == 2


def test_another_pools_tasks_are_fenced_from_a_worker(db: Database, roles: Roles) -> None:
    db.pool(mailbox={"notifier": {"type": "http", "base_url": "http://localhost:1"}})
    db.pool("cpu")
    ended, task = db.parked(tenant="a"), db.parked(tenant="a")
    db.claim()
    db.finish(ended)
    worker = roles.granted("worker", pools=["cpu"])
    refused(lambda: worker.claim("gpu"), "may not claim from pool 'gpu'")
    refused(lambda: worker.claim("nowhere"), "may not claim from pool 'nowhere'")
    refused(lambda: worker.rows("select * from pgpark.park_next('gpu', 'w')"))
    refused(lambda: worker.rows("select * from pgpark.park_heartbeat('gpu', 'w', %s)", [task]))
    refused(lambda: worker.rows("select * from pgpark.park_explain('gpu')"))
    refused(lambda: worker.stats("gpu"))
    refused(lambda: worker.rows("select * from pgpark.park_callbacks(10, 'gpu')"))
    assert worker.rows("select * from pgpark.park_heartbeat('cpu', 'w', %s)", [task]) == [{"park_heartbeat": task}]
    assert worker.finish(task) is False
    assert worker.value("select pgpark.park_release(%s, 1)", task) is False
    assert worker.value("select pgpark.park_emit(%s, 1, %s)", task, Jsonb([{"content": 1}])) is False
    emissions = Jsonb([{"task_id": task, "attempt": 1, "parts": [{"content": 1}]}])
    assert worker.rows("select * from pgpark.park_emit_many(%s)", emissions)[0]["accepted"] is False
    outcomes = Jsonb([{"task_id": task, "attempt": 1}])
    assert worker.rows("select * from pgpark.park_finish_many(%s)", outcomes) == [{"task_id": task, "accepted": False}]
    (row,) = worker.rows("select * from pgpark.park_next('cpu', 'w', %s)", outcomes)
    assert (row["task_id"], row["fenced"]) == (task, True)
    assert worker.rows("select * from pgpark.park_callbacks_due()") == []
    assert worker.rows("select * from pgpark.park_callbacks()") == []
    (callback,) = db.rows("select * from pgpark.park_callbacks()")
    done = "select pgpark.park_callback_done(%s, 1, 200)"
    assert worker.value(done, callback["callback_id"]) == "unknown"
    assert db.status(task)["status"] == "running"
    assert db.value(done, callback["callback_id"]) == "delivered"


def test_an_unknown_pool_names_only_those_that_the_role_may_use(db: Database, roles: Roles) -> None:
    for name in ("gpu", "secret_project"):
        db.pool(name)
    reader = roles.granted("producer", tenants=["a"], pools=["gpu"])
    db.rows("select pgpark.park_drop_pool('gpu')")
    with pytest.raises(psycopg.errors.UndefinedObject) as caught:
        reader.submit("gpu", tenant="a")
    assert "secret_project" not in str(caught.value.diag.message_hint)


# -- readers and admins ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rival")
def test_a_reader_sees_numbers_and_no_payloads(roles: Roles) -> None:
    reader = roles.granted("reader")
    assert reader.stats()["running"] == 1
    assert [row["why"] for row in reader.rows("select * from pgpark.park_explain('gpu')")] == ["may start"]
    assert len(reader.rows("select * from pgpark.park_pools()")) == 1
    for statement in (
        "select * from pgpark.park_result(1)",
        "select * from pgpark.park_fetch('rival')",
        "select * from pgpark.park_callbacks()",
        "select * from pgpark.park_dead_letters()",
        "select * from pgpark.park_claim('gpu', 'w')",
    ):
        refused(lambda statement=statement: reader.rows(statement), "permission denied for function")


def test_a_reader_of_a_pool_sees_that_one(db: Database, roles: Roles) -> None:
    db.pool()
    db.pool("cpu")
    reader = roles.granted("reader", pools=["cpu"])
    assert [row["pool"] for row in reader.rows("select * from pgpark.park_stats()")] == ["cpu"]
    assert [row["name"] for row in reader.rows("select * from pgpark.park_pools()")] == ["cpu"]
    refused(lambda: reader.rows("select * from pgpark.park_stats('gpu')"), "may not see numbers of pool 'gpu'")


def test_an_admin_makes_pools_and_grants_access(roles: Roles) -> None:
    admin = roles.granted("admin")
    assert admin.pool("made", max_units=3) == "created"
    task = admin.parked("made", tenant="a")
    assert admin.claimed("made") == [task]
    admin.finish(task, result="x")
    assert admin.outcome(task) == ("completed", None)
    newcomer = roles.make()
    admin.rows("select pgpark.park_grant(%s, 'reader')", newcomer)
    assert roles.session(newcomer).stats("made")["completed"] == 1
    listed = admin.rows("select * from pgpark.park_grants()")
    assert {(row["role"], row["kind"]) for row in listed} >= {(newcomer, "reader")}
    admin.rows("select pgpark.park_set_pool_state('made', 'paused')")
    admin.rows("select pgpark.park_drop_pool('made', true)")
    assert admin.rows("select * from pgpark.park_dead_letters()") == []


def test_what_was_revoked_is_gone_at_once_and_the_role_can_be_dropped(db: Database, roles: Roles) -> None:
    db.pool()
    role = roles.make()
    roles.grant(role, "reader")
    roles.grant(role, "worker")
    session = roles.session(role)
    assert db.value("select pgpark.park_revoke(%s, 'worker')", role) == 1
    assert session.stats()["parked"] == 0
    refused(lambda: session.claim())
    assert db.value("select pgpark.park_revoke(%s)", role) == 1
    assert db.value("select pgpark.park_revoke(%s)", role) == 0
    assert callable_by(session) == set()
    session.close()
    db.connection.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))
    roles.made.remove(role)
    assert db.rows("select * from pgpark.park_grants()") == []


def test_a_second_grant_of_a_kind_replaces_the_first(db: Database, roles: Roles) -> None:
    db.pool()
    role = roles.make()
    roles.grant(role, "producer", ["a"])
    roles.grant(role, "producer", ["b"], ["gpu"])
    session = roles.session(role)
    session.parked(tenant="b")
    refused(lambda: session.submit(tenant="a"))
    (row,) = db.rows("select * from pgpark.park_grants()")
    assert row == {"role": role, "kind": "producer", "tenants": ["b"], "pools": ["gpu"]}


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        (("nobody_of_this_name", "reader", None, None), "42704", "unknown role 'nobody_of_this_name'"),
        ((None, "reader", None, None), "42704", "unknown role NULL"),
        (("public", "reader", None, None), "42704", "unknown role 'public'"),
        (("ROLE", "king", None, None), "22023", "unknown kind of access 'king'; use producer, worker, reader or admin"),
        (("ROLE", None, None, None), "22023", "unknown kind of access NULL"),
        (("ROLE", "worker", ["a"], None), "22023", "tenants go with producer, not with worker"),
        (("ROLE", "admin", None, ["gpu"]), "22023", "an admin has all pools"),
        (("ROLE", "producer", [], None), "22023", "must name at least one"),
        (("ROLE", "producer", ["a", None], None), "22023", "must name at least one"),
        (("ROLE", "producer", [["a"]], None), "22023", "must be plain lists of names"),
        (("ROLE", "worker", None, [["gpu"], ["gpu"]]), "22023", "must be plain lists of names"),
        (("ROLE", "worker", None, ["gpu", "typo"]), "42704", "unknown pool 'typo'"),
        (("ROLE", "k" * 100_000, None, None), "22023", "unknown kind of access 'kkk.{,800}; use producer, worker"),
    ],
)
def test_a_grant_that_makes_no_sense_is_refused(
    db: Database, roles: Roles, arguments: tuple[Any, ...], state: str, message: str
) -> None:
    db.pool()
    role = roles.make()
    given = [role if argument == "ROLE" else argument for argument in arguments]
    with pytest.raises(psycopg.Error, match=message) as caught:
        roles.grant(*given)
    assert caught.value.sqlstate == state
    assert db.rows("select * from pgpark.park_grants()") == []


def test_nothing_is_granted_to_the_owner_nor_taken_from_it(db: Database) -> None:
    owner = db.value("select nspowner::regrole::text from pg_namespace where nspname = 'pgpark'")
    for call in ("park_grant(%s, 'reader')", "park_revoke(%s)"):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="owns pgpark and may do everything"):
            db.rows(f"select pgpark.{call}", owner)


def test_grants_at_once_wait_for_one_another(
    db: Database,
    roles: Roles,
    connect: Callable[[], Database],
    background: Callable[[Database, Callable[[], Any]], Background],
) -> None:
    first, second = roles.make(), roles.make()
    other = connect()
    db.connection.execute("begin")
    roles.grant(first, "reader")
    waiting = background(
        other, lambda: other.rows("select pgpark.park_grant(%s, 'reader')", second)
    ).wait_until_blocked()
    db.connection.execute("commit")
    waiting.result()
    assert {row["role"] for row in db.rows("select * from pgpark.park_grants()")} == {first, second}


# -- who is asking ---------------------------------------------------------------------------------------------------


# -- what surrounds a session ----------------------------------------------------------------------------------------

# Things of the attacker's own that have the names of what our functions use.
