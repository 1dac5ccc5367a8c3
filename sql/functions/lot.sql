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
  running := array(select t from pgpark._first_running(lot.pool_id) t where pgpark._is_shown(t.tenant, view_.own));
  parked := array(select t from pgpark._first_parked(lot, pgpark._lot_reach()) t where pgpark._is_shown(t.tenant, view_.own));
  if view_.own is not null then
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
    'parked', pgpark._lot_parked(lot, parked, line, view_.own, now_, max_tasks),
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
1000; sums, tenants and own tasks are of what was counted). Times are seconds before or after `at`.
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
    running := array(select t from pgpark._first_running(lot.pool_id) t where pgpark._is_shown(t.tenant, own));
    if own is null then
      counts := array(select pgpark._count_level(lot, g.level) from unnest(array[3, 2, 1, 0]) as g (level));
    else
      counts := array(
        select count(*)::int
        from pgpark._first_parked(lot, pgpark._lot_reach()) t
        where pgpark._is_shown(t.tenant, own));
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
      'parked', jsonb_build_object('count', (select sum(c) from unnest(counts) c),
                                   'more', pgpark._lot_reach() <= any (counts)),
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
  theirs text[];
begin
  if stranger then
    perform pgpark._require(pgpark._kinds(), _lot_view.pool, '{}', format('see pool %L', _lot_view.pool));
  end if;
  own := pgpark._own_tenants(_lot_view.pool);
  theirs := coalesce(own, array[null]);
  told := not stranger or pgpark._may(array['producer', 'worker'], _lot_view.pool, theirs);
  may_submit := not stranger or pgpark._may(array['producer'], _lot_view.pool, theirs);
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

-- As many running tasks as are looked at.
create or replace function pgpark._first_running(pool_id int) returns setof pgpark.task
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  return query
  select t.*
  from task t
  where t.pool_id = _first_running.pool_id
    and t.state in ('running', 'cancelling')
  limit pgpark._lot_reach();
end
$$;

-- The first parked tasks of each priority, in no order. Of the lanes of limited tenants each gives its part.
create or replace function pgpark._first_parked(lot pgpark.pool, most int) returns setof pgpark.task
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  lanes constant text[] := array(select l from pgpark._lanes(lot.pool_id) l limit most);
begin
  return query
  select t.*
  from pgpark._floors(lot.pool_id) f
  cross join unnest(array[3, 2, 1, 0]) as g (level)
  cross join lateral (
    select t.*
    from task t
    where t.pool_id = lot.pool_id
      and t.state = 'parked'
      and t.lane is null
      and t.priority = g.level
      and (t.start_tag, t.task_id) >= (f.tag_floors[g.level + 1], f.task_floors[g.level + 1])
    order by t.priority desc, t.start_tag, t.task_id
    limit most
  ) t;

  return query
  select t.*
  from unnest(array[3, 2, 1, 0]) as g (level)
  cross join unnest(lanes) as l (tenant)
  cross join lateral (
    select t.*
    from task t
    where t.pool_id = lot.pool_id
      and t.state = 'parked'
      and t.lane is not null
      and t.lane = l.tenant
      and t.priority = g.level
    order by t.priority desc, t.start_tag, t.task_id
    limit greatest(most / cardinality(lanes), 1)
  ) t;
end
$$;

-- How many tasks are parked with this priority, up to where things are counted.
create or replace function pgpark._count_level(lot pgpark.pool, level int) returns int
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  most constant int := pgpark._lot_reach();
  counted int;
begin
  select count(*)::int into counted
  from pgpark._floors(lot.pool_id) f
  cross join lateral (
    select
    from task t
    where t.pool_id = lot.pool_id
      and t.state = 'parked'
      and t.lane is null
      and t.priority = _count_level.level
      and (t.start_tag, t.task_id) >= (f.tag_floors[_count_level.level + 1], f.task_floors[_count_level.level + 1])
    order by t.priority desc, t.start_tag, t.task_id
    limit most
  ) t;
  if counted < most then
    counted := counted + (
      select count(*)::int
      from (
        select
        from pgpark._lanes(lot.pool_id) as l (tenant)
        cross join lateral (
          select
          from task t
          where t.pool_id = lot.pool_id
            and t.state = 'parked'
            and t.lane is not null
            and t.lane = l.tenant
            and t.priority = _count_level.level
          order by t.priority desc, t.start_tag, t.task_id
          limit most
        ) t
        limit most
      ) t);
  end if;
  return least(counted, most);
