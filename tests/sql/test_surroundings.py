"""What a session brings along lends it no rights: its role, functions around ours, names, casts, settings, locks."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

from tests.conftest import Background, Database
from tests.roles import DENIED, Roles, refused, rival, roles

__all__ = ["rival", "roles"]  # fixtures


# -- who is asking -----------------------------------------------------------------------------------------------------


def test_members_have_what_their_group_was_granted(db: Database, roles: Roles) -> None:
    db.pool()
    group = roles.make()
    roles.grant(group, "producer", ["a"])
    member = roles.session(roles.make(within=group))
    member.parked(tenant="a")
    refused(lambda: member.submit(tenant="b"))
    member.connection.execute(sql.SQL("set role {}").format(sql.Identifier(group)))
    member.parked(tenant="a")
    refused(lambda: member.submit(tenant="b"))


def test_a_role_that_gives_up_its_rights_has_given_them_up(db: Database, roles: Roles) -> None:
    db.pool()
    lesser = roles.make()
    roles.grant(lesser, "producer", ["a"])
    greater = roles.make(within=lesser)
    roles.grant(greater, "producer", ["b"])
    session = roles.session(greater)
    session.parked(tenant="b")
    session.connection.execute(sql.SQL("set role {}").format(sql.Identifier(lesser)))
    session.parked(tenant="a")
    refused(lambda: session.submit(tenant="b"))
    owner_name = db.value("select current_user")
    with pytest.raises(DENIED):
        session.connection.execute(sql.SQL("set role {}").format(sql.Identifier(owner_name)))


def test_a_function_around_ours_lends_nobody_the_rights_of_its_owner(db: Database, roles: Roles) -> None:
    """Neither the owner of the wrapper gains by who calls it, nor its caller by who owns it."""
    db.pool()
    owner, caller = roles.make(), roles.make()
    roles.grant(owner, "producer", ["a"])
    db.connection.execute(sql.SQL("create schema wrapped authorization {}").format(sql.Identifier(owner)))
    wrapping = roles.session(owner)
    wrapping.connection.execute(
        "create function wrapped.submit(tenant text) returns text security definer language sql as"
        " $$ select status from pgpark.park_submit('gpu', '{}', tenant => submit.tenant) $$"
    )
    wrapping.connection.execute("grant usage on schema wrapped to public")
    asking = roles.session(caller)
    for tenant in ("a", "b"):
        refused(lambda tenant=tenant: asking.rows("select wrapped.submit(%s)", tenant), "may not submit")
    roles.grant(caller, "producer", ["b"])
    assert asking.value("select wrapped.submit('b')") == "parked"
    refused(lambda: asking.rows("select wrapped.submit('a')"), "for tenant 'a'")
    assert wrapping.value("select wrapped.submit('a')") == "parked"
    refused(lambda: wrapping.rows("select wrapped.submit('b')"), "for tenant 'b'")


@pytest.mark.parametrize(
    "name",
    [
        'quo"te',
        "semi; drop schema pgpark cascade; --",
        "apostro'phe",
        "Üñïcødé 漢字 🅿",
        "x" * 63,
        "ü" * 31,
        " ",
        "%s %I %L",
    ],
)
def test_names_are_only_names(db: Database, roles: Roles, name: str) -> None:
    db.pool()
    role = roles.make(name + uuid.uuid4().hex[:8] if len(name.encode()) < 50 else name)
    roles.grant(role, "producer", [name])
    session = roles.session(role)
    task = session.parked(tenant=name, user_id=name, session_id=name, idempotency_key=name, payload=name)
    refused(lambda: session.submit(tenant=name + "x"), "may not submit")
    assert db.claim(worker=name[:60])[0]["payload"] == name
    db.finish(task, result=name)
    (message,) = session.rows("select * from pgpark.park_fetch(%s, %s, %s)", name, name, name)
    assert message["payload"] == name
    assert db.value("select pgpark.park_revoke(%s)", role) == 1


# -- what surrounds a session ------------------------------------------------------------------------------------------


SHADOWS = """
create table {schema}.task (like information_schema.sql_features);
create table {schema}.pool (like information_schema.sql_features);
create table {schema}.mailbox (like information_schema.sql_features);
create table {schema}.fallen (who text);
create function {schema}.trap(text) returns text language plpgsql as
  $$ begin insert into {schema}.fallen values (current_user); return $1; end $$;
