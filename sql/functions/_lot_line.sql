-- The line in the picture of a pool: what is parked by priority, what is delayed, why the line does not move, and what stands at
-- its head. Called by park_lot (lot.sql), which says who may see what.

-- parked: those of looked that are shown. line: of _lot_line. Counts of own tasks are of those looked at.
create or replace function pgpark._lot_parked(lot pgpark.pool, parked pgpark.task[], looked pgpark.task[], line jsonb, own text[],
                                              now_ timestamptz, most int)
returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lanes jsonb;
  counts constant int[] := pgpark._parked_by_priority(lot.pool_id, pgpark._lot_reach());
begin
  select jsonb_agg(jsonb_build_object(
           'priority', pgpark._priority_word(g.level::smallint),
           'count', case when own is null then counts[g.level + 1] else s.seen end,
           'more', counts[g.level + 1] >= pgpark._lot_reach()
                   or (own is not null
                       and counts[g.level + 1] > (select count(*) from unnest(looked) k where k.priority = g.level)),
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
  ) s;
  return jsonb_build_object(
    'count', (select sum((l.lane ->> 'count')::int) from jsonb_array_elements(lanes) as l (lane)),
    'more', (select bool_or((l.lane ->> 'more')::boolean) from jsonb_array_elements(lanes) as l (lane)),
    'lanes', lanes);
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
  select t.* from pgpark._in_line(lot.pool_id, array[3, 2, 1, 0], most) t
  union all
  select t.*
  from pgpark._in_lanes(lot.pool_id, lanes, array[3, 2, 1, 0], greatest(most / greatest(cardinality(lanes), 1), 1)) t;
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
  if limited then
    -- Others may be in line behind all that.
    select places || coalesce(jsonb_object_agg(e.task_id, jsonb_build_array(e."position", e.why)), '{}'),
           count(*) = 0,
           (array_agg(e.task_id order by e."position") filter (where e.why in ('no units', 'worker capacity')))[1]
    into places, limited, head_id
    from pgpark._explain(lot, least(most, 20), line_only => true) e
    where e.why <> 'delayed';
  end if;
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