end
$$;

create or replace function pgpark._lot_running(running pgpark.task[], now_ timestamptz, most int) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  return jsonb_build_object(
    'count', cardinality(running),
    'more', cardinality(running) >= pgpark._lot_reach(),
    'tasks', (
      select coalesce(jsonb_agg(jsonb_build_object(
               'task_id', r.task_id, 'state', r.state, 'units', r.units, 'priority', pgpark._priority_word(r.priority),
               'tenant', r.tenant, 'worker', r.worker, 'attempt', r.attempt,
               'secs', pgpark._seconds(r.started_at, now_), 'lease_secs', pgpark._seconds(now_, r.lease_until),
               'run_secs_left', pgpark._seconds(now_, r.run_until)) order by r.units desc, r.task_id), '[]')
      from (select t.* from unnest(running) t order by t.units desc, t.task_id limit most) r));
end
$$;

-- line: of _lot_line. Counts of own tasks are of those looked at.
create or replace function pgpark._lot_parked(lot pgpark.pool, parked pgpark.task[], line jsonb, own text[], now_ timestamptz, most int)
returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lanes jsonb;
begin
  select jsonb_agg(jsonb_build_object(
           'priority', pgpark._priority_word(g.level::smallint),
           'count', c.counted,
           'more', c.counted >= pgpark._lot_reach(),
           'units', s.units,
           'oldest_secs', s.oldest_secs,
           'tasks', s.tasks) order by g.level desc)
  into lanes
  from unnest(array[3, 2, 1, 0]) as g (level)
  cross join lateral (
    select coalesce(sum(t.units), 0) as units, pgpark._seconds(min(t.created_at), now_) as oldest_secs, count(*)::int as seen,
           coalesce(jsonb_agg(jsonb_build_object(
             'task_id', t.task_id, 'units', t.units, 'tenant', t.tenant, 'attempt', t.attempt,
             'secs', pgpark._seconds(t.created_at, now_), 'deadline_secs', pgpark._seconds(now_, t.deadline),
             'position', line -> 'places' -> t.task_id::text -> 0,
             'why', case when own is null then line -> 'places' -> t.task_id::text -> 1 end)
             order by t.start_tag, t.task_id) filter (where t.nth <= most), '[]') as tasks
    from (
      select p.*, row_number() over (order by p.start_tag, p.task_id) as nth
      from unnest(parked) p
      where p.priority = g.level
    ) t
  ) s
  cross join lateral (
    select case when own is null and s.seen > 0 then pgpark._count_level(lot, g.level) else s.seen end as counted
  ) c;
  return jsonb_build_object(
    'count', (select sum((l.lane ->> 'count')::int) from jsonb_array_elements(lanes) as l (lane)),
    'more', (select bool_or((l.lane ->> 'more')::boolean) from jsonb_array_elements(lanes) as l (lane)),
    'lanes', lanes);
end
$$;

create or replace function pgpark._lot_delayed(lot pgpark.pool, own text[], now_ timestamptz, most int) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  done constant timestamptz := (select f.due_to from pgpark._floors(lot.pool_id) f);
  delayed pgpark.task[];
begin
  delayed := array(
    select t
    from (
      select d.*
      from task d
      where d.pool_id = lot.pool_id
        and d.state = 'delayed'
        and d.run_at > done
      order by d.run_at
      limit pgpark._lot_reach()
    ) t
    where pgpark._is_shown(t.tenant, own));
  return jsonb_build_object(
    'count', cardinality(delayed),
    'more', cardinality(delayed) >= pgpark._lot_reach(),
    'tasks', (
      select coalesce(jsonb_agg(jsonb_build_object(
               'task_id', d.task_id, 'units', d.units, 'priority', pgpark._priority_word(d.priority), 'tenant', d.tenant,
               'attempt', d.attempt, 'due_secs', pgpark._seconds(now_, d.run_at), 'backoff', d.failures > 0) order by d.run_at, d.task_id), '[]')
      from (select t.* from unnest(delayed) t order by t.run_at, t.task_id limit most) d));
