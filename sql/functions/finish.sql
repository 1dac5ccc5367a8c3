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
security definer
set search_path = pgpark, pg_temp
as $$
begin
  if park_finish.status not in ('completed', 'failed', 'dropped') then
    perform pgpark._refuse_element(pgpark._bad_status(park_finish.status), null);
  elsif pgpark._is_stranger() and not pgpark._may_on(array['worker'], park_finish.task_id) then
    return false;
  end if;
  return cardinality((pgpark._finish(
    array[park_finish.task_id], array[park_finish.attempt], array[coalesce(park_finish.status, 'completed')],
    array[park_finish.result], array[park_finish.reason])).accepted) = 1;
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
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  given record;
  ended record;
begin
  given := pgpark._read_outcomes(outcomes);
  ended := pgpark._finish(case when pgpark._is_stranger() then pgpark._own(array['worker'], given.ids) else given.ids end,
                          given.attempts, given.statuses, given.results, given.reasons);
  return query
  select i.id, i.ord = any (ended.accepted)
  from unnest(given.ids) with ordinality as i (id, ord)
  order by i.ord;
end
$$;

comment on function pgpark.park_finish_many is
'Ends many attempts at once. Each element is an object with the arguments of park_finish as its keys (task_id and
attempt are required). Returns one row per element, in order: task_id and whether it was accepted; false means fenced,
as in park_finish. An element that is not of the right form is an error (22023) and nothing is changed.
Errors: 22023, 25001.';

create or replace function pgpark.park_next(
  pool text,
  worker text,
  outcomes jsonb default '[]',
  max_tasks int default 1,
  max_units int default null)
returns table (task_id bigint, attempt int, payload jsonb, priority text, units int, tenant text, user_id text,
               session_id text, deadline timestamptz, created_at timestamptz, fenced boolean)
language plpgsql
security definer
set search_path = pgpark, pg_temp
set lock_timeout = '500ms'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  given record;
  ended record;
begin
  if pgpark._is_stranger() then
    perform pgpark._require_pool('worker', park_next.pool, 'claim from');
  end if;
  given := pgpark._read_outcomes(outcomes);
  ended := pgpark._finish(case when pgpark._is_stranger() then pgpark._own(array['worker'], given.ids) else given.ids end,
                          given.attempts, given.statuses, given.results, given.reasons, park_next.pool);
  return query
  select c.*, false
  from pgpark._claim(park_next.pool, park_next.worker, park_next.max_tasks, park_next.max_units, ended.freed) c;
  if cardinality(given.ids) > cardinality(ended.accepted) then
    return query
    select i.id, given.attempts[i.ord], null::jsonb, null::text, null::int, null::text, null::text, null::text,
           null::timestamptz, null::timestamptz, true
    from unnest(given.ids) with ordinality as i (id, ord)
    where i.ord <> all (ended.accepted)
    order by i.ord;
  end if;
end
$$;

comment on function pgpark.park_next is
'park_finish_many and then park_claim, in one transaction and one round trip: what a worker that is busy calls. outcomes:
as in park_finish_many, also of other pools. Returns the rows of park_claim with fenced = false, then a row with fenced =
true for each outcome that was not accepted (its task_id and attempt, all else null). Errors: 22023, 42704, 25001 and
42501, and then nothing was done; 40P01 and 55P03 if somebody who holds the pool for half a second or more is in the way:
try again, or call the two one after the other.';

create or replace function pgpark._bad_status(status text) returns text
language sql immutable
as $$
  select format('unknown status %L; use completed, failed or dropped', status);
$$;

-- The elements of park_finish_many, checked, as arrays that run in parallel; nothing on the way changes their order.
create or replace function pgpark._read_outcomes(outcomes jsonb, out ids bigint[], out attempts int[],
                                                 out statuses text[], out results jsonb[], out reasons text[])
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  ord bigint;  -- of the first bad one
  complaint text;
