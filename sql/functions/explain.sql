-- Why a task is not running now. Reads as park_claim decides, and changes nothing.

create or replace function pgpark.park_explain(pool text, max_tasks int default 20)
returns table (task_id bigint, "position" int, why text)
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
begin
  if pgpark._is_stranger() then
    perform pgpark._require(array['reader', 'worker'], park_explain.pool, '{}',
                            format('see what waits in pool %L', park_explain.pool));
  end if;
  lot := pgpark._pool(park_explain.pool);
  if coalesce(max_tasks, 0) < 1 then
    raise exception 'max_tasks must be at least 1, not %', coalesce(max_tasks::text, 'NULL') using errcode = '22023';
  end if;
  return query select * from pgpark._explain(lot, max_tasks);
end
$$;

comment on function pgpark.park_explain is
'For the first parked tasks of a pool in rank order, then for delayed ones: task_id, position (how many are ahead; null
for delayed) and why it is not running: may start (a free worker will take it), no units (the head, or a task that does
not fit either), held for head, worker capacity (the pool has room, no live worker has), tenant limit, delayed, paused.
Errors: 22023, 42704, 42501.';

-- The same for whoever has asked already; park_lot too. line_only: without what the limit of its tenant keeps out of the line.
create or replace function pgpark._explain(lot pgpark.pool, max_tasks int, line_only boolean default false)
returns table (task_id bigint, "position" int, why text)
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
  candidate record;
  explained int := 0;
  ahead int := 0;  -- in line
  now_ timestamptz := pgpark._now();
  free bigint := lot.max_units - pgpark._used_units(lot.pool_id);
  largest bigint := pgpark._largest_worker(lot, now_);
  head_found boolean := false;
  passes int := 0;
  looked int := 0;  -- tasks seen behind the head
begin
  for candidate in
    select c.*, (row_number() over (partition by c.tenant, c.in_line
                                    order by c.priority desc, c.start_tag, c.task_id) - 1)::int as own_ahead
    from (
      (select t.task_id, null as tenant, t.units, t.bypassed, true as in_line, t.priority, t.start_tag
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
           and t.units <= lot.max_units  -- what is larger, and what is late, ends at the next claim
           and (t.deadline is null or t.deadline > now_)
         order by t.priority desc, t.start_tag, t.task_id
         limit max_tasks
       ) t
       limit max_tasks)
      union all
      select l.task_id, l.tenant, l.units, l.bypassed, l.in_line, l.priority, l.start_tag
      from pgpark._read_lanes(lot, now_, max_tasks, 0) l
      where line_only
        and l.in_line
        and l.units <= least(lot.max_units, l.max_units)
        and (l.deadline is null or l.deadline > now_)
      union all
      select l.task_id, l.tenant, l.units, l.bypassed, l.in_line, l.priority, l.start_tag
      from pgpark._first_of_lanes(lot, now_, max_tasks) l
      where not line_only
    ) c
    order by c.priority desc, c.start_tag, c.task_id
    limit max_tasks
  loop
    task_id := candidate.task_id;
    "position" := ahead + case when candidate.in_line then 0 else candidate.own_ahead end;
    explained := explained + 1;
    ahead := ahead + candidate.in_line::int;
    looked := looked + (head_found and candidate.in_line)::int;
    if lot.state in ('paused', 'disabled') then
      why := 'paused';
    elsif not candidate.in_line then
      why := 'tenant limit';
    elsif head_found and (passes < 1 or looked > pgpark._bypass_window()) then
      why := 'held for head';
    elsif candidate.units <= least(free, largest) then
      why := 'may start';
      free := free - candidate.units;
      passes := passes - head_found::int;
    else
      why := case when candidate.units <= free then 'worker capacity' else 'no units' end;
      if not head_found then
        head_found := true;
        passes := lot.max_bypass - candidate.bypassed;
      end if;
    end if;
    return next;
  end loop;

  return query
  select t.task_id, null::int, 'delayed'
  from task t
  where t.pool_id = lot.pool_id
    and t.state = 'delayed'
  order by t.run_at
  limit greatest(max_tasks - explained, 0);
end
$$;

-- The most that one task could get on the live worker with the most room; null when no worker sets a limit.
create or replace function pgpark._largest_worker(lot pgpark.pool, now_ timestamptz) returns bigint
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return (
    select case when bool_and(k.max_units is not null) then max(k.max_units - k.units) end
    from (
      select e.worker, max(e.max_units) as max_units, sum(e.units)::bigint as units
      from (
        select w.worker, w.max_units, 0 as units, true as lives
        from worker w
        where w.pool_id = lot.pool_id
          and w.seen_at > now_ - greatest(pgpark._secs(lot.lease_secs), interval '1 minute')
        union all
        select h.worker, null, h.units, false from pgpark._held_units(lot.pool_id) h
      ) e
      group by e.worker
      having bool_or(e.lives)
    ) k);
end
$$;
