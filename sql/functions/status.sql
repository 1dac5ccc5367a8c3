-- Where a task is now, live or ended.

create or replace function pgpark.park_status(task_id bigint) returns setof pgpark.task_status
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
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
task how many are ahead of it, 1000 meaning that many or more. started_at: of the latest attempt.';

-- How many parked tasks of the pool rank before this one, counted up to 1000.
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
begin
  return (
    select count(*)::int
    from (
      select t.priority, t.task_id
      from task t
      where t.pool_id = _tasks_ahead.task.pool_id
        and t.state = 'parked'
      order by t.priority desc, t.task_id
      limit 1000
    ) front
    where front.priority > _tasks_ahead.task.priority
       or (front.priority = _tasks_ahead.task.priority and front.task_id < _tasks_ahead.task.task_id));
end
$$;
