-- What the passing of time does to a pool: deadlines expire, delayed tasks park, lapsed leases are taken back.
-- Each function does one bounded bite and passes over rows that somebody else holds, so that any number of
-- callers may run them at once. Called by park_claim, park_prune and park_maintain.
-- Keeps invariants 4 (deadline) and 6 (wake-up).

-- Returns how many waiting tasks expired.
create or replace function pgpark._expire(pool_id int, now_ timestamptz, bite int) returns int
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
  done timestamptz := (select f.expired_to from pgpark._floors(_expire.pool_id) f);
  due bigint[];
begin
  select array_agg(d.task_id) into due
  from (
    select t.task_id
    from task t
    where t.pool_id = _expire.pool_id
      and t.state in ('parked', 'delayed')
      and t.deadline > done
      and t.deadline <= now_
    order by t.deadline
    limit bite
    for update skip locked
  ) d;
  return pgpark._conclude_all(due, 'expired', 'deadline_expired');
end
$$;

-- Returns how many delayed tasks parked. In a fair pool a task that never started has its turn from now on; one that
-- comes back after a failure has its old one.
create or replace function pgpark._promote(lot pgpark.pool, now_ timestamptz, bite int) returns int
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
  done timestamptz := (select f.due_to from pgpark._floors(lot.pool_id) f);
  due bigint[];
  tags double precision[];
begin
  due := array(
    select t.task_id
    from task t
    where t.pool_id = lot.pool_id
      and t.state = 'delayed'
      and t.run_at > done
      and t.run_at <= now_
    order by t.run_at, t.task_id
    limit bite
    for update skip locked);
  if cardinality(due) = 0 then
    return 0;
  end if;
  if lot.fairness = 'tenant' then
    select pgpark._stamp(lot, array_agg(case t.attempt when 0 then coalesce(t.tenant, '') end order by d.ord),
                         array_agg(t.priority order by d.ord), array_agg(t.units order by d.ord))
    into tags
    from unnest(due) with ordinality as d (task_id, ord)
    join task t on t.task_id = any (array[d.task_id]);
  end if;
  update task t
  set state = 'parked',
      run_at = null,
      waits_since = t.run_at,
      start_tag = case lot.fairness when 'tenant' then coalesce(tags[d.ord], t.start_tag) else 0 end,
      share = case lot.fairness when 'tenant' then coalesce(t.tenant, '') end,
      lane = pgpark._lane(lot.pool_id, t.tenant)
  from unnest(due) with ordinality as d (task_id, ord)
  where t.task_id = any (array[d.task_id]);
  insert into returned (pool_id, task_id) select lot.pool_id, d.id from unnest(due) as d (id);
  perform pgpark._wake(lot.name);
  return cardinality(due);
end
$$;

-- Gives all that runs the time of a lease from now on. For who has kept its workers from sending heartbeats.
create or replace function pgpark._renew_leases() returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  update task t
  set lease_until = greatest(t.lease_until, pgpark._now() + pgpark._secs(p.lease_secs))
  from pool p
  where p.pool_id = t.pool_id
    and t.state in ('running', 'cancelling');
end
$$;

-- Takes back the tasks whose lease lapsed and returns how many those are. One that was being cancelled is dropped;
-- one that ran past its run_timeout has failed; any other was lost with its worker: it parks again in its old place,
-- until retry.max_losses workers were lost with it.
create or replace function pgpark._reclaim(lot pgpark.pool, now_ timestamptz, bite int) returns int
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
  lapsed bigint[];
begin
  if now_ < (select f.next_lapse from front f where f.pool_id = lot.pool_id) then
    return 0;
  end if;
  select array_agg(l.task_id) into lapsed
  from (
    select t.task_id
    from task t
    where t.pool_id = lot.pool_id
      and t.state in ('running', 'cancelling')
      and t.lease_until <= now_
    limit bite
    for update skip locked
  ) l;
  if lapsed is null then
    return 0;
  end if;

  insert into tally (pool_id, at, lost)
  select lot.pool_id, now_, count(*)
  from task t
  where t.task_id = any (lapsed)
    and (t.run_until <= now_) is not true
  having count(*) > 0;
  perform pgpark._fail(
    array(select t.task_id from task t
          where t.task_id = any (lapsed) and t.state <> 'cancelling' and t.run_until <= now_),
    'run_timeout', now_);

  perform pgpark._conclude(array_agg(t.task_id), null, array_agg('dropped'::text),
                           array_agg(case t.state when 'cancelling' then t.cancel_reason else 'lost worker' end), null)
  from task t
  where t.task_id = any (lapsed)
    and (t.state = 'cancelling' or (pgpark._runs(t.state) and t.losses + 1 >= lot.max_losses));

  perform pgpark._park_again(lot, lapsed, lost => 1);
  perform pgpark._wake(lot.name);
  return cardinality(lapsed);
