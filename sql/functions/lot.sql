-- The picture of a pool: all that the live page and `pgpark top` draw of it, in one call and from one snapshot.
-- Reads by index and in bounded bites, so it costs the same with a million parked tasks as with a thousand: counts stop at
-- 1000, as positions do, and units in use are always exact.
--
-- Who may see what: whoever may see the numbers of the pool sees the lot, without payloads and results. A producer that is
-- bound to tenants sees their tasks and outcomes alone. The reasons of outcomes are the handlers' own words, which may repeat
-- what is in a payload: only who may read the mailbox, or works for the pool, is told those that pgpark did not give itself.

create or replace function pgpark.park_lot(pool text default null, max_tasks int default 100) returns jsonb
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set jit = off  -- as for park_metrics: functions/measures.sql
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  now_ timestamptz := pgpark._now();
  view_ record;
  used bigint;
  running pgpark.task[];
  looked pgpark.task[];  -- the first that are parked, whose ever they are
  parked pgpark.task[];
  line jsonb;
begin
  if coalesce(max_tasks, 0) not between 1 and pgpark._lot_reach() then
    raise exception 'max_tasks must be from 1 to %, not %', pgpark._lot_reach(), coalesce(max_tasks::text, 'NULL')
      using errcode = '22023';
  elsif park_lot.pool is null then
    return pgpark._lots(now_);
  end if;
  view_ := pgpark._lot_view(park_lot.pool);
  lot := pgpark._pool(park_lot.pool);
  used := pgpark._used_units(lot.pool_id);
  running := array(select t from pgpark._first_running(lot.pool_id, view_.own) t);
  looked := array(select t from pgpark._first_parked(lot, pgpark._lot_reach()) t);
  parked := looked;
  if view_.own is not null then
    parked := array(select t from unnest(looked) t where pgpark._is_shown(t.tenant, view_.own));
    used := (select coalesce(sum(r.units), 0) from unnest(running) r);
  end if;
  line := pgpark._lot_line(lot, used, now_, least(4 * max_tasks, pgpark._lot_reach()));
  return jsonb_build_object(
    'pool', lot.name,
    'at', now_,
    'state', lot.state,
    'own', view_.own,
    'may', jsonb_build_object('change', view_.may_change, 'cancel', view_.may_submit, 'retry', view_.may_submit),
    'settings', pgpark._lot_settings(lot, view_.own),
    'used_units', used,
    'running', pgpark._lot_running(running, now_, max_tasks),
    'parked', pgpark._lot_parked(lot, parked, looked, line, view_.own, now_, max_tasks),
    'delayed', pgpark._lot_delayed(lot, view_.own, now_, max_tasks),
    'line', case when view_.own is null then line - 'places'
                 else jsonb_build_object('why', case when lot.state in ('paused', 'disabled') then 'paused' end) end,
    'tenants', pgpark._lot_tenants(lot, running, parked),
    'workers', case when view_.own is null then pgpark._lot_workers(lot, running, now_) end,
    'mailbox', pgpark._lot_mailbox(lot, view_.own, view_.told, now_, least(max_tasks, 50)),
    'outcomes', case when view_.own is null then pgpark._lot_outcomes(lot.pool_id) end);
end
$$;

comment on function pgpark.park_lot is
'All that the live page and `pgpark top` draw of one pool, as one object, at the same cost however much waits. Lists have at
most max_tasks (1 to 1000) entries; count says how many there are, and with more = true that many or more (it stops at
1000, of whomever; sums, tenants and own tasks are of what was counted). Times are seconds before or after `at`.
settings: max_units, max_bypass, fairness and others; free_places in a pool with max_queue_depth. used_units: exact. running:
the largest first. parked: a lane for each priority, critical first, with its first tasks, their position and why they wait
(as park_explain says). delayed: by starting time; backoff: it comes back after a failure. line: why the line does not move
(paused, no worker, no units, worker capacity, tenant limit; null: it does, or nothing waits), free_units, largest_room (the
most that one worker has free; null: no limit), and the head, the first task that does not fit. tenants: who holds, and who
waits. workers: seen within a minute, or a lease. mailbox: the latest outcomes, of the latest 1000 in its storage; failures of
the last hour by reason; retry: park_retry may find the payload. outcomes: since the pool was made. may: whether the caller
may change the pool, cancel and retry. own: the tenants whose tasks alone the caller sees; numbers of the pool are null then.
pool null: {"at", "pools"}, for each pool that the caller may see name, state, used_units, counts, and units of what runs.
Errors: 22023, 42704, 42501.';

-- Each pool in a few numbers.
create or replace function pgpark._lots(now_ timestamptz) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lots jsonb := jsonb_build_array();
  lot pgpark.pool;
  own text[];
  running pgpark.task[];
  counts int[];  -- of what is parked, by level
  parked int;
  more boolean;
