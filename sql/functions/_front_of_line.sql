-- How a claim chooses from the front of the line, all its tasks in one statement; what it books for them; and whether
-- anything is there to choose. Called by claims, which hold the pool's lock. Keeps invariants 1 (capacity) and 3 (order).

-- How many tasks one walk looks at: from the front, and behind a head. Bounds what a claim costs, whatever waits.
create or replace function pgpark._longest_walk() returns int
language sql immutable
as $$
  select 10000;
$$;

-- Chooses what starts from the front of the line, as far as it fits, and locks it: ids in rank order, their messages, and
-- what they take and how long they waited. One that somebody else holds this moment (a cancel that is not committed) is passed
-- over as if it were gone. reach: how far above its floor the walk came. more: the walk ended before the line. look_behind: it
-- ended at a task that may be passed, or has to end.
create or replace function pgpark._front_of_line(lot pgpark.pool, tag_floors double precision[], task_floors bigint[],
                                                 now_ timestamptz, free bigint, slots int,
                                                 out ids bigint[], out msg_ids bigint[], out units bigint,
                                                 out waited real[], out past_head int, out first_units int,
                                                 out reach bigint, out more boolean, out look_behind boolean)
language plpgsql
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
  most int := least(slots, free, pgpark._longest_walk())::int;
  seen int;
  waits boolean;  -- the first that does not start: whether it waits for units alone
begin
  -- What cannot start at all counts as wider than any pool. Nobody behind the first that does not fit is taken here. The
  -- arrays are in the order of the walk, which nothing changes on the way.
  select coalesce(array_agg(l.task_id) filter (where l.up_to <= free), '{}'),
         coalesce(array_agg(l.msg_id) filter (where l.up_to <= free), '{}'),
         coalesce(sum(l.units) filter (where l.up_to <= free), 0),
         array_agg(pgpark._elapsed(l.since, now_)) filter (where l.up_to <= free),
         (array_agg(l.units) filter (where l.up_to <= free))[1],
         coalesce(max(l.above) filter (where l.up_to <= free), 0),
         count(*)::int, (array_agg(l.able) filter (where l.up_to > free))[1]
  into ids, msg_ids, units, waited, first_units, reach, seen, waits
  from (
    select c.task_id, c.msg_id, c.units, c.since, c.able, c.task_id - task_floors[g.level + 1] as above,
           sum(case when c.able then c.units::double precision else 'infinity' end)
             over (rows unbounded preceding) as up_to
    from unnest(array[3, 2, 1, 0]) as g (level)
    cross join lateral (
      select t.task_id, t.msg_id, t.units, coalesce(t.waits_since, t.created_at) as since,
             t.units <= lot.max_units and coalesce(t.deadline > now_, true) as able
      from task t
      where t.pool_id = lot.pool_id
        and t.state = 'parked'
        and t.lane is null
        and t.priority = g.level
        and (t.start_tag, t.task_id) >= (tag_floors[g.level + 1], task_floors[g.level + 1])
      order by t.priority desc, t.start_tag, t.task_id
      for update skip locked
    ) c
    limit most
  ) l;
  past_head := 0;
  more := seen = pgpark._longest_walk();
  look_behind := waits is not null and (lot.max_bypass > 0 or not waits);
end
$$;

-- Books what tasks take that start on a worker: units, of which their sum is given, of a tenant's share, and of the waiting
-- places; and how long they waited. The last past_head of them start past a head.
create or replace function pgpark._book_start(lot pgpark.pool, worker text, ids bigint[], units bigint, waits real[],
                                              past_head int, now_ timestamptz)
returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  insert into tally (pool_id, worker, units, at, waits)
  values (lot.pool_id, _book_start.worker, _book_start.units, now_, _book_start.waits);
  if lot.fairness = 'tenant' then
    perform pgpark._serve(lot, ids, past_head);
  end if;
  if lot.max_queue_depth is not null then
    perform pgpark._give_places(lot.pool_id, cardinality(ids));
  end if;
  if lot.audit then
    perform pgpark._audit_starts(lot, ids);
  end if;
end
$$;

-- Whether a parked task would start now on a worker with room enough: the first of the line, whatever its deadline, fits
-- what is free in the pool. What is too large for the pool or its tenant ends at the next claim and is passed over.
create or replace function pgpark._may_start(lot pgpark.pool, now_ timestamptz, free bigint) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  first_ pgpark.candidate;
  of_lanes pgpark.candidate;
begin
  if free < 1 or lot.state in ('paused', 'disabled') then
    return false;
  end if;
  select c.*
  into first_.task_id, first_.tenant, first_.priority, first_.start_tag, first_.units, first_.bypassed
  from pgpark._floors(lot.pool_id) f
  cross join unnest(array[3, 2, 1, 0]) as g (level)
  cross join lateral (
    select t.task_id, t.tenant, t.priority, t.start_tag, t.units, t.bypassed
    from task t
    where t.pool_id = lot.pool_id
      and t.state = 'parked'
      and t.lane is null
      and t.priority = g.level
      and t.units <= lot.max_units
      and (t.start_tag, t.task_id) >= (f.tag_floors[g.level + 1], f.task_floors[g.level + 1])
    order by t.priority desc, t.start_tag, t.task_id
    limit 1
  ) c
  limit 1;
  if lot.limited then
    select l.* into of_lanes
    from pgpark._read_lanes(lot, now_, 1, 0) l
    where l.in_line
      and l.units <= least(lot.max_units, l.max_units)
    limit 1;
    if first_.task_id is null or pgpark._ranks_before(of_lanes, first_) then
      first_ := of_lanes;
    end if;
  end if;
  return first_.task_id is not null and free >= case when first_.bypassed < lot.max_bypass then 1 else first_.units end;
end
$$;
