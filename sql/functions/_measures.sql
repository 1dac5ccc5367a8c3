-- What is measured, and how it is kept: counts that never go back, and a history by minute. docs/decisions/0022.
-- Called by claims and park_maintain (folding), and by whoever reads (functions/measures.sql).
--
-- Every start, end, retry and lost lease appends a row to pgpark.tally, in the transaction that changes the task (_book_start,
-- _conclude, _retry, _reclaim). It says when, and how long its tasks waited or ran: nothing is counted or looked up for that.
-- When a pool has many such rows they are folded: into a row of totals, and one of the minute that is not over, both of the
-- same form, with waits and runs counted by bucket. What is in minutes that are over is also written to pgpark.history,
-- once. So totals are a sum over a few dozen rows, exact in any snapshot, and history is that table and the rows of the tally
-- that have a time. Nothing is updated, so nobody waits, and an old snapshot costs no more than it did (functions/_front.sql).

-- Seconds.
create or replace function pgpark._elapsed(since timestamptz, now_ timestamptz) returns real
language sql immutable
as $$
  select greatest(date_part('epoch', now_ - since), 0)::real;
$$;

-- Up to how many seconds the waits and runs of a bucket took; one more bucket has all above.
create or replace function pgpark._bounds() returns double precision[]
language sql immutable
as $$
  select '{0.005,0.01,0.025,0.05,0.1,0.25,0.5,1,2.5,5,10,30,60,120,300,600,1800,3600,7200,21600,86400}'::double precision[];
$$;

-- How many buckets there are.
create or replace function pgpark._buckets() returns int
language sql immutable
as $$
  select 22;
$$;

-- From 1. A bucket has its upper bound, and with width_bucket() it would not; a real that is rounded up from it is to be there
-- too. So less than a millionth is taken off.
create or replace function pgpark._bucket(secs real) returns int
language sql immutable
as $$
  select 1 + width_bucket(secs * 0.9999998::double precision, pgpark._bounds());
$$;

-- Minutes are those of the clock, wherever the session is.
create or replace function pgpark._minute(at timestamptz) returns timestamptz
language sql immutable
as $$
  select date_bin('1 minute', at, 'epoch');
$$;

-- What a row of the tally has observed: counts by place in tally.counts, and seconds of what was not folded yet.
create or replace function pgpark._observed(counts bigint[], waits real[], runs real[])
returns table (place int, observed bigint, secs double precision)
language sql immutable
as $$
  select c.place::int, c.observed, 0::double precision from unnest(counts) with ordinality as c (observed, place)
  union all
  select pgpark._bucket(w.secs), 1::bigint, w.secs::double precision from unnest(waits) as w (secs)
  union all
  select pgpark._buckets() + pgpark._bucket(r.secs), 1::bigint, r.secs::double precision from unnest(runs) as r (secs);
$$;

-- How many waits and runs are carried on in one row before they are counted by bucket.
create or replace function pgpark._handful() returns int
language sql immutable
as $$
  select 1000;
$$;

-- Sums up the tally rows of a pool once they are many.
create or replace function pgpark._fold_if_many(pool_id int) returns void
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  floor_ bigint := (select f.entry_floor from front f where f.pool_id = _fold_if_many.pool_id);
begin
  if (select pgpark._are_many(count(*), count(distinct y.worker)) from tally y
      where y.pool_id = _fold_if_many.pool_id and y.entry_id > floor_) then
    perform pgpark._fold_tally(_fold_if_many.pool_id);
  end if;
end
$$;

-- Sums up the tally rows of a pool. Rows that somebody else is folding are left to him.
create or replace function pgpark._fold_tally(pool_id int) returns void
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  minute_ timestamptz := pgpark._minute(pgpark._now());  -- is not over
  mine tid[];
  plain boolean;  -- nothing is to be merged
