-- Why a task is not running now. Reads as park_claim decides, and changes nothing.

create or replace function pgpark.park_explain(pool text, max_tasks int default 20)
returns table (task_id bigint, "position" int, why text)
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
  lot pgpark.pool := pgpark._pool(park_explain.pool);
  candidate record;
  rank_ int := 0;
  now_ timestamptz := pgpark._now();
  free bigint := pgpark._free_units(lot, null, null);
  largest bigint := pgpark._largest_worker(lot, now_);
  head_found boolean := false;
  passes int := 0;
  looked int := 0;  -- tasks seen behind the head
begin
  if coalesce(max_tasks, 0) < 1 then
    raise exception 'max_tasks must be at least 1, not %', coalesce(max_tasks::text, 'NULL') using errcode = '22023';
  end if;
  for candidate in
    select t.task_id, t.units, t.bypassed
    from task t
    where t.pool_id = lot.pool_id
      and t.state = 'parked'
      and t.units <= lot.max_units  -- what is larger, and what is late, ends at the next claim
      and (t.deadline is null or t.deadline > now_)
    order by t.priority desc, t.task_id
    limit max_tasks
  loop
    task_id := candidate.task_id;
    "position" := rank_;
    rank_ := rank_ + 1;
    looked := looked + head_found::int;
    if lot.state in ('paused', 'disabled') then
      why := 'paused';
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
  limit greatest(max_tasks - rank_, 0);
end
$$;

comment on function pgpark.park_explain is
'For the first parked tasks of a pool in rank order, then for delayed ones: task_id, position (how many are ahead; null
for delayed) and why it is not running: may start (a free worker will take it), no units (the head, or a task that does
not fit either), held for head, worker capacity (the pool has room, no live worker has), delayed, paused.
Errors: 22023, 42704.';

-- The most that one task could get on the live worker with the most room; null when no worker sets a limit.
create or replace function pgpark._largest_worker(lot pgpark.pool, now_ timestamptz) returns bigint
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return (
    select case when bool_and(w.max_units is not null)
                then max(w.max_units - coalesce((select sum(t.units) from task t
                                                 where t.pool_id = lot.pool_id
                                                   and t.state in ('running', 'cancelling')
                                                   and t.worker = w.worker), 0)) end
    from worker w
    where w.pool_id = lot.pool_id
      and w.seen_at > now_ - greatest(pgpark._secs(lot.lease_secs), interval '1 minute'));
end
$$;
