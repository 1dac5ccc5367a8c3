-- Cancelling: a task that waits is dropped at once; a running one is asked to stop.

create or replace function pgpark.park_cancel(task_id bigint, reason text default 'cancelled') returns text
language plpgsql
security definer
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  live pgpark.task;
  why text := coalesce(park_cancel.reason, 'cancelled');
begin
  perform pgpark._require_read_committed();
  if pgpark._is_stranger() and not pgpark._may_on(array['producer'], park_cancel.task_id) then
    return 'unknown';
  end if;
  select t.* into live from task t where t.task_id = park_cancel.task_id for update;
  if not found then
    return case when exists (select from mailbox m where m.task_id = park_cancel.task_id)
                then 'finished' else 'unknown' end;
  elsif live.state in ('parked', 'delayed') then
    perform pgpark._conclude_all(array[live.task_id], 'dropped', why);
    return 'dropped';
  elsif live.state = 'running' then
    update task t set state = 'cancelling', cancel_reason = why where t.task_id = live.task_id;
    perform pgpark._wake(p.name, 'cancel') from pool p where p.pool_id = live.pool_id;
    insert into audit (at, event, pool, task_id, attempt, worker, tenant, priority, units, reason)
    select pgpark._now(), 'cancelling', p.name, live.task_id, live.attempt, live.worker, live.tenant, live.priority,
           live.units, pgpark._audit_reason(why)
    from pool p
    where p.pool_id = live.pool_id
      and p.audit;
  end if;
  return 'cancelling';
end
$$;

comment on function pgpark.park_cancel is
'Cancels a task. Returns dropped (it was waiting; the outcome with this reason is in the mailbox), cancelling (it is
running: its worker is told, and the outcome follows when it has stopped), finished (too late) or unknown.
Errors: 25001.';