begin
  select array_agg(y.ctid),
         coalesce(sum(cardinality(y.waits)), 0) + coalesce(sum(cardinality(y.runs)), 0) <= pgpark._handful()
         and count(*) filter (where y.counts is not null and y.at is null) <= 1
         and count(*) filter (where y.counts is not null and y.at is not null) <= 1
         and coalesce(min(y.at) >= minute_, true)
  into mine, plain
  from (
    select y.ctid, y.waits, y.runs, y.counts, y.at
    from tally y
    where y.pool_id = _fold_tally.pool_id
      and y.entry_id > (select f.entry_floor from front f where f.pool_id = _fold_tally.pool_id)
    limit 10000
    for update skip locked
  ) y;
  if plain then
    with folding as (
      delete from tally y where y.ctid = any (mine) returning y.*, coalesce(pgpark._minute(y.at), '-infinity') as minute
    )
    insert into tally (pool_id, worker, units, completed, failed, expired, dropped, retried, lost, delivered, undelivered,
                       dead, at, waits, runs, counts, wait_secs, run_secs)
    select f.pool_id, null, coalesce(sum(f.units) filter (where f.worker is null), 0), sum(f.completed), sum(f.failed),
           sum(f.expired), sum(f.dropped), sum(f.retried), sum(f.lost), sum(f.delivered), sum(f.undelivered), sum(f.dead),
           case when f.minute <> '-infinity' then f.minute end,
           (select array_agg(w.secs)
            from folding g
            cross join lateral unnest(g.waits) as w (secs)
            where g.minute = f.minute and g.waits is not null),
           (select array_agg(r.secs)
            from folding g
            cross join lateral unnest(g.runs) as r (secs)
            where g.minute = f.minute and g.runs is not null),
           max(f.counts), sum(f.wait_secs), sum(f.run_secs)
    from folding f
    group by f.pool_id, f.minute
    union all
    select f.pool_id, f.worker, sum(f.units), 0, 0, 0, 0, 0, null, null, null, null, null, null, null, null, null, null
    from folding f
    where f.worker is not null
    group by f.pool_id, f.worker
    having sum(f.units) <> 0;
    return;
  end if;
  with folding as (
    delete from tally y where y.ctid = any (mine) returning y.*, coalesce(pgpark._minute(y.at), '-infinity') as minute
  ),
  counted as (
    select f.minute, sum(f.completed)::bigint as completed, sum(f.failed)::bigint as failed, sum(f.expired)::bigint as expired,
           sum(f.dropped)::bigint as dropped, sum(f.retried)::bigint as retried, sum(f.lost)::bigint as lost,
           sum(f.delivered)::bigint as delivered, sum(f.undelivered)::bigint as undelivered, sum(f.dead)::bigint as dead,
           sum(f.units) filter (where f.worker is null) as units,
           coalesce(sum(f.wait_secs), 0) as wait_secs, coalesce(sum(f.run_secs), 0) as run_secs
    from folding f
    group by f.minute
  ),
  observed as (
    select o.minute, o.place, sum(o.observed)::bigint as observed, sum(o.secs) as secs
    from (
      select f.minute, o.place, o.observed, o.secs
      from folding f
      cross join lateral pgpark._observed(f.counts, f.waits, f.runs) o
      union all
      select c.minute, p.place, 0, 0
      from counted c
      cross join generate_series(1, 2 * pgpark._buckets()) as p (place)
    ) o
    group by o.minute, o.place
  ),
  told as (
    insert into history (pool_id, minute, completed, failed, expired, dropped, retried, lost, counts, wait_secs, run_secs)
    select _fold_tally.pool_id, c.minute, c.completed, c.failed, c.expired, c.dropped, c.retried, coalesce(c.lost, 0), o.counts,
           c.wait_secs + o.wait_secs, c.run_secs + o.run_secs
    from counted c
    cross join lateral (
      select array_agg(o.observed order by o.place) as counts,
             sum(o.secs) filter (where o.place <= pgpark._buckets()) as wait_secs,
             sum(o.secs) filter (where o.place > pgpark._buckets()) as run_secs
      from observed o
      where o.minute = c.minute
    ) o
    where c.minute < minute_
      and c.minute > '-infinity'
  )
  insert into tally (pool_id, worker, units, completed, failed, expired, dropped, retried, lost, delivered, undelivered, dead,
                     at, counts, wait_secs, run_secs)
  select _fold_tally.pool_id, null, c.units, c.completed, c.failed, c.expired, c.dropped, c.retried, c.lost, c.delivered,
         c.undelivered, c.dead, case when c.minute <> '-infinity' then c.minute end, o.counts, c.wait_secs + o.wait_secs,
         c.run_secs + o.run_secs
  from (
    select case when c.minute >= minute_ then c.minute else '-infinity' end as minute, coalesce(sum(c.units), 0) as units,
           sum(c.completed) as completed, sum(c.failed) as failed, sum(c.expired) as expired, sum(c.dropped) as dropped,
           sum(c.retried) as retried, sum(c.lost) as lost, sum(c.delivered) as delivered, sum(c.undelivered) as undelivered,
           sum(c.dead) as dead, sum(c.wait_secs) as wait_secs, sum(c.run_secs) as run_secs
    from counted c
    group by 1
  ) c
  cross join lateral (
    select array_agg(o.observed order by o.place) as counts,
           sum(o.secs) filter (where o.place <= pgpark._buckets()) as wait_secs,
           sum(o.secs) filter (where o.place > pgpark._buckets()) as run_secs
    from (
      select o.place, sum(o.observed)::bigint as observed, sum(o.secs) as secs
      from observed o
      where (o.minute >= minute_ and o.minute = c.minute) or (o.minute < minute_ and c.minute = '-infinity')
      group by o.place
    ) o
  ) o
  union all
  select f.pool_id, f.worker, sum(f.units), 0, 0, 0, 0, 0, null, null, null, null, null, null, null, null
  from folding f
  where f.worker is not null
  group by f.pool_id, f.worker
  having sum(f.units) <> 0;
