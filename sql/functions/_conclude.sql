-- How a task ends: one function, whatever the reason. It takes the task out of the ledger, writes its outcome,
-- archives or deletes its message, counts it and notifies, all in the caller's transaction.
-- Keeps invariants 2 (one outcome) and 8 (atomicity). Whatever ends a task comes here.

-- The arrays run in parallel; attempts and results may be null for none. Given attempts, only running tasks end, and only
-- such of them as are in that attempt; else the caller holds the row locks of the tasks. Of several elements for one
-- task the first counts; ids that are not in the ledger are passed over. quiet: a pool that the caller wakes itself.
-- places: those of what ended, from 1. freed: units that are free now in the quiet pool.
create or replace function pgpark._conclude(ids bigint[], attempts int[], statuses text[], reasons text[],
                                            results jsonb[], quiet text default null,
                                            out places int[], out freed bigint)
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
  ended record;  -- of one pool
  lot pgpark.pool;
  now_ timestamptz := pgpark._now();
begin
  places := '{}';
  freed := 0::bigint;
  if coalesce(cardinality(ids), 0) = 0 then
    return;
  elsif exists (select from pool p where p.mailbox_table <> 'mailbox_messages' or p.max_payload_kb is not null) then
    perform pgpark._lock_storages(ids);
    if results is not null then
      select c.statuses, c.reasons, c.results
      into statuses, reasons, results
      from pgpark._within_limits(ids, statuses, reasons, results) c;
    end if;
  end if;
  for ended in
    with outcome as (
      select o.*
      from unnest(ids, attempts, statuses, reasons, results)
             with ordinality as o (task_id, attempt, status, reason, result, ord)
      order by o.task_id, o.ord  -- one order for everybody, so that two batches cannot deadlock
    ),
    ended as (
      delete from task t
      using outcome o
      where t.task_id = any (array[o.task_id])  -- not "=": docs/decisions/0008
        and (attempts is null or (t.attempt = o.attempt and pgpark._runs(t.state)))
      returning t.*, o.status, o.reason, o.result, o.ord
    ),
    posted as (
      insert into mailbox (task_id, pool, tenant, user_id, session_id, status, reason, payload, priority, units,
                           attempt, worker, deadline, submitted_at, started_at, created_at, purge_at, pool_id,
                           idempotency_key, storage, emitted, msg_id)
      select e.task_id, p.name, e.tenant, e.user_id, e.session_id, e.status, e.reason, e.result, e.priority, e.units,
             e.attempt, e.worker, e.deadline, e.created_at, e.started_at, now_,
             now_ + pgpark._secs(p.mailbox_ttl_secs), e.pool_id, e.idempotency_key, p.mailbox_table,
             case when e.emitted = e.attempt then e.emitted else 0 end, e.msg_id
      from ended e
      join pool p using (pool_id)
    ),
    counted as (
      insert into tally (pool_id, worker, completed, failed, expired, dropped, units, at, runs)
      select e.pool_id, e.worker,
             count(*) filter (where e.status = 'completed'),
             count(*) filter (where e.status = 'failed'),
             count(*) filter (where e.status = 'expired'),
             count(*) filter (where e.status = 'dropped'),
             -coalesce(sum(e.units) filter (where e.state not in ('parked', 'delayed')), 0),
             now_,
             -- Nobody knows how long an attempt ran that was lost.
             array_agg(pgpark._elapsed(e.started_at, now_))
               filter (where e.state not in ('parked', 'delayed')
                         and (e.reason = 'lost worker' and e.lease_until <= now_) is not true)
      from ended e
      group by e.pool_id, e.worker
    )
    select e.pool_id, array_agg(e.msg_id) as msg_ids, array_agg(e.task_id) as task_ids,
           array_agg(e.ord::int) as places,
           array_agg(e.task_id) filter (where e.emitted not in (0, e.attempt)) as with_old_parts,
           count(*) filter (where e.state in ('parked', 'delayed'))::int as waited,
           coalesce(sum(e.units) filter (where e.state not in ('parked', 'delayed')), 0)::bigint as freed
    from ended e
    group by e.pool_id
  loop
    select p.* into lot from pool p where p.pool_id = ended.pool_id;
    perform pgpark._discard(lot, ended.msg_ids);
    if lot.max_queue_depth is not null and ended.waited > 0 then
      perform pgpark._give_places(lot.pool_id, ended.waited);
    end if;
    if ended.with_old_parts is not null then  -- of an attempt before the one that ended
      delete from part r where r.task_id = any (ended.with_old_parts);
    end if;
    if lot.audit then
      perform pgpark._audit_outcomes(ended.task_ids);
    end if;
    if lot.notifier is not null then
      perform pgpark._post_callbacks(ended.task_ids, lot.name);
    end if;
    perform pg_notify('pgpark.mailbox', id::text) from unnest(ended.task_ids) as id;
    if quiet is distinct from lot.name then
      perform pgpark._wake(lot.name);
    else
      freed := ended.freed;
    end if;
    places := places || ended.places;
  end loop;
end
$$;

-- The same outcomes, but failed and without its result wherever that is larger than the pool takes. Such an attempt is the
-- last: the next would most likely give as much.
create or replace function pgpark._within_limits(ids bigint[], inout statuses text[], inout reasons text[],
                                                 inout results jsonb[])
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  large record;
begin
  for large in
    select o.ord, pgpark._json_kb(o.result) as kb, p.max_payload_kb
    from unnest(ids, results) with ordinality as o (task_id, result, ord)
    join task t on t.task_id = any (array[o.task_id])
    join pool p using (pool_id)
    where o.result is not null
      and p.max_payload_kb is not null
      and pgpark._json_kb(o.result) > p.max_payload_kb
  loop
    if statuses[large.ord] = 'completed' or reasons[large.ord] is null then
      reasons[large.ord] := format('result too large: %s KiB, the pool takes %s (max_payload_kb)', large.kb,
                                   large.max_payload_kb);
    end if;
    if statuses[large.ord] = 'completed' then
      statuses[large.ord] := 'failed';
    end if;
    results[large.ord] := null;
  end loop;
end
$$;

-- A transaction that has used the mailbox before learns only so of a part of it that was attached since.
create or replace function pgpark._lock_storages(ids bigint[]) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  storage_ text;
begin
  for storage_ in
    select distinct p.mailbox_table
    from task t
    join pool p using (pool_id)
    where t.task_id = any (ids)
      and p.mailbox_table <> 'mailbox_messages'
  loop
    execute format('lock table pgpark.%I in row exclusive mode', storage_);
  end loop;
end
$$;

-- The same status and reason for all, whatever their state, and no results. Returns how many ended.
create or replace function pgpark._conclude_all(ids bigint[], status text, reason text) returns int
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  if coalesce(cardinality(ids), 0) = 0 then
    return 0;
  end if;
  return cardinality((pgpark._conclude(
    ids,
    null,
    array_fill(status, array[cardinality(ids)]),
    array_fill(reason, array[cardinality(ids)]),
    null)).places);
end
$$;
