-- Reading the audit: what happened to tasks, for those who have to answer for it. functions/_audit.sql writes it.

create or replace function pgpark.park_audit(
  pool text default null,
  task_id bigint default null,
  tenant text default null,
  since timestamptz default null,
  until timestamptz default null,
  event text default null,
  max_events int default 100,
  before bigint default null)
returns setof pgpark.audit_event
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set plan_cache_mode = force_custom_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  stranger constant boolean := pgpark._is_stranger();
  by_row constant boolean := stranger and (park_audit.pool is null or park_audit.task_id is not null);
begin
  if coalesce(max_events, 0) < 1 then
    raise exception 'max_events must be at least 1, not %', coalesce(max_events::text, 'NULL') using errcode = '22023';
  elsif park_audit.event <> all (pgpark._audit_events()) then
    raise exception 'unknown event %; use %', pgpark._on_one_line(quote_literal(park_audit.event)),
                    array_to_string(pgpark._audit_events(), ', ')
      using errcode = '22023';
  elsif before is not null and until is null then
    raise exception 'before goes with until' using errcode = '22023', hint = 'Give both as they are in the last row that you have.';
  elsif stranger and park_audit.task_id is null then
    perform pgpark._require(array['producer', 'reader'], park_audit.pool, array[park_audit.tenant],
                            'read the audit' || coalesce(' of pool ' || quote_literal(park_audit.pool), '')
                            || coalesce(' for tenant ' || quote_literal(park_audit.tenant), ' for all tenants'));
  end if;
  if park_audit.task_id is not null then
    return query
    select a.event_id, a.at, a.event, a.pool, a.task_id, a.attempt, a.worker, a.tenant, pgpark._priority_word(a.priority),
           a.units, pgpark._reason_for(a.reason, not stranger or pgpark._hears(a.event, a.pool, a.tenant))
    from (  -- all that the task has, which is little; sorted after, because that is no order to find it in
      select * from audit a where a.task_id = park_audit.task_id offset 0
    ) a
    where (park_audit.pool is null or a.pool = park_audit.pool)
      and (park_audit.tenant is null or a.tenant = park_audit.tenant)
      and (park_audit.event is null or a.event = park_audit.event)
      and (since is null or a.at >= since)
      and (until is null or before is not null or a.at < until)
      and (before is null or (a.at, a.event_id) < (until, before))
      and (not by_row or pgpark._may(array['producer', 'reader'], a.pool, array[a.tenant]))
    order by a.at desc, a.event_id desc
    limit max_events;
    return;
  end if;
  -- Planned anew each time, with these values: what is null is no condition, days outside the period are no part of the plan,
  -- and each of the ways to ask has an index that gives the order too.
  return query
  select a.event_id, a.at, a.event, a.pool, a.task_id, a.attempt, a.worker, a.tenant, pgpark._priority_word(a.priority),
         a.units, pgpark._reason_for(a.reason, not stranger or pgpark._hears(a.event, a.pool, a.tenant))
  from audit a
  where (park_audit.pool is null or a.pool = park_audit.pool)
    and (park_audit.tenant is null or a.tenant = park_audit.tenant)
    and (park_audit.event is null or a.event = park_audit.event)
    and (since is null or a.at >= since)
    and (until is null or before is not null or a.at < until)
    and (before is null or a.at <= until)  -- for the planner, who leaves days out by this
    and (before is null or (a.at, a.event_id) < (until, before))
    and (not by_row or pgpark._may(array['producer', 'reader'], a.pool, array[a.tenant]))
  order by a.at desc, a.event_id desc
  limit max_events;
end
$$;

comment on function pgpark.park_audit is
'What happened to tasks of pools with audit: true, newest first: rows (event_id, at, event, pool, task_id, attempt, worker,
tenant, priority, units, reason). Null arguments mean any. since: at this time or later; until: before this time. event:
submitted, rejected (no task_id; reason as in park_submit), started, completed, failed, expired, dropped (the outcome, with its
reason), retried (an attempt failed, and another follows), released, lost (the lease lapsed, and the task parked again),
cancelling (its worker is told to stop). To read on, give until and before as they are in the last row. An event is seen when
its transaction has committed, at is when it happened: so one that is committed late may appear among those before. Also of
pools that were dropped, for as long as events are kept. Readers are told the reasons that pgpark gave itself, and null for
what handlers said. Producers that are bound to tenants name one; who is bound to pools
had better name one too. Errors: 22023, 42501.';

-- Whether the caller is told what a handler, or whoever cancelled, gave as the reason of an event. Why a submit was refused,
-- pgpark said itself.
create or replace function pgpark._hears(event text, pool text, tenant text) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  return _hears.event = 'rejected' or pgpark._may(array['producer', 'worker'], _hears.pool, array[_hears.tenant]);
end
$$;
