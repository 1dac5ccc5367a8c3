-- Once more: a task in its backoff parks at once, and one that ended without being completed is submitted anew.
-- Called by people who have mended what made tasks fail. Keeps invariant 2: what has ended stays ended; who wants it again
-- gets another task.

create or replace function pgpark.park_retry(task_id bigint) returns setof pgpark.submission
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
begin
  perform pgpark._require_read_committed();
  if pgpark._is_stranger() and not pgpark._may_on(array['producer'], park_retry.task_id) then
    return next row(null, false, 'rejected', 'unknown')::pgpark.submission;
    return;
  end if;
  select t.* into live from task t where t.task_id = park_retry.task_id for update;
  if not found then
    return query select * from pgpark._submit_again(park_retry.task_id);
  elsif live.state = 'delayed' and live.failures > 0 then
    perform pgpark._end_backoff(live);
    return next row(live.task_id, true, 'parked', null)::pgpark.submission;
  else
    return next row(null, false, 'rejected', 'not_ended')::pgpark.submission;
  end if;
end
$$;

comment on function pgpark.park_retry is
'Once more. A task that waits out its backoff parks at once. One that ended as failed, expired or dropped is submitted anew
with the same payload, units, priority and address, if its pool keeps an archive: a new task, with its own outcome; its
deadline is the pool''s default. A second retry of the same ended task gets that new task (duplicate), as long as its
outcome is kept.
Returns a row as park_submit does; its reasons, or: unknown (no such task, or its outcome was taken out of the mailbox),
completed, not_ended (it is parked, running, or delayed until a time that its client chose), payload_gone (the pool keeps
no archive, or was dropped, or it ended before pgpark kept what leads there). Errors: 25001, 42501 (it may not submit).';

-- The tasks that must run at once did fail before: their turn, in a fair pool, is the old one.
create or replace function pgpark._end_backoff(waiting pgpark.task) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
begin
  select p.* into lot from pool p where p.pool_id = waiting.pool_id;
  update task t
  set state = 'parked',
      run_at = null,
      waits_since = pgpark._now(),
      start_tag = case lot.fairness when 'tenant' then t.start_tag else 0 end,
      share = case lot.fairness when 'tenant' then coalesce(t.tenant, '') end,
      lane = pgpark._lane(lot.pool_id, t.tenant)
  where t.task_id = waiting.task_id;
  insert into returned (pool_id, task_id) values (lot.pool_id, waiting.task_id);
  perform pgpark._wake(lot.name);
end
$$;

-- A task like one that has ended, if it should be tried again and its payload is kept.
create or replace function pgpark._submit_again(task_id bigint) returns setof pgpark.submission
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  outcome pgpark.mailbox;
  lot pgpark.pool;
  payload jsonb;
begin
  select m.* into outcome from mailbox m where m.task_id = _submit_again.task_id;
  if not found then
    return next row(null, false, 'rejected', 'unknown')::pgpark.submission;
    return;
  elsif outcome.status = 'completed' then
    return next row(null, false, 'rejected', 'completed')::pgpark.submission;
    return;
  end if;
  select p.* into lot from pool p where p.pool_id = outcome.pool_id;
  if found then
    payload := pgpark._archived_payload(lot, outcome.msg_id, outcome.task_id);
  end if;
  if payload is null then
    return next row(null, false, 'rejected', 'payload_gone')::pgpark.submission;
    return;
  end if;
  return query
  select s.*
  from pgpark.park_submit(
    pool => lot.name, payload => payload, priority => pgpark._priority_word(outcome.priority), units => outcome.units,
    tenant => outcome.tenant, user_id => outcome.user_id, session_id => outcome.session_id,
    idempotency_key => 'retry of ' || outcome.task_id) s;
end
$$;

-- The payload of an ended task in the archive of its pool; null: it is not there.
create or replace function pgpark._archived_payload(lot pgpark.pool, msg_id bigint, task_id bigint) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  message jsonb;
  kept text := pgpark._archive(lot);
begin
  if to_regclass(kept) is null then
    return null;
  end if;
  execute format('select message from %s where msg_id = $1 and archived_at is not null', kept) into message using msg_id;
  return case when (message #>> '{metadata,task_id}')::bigint = task_id then message -> 'payload' end;
end
$$;
