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

-- The first so many tasks in rank order of those in lanes, as _read_lanes tells them, but for such as end at the next claim. It
-- reads a few of each lane, and then, of those lanes that may have more among the first, twice as many, and so on: in all a
-- few of each lane, and a few times what was asked for, whatever waits behind.
create or replace function pgpark._first_of_lanes(lot pgpark.pool, now_ timestamptz, most int)
returns setof pgpark.candidate
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  deeper text[] := array(select l from pgpark._lanes(lot.pool_id) l);  -- lanes of which more has to be read
  deep int := greatest(2 * most / greatest(cardinality(deeper), 1), 2);
  first_ pgpark.candidate[] := array[]::pgpark.candidate[];
begin
  while cardinality(deeper) > 0 loop
    deep := least(deep, most);
    with known as (
      select f as candidate, f.tenant, f.priority, f.start_tag, f.task_id, true as able
      from unnest(first_) f
      where f.tenant <> all (deeper)
      union all
      select l, l.tenant, l.priority, l.start_tag, l.task_id,
             l.units <= least(lot.max_units, l.max_units) and coalesce(l.deadline > now_, true)
      from pgpark._read_lanes(lot, now_, deep, deep, deeper) l
    ),
    ranked as (
      select k.*, count(*) filter (where k.able)
                    over (order by k.priority desc, k.start_tag, k.task_id) - k.able::int as ahead
      from known k
    )
    select array(select r.candidate from ranked r where r.able and r.ahead < most order by r.ahead),
           array(select r.tenant
                 from ranked r
                 where r.tenant = any (deeper)
                 group by r.tenant
                 having max(r.ahead) < most and count(*) >= deep and deep < most)
    into first_, deeper;
    deep := 2 * deep;
  end loop;
  return query select f.* from unnest(first_) f;
end
$$;
