-- Walks over what is parked, for whoever looks and changes nothing: the picture of a pool (lot.sql), its measures (measures.sql),
-- its depth (_places.sql). Claims have walks of their own, which lock what they choose.
--
-- A walk is plain SQL with no settings, so it becomes a part of the statement that asks for it: of a task it reads no more
-- than that needs, and only the index where it is counted. Who asks pins the plan (docs/decisions/0008).

-- The first parked tasks of each of these priorities, in this order, but for those in a lane. A null `of_each` is no bound.
create or replace function pgpark._in_line(pool_id int, levels int[], of_each int) returns setof pgpark.task
language sql stable
as $$
  select w.*
  from pgpark._floors(_in_line.pool_id) f
  cross join unnest(_in_line.levels) as g (level)
  cross join lateral (
    select t.*
    from pgpark.task t
    where t.pool_id = _in_line.pool_id
      and t.state = 'parked'
      and t.lane is null
      and t.priority = g.level
      and (t.start_tag, t.task_id) >= (f.tag_floors[g.level + 1], f.task_floors[g.level + 1])
    order by t.priority desc, t.start_tag, t.task_id
    limit _in_line.of_each
  ) w;
$$;

-- The first of each of these priorities in each of these lanes.
create or replace function pgpark._in_lanes(pool_id int, lanes text[], levels int[], of_each int) returns setof pgpark.task
language sql stable
as $$
  select w.*
  from unnest(_in_lanes.levels) as g (level)
  cross join unnest(_in_lanes.lanes) as l (tenant)
  cross join lateral (
    select t.*
    from pgpark.task t
    where t.pool_id = _in_lanes.pool_id
      and t.state = 'parked'
      and t.lane is not null
      and t.lane = l.tenant
      and t.priority = g.level
    order by t.priority desc, t.start_tag, t.task_id
    limit _in_lanes.of_each
  ) w;
$$;

-- How many tasks are parked by priority, from 0, each counted up to a bound.
create or replace function pgpark._parked_by_priority(pool_id int, most int) returns int[]
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
  lanes constant text[] := array(select l from pgpark._lanes(_parked_by_priority.pool_id) l);
  counts int[] := array[]::int[];
begin
  for level in 0 .. 3 loop
    counts := counts || (
      select count(*)::int
      from (
        select 1 from pgpark._in_line(_parked_by_priority.pool_id, array[level], most)
        union all
        select 1 from pgpark._in_lanes(_parked_by_priority.pool_id, lanes, array[level], most)
        limit most
      ) t);
  end loop;
  return counts;
end
$$;