end
$$;

-- Whether so many tally rows, of so many workers, are worth folding: it leaves one row or two, and one for each busy worker.
create or replace function pgpark._are_many(entries bigint, workers bigint) returns boolean
language sql immutable
as $$
  select entries > 40 + 2 * workers;
$$;

-- What has become of callbacks. done: delivered, retry or dead.
create or replace function pgpark._count_callbacks(pool text, done text, callbacks bigint) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  insert into tally (pool_id, at, delivered, undelivered, dead)
  select p.pool_id, pgpark._now(), case done when 'delivered' then callbacks end, case done when 'retry' then callbacks end,
         case done when 'dead' then callbacks end
  from pool p
  where p.name = _count_callbacks.pool;
end
$$;

-- How long history is kept.
create or replace function pgpark._history_kept() returns interval
language sql immutable
as $$
  select interval '2 days';
$$;

create or replace function pgpark._forget_history(pool_id int, now_ timestamptz, bite int) returns void
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  delete from history h
  where h.ctid = any (array(
    select o.ctid
    from history o
    where o.pool_id = _forget_history.pool_id
      and o.minute < now_ - pgpark._history_kept()
    order by o.minute
    limit bite
    for update skip locked));
end
$$;

-- The value below which this share of what was counted in `buckets` buckets lies, the first at this place of counts; null of
-- nothing. Within a bucket values are taken to lie evenly; what is above the last bound, to be at it.
create or replace function pgpark._quantile(share double precision, counts bigint[], place int) returns double precision
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
declare
  bounds constant double precision[] := pgpark._bounds();
  last_ constant int := place + pgpark._buckets() - 1;
  wanted double precision := 0::double precision;
  below bigint := 0::bigint;
begin
  if counts is null then
    return null;
  end if;
  for at in place .. last_ loop
    wanted := wanted + counts[at];
  end loop;
  wanted := share * wanted;
  for at in place .. last_ loop
    if counts[at] > 0 and below + counts[at] >= wanted then
      return case when at = last_ then bounds[cardinality(bounds)]
                  else coalesce(bounds[at - place], 0)
                       + (bounds[at - place + 1] - coalesce(bounds[at - place], 0)) * (wanted - below) / counts[at] end;
    end if;
    below := below + counts[at];
  end loop;
  return null;
end
$$;