begin
  if jsonb_typeof(outcomes) is distinct from 'array' then
    raise exception 'outcomes must be a JSON array, not %', coalesce(jsonb_typeof(outcomes), 'NULL')
      using errcode = '22023', hint = 'For example: [{"task_id": 1, "attempt": 1, "result": {"answer": 42}}]';
  end if;
  select coalesce(array_agg(case when o.complaint is null then (o.element ->> 'task_id')::bigint end), '{}'),
         coalesce(array_agg(case when o.complaint is null then (o.element ->> 'attempt')::int end), '{}'),
         coalesce(array_agg(coalesce(o.element ->> 'status', 'completed')), '{}'),
         coalesce(array_agg(o.element -> 'result'), '{}'),
         coalesce(array_agg(o.element ->> 'reason'), '{}'),
         min(o.ord) filter (where o.complaint is not null),
         (array_agg(o.complaint) filter (where o.complaint is not null))[1]
  into ids, attempts, statuses, results, reasons, ord, complaint
  from (
    select e.element, e.ord,
           case
             when jsonb_typeof(e.element) <> 'object'
                  or coalesce(e.element ->> 'task_id', '') !~ '^[0-9]{1,18}$'
                  or coalesce(e.element ->> 'attempt', '') !~ '^[0-9]{1,9}$' then
               'an outcome is an object with task_id and attempt as whole numbers'
             when e.element - pgpark._outcome_keys() <> '{}' then
               pgpark._unknown_key(e.element)
             when jsonb_typeof(e.element -> 'reason') not in ('string', 'null') then
               format('reason must be a string, not %s', e.element -> 'reason')
             when e.element ->> 'status' not in ('completed', 'failed', 'dropped') then
               pgpark._bad_status(e.element ->> 'status')
           end as complaint
    from jsonb_array_elements(outcomes) with ordinality as e (element, ord)
    offset 0  -- so that the complaint is looked for once and not wherever it is asked for
  ) o;
  if complaint is not null then
    perform pgpark._refuse_element(complaint, ord::int);
  end if;
end
$$;

create or replace function pgpark._outcome_keys() returns text[]
language sql immutable
as $$
  select array['task_id', 'attempt', 'status', 'result', 'reason'];
$$;

create or replace function pgpark._unknown_key(outcome jsonb) returns text
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
begin
  return format('unknown key %L; an outcome has %s',
                (select min(k) from jsonb_object_keys(outcome - pgpark._outcome_keys()) k),
                array_to_string(pgpark._outcome_keys(), ', '));
end
$$;

-- The arrays run in parallel. accepted: the places, counted from 1, of the elements that name the current attempt of a
-- running task; of several that do, the first. quiet, freed: as in _conclude.
create or replace function pgpark._finish(ids bigint[], attempts int[], statuses text[], results jsonb[], reasons text[],
                                          quiet text default null, out accepted int[], out freed bigint)
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
  ended record;
  failing bigint[];  -- may have another attempt
  failures text[];   -- why each of them failed
  retried bigint[] := array[]::bigint[];
begin
  if pgpark._sees_the_past() then
    perform pgpark._require_read_committed();
  elsif 'completed' = all (statuses) then  -- the usual case: nothing to decide, only that it is still theirs
    ended := pgpark._conclude(ids, attempts, statuses, reasons, results, quiet);
    accepted := ended.places;
    freed := ended.freed;
    return;
  end if;
  with given as (
    select g.task_id, g.attempt, min(g.ord)::int as ord
    from unnest(ids, attempts) with ordinality as g (task_id, attempt, ord)
    group by g.task_id, g.attempt
  ),
  held as (
    select t.task_id, t.state, t.run_until <= now_ as overran, g.ord
    from given g
    join task t on t.task_id = any (array[g.task_id]) and t.attempt = g.attempt
    where pgpark._runs(t.state)
    order by g.task_id  -- one order for everybody, so that two batches cannot deadlock
    for update of t
  )
  select coalesce(array_agg(h.ord), '{}'),
         array_agg(h.task_id) filter (where h.state = 'running' and statuses[h.ord] = 'failed'),
         array_agg(case when h.overran then coalesce(reasons[h.ord], 'run_timeout') else reasons[h.ord] end)
           filter (where h.state = 'running' and statuses[h.ord] = 'failed')
  into accepted, failing, failures
  from held h;

  if failing is not null then
    retried := pgpark._retry(failing, failures, now_);
  end if;

  -- An attempt that failed without saying why after its time was up was stopped for that. What was being cancelled
  -- is dropped, unless it was completed all the same: then the answer is kept.
  select (pgpark._conclude(
    array_agg(o.task_id),
    null,
    array_agg(case when o.cancelled then 'dropped' else o.status end),
    array_agg(case when o.cancelled then o.cancel_reason
                   when o.status = 'failed' and o.overran then coalesce(o.reason, 'run_timeout')
                   else o.reason end),
    array_agg(o.result),
    quiet)).freed
  into freed
  from (
    select t.task_id, t.cancel_reason, t.run_until <= now_ as overran,
           statuses[a.ord] as status, reasons[a.ord] as reason, results[a.ord] as result,
           t.state = 'cancelling' and statuses[a.ord] <> 'completed' as cancelled
    from unnest(accepted) as a (ord)
    join task t on t.task_id = any (array[ids[a.ord]])
    where t.task_id <> all (retried)
  ) o;
end
$$;
