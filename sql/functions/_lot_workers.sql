-- What runs in the picture of a pool, and on which workers. Called by park_lot (lot.sql), which says who may see what.

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

-- As many running tasks as are looked at, of all or of own tenants.
create or replace function pgpark._first_running(pool_id int, own text[]) returns setof pgpark.task
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
    and pgpark._is_shown(t.tenant, own)
  limit pgpark._lot_reach();
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
      select e.worker, max(e.max_units) as max_units, max(e.seen_secs) as seen_secs, count(e.task_id) as running,
             coalesce(sum(e.units), 0)::bigint as used_units
      from (
        select s.worker, s.max_units, s.seen_secs, null::bigint as task_id, null::bigint as units from seen s
        union all
        select r.worker, null, null, r.task_id, null from unnest(running) r
        union all
        select h.worker, null, null, null, h.units from pgpark._held_units(lot.pool_id) h
      ) e
      group by e.worker
      having max(e.seen_secs) is not null
    )
    select jsonb_build_object(
      'count', (select count(*) from seen),
      'more', (select count(*) from seen) >= pgpark._lot_reach(),
      'list', (
        select coalesce(jsonb_agg(to_jsonb(b) order by b.used_units desc, b.worker), '[]')
        from (select * from busy order by used_units desc, worker limit 20) b)));
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
