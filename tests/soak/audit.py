"""The audit: what happened to the tables of pgpark, written down by triggers in the transactions in which it happened.

A statement that moves tasks leaves one row in soak.look, with its transaction and a snapshot that is taken after the
statement, and a row in soak.step for each task that began or ceased to wait or to hold units. Changes of a pool go to
soak.setting, outcomes to soak.outcome. An observer beside it looks at the ledger itself, one statement at a time; the
replay must agree with what it saw. Nothing here calls pgpark.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any, NamedTuple

import psycopg

from tests.soak.plan import Config

GONE, WAITING, HELD = 0, 1, 2  # what a task is: not in the ledger; parked or delayed; running or cancelling

INSTALL = """
create schema soak;
create unlogged table soak.look (
  look bigint generated always as identity, xid bigint not null, snapshot text not null);
create unlogged table soak.step (
  look bigint not null, task_id bigint not null, pool_id int not null, was smallint not null, becomes smallint not null,
  units int not null, worker text, attempt int not null, tenant text, late boolean not null);
create unlogged table soak.setting (
  look bigint not null, pool_id int not null, max_units int not null, max_queue_depth int, state text not null,
  config jsonb not null);
create unlogged table soak.outcome (
  xid bigint not null, task_id bigint not null, status text not null, reason text, payload jsonb, attempt int not null,
  early boolean not null);

create function soak.place(state text) returns smallint language sql immutable as
$$ select case when state in ('running', 'cancelling') then 2 else 1 end::smallint $$;

-- late: the task was started after its deadline, by what pgpark says, or by when the claim was called.
create function soak.note_task() returns trigger language plpgsql set enable_hashjoin = on as $$
begin
  if tg_op = 'INSERT' then
    with look as (
      insert into soak.look (xid, snapshot)
      select pg_current_xact_id()::text::bigint, pg_current_snapshot()::text
      where exists (select from new_row)
      returning look)
    insert into soak.step
    select l.look, n.task_id, n.pool_id, 0, soak.place(n.state), n.units, n.worker, n.attempt, n.tenant, false
    from look l, new_row n;
  elsif tg_op = 'DELETE' then
    with look as (
      insert into soak.look (xid, snapshot)
      select pg_current_xact_id()::text::bigint, pg_current_snapshot()::text
      where exists (select from old_row)
      returning look)
    insert into soak.step
    select l.look, o.task_id, o.pool_id, soak.place(o.state), 0, o.units, o.worker, o.attempt, o.tenant, false
    from look l, old_row o;
  else
    with moved as materialized (
      select soak.place(o.state) as was, soak.place(n.state) as becomes, n.*
      from old_row o
      join new_row n using (task_id)
      where soak.place(o.state) <> soak.place(n.state) or o.attempt <> n.attempt),
    look as (
      insert into soak.look (xid, snapshot)
      select pg_current_xact_id()::text::bigint, pg_current_snapshot()::text
      where exists (select from moved)
      returning look)
    insert into soak.step
    select l.look, m.task_id, m.pool_id, m.was, m.becomes, m.units, m.worker, m.attempt, m.tenant,
           m.becomes = 2 and coalesce(m.deadline <= greatest(m.started_at, statement_timestamp()), false)
    from look l, moved m;
  end if;
  return null;
end $$;

create function soak.note_pool() returns trigger language plpgsql as $$
begin
  with look as (
    insert into soak.look (xid, snapshot)
    select pg_current_xact_id()::text::bigint, pg_current_snapshot()::text
    where exists (select from new_row)
    returning look)
  insert into soak.setting
  select l.look, n.pool_id, n.max_units, n.max_queue_depth, n.state, n.config from look l, new_row n;
  return null;
end $$;

create function soak.note_outcome() returns trigger language plpgsql as $$
begin
  insert into soak.outcome
  select pg_current_xact_id()::text::bigint, n.task_id, n.status, n.reason, n.payload, n.attempt,
         n.status = 'expired' and coalesce(n.deadline > clock_timestamp(), true)
  from new_row n;
  return null;
end $$;

create trigger soak_insert after insert on pgpark.task
  referencing new table as new_row for each statement execute function soak.note_task();
create trigger soak_update after update on pgpark.task
  referencing old table as old_row new table as new_row for each statement execute function soak.note_task();
create trigger soak_delete after delete on pgpark.task
  referencing old table as old_row for each statement execute function soak.note_task();
create trigger soak_insert after insert on pgpark.pool
  referencing new table as new_row for each statement execute function soak.note_pool();
create trigger soak_update after update on pgpark.pool
  referencing new table as new_row for each statement execute function soak.note_pool();
create trigger soak_outcome after insert on pgpark.mailbox
  referencing new table as new_row for each statement execute function soak.note_outcome();

