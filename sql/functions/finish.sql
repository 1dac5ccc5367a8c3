-- Finishing: a worker reports what became of an attempt. Outcome, freed units, archived message and wake-up are one
-- transaction. Keeps invariants 2 (one outcome), 7 (fencing) and 8 (atomicity). Takes no lock on the pool.

create or replace function pgpark.park_finish(
  task_id bigint,
  attempt int,
  status text default 'completed',
  result jsonb default null,
  reason text default null)
returns boolean
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  perform pgpark._check_finish(park_finish.status, null);
  return cardinality(pgpark._finish(
    array[park_finish.task_id], array[park_finish.attempt], array[coalesce(park_finish.status, 'completed')],
    array[park_finish.result], array[park_finish.reason])) = 1;
end
$$;

comment on function pgpark.park_finish is
'Ends an attempt. status: completed, failed (retried while retry.max_attempts allows) or dropped. result: what the
client gets from the mailbox. reason: for people. Returns false when this attempt no longer holds the task (its lease
lapsed, it was finished, released or dropped); then nothing was changed. A task that was being cancelled and is not
completed is dropped with the reason of the cancel. Errors: 22023, 25001.';

create or replace function pgpark.park_finish_many(outcomes jsonb)
returns table (task_id bigint, accepted boolean)
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  ids bigint[];
  attempts int[];
  statuses text[];
  results jsonb[];
  reasons text[];
  accepted_places int[];
begin
  perform pgpark._check_outcomes(outcomes);
  select array_agg((e.element ->> 'task_id')::bigint order by e.ord),
         array_agg((e.element ->> 'attempt')::int order by e.ord),
         array_agg(coalesce(e.element ->> 'status', 'completed') order by e.ord),
         array_agg(e.element -> 'result' order by e.ord),
         array_agg(e.element ->> 'reason' order by e.ord)
  into ids, attempts, statuses, results, reasons
  from jsonb_array_elements(outcomes) with ordinality as e (element, ord);
  accepted_places := pgpark._finish(ids, attempts, statuses, results, reasons);
  return query
  select i.id, i.ord = any (accepted_places)
  from unnest(ids) with ordinality as i (id, ord)
  order by i.ord;
end
$$;

comment on function pgpark.park_finish_many is
'Ends many attempts at once. Each element is an object with the arguments of park_finish as its keys (task_id and
attempt are required). Returns one row per element, in order: task_id and whether it was accepted; false means fenced,
as in park_finish. An element that is not of the right form is an error (22023) and nothing is changed.';

create or replace function pgpark._check_finish(status text, "position" int) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  if _check_finish.status not in ('completed', 'failed', 'dropped') then
    perform pgpark._refuse_element(
      format('unknown status %L; use completed, failed or dropped', _check_finish.status), "position");
  end if;
end
$$;

create or replace function pgpark._check_outcomes(outcomes jsonb) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  bad record;
  keys constant text[] := array['task_id', 'attempt', 'status', 'result', 'reason'];
begin
  if jsonb_typeof(outcomes) is distinct from 'array' then
    raise exception 'outcomes must be a JSON array, not %', coalesce(jsonb_typeof(outcomes), 'NULL')
      using errcode = '22023', hint = 'For example: [{"task_id": 1, "attempt": 1, "result": {"answer": 42}}]';
  end if;
  select e.ord, c.complaint into bad
  from jsonb_array_elements(outcomes) with ordinality as e (element, ord)
  cross join lateral (
    select case
      when jsonb_typeof(e.element) <> 'object'
           or coalesce(e.element ->> 'task_id', '') !~ '^[0-9]{1,18}$'
           or coalesce(e.element ->> 'attempt', '') !~ '^[0-9]{1,9}$' then
        'an outcome is an object with task_id and attempt as whole numbers'
      when e.element - keys <> '{}' then
        format('unknown key %L; an outcome has %s',
               (select min(k) from jsonb_object_keys(e.element - keys) k), array_to_string(keys, ', '))
      when jsonb_typeof(e.element -> 'reason') not in ('string', 'null') then
        format('reason must be a string, not %s', e.element -> 'reason')
    end as complaint
  ) c
  where c.complaint is not null
  order by e.ord
  limit 1;
  if found then
    perform pgpark._refuse_element(bad.complaint, bad.ord::int);
  end if;
  perform pgpark._check_finish(e.element ->> 'status', e.ord::int)
  from jsonb_array_elements(outcomes) with ordinality as e (element, ord);
end
$$;

-- The arrays run in parallel. Returns the places, counted from 1, of the elements that were accepted: those that name
-- the current attempt of a running task, and of several that do the first.
create or replace function pgpark._finish(ids bigint[], attempts int[], statuses text[], results jsonb[], reasons text[])
returns int[]
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  now_ timestamptz := pgpark._now();
  accepted int[];
  failing bigint[];  -- may have another attempt
  retried bigint[] := array[]::bigint[];
begin
  perform pgpark._require_read_committed();
  with given as (
    select g.task_id, g.attempt, min(g.ord)::int as ord
    from unnest(ids, attempts) with ordinality as g (task_id, attempt, ord)
    group by g.task_id, g.attempt
  ),
  held as (
    select t.task_id, t.state, g.ord
    from task t
    join given g on g.task_id = t.task_id and g.attempt = t.attempt
    where t.state in ('running', 'cancelling')
    order by t.task_id  -- one order for everybody, so that two batches cannot deadlock
    for update of t
  )
  select array_agg(h.ord),
         array_agg(h.task_id) filter (where h.state = 'running' and statuses[h.ord] = 'failed')
  into accepted, failing
  from held h;

  if failing is not null then
    retried := pgpark._retry(failing, now_);
  end if;

  -- An attempt that failed without saying why after its time was up was stopped for that. What was being cancelled
  -- is dropped, unless it was completed all the same: then the answer is kept.
  perform pgpark._conclude(
    array_agg(o.task_id),
    array_agg(case when o.cancelled then 'dropped' else o.status end),
    array_agg(case when o.cancelled then o.cancel_reason
                   when o.status = 'failed' and o.overran then coalesce(o.reason, 'run_timeout')
                   else o.reason end),
    array_agg(o.result))
  from (
    select t.task_id, t.cancel_reason, t.run_until <= now_ as overran,
           statuses[a.ord] as status, reasons[a.ord] as reason, results[a.ord] as result,
           t.state = 'cancelling' and statuses[a.ord] <> 'completed' as cancelled
    from unnest(accepted) as a (ord)
    join task t on t.task_id = ids[a.ord]
    where t.task_id <> all (retried)
  ) o;
  return coalesce(accepted, array[]::int[]);
end
$$;
