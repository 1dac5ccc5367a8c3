-- Releasing: a worker gives a running task back unharmed, for instance when it shuts down.
-- Keeps invariants 3 (its old place), 6 (wake-up) and 7 (fencing).

create or replace function pgpark.park_release(task_id bigint, attempt int) returns boolean
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
  held pgpark.task;
  lot pgpark.pool;
begin
  perform pgpark._require_read_committed();
  if pgpark._is_stranger() and not pgpark._may_on(array['worker'], park_release.task_id) then
    return false;
  end if;
  select t.* into held
  from task t
  where t.task_id = park_release.task_id
    and t.attempt = park_release.attempt
    and pgpark._runs(t.state)
  for update;
  if not found then
    return false;
  elsif held.state = 'cancelling' then
    perform pgpark._conclude_all(array[held.task_id], 'dropped', held.cancel_reason);
    return true;
  end if;
  select p.* into lot from pool p where p.pool_id = held.pool_id;
  perform pgpark._park_again(lot, array[held.task_id], lost => 0);
  perform pgpark._wake(lot.name);
  return true;
end
$$;

comment on function pgpark.park_release is
'Puts a running task back in its old place; counts neither as a failure nor as a lost worker. Returns false when this
attempt no longer holds the task; then nothing was changed. One that is being cancelled is dropped instead.
Errors: 25001.';