-- Walks begin somewhere else all the time.
create or replace function pgpark._stride() returns int language sql immutable as 'select 20';
"""

OBSERVE = """
select pg_current_snapshot()::text, p.pool_id,
       coalesce(sum(t.units) filter (where t.state in ('running', 'cancelling')), 0)::int,
       (count(*) filter (where t.state in ('parked', 'delayed')))::int
from pgpark.pool p
left join pgpark.task t using (pool_id)
group by p.pool_id
order by p.pool_id
"""


class Step(NamedTuple):
    """A task began or ceased to wait or to hold units; worker is who holds or held it, attempt the one of then."""

    look: int
    task: int
    pool: int
    was: int
    becomes: int
    units: int
    worker: str | None
    attempt: int
    tenant: str | None
    late: bool


class Setting(NamedTuple):
    """A pool as it was made or changed."""

    look: int
    pool: int
    max_units: int
    depth: int | None
    state: str
    config: Config

    def tenant_units(self, tenant: str) -> int | None:
        """The max_units of a tenant, None for none; '' stands for tasks without a tenant."""
        units: int | None = ((self.config.get("tenants") or {}).get(tenant) or {}).get("max_units")
        return units


class Outcome(NamedTuple):
    """A row as it was put into the mailbox, and whether it said `expired` before the deadline."""

    xid: int
    task: int
    status: str
    reason: str | None
    payload: Any
    attempt: int
    early: bool


@dataclass(slots=True, eq=False)
class Look:
    """A snapshot: it sees the transactions below xmax that are not busy; xid is the transaction that took it, or 0."""

    xid: int
    xmax: int
    busy: frozenset[int]
    steps: list[Step] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    observed: dict[int, tuple[int, int]] | None = None  # by pool: units in use, tasks waiting
    position: int = -1  # among all looks, in their order

    @classmethod
    def parse(cls, xid: int, snapshot: str) -> Look:
        _, xmax, busy = snapshot.split(":")
        return cls(xid, int(xmax), frozenset(map(int, busy.split(","))) if busy else frozenset())

    def completed(self) -> int:
        """How many transactions, from some origin, had ended when it was taken; its own had not."""
        return self.xmax - len(self.busy) - (0 < self.xid < self.xmax)

    def sees(self, xid: int) -> bool:
        return xid < self.xmax and xid not in self.busy and xid != self.xid


def install(connection: psycopg.Connection[Any]) -> None:
    """Before there are any pools or tasks."""
    connection.execute(INSTALL)


def read(connection: psycopg.Connection[Any]) -> tuple[list[Look], list[Outcome]]:
    """The looks that moved something, each transaction's in the order of its statements, and all outcomes."""
    looks = {number: Look.parse(xid, snapshot) for number, xid, snapshot in _stream(connection, "look", "look")}
    for row in _stream(connection, "step", "look"):
        looks[row[0]].steps.append(Step._make(sys.intern(name) if isinstance(name, str) else name for name in row))
    for row in _stream(connection, "setting", "look"):
        looks[row[0]].settings.append(Setting(*row))
    return list(looks.values()), [Outcome(*row) for row in _stream(connection, "outcome", "xid")]


def _stream(connection: psycopg.Connection[Any], table: str, order: str) -> Iterator[tuple[Any, ...]]:
    with connection.transaction(), connection.cursor("soak") as cursor:
        cursor.itersize = 20_000
        yield from cursor.execute(f"select * from soak.{table} order by {order}")


class Observer(threading.Thread):
    """Looks at the ledger again and again; each look is one statement, and so one snapshot."""

    def __init__(self, connection: psycopg.Connection[Any], waiting: SynchronizedArray[int]) -> None:
        super().__init__(daemon=True)
        self.connection, self.waiting = connection, waiting
        self.looks: list[Look] = []
        self.left = 0  # tasks in the ledger at the last look
        self.error: BaseException | None = None
        self.halt = threading.Event()

    def run(self) -> None:
        try:
            while not self.halt.wait(0.03):
                self.look()
        except BaseException as error:
            self.error = error

    def look(self) -> None:
        rows = self.connection.execute(OBSERVE, prepare=True).fetchall()
        look = Look.parse(0, rows[0][0])
        look.observed = {pool: (used, waiting) for _, pool, used, waiting in rows}
        self.looks.append(look)
        for place, (*_, waiting) in enumerate(rows):
            self.waiting[place] = waiting

    def stop(self) -> None:
        """Takes a last look, which sees everything if nobody else is at work any more."""
        self.halt.set()
        self.join()
        if self.error:
            raise self.error
        self.look()


def snapshot(text: str) -> Look:
    """A snapshot that a client took before a call."""
    return Look.parse(0, text)