end
$$;

-- Why the line does not move, and what stands at its head. places: by task, its position and why it waits.
create or replace function pgpark._lot_line(lot pgpark.pool, used bigint, now_ timestamptz, most int) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  places jsonb;
  waiting boolean;
  limited boolean;  -- all that waits is at its tenant's limit
  head_id bigint;
  head jsonb;
begin
  select coalesce(jsonb_object_agg(e.task_id, jsonb_build_array(e."position", e.why)), '{}'),
         count(*) filter (where e.why <> 'delayed') > 0,
         bool_and(e.why = 'tenant limit') filter (where e.why <> 'delayed'),
         (array_agg(e.task_id order by e."position") filter (where e.why in ('no units', 'worker capacity')))[1]
  into places, waiting, limited, head_id
  from pgpark._explain(lot, most) e;
  head := (
    select jsonb_build_object(
             'task_id', t.task_id, 'units', t.units, 'priority', pgpark._priority_word(t.priority), 'tenant', t.tenant,
             'secs', pgpark._seconds(t.created_at, now_), 'bypassed', t.bypassed,
             'why', places -> t.task_id::text -> 1)
    from task t
    where t.task_id = head_id);
  return jsonb_build_object(
    'why', case when not waiting then null
                when lot.state in ('paused', 'disabled') then 'paused'
                when not pgpark._has_workers(lot, now_) then 'no worker'
                when head is not null then head ->> 'why'
                when limited then 'tenant limit' end,
    'free_units', greatest(lot.max_units - used, 0),
    'largest_room', pgpark._largest_worker(lot, now_),
    'head', head,
    'places', places);
end
$$;

-- Whether a worker of this pool was seen lately.
create or replace function pgpark._has_workers(lot pgpark.pool, now_ timestamptz) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
begin
  return exists (
    select from worker w
    where w.pool_id = lot.pool_id
      and w.seen_at > now_ - greatest(pgpark._secs(lot.lease_secs), interval '1 minute'));
end
$$;

-- Who holds units and who waits, of the tasks looked at: the first twenty.
create or replace function pgpark._lot_tenants(lot pgpark.pool, running pgpark.task[], parked pgpark.task[]) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
begin
  return (
    select coalesce(jsonb_agg(jsonb_build_object(
             'tenant', nullif(s.tenant, ''), 'running', s.running, 'running_units', s.running_units, 'parked', s.parked,
             'parked_units', s.parked_units, 'weight', coalesce(n.weight, 1), 'max_units', n.max_units)
             order by s.running_units desc, s.parked_units desc, s.tenant), '[]')
    from (
      select coalesce(l.tenant, '') as tenant,
             count(*) filter (where l.runs) as running, coalesce(sum(l.units) filter (where l.runs), 0) as running_units,
             count(*) filter (where not l.runs) as parked, coalesce(sum(l.units) filter (where not l.runs), 0) as parked_units
      from (
        select r.tenant, r.units, true as runs from unnest(running) r
        union all
        select p.tenant, p.units, false from unnest(parked) p
      ) l
      group by 1
      order by 3 desc, 5 desc, 1
      limit 20
    ) s
    left join tenant n on n.pool_id = lot.pool_id and n.tenant = s.tenant);
end
$$;

-- Workers that were seen lately, those that hold most first: twenty of them.
create or replace function pgpark._lot_workers(lot pgpark.pool, running pgpark.task[], now_ timestamptz) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
begin
  return (
    with seen as (
      select w.worker, w.max_units, pgpark._seconds(w.seen_at, now_) as seen_secs
      from worker w
      where w.pool_id = lot.pool_id
        and w.seen_at > now_ - greatest(pgpark._secs(lot.lease_secs), interval '1 minute')
      limit pgpark._lot_reach()
    ),
    busy as (
      select s.*, coalesce(h.running, 0) as running, coalesce(h.units, 0) as used_units
      from seen s
      left join (
        select r.worker, count(*) as running, sum(r.units) as units from unnest(running) r group by r.worker
      ) h on h.worker = s.worker
    )
    select jsonb_build_object(
      'count', (select count(*) from seen),
      'more', (select count(*) from seen) >= pgpark._lot_reach(),
      'list', (
        select coalesce(jsonb_agg(to_jsonb(b) order by b.used_units desc, b.worker), '[]')
        from (select * from busy order by used_units desc, worker limit 20) b)));
