-- Heartbeats: a worker says which tasks it is running, and is told which of them to stop.
-- Renewal names each task, so that a worker that came back under its old name does not keep its dead tasks alive.

create or replace function pgpark.park_heartbeat(pool text, worker text, task_ids bigint[]) returns setof bigint
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
  lot pgpark.pool;
  now_ timestamptz := pgpark._now();
begin
  if pgpark._is_stranger() then
    perform pgpark._require_pool('worker', park_heartbeat.pool, 'send heartbeats for');
  end if;
  lot := pgpark._pool(park_heartbeat.pool);
  perform pgpark._require_read_committed();
  perform pgpark._check_worker(park_heartbeat.worker, null);

  -- A task that ran out of time gets no more leases once the last one has lapsed: a worker that does not stop it
  -- loses it then. One that is being cancelled keeps its units for as long as its worker says it is there. A row that
  -- somebody else holds is passed over: one open transaction must not cost the others their leases.
  with mine as (
    select t.task_id
    from task t
    where t.task_id = any (park_heartbeat.task_ids)
      and t.pool_id = lot.pool_id
      and t.worker = park_heartbeat.worker
      and pgpark._runs(t.state)
      and (t.run_until is null or t.run_until > now_ or t.state = 'cancelling')
    for update skip locked
  )
  update task t
  set lease_until = now_ + pgpark._secs(lot.lease_secs)
  from mine m
  where t.task_id = any (array[m.task_id]);

  -- The worker's row after the tasks' rows, as in park_claim, so that the two cannot deadlock.
  perform pgpark._seen(lot.pool_id, park_heartbeat.worker,
                       (select w.max_units from worker w
                        where w.pool_id = lot.pool_id and w.worker = park_heartbeat.worker), now_);

  return query
  select distinct i.id
  from unnest(park_heartbeat.task_ids) as i (id)
  where i.id is not null
    and not exists (
      select from task t
      where t.task_id = any (array[i.id])
        and t.pool_id = lot.pool_id
        and t.worker = park_heartbeat.worker
        and pgpark._runs(t.state)
        and t.state <> 'cancelling'
        and (t.run_until is null or t.run_until > now_));
end
$$;

comment on function pgpark.park_heartbeat is
'Renews the leases of exactly these running tasks for another lease_secs, and marks the worker as alive (an empty array
does just that). Returns the ids that this worker should stop: cancelled, out of run_timeout_secs, or no longer its
own. Send it about every third of lease_secs. Errors: 22023, 42704, 25001, 42501.';
