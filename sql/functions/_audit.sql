-- Writing the audit, and keeping its partitions. Called wherever a task changes its state in a pool with `audit: true`, in the
-- transaction that changes it: so the audit tells what was committed, and nothing else. docs/decisions/0024.
--
-- An event goes to the partition of its day (UTC). Days are made a week ahead, by whoever maintains; what has no day goes to
-- audit_rest, where it is found as fast and deleted in bites, so that nobody who writes ever waits for a table to be made.
-- Days that no pool wants any more are dropped as a whole.

create or replace function pgpark._audit_events() returns text[]
language sql immutable
as $$
  select array['submitted', 'rejected', 'started', 'completed', 'failed', 'retried', 'expired', 'dropped', 'released', 'lost',
               'cancelling'];
$$;

-- What a reason takes at most, in characters: a handler may say more than anybody wants to keep of each attempt.
create or replace function pgpark._audit_reason(reason text) returns text
language sql immutable
as $$
  select left(reason, 500);
$$;

-- Drafts that were accepted, or that were refused for these reasons; the arrays run in parallel.
create or replace function pgpark._audit_drafts(lot pgpark.pool, drafts pgpark.draft[], refusals text[], now_ timestamptz)
returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  insert into audit (at, event, pool, task_id, tenant, priority, units, reason)
  select now_, case when refusals is null then 'submitted' else 'rejected' end, lot.name,
         case when refusals is null then d.task_id end, d.tenant, pgpark._priority_level(d.priority), d.units, refusals[d.nth]
  from unnest(drafts) with ordinality as d (ord, task_id, payload, priority, units, deadline, tenant, user_id, session_id,
                                            run_at, idempotency_key, nth)
  order by d.nth;
end
$$;

-- Tasks that have just started on a worker.
create or replace function pgpark._audit_starts(lot pgpark.pool, ids bigint[]) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  insert into audit (at, event, pool, task_id, attempt, worker, tenant, priority, units)
  select t.started_at, 'started', lot.name, t.task_id, t.attempt, t.worker, t.tenant, t.priority, t.units
  from unnest(ids) with ordinality as c (task_id, ord)
  join task t on t.task_id = any (array[c.task_id])
  order by c.ord;
end
$$;

-- Tasks whose outcomes have just been put into the mailbox.
create or replace function pgpark._audit_outcomes(ids bigint[]) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  insert into audit (at, event, pool, task_id, attempt, worker, tenant, priority, units, reason)
  select m.created_at, m.status, m.pool, m.task_id, m.attempt, m.worker, m.tenant, m.priority, m.units,
         pgpark._audit_reason(m.reason)
  from unnest(ids) with ordinality as c (task_id, ord)
  join mailbox m on m.task_id = any (array[c.task_id])
  order by c.ord;
end
$$;

-- The first moment of a day.
create or replace function pgpark._audit_day(moment timestamptz) returns timestamptz
language sql stable
as $$
  select date_trunc('day', moment, 'UTC');
$$;

create or replace function pgpark._audit_table(day timestamptz) returns text
language sql stable
as $$
  select 'audit_' || to_char(day at time zone 'UTC', 'YYYYMMDD');
$$;

-- For how many days events are kept: the longest that any pool wants. A pool that has given its audit up, but not its
-- audit_days, still counts; 30 where nobody says anything.
create or replace function pgpark._audit_days_kept() returns int
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return least(coalesce((select max(coalesce(p.audit_days, 30)) from pool p where p.audit or p.audit_days is not null), 30),
               365000);  -- so that there is such a time
end
$$;

-- Makes the partitions of so many days, if they are not there, or the first of these. It waits for nobody for long: the lock
-- that it needs on audit_rest would keep others waiting behind it. Where it cannot have that, and where events of a day are
-- in audit_rest already, the day goes without a partition.
create or replace function pgpark._add_audit_days(first_day timestamptz, days int) returns void
language plpgsql
set search_path = pgpark, pg_temp
set lock_timeout = '100ms'
as $$
#variable_conflict use_column
declare
  day timestamptz;
  name text;
