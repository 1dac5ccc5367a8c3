-- Where a task is now, live or ended.

-- Volatile, so that it sees what its own statement has submitted.
create or replace function pgpark.park_status(task_id bigint) returns setof pgpark.task_status
language plpgsql volatile
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  if pgpark._is_stranger() and not pgpark._may_on(array['producer'], park_status.task_id) then
    return;
  end if;
  return query
  select t.task_id, p.name, t.state, t.cancel_reason, pgpark._priority_word(t.priority), t.units, t.attempt, t.worker,
         case when t.state = 'parked' then pgpark._tasks_ahead(t) end,
         t.created_at, t.started_at, null::timestamptz, t.deadline
  from task t
  join pool p using (pool_id)
  where t.task_id = park_status.task_id;
  if not found then
    return query
    select m.task_id, m.pool, m.status, m.reason, pgpark._priority_word(m.priority), m.units, m.attempt, m.worker,
           null::int, m.submitted_at, m.started_at, m.created_at, m.deadline
    from mailbox m
    where m.task_id = park_status.task_id;
  end if;
end
$$;

comment on function pgpark.park_status is
'One task, live or ended; no row for an id that is unknown or whose outcome was taken out of the mailbox.
status: parked, delayed, running, cancelling, or the outcome completed, failed, expired, dropped. position: for a parked
task how many are ahead of it, 1000 meaning that many or more; tasks that their tenant''s limit keeps waiting are ahead
of that tenant''s tasks alone. started_at: of the latest attempt. May look at what its own statement submits: select s.*,
t.position from pgpark.park_submit(''gpu'', ''{}'') s left join lateral pgpark.park_status(s.task_id) t on true.';

-- How many tasks are ahead of a parked one, counted up to 1000: those in line that rank before it, and for one that its
-- tenant's limit keeps out of the line also the tenant's tasks before it that are out of it.
create or replace function pgpark._tasks_ahead(task pgpark.task) returns int
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
  lot pgpark.pool;
  now_ timestamptz := pgpark._now();
  ahead int;
  of_lanes int;
  of_own_lane int;  -- ahead of it in its own lane, in line and not
begin
  select p.* into lot from pool p where p.pool_id = _tasks_ahead.task.pool_id;
  select count(*)::int into ahead
  from (
    select t.*
    from pgpark._floors(_tasks_ahead.task.pool_id) f
    cross join unnest(array[3, 2, 1, 0]) as g (level)
    cross join lateral (
      select t.priority, t.start_tag, t.task_id, t.units, t.deadline
      from task t
      where t.pool_id = _tasks_ahead.task.pool_id
        and t.state = 'parked'
        and t.lane is null
        and t.priority = g.level
        and (t.start_tag, t.task_id) >= (f.tag_floors[g.level + 1], f.task_floors[g.level + 1])
      order by t.priority desc, t.start_tag, t.task_id
      limit 1000
    ) t
    limit 1000
  ) t
  where (-t.priority, t.start_tag, t.task_id)
        < (-_tasks_ahead.task.priority, _tasks_ahead.task.start_tag, _tasks_ahead.task.task_id)
    and t.units <= lot.max_units  -- what is larger, and what is late, ends at the next claim
    and (t.deadline is null or t.deadline > now_);

  select count(*)::int, (count(*) filter (where l.tenant = _tasks_ahead.task.lane))::int
  into of_lanes, of_own_lane
  from pgpark._read_lanes(lot, now_, 1000, 0) l
  where l.in_line
    and l.units <= least(lot.max_units, l.max_units)
    and (l.deadline is null or l.deadline > now_)
    and (-l.priority, l.start_tag, l.task_id)
        < (-_tasks_ahead.task.priority, _tasks_ahead.task.start_tag, _tasks_ahead.task.task_id);
  if _tasks_ahead.task.lane is not null then
    of_own_lane := (
      select count(*)::int - of_own_lane
      from (
        select t.priority, t.start_tag, t.task_id, t.units, t.deadline
        from task t
        where t.pool_id = _tasks_ahead.task.pool_id
          and t.state = 'parked'
          and t.lane is not null
          and t.lane = _tasks_ahead.task.lane
        order by t.priority desc, t.start_tag, t.task_id
        limit 1000
      ) t
      where (-t.priority, t.start_tag, t.task_id)
            < (-_tasks_ahead.task.priority, _tasks_ahead.task.start_tag, _tasks_ahead.task.task_id)
        and t.units <= pgpark._most_units(lot, _tasks_ahead.task.tenant)
        and (t.deadline is null or t.deadline > now_));
  end if;
  return least(ahead + of_lanes + of_own_lane, 1000);
end
$$;