end
$$;

-- Remembers when to look for lapsed leases again: a lease that is taken or renewed meanwhile is as long as any. Called by
-- claims alone, which hold the pool's lock.
create or replace function pgpark._note_next_lapse(lot pgpark.pool, now_ timestamptz) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  update front f
  set next_lapse = least(now_ + pgpark._secs(lot.lease_secs), (
        select min(t.lease_until)
        from task t
        where t.pool_id = lot.pool_id and t.state in ('running', 'cancelling')))
  where f.pool_id = lot.pool_id
    and f.next_lapse <= now_;
end
$$;

-- A failed attempt of each of these running tasks: a delayed retry while attempts remain, else the outcome `failed`.
-- The n-th retry waits backoff_secs * backoff_factor^(n-1), at most max_backoff_secs, of which a random quarter is
-- taken off so that tasks that failed together do not come back together.
create or replace function pgpark._fail(ids bigint[], reason text, now_ timestamptz) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  if cardinality(ids) = 0 then
    return;
  end if;
  perform pgpark._retry(ids, array_fill(reason, array[cardinality(ids)]), now_);
  perform pgpark._conclude_all(
    array(select t.task_id from task t where t.task_id = any (ids) and pgpark._runs(t.state) and t.state <> 'cancelling'),
    'failed', reason);
end
$$;

-- Puts those of these running tasks that have attempts left into their backoff, and returns their ids. reasons: why each
-- attempt failed. The caller holds the locks of their rows.
create or replace function pgpark._retry(ids bigint[], reasons text[], now_ timestamptz) returns bigint[]
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
  retried bigint[];
begin
  with again as (
    update task t
    set state = 'delayed',
        failures = t.failures + 1,
        run_at = now_ + pgpark._secs(
          least(p.max_backoff_secs, p.backoff_secs * power(p.backoff_factor, least(t.failures, 30)))
          * (1 - random() / 4)),
        worker = null,
        lease_until = null,
        run_until = null
    from pool p, (select k.task_id, k.worker from task k where k.task_id = any (ids)) held
    where t.task_id = any (array[held.task_id])
      and pgpark._runs(t.state)
      and t.state <> 'cancelling'
      and p.pool_id = t.pool_id
      and t.failures + 1 < p.max_attempts
    returning t.task_id, t.pool_id, t.units, t.attempt, t.tenant, t.priority, t.started_at, held.worker
  ),
  counted as (
    insert into tally (pool_id, worker, retried, units, at, runs)
    select a.pool_id, a.worker, count(*), -sum(a.units), now_, array_agg(pgpark._elapsed(a.started_at, now_))
    from again a
    group by a.pool_id, a.worker
  ),
  back as (
    insert into returned (pool_id, task_id) select a.pool_id, a.task_id from again a
  ),
  noted as (
    insert into audit (at, event, pool, task_id, attempt, worker, tenant, priority, units, reason)
    select now_, 'retried', p.name, a.task_id, a.attempt, a.worker, a.tenant, a.priority, a.units,
           pgpark._audit_reason(reasons[array_position(ids, a.task_id)])
    from again a
    join pool p using (pool_id)
    where p.audit
  ),
  booked as (
    select pgpark._wake(p.name), case when p.max_queue_depth is not null then pgpark._owe_places(p.pool_id, a.tasks) end
    from (select a.pool_id, count(*)::int as tasks from again a group by a.pool_id) a
    join pool p using (pool_id)
  )
  select array_agg(a.task_id) into retried
  from again a
  where (select count(*) from booked) > 0;
  return coalesce(retried, '{}');
end
$$;

-- When somebody should look at a pool again: at its next timer, and in a second while a parked task could start. The
-- latter is a net below the notifications: a claim passes over a task that is being cancelled, and nobody is told
-- when that cancel is rolled back.
create or replace function pgpark._next_due(lot pgpark.pool, now_ timestamptz) returns timestamptz
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
  next_lapse timestamptz := (select f.next_lapse from front f where f.pool_id = lot.pool_id);
  done record := pgpark._floors(lot.pool_id);
  used bigint := pgpark._used_units(lot.pool_id);
begin
  return least(
    (select min(t.deadline) from task t
     where t.pool_id = lot.pool_id and t.state in ('parked', 'delayed') and t.deadline > done.expired_to),
    (select min(t.run_at) from task t
     where t.pool_id = lot.pool_id and t.state = 'delayed' and t.run_at > done.due_to),
    case when used = 0 then null
         when next_lapse > now_ then next_lapse
         else (select min(t.lease_until) from task t
               where t.pool_id = lot.pool_id and t.state in ('running', 'cancelling')) end,
    case when pgpark._may_start(lot, now_, lot.max_units - used) then now_ + interval '1 second' end);
end
$$;