begin
  for nth in 0 .. days - 1 loop
    day := first_day + nth * interval '24 hours';
    name := pgpark._audit_table(day);
    continue when to_regclass('pgpark.' || name) is not null
                  or exists (select from audit_rest a where a.at >= day and a.at < day + interval '24 hours');
    -- Attached, not created in its place: that would keep everybody out of the whole audit until this transaction ends.
    execute format('create table pgpark.%I (like pgpark.audit including defaults including constraints including comments)',
                   name);
    execute format('alter table pgpark.audit attach partition pgpark.%I for values from (%L) to (%L)', name,
                   to_char(day at time zone 'UTC', 'YYYY-MM-DD') || ' 00:00:00+00',
                   to_char((day + interval '24 hours') at time zone 'UTC', 'YYYY-MM-DD') || ' 00:00:00+00');
    -- Postgres looks through all of audit_rest for events of that day, and nobody writes there meanwhile: a tenth of a second
    -- for a million. So one a look, as long as there are any.
    exit when exists (select from audit_rest);
  end loop;
exception
  when lock_not_available or deadlock_detected or check_violation or duplicate_table then
    null;  -- the next look tries again
end
$$;

-- Drops a day if that needs no long wait: everybody who reads or writes the audit waits meanwhile.
create or replace function pgpark._drop_audit_day(name text) returns void
language plpgsql
set search_path = pgpark, pg_temp
set lock_timeout = '100ms'
as $$
begin
  execute format('drop table pgpark.%I', name);
exception
  when lock_not_available or deadlock_detected then
    null;
end
$$;

-- Whether the caller may keep everybody out of the audit: not somebody who is bound to pools, or only submits, or acts for a
-- token, and who might leave the transaction open.
create or replace function pgpark._may_drop_audit() returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return pgpark._token() = '' and (pg_has_role(pgpark._caller(), current_user, 'usage') or exists (
    select from access a
    where a.kind in ('admin', 'worker')
      and a.pools is null
      and pg_has_role(pgpark._caller(), a.role::oid, 'usage')));
end
$$;

-- The partitions of days before a moment, oldest first.
create or replace function pgpark._audit_days_before(moment timestamptz) returns setof text
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select c.relname::text
  from pg_inherits i
  join pg_class c on c.oid = i.inhrelid
  where i.inhparent = 'pgpark.audit'::regclass
    and c.relname ~ '^audit_[0-9]{8}$'
    and c.relname < pgpark._audit_table(moment)::name
  order by c.relname;
end
$$;

-- At most once a minute: days ahead, and those that are over. The caller is the only one to do so. Last in its transaction,
-- because of the locks.
create or replace function pgpark._keep_audit(now_ timestamptz) returns void
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  kept_from timestamptz;
  bygone text;
begin
  update audit_upkeep u
  set next_look = now_ + interval '1 minute'
  where u.next_look <= now_
     or u.next_look > now_ + interval '1 minute';  -- somebody has put the clock back
  if not found then
    return;
  end if;
  kept_from := now_ - pgpark._audit_days_kept() * interval '24 hours';
  if exists (select from pool p where p.audit) then
    perform pgpark._add_audit_days(pgpark._audit_day(now_) + interval '24 hours', 7);
  end if;
  delete from audit_rest a
  where a.ctid = any (array(select o.ctid from audit_rest o where o.at < kept_from order by o.at limit 10000));
  if pgpark._may_drop_audit() then
    for bygone in select pgpark._audit_days_before(kept_from) loop
      perform pgpark._drop_audit_day(bygone);
    end loop;
  end if;
end
$$;

-- What of this upkeep has not been done, most likely because nobody maintains. Called by park_doctor.
create or replace function pgpark._audit_lag(now_ timestamptz) returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  tomorrow constant text := pgpark._audit_table(pgpark._audit_day(now_) + interval '24 hours');
  look constant text := E'update pgpark.audit_upkeep set next_look = ''epoch'';\nselect pgpark.park_maintain();';
begin
  if exists (select from pool p where p.audit) and to_regclass('pgpark.' || tomorrow) is null then
    return next row('audit without days', 'pgpark.audit', 'there is no partition for tomorrow; events go to audit_rest, and are '
                    'deleted there instead of dropped', look, false)::pgpark.finding;
  end if;
  return query
  select 'audit kept too long', 'pgpark.' || d.name,
         format('no pool wants what is older than %s days; nobody maintains, or some transaction stays open',
                pgpark._audit_days_kept()), look, false
  from pgpark._audit_days_before(now_ - (pgpark._audit_days_kept() + 1) * interval '24 hours') as d (name);
end
$$;
