-- Timers: deadlines, backoffs, leases, retention. Claims do those of their own pool on the way; this is for whoever
-- waits, for pools without workers, and for pg_cron. Keeps invariant 4 (an outcome `expired` lands promptly).

create or replace function pgpark.park_prune(pool text default null) returns int
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  moved int;
  total int := 0;
begin
  perform pgpark._require_read_committed();
  for lot in select * from pgpark._pools(park_prune.pool) loop
    loop
      moved := pgpark._expire(lot.pool_id, pgpark._now(), bite => 1000);
      exit when moved = 0;
      total := total + moved;
    end loop;
  end loop;
  return total;
end
$$;

comment on function pgpark.park_prune is
'Moves the waiting tasks of a pool (null: of all) whose deadline has passed into the mailbox as expired, and returns how
many those were. Errors: 42704, 25001.';

create or replace function pgpark.park_maintain(
  pool text default null,
  out expired int,
  out reclaimed int,
  out promoted int,
  out purged int,
  out next_due timestamptz)
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  now_ timestamptz := pgpark._now();
  lost int;
begin
  perform pgpark._require_read_committed();
  expired := 0;
  reclaimed := 0;
  promoted := 0;
  purged := 0;
  for lot in select * from pgpark._pools(park_maintain.pool) loop
    lost := 0;
    -- One at a time: a second one has nothing to add but the time of the next timer.
    if pgpark._try_latch(lot.pool_id, 'maintenance') then
      lost := pgpark._recall(lot, bite => 1000);
      expired := expired + pgpark._expire(lot.pool_id, now_, bite => 1000);
      promoted := promoted + pgpark._promote(lot, now_, bite => 1000);
      reclaimed := reclaimed + pgpark._reclaim(lot, now_, bite => 1000);
      perform pgpark._fold_if_many(lot.pool_id);
      perform pgpark._forget_history(lot.pool_id, now_, bite => 1000);
      perform pgpark._forget_workers(lot.pool_id, now_);
      perform pgpark._forget_service(lot.pool_id);
      if exists (select from task t where t.pool_id = lot.pool_id and t.state = 'parked' and t.share is not null) then
        perform pgpark._straighten(lot.pool_id);
      end if;
      perform pgpark._recount_places(lot, now_);
    end if;
    next_due := least(next_due, pgpark._next_due(lot, now_));
    if lost = 1000 then
      next_due := now_;
    end if;
  end loop;
  if pgpark._try_latch(0, 'maintenance') then  -- of what belongs to no pool
    purged := pgpark._purge(now_, bite => 1000);
    perform pgpark._forget_parts(bite => 5);
    perform pgpark._keep_audit(now_);
  end if;
  next_due := least(next_due, pgpark._next_purge(now_, full_bite => purged = 1000));
end
$$;

comment on function pgpark.park_maintain is
'Does what time has made due in a pool (null: in all), at most 1000 of each kind: deadlines expire, lapsed leases are
reclaimed, delayed tasks park, outcomes older than mailbox.ttl_secs are purged; after a crash, tasks whose payloads were
kept in memory end as dropped (payload lost). Returns one row with how many of each, and next_due, when to look again:
the next deadline, lease, delayed task or purge (in the past: call again), a second from now while a parked task could
start that nobody has claimed, null for none of these. Safe to run anywhere, at once, or from pg_cron. Errors: 42704, 25001.';

-- Rows of workers that were not seen for a day and hold nothing.
create or replace function pgpark._forget_workers(pool_id int, now_ timestamptz) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  delete from worker w
  where (w.pool_id, w.worker) in (
    select g.pool_id, g.worker
    from worker g
    where g.pool_id = _forget_workers.pool_id
      and g.seen_at < now_ - interval '1 day'
      and not exists (select from task t
                      where t.pool_id = g.pool_id
                        and t.state in ('running', 'cancelling')
                        and t.worker = g.worker)
    for update skip locked);
end
$$;

-- One pool, or all for null.
create or replace function pgpark._pools(name text) returns setof pgpark.pool
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  if _pools.name is not null then
    return next pgpark._pool(_pools.name);
  else
    return query select p.* from pool p order by p.name;
  end if;
end
$$;