end
$$;

-- The latest outcomes of a pool, those that did not complete among them for an hour, and these by their reasons.
create or replace function pgpark._lot_mailbox(lot pgpark.pool, own text[], told boolean, now_ timestamptz, most int) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  latest constant pgpark.ended[] := array(
    select m from pgpark._latest_outcomes(lot, own) m
    where m.pool_id = lot.pool_id and pgpark._is_shown(m.tenant, own));
  failures constant pgpark.ended[] := array(
    select m from pgpark._latest_failures(lot.pool_id) m
    where m.created_at > now_ - interval '1 hour' and pgpark._is_shown(m.tenant, own));
begin
  return jsonb_build_object(
    'latest', (
      select coalesce(jsonb_agg(jsonb_build_object(
               'task_id', m.task_id, 'status', m.status, 'reason', pgpark._reason_for(m.reason, told),
               'units', m.units, 'priority', pgpark._priority_word(m.priority), 'tenant', m.tenant, 'attempt', m.attempt,
               'secs', pgpark._seconds(m.created_at, now_), 'wait_secs', pgpark._seconds(m.submitted_at, m.started_at),
               'run_secs', pgpark._seconds(m.started_at, m.created_at),
               'retry', m.status <> 'completed' and lot.archive and m.msg_id is not null)
               order by m.message_id desc), '[]')
      from (
        select * from unnest(latest)
        union
        select * from unnest(failures)
        order by message_id desc
        limit most
      ) m),
    'failures', (
      select coalesce(jsonb_agg(to_jsonb(g) order by g.count desc, g.secs), '[]')
      from (
        select m.status, pgpark._reason_for(m.reason, told) as reason, count(*),
               pgpark._seconds(max(m.created_at), now_) as secs, max(m.task_id) as task_id
        from unnest(failures) m
        group by 1, 2
        order by 3 desc, 4
        limit 20
      ) g),
    'failed', cardinality(failures),
    'more', cardinality(failures) >= pgpark._lot_reach());
end
$$;

-- The latest outcomes in the storage of this pool, those of other pools among them; of own tenants, whatever their storage.
create or replace function pgpark._latest_outcomes(lot pgpark.pool, own text[]) returns setof pgpark.ended
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
begin
  if own is null then
    return query
    select m.message_id, m.task_id, m.pool_id, m.tenant, m.status, left(m.reason, 200), m.priority, m.units, m.attempt,
           m.submitted_at, m.started_at, m.created_at, m.msg_id
    from mailbox m
    where m.storage = lot.mailbox_table
    order by m.message_id desc
    limit pgpark._lot_reach();
  else
    return query
    select l.*
    from unnest(own) as o (tenant)
    cross join lateral (
      select m.message_id, m.task_id, m.pool_id, m.tenant, m.status, left(m.reason, 200), m.priority, m.units, m.attempt,
             m.submitted_at, m.started_at, m.created_at, m.msg_id
      from mailbox m
      where m.tenant = o.tenant
      order by m.message_id desc
      limit greatest(pgpark._lot_reach() / cardinality(own), 1)
    ) l;
  end if;
end
$$;

create or replace function pgpark._latest_failures(pool_id int) returns setof pgpark.ended
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
begin
  return query
  select m.message_id, m.task_id, m.pool_id, m.tenant, m.status, left(m.reason, 200), m.priority, m.units, m.attempt,
         m.submitted_at, m.started_at, m.created_at, m.msg_id
  from mailbox m
  where m.pool_id = _latest_failures.pool_id
    and m.status <> 'completed'
  order by m.message_id desc
  limit pgpark._lot_reach();
end
$$;

-- A reason as it is told: what pgpark gave itself to everybody, a handler's own words to who may hear them.
create or replace function pgpark._reason_for(reason text, told boolean) returns text
language sql immutable
as $$
  select case when told or reason in ('deadline_expired', 'lost worker', 'run_timeout', 'cancelled', 'too_large', 'overflow',
                                      'payload lost', 'pool_dropped')
              then reason end;
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
