-- Small helpers that most functions share: the clock, the guard against stale snapshots, lookups, priority names.
-- Nobody outside the schema calls them.
--
-- Functions that touch the ledger pin their plans (set plan_cache_mode, enable_...), and with them the plans of the
-- helpers that they call: docs/decisions/0008.

-- The one clock. Everything that compares times asks here, so that tests can replace it.
create or replace function pgpark._now() returns timestamptz
language plpgsql volatile
set search_path = pgpark, pg_temp
as $$
begin
  return clock_timestamp();
end
$$;

-- Under REPEATABLE READ or SERIALIZABLE a transaction goes on seeing the past after it has waited for a lock, so it
-- would count units that others have taken meanwhile as free (DESIGN invariant 1).
create or replace function pgpark._sees_the_past() returns boolean
language sql stable
as $$
  select current_setting('transaction_isolation') not in ('read committed', 'read uncommitted');
$$;

create or replace function pgpark._require_read_committed() returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  if pgpark._sees_the_past() then
    raise exception 'pgpark needs READ COMMITTED, this transaction is %', upper(current_setting('transaction_isolation'))
      using errcode = '25001',
            hint = 'With an older snapshot, capacity and depth would be counted wrongly. '
                   'Use: begin transaction isolation level read committed';
  end if;
end
$$;

create or replace function pgpark._pool(name text) returns pgpark.pool
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
begin
  select p.* into lot from pool p where p.name = _pool.name;
  if not found then
    perform pgpark._unknown_pool(_pool.name);
  end if;
  return lot;
end
$$;

create or replace function pgpark._unknown_pool(name text) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  names text := (
    select string_agg(p.name, ', ' order by p.name)
    from (select pool.name from pool where pgpark._may(pgpark._kinds(), pool.name, '{}') order by 1 limit 20) p);
begin
  raise exception 'unknown pool %', coalesce(pgpark._on_one_line(quote_literal(_unknown_pool.name)), 'NULL')
    using errcode = '42704',
          hint = coalesce('Pools here: ' || names, 'There are no pools yet; park_put_pool makes one.');
end
$$;

-- Claims of one pool happen one after another: each waits here for the one before to commit. The lock is a statement
-- of its own, so that the statements after it see what that one did.
create or replace function pgpark._lock_pool(name text) returns pgpark.pool
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
begin
  for look in 1 .. 2 loop  -- twice: it may have been dropped and made anew while we waited for its row
    select p.* into lot from pool p where p.name = _lock_pool.name for no key update;
    exit when found;
  end loop;
  if lot.pool_id is null then
    perform pgpark._unknown_pool(_lock_pool.name);
  end if;
  return lot;
end
$$;

create or replace function pgpark._priority_names() returns text[]
language sql immutable
as $$
  select array['low', 'normal', 'high', 'critical'];
$$;

-- 0 low ... 3 critical; null for a word that is none of them.
create or replace function pgpark._priority_level(word text) returns smallint
language sql immutable
as $$
  select (array_position(pgpark._priority_names(), word) - 1)::smallint;
$$;

create or replace function pgpark._priority_word(level smallint) returns text
language sql immutable
as $$
  select (pgpark._priority_names())[level + 1];
$$;

-- A message as it is raised: on one line, and cut in the middle where what it repeats of an argument is long.
create or replace function pgpark._on_one_line(message text) returns text
language sql immutable
as $$
  select case when length(l.line) <= 700 then l.line else left(l.line, 350) || ' ... ' || right(l.line, 300) end
  from (select translate(message, chr(10) || chr(13), '  ') as line) l;
$$;

-- Raises 22023 for a complaint about one element of an array, named by its place from 1; null: about a single one.
create or replace function pgpark._refuse_element(complaint text, "position" int) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  if "position" is null then
    raise exception '%', pgpark._on_one_line(complaint) using errcode = '22023';
  else
    raise exception 'element %: %', "position", pgpark._on_one_line(complaint)
      using errcode = '22023', detail = format('element %s', "position");
  end if;
end
$$;

-- Whether a task runs, or is being stopped; for tasks that are looked up by id. "state in (running, cancelling)" would let the
-- planner walk the index of all that runs instead: docs/decisions/0008.
create or replace function pgpark._runs(state text) returns boolean
language sql immutable
as $$
  select state not in ('parked', 'delayed');
$$;

create or replace function pgpark._secs(secs double precision) returns interval
language sql immutable
as $$
  select make_interval(secs => secs);
$$;

-- KiB that a value takes as JSON text, rounded up.
create or replace function pgpark._json_kb(value jsonb) returns int
language sql immutable
as $$
  select ((octet_length(value::text) + 1023) / 1024)::int;
$$;

-- Tells whoever listens that a task of this pool may now start. message: '' for that, 'cancel' when a running task
-- should be stopped.
create or replace function pgpark._wake(pool_name text, message text default '') returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  perform pg_notify('pgpark.pool.' || pool_name, message);
end
$$;