create function {schema}.coalesce_(text) returns text language sql as $$ select {schema}.trap($1) $$;
create function {schema}.quote_literal(text) returns text language sql as $$ select {schema}.trap($1) $$;
create function {schema}.format(text, text) returns text language sql as $$ select {schema}.trap($1) $$;
create function {schema}.pg_notify(text, text) returns void language sql as $$ select {schema}.trap($1) $$;
create function {schema}.cardinality(bigint[]) returns int language sql as $$ select length({schema}.trap('1')) $$;
create function {schema}.array_position(text[], text) returns int language sql as
  $$ select length({schema}.trap('1')) $$;
create function {schema}.equal(text, text) returns boolean language sql as $$ select {schema}.trap($1) is not null $$;
create function {schema}.equal(bigint, bigint) returns boolean language sql as $$ select {schema}.trap('') is null $$;
create function {schema}.less(timestamptz, timestamptz) returns boolean language sql as
  $$ select {schema}.trap('') is null $$;
create operator {schema}.= (leftarg = text, rightarg = text, function = {schema}.equal);
create operator {schema}.= (leftarg = bigint, rightarg = bigint, function = {schema}.equal);
create operator {schema}.<= (leftarg = timestamptz, rightarg = timestamptz, function = {schema}.less);
"""


def whole_life(session: Database) -> None:
    """What an admin's session calls, from a pool's making to its end."""
    session.pool("lot", max_queue_depth=5, fairness="tenant", tenants={"a": {"max_units": 5}})
    life_in_the_lot(session)
    session.rows("select pgpark.park_drop_pool('lot', true)")


def life_in_the_lot(session: Database) -> None:
    """No times are read: some settings change how they are written."""
    task = session.parked("lot", tenant="a", idempotency_key="k", deadline="2999-01-01T00:00:00Z", payload="p")
    session.rows(
        "select * from pgpark.park_submit_many('lot', %s)", Jsonb([{"payload": 1, "tenant": "a"}, {"payload": 2}])
    )
    session.rows("select * from pgpark.park_explain('lot')")
    assert session.value("select pgpark.park_lot('lot') -> 'parked' ->> 'count'") == "3"
    assert session.rows("select reason from pgpark.park_retry(%s)", task) == [{"reason": "not_ended"}]
    session.rows("select * from pgpark.park_stats()")
    assert session.rows("select payload from pgpark.park_claim('lot', 'w')") == [{"payload": "p"}]
    session.rows("select * from pgpark.park_heartbeat('lot', 'w', %s)", [task])
    session.rows("select pgpark.park_emit(%s, 1, %s)", task, Jsonb([{"content": 1}]))
    assert session.finish(task, result="r")
    messages = session.rows("select message_id, task_id, payload from pgpark.park_fetch_of('lot', 'a')")
    assert (messages[-1]["task_id"], messages[-1]["payload"]) == (task, "r")
    session.rows("select expired, reclaimed from pgpark.park_maintain('lot')")
    assert session.value("select pgpark.park_ack(%s)", [messages[-1]["message_id"]]) == 1


@pytest.mark.parametrize("where", ["own", "pg_temp"])
def test_things_of_the_sessions_own_are_never_taken_for_ours(db: Database, roles: Roles, where: str) -> None:
    role = roles.make()
    roles.grant(role, "admin")
    session = roles.session(role)
    if where == "own":
        db.connection.execute(sql.SQL("create schema own authorization {}").format(sql.Identifier(role)))
    session.connection.execute(SHADOWS.format(schema=where))
    session.connection.execute(f"set search_path = {where}, pg_catalog")
    whole_life(session)
    session.connection.execute(f"set search_path = {where}, pgpark, public, pg_catalog")
    whole_life(session)
    assert session.value(f"select count(*) from {where}.fallen") == 0
    session.rows(f"select {where}.trap('x')")
    assert session.value(f"select count(*) from {where}.fallen") == 1  # the trap does work


def test_a_cast_of_the_sessions_own_runs_as_the_session(db: Database, roles: Roles) -> None:
    db.pool()
    role = roles.make()
    roles.grant(role, "producer", ["a"])
    db.connection.execute(sql.SQL("create schema own authorization {}").format(sql.Identifier(role)))
    session = roles.session(role)
    session.connection.execute("create type own.odd as (x text)")
    session.connection.execute(
        "create function own.as_json(own.odd) returns jsonb language sql as $$ select to_jsonb(current_user::text) $$"
    )
    session.connection.execute("create cast (own.odd as jsonb) with function own.as_json(own.odd) as implicit")
    session.rows("select * from pgpark.park_submit('gpu', row('x')::own.odd, tenant => 'a')")
    assert db.claim()[0]["payload"] == role


@pytest.mark.parametrize(
    "setting",
    [
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'sql_standard'",
        "timezone = 'Asia/Kathmandu'",
        "extra_float_digits = -15",
        "bytea_output = 'escape'",
        "array_nulls = off",
        "escape_string_warning = off",
        "quote_all_identifiers = on",
        "transform_null_equals = on",
        "client_encoding = 'LATIN1'",
        "enable_indexscan = off",
        "enable_nestloop = off",
        "plan_cache_mode = force_custom_plan",
        "work_mem = '64kB'",
        "row_security = off",
        "default_transaction_isolation = 'read uncommitted'",
        "check_function_bodies = off",
        "plpgsql.variable_conflict = 'error'",
        "plpgsql.extra_errors = 'all'",
        "default_table_access_method = 'heap'",
        "pgpark.caller = 'postgres'",
    ],
)
def test_no_setting_of_a_session_changes_what_is_done(roles: Roles, setting: str) -> None:
    session = roles.granted("admin")
    with contextlib.suppress(psycopg.errors.UndefinedObject, DENIED):  # unknown to this server, or a superuser's
        session.connection.execute(f"set {setting}")
    whole_life(session)


def test_no_literal_of_ours_depends_on_standard_conforming_strings(db: Database) -> None:
    for row in db.rows("select proname, prosrc from pg_proc where pronamespace = 'pgpark'::regnamespace"):
        plain = re.sub(r"\bE'(?:[^'\\]|\\.|'')*'", "", row["prosrc"])
        assert "\\" not in plain, row["proname"]


def test_nothing_waits_for_a_lock_that_anybody_can_take(db: Database) -> None:
    assert (
        db.rows("select proname from pg_proc where pronamespace = 'pgpark'::regnamespace and prosrc ~ 'advisory'") == []
    )
    db.pool("lot", max_queue_depth=5, fairness="tenant", tenants={"a": {"max_units": 5}})  # pgmq takes one for a queue
    db.connection.execute("begin")
    life_in_the_lot(db)
    db.rows("select pgpark.park_set_pool_state('lot', 'draining')")
    assert db.rows("select * from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()") == []
    db.connection.execute("rollback")


def test_a_submitter_waits_for_who_closes_the_pool_and_nobody_else(
    db: Database, connect: Callable[[], Database]
) -> None:
    """The door: shared by submitters, alone for who drains; a dropped pool's door is used again."""
    db.pool()
    other, watcher = connect(), connect()
    other.connection.execute("begin")
    other.parked()
    db.parked()  # beside an open submit
    draining = Background(db, watcher, lambda: db.rows("select pgpark.park_set_pool_state('gpu', 'draining')"))
    draining.wait_until_blocked()
    other.connection.execute("commit")
    draining.result()
    assert db.submit()["reason"] == "pool_closed"
    door = db.value("select door from pgpark.pool")
    db.rows("select pgpark.park_drop_pool('gpu', true)")
    db.pool("next")
    assert db.value("select door from pgpark.pool") == door
    db.parked("next")


@pytest.mark.usefixtures("rival")
def test_statistics_show_a_stranger_nothing(db: Database, roles: Roles) -> None:
    db.connection.execute("analyze")
    session = roles.granted("producer", ["a"])
    assert session.rows("select * from pg_stats where schemaname in ('pgpark', 'pgmq')") == []
    assert db.rows("select * from pg_stats where schemaname = 'pgpark'") != []
    seen = session.rows("select query from pg_stat_activity where usename <> session_user and query ~ 'pgpark'")
    assert {row["query"] for row in seen} <= {"<insufficient privilege>"}