begin
  if pgpark._is_stranger() then
    perform pgpark._require(pgpark._kinds(), null, '{}', 'see pools');
  end if;
  for lot in
    select p.*
    from pool p
    where not pgpark._is_stranger() or pgpark._may(pgpark._kinds(), p.name, '{}')
    order by p.name
    limit pgpark._lot_reach()
  loop
    own := pgpark._own_tenants(lot.name);
    running := array(select t from pgpark._first_running(lot.pool_id, own) t);
    counts := pgpark._parked_by_priority(lot.pool_id, pgpark._lot_reach());
    parked := (select sum(c)::int from unnest(counts) c);
    more := pgpark._lot_reach() <= any (counts);
    if own is not null then
      select (count(*) filter (where pgpark._is_shown(t.tenant, own)))::int, more or count(*) < parked
      into parked, more
      from pgpark._first_parked(lot, pgpark._lot_reach()) t;
    end if;
    lots := lots || jsonb_build_object(
      'pool', lot.name, 'state', lot.state, 'own', own, 'max_units', lot.max_units,
      'used_units', case when own is null then pgpark._used_units(lot.pool_id)
                         else (select coalesce(sum(r.units), 0) from unnest(running) r) end,
      'running', jsonb_build_object(
        'count', cardinality(running), 'more', cardinality(running) >= pgpark._lot_reach(),
        'tasks', (select coalesce(jsonb_agg(jsonb_build_object('task_id', r.task_id, 'units', r.units, 'tenant', r.tenant,
                                                               'priority', pgpark._priority_word(r.priority))
                                            order by r.units desc, r.task_id), '[]')
                  from (select t.* from unnest(running) t order by t.units desc, t.task_id limit 24) r)),
      'parked', jsonb_build_object('count', parked, 'more', more),
      'workers', case when own is null then pgpark._has_workers(lot, now_) end);
  end loop;
  return jsonb_build_object('at', now_, 'pools', lots);
end
$$;

-- Up to where things are counted.
create or replace function pgpark._lot_reach() returns int
language sql immutable
as $$
  select 1000;
$$;

-- What the caller is shown and may do. own: the tenants whose tasks it sees; null: all. told: whether it is told the reasons
-- that handlers gave. Raises 42501.
create or replace function pgpark._lot_view(pool text, out own text[], out told boolean, out may_change boolean,
                                            out may_submit boolean)
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  stranger constant boolean := pgpark._is_stranger();
begin
  if stranger then
    perform pgpark._require(pgpark._kinds(), _lot_view.pool, '{}', format('see pool %L', _lot_view.pool));
  end if;
  own := pgpark._own_tenants(_lot_view.pool);
  -- Own tenants are those that the caller is a producer of, by one grant or by several.
  told := not stranger or coalesce(cardinality(own) > 0, pgpark._may(array['producer', 'worker'], _lot_view.pool, array[null]));
  may_submit := not stranger or coalesce(cardinality(own) > 0, pgpark._may(array['producer'], _lot_view.pool, array[null]));
  may_change := not stranger or pgpark._may('{}', null, '{}');
end
$$;

-- The tenants that the caller is bound to in this pool; null: to none.
create or replace function pgpark._own_tenants(pool text) returns text[]
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  if not pgpark._is_stranger() or pgpark._may(pgpark._kinds(), _own_tenants.pool, array[null]) then
    return null;
  end if;
  return array(
    select t.tenant
    from (
      select n.tenant from access a cross join unnest(a.tenants) as n (tenant)
      union
      select n.tenant from token k cross join unnest(k.tenants) as n (tenant) where k.hash = pgpark._token()
    ) t
    where pgpark._may(array['producer'], _own_tenants.pool, array[t.tenant])
    order by 1);
end
$$;

create or replace function pgpark._is_shown(tenant text, own text[]) returns boolean
language sql immutable
as $$
  select own is null or coalesce(tenant = any (own), false);
$$;

-- Seconds from one time to another, as they are shown.
create or replace function pgpark._seconds(from_ timestamptz, to_ timestamptz) returns numeric
language sql immutable
as $$
  select round(extract(epoch from to_ - from_)::numeric, 2);
$$;

create or replace function pgpark._lot_settings(lot pgpark.pool, own text[]) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return jsonb_build_object(
    'max_units', lot.max_units, 'max_bypass', lot.max_bypass, 'fairness', lot.fairness, 'overflow', lot.overflow,
    'resource_kind', lot.resource_kind, 'archive', lot.archive, 'lease_secs', lot.lease_secs,
    'run_timeout_secs', lot.run_timeout_secs, 'max_attempts', lot.max_attempts, 'max_queue_depth', lot.max_queue_depth,
    'free_places', case when own is null and lot.max_queue_depth is not null
                        then (select greatest(sum(p.free), 0) from place p where p.pool_id = lot.pool_id) end);
end
$$;

create or replace function pgpark._lot_outcomes(pool_id int) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  return (
    select jsonb_build_object(
             'completed', coalesce(sum(y.completed), 0), 'failed', coalesce(sum(y.failed), 0),
             'expired', coalesce(sum(y.expired), 0), 'dropped', coalesce(sum(y.dropped), 0),
             'retried', coalesce(sum(y.retried), 0))
    from tally y
    where y.pool_id = _lot_outcomes.pool_id
      and y.entry_id > (select f.entry_floor from front f where f.pool_id = _lot_outcomes.pool_id));
end
$$;
