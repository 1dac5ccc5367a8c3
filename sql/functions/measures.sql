-- Numbers for monitors, autoscalers and pages that draw: what a pool does now, what it has done, and what it would need.
-- Reads the live tasks as far as a bound, and what functions/_measures.sql keeps; never the mailbox. So it costs the same
-- however much has ended, and no more than so much however much is parked. All numbers of one call are of one moment.
--
-- JIT is off: before PostgreSQL 18 it compiles at each call what is seldom dear: docs/decisions/0008.

create or replace function pgpark.park_metrics(pool text default null) returns setof pgpark.metric
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set jit = off
as $$
#variable_conflict use_column
declare
  now_ timestamptz := pgpark._now();
begin
  return query
  select p.name, g.metric, g.labels, g.value
  from pgpark._visible_pools(park_metrics.pool) p
  cross join lateral (
    select * from pgpark._gauges(p, now_)
    union all
    select * from pgpark._counters(p)
  ) g;
end
$$;

comment on function pgpark.park_metrics is
'What Prometheus would read of a pool (null: of each): the name of a sample, its labels besides the pool, and its value. Names
ending in _total, _count, _sum and _bucket only grow while the pool is there, and are exact; the others say what is now. What is
parked or delayed is counted up to 100,000 tasks of each priority, demand as in park_demand. docs/operations/metrics.md says
what each means. Errors: 42704, 42501.';

create or replace function pgpark.park_demand(pool text) returns bigint
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set jit = off
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
begin
  if park_demand.pool is null then
    perform pgpark._unknown_pool(null);
  end if;
  select p.* into lot from pgpark._visible_pools(park_demand.pool) p;
  return pgpark._demand(lot);
end
$$;

comment on function pgpark.park_demand is
'How many units a pool could use at once: those in use, and those of what is parked or due; delayed tasks ask for nothing
until their time has come, and those of a tenant with a limit no more than that would let start. For autoscalers: divided by the units of a worker it is the number of workers wanted. Exact while
no more tasks are parked than four times max_units, or 10,000 where that is more, and at most 100,000; beyond, the units of so
many. Errors: 42704, 42501.';

create or replace function pgpark.park_history(
  pool text default null,
  period interval default '1 hour',
  step interval default '1 minute')
returns setof pgpark.history_step
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
set jit = off
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  secs constant double precision := date_part('epoch', park_history.step);
  width interval := pgpark._secs(secs);
  first_ timestamptz;
  last_ timestamptz := pgpark._now();
begin
  if coalesce(secs < 60 or secs::numeric % 60 <> 0 or secs > date_part('epoch', pgpark._history_kept()), true) then
    raise exception 'step must be whole minutes, up to two days, not %', coalesce(park_history.step::text, 'NULL')
      using errcode = '22023', hint = 'For example: step => ''5 minutes''';
  elsif coalesce(date_part('epoch', park_history.period) not between 1 and date_part('epoch', pgpark._history_kept()),
                 true) then
    raise exception 'period must be more than nothing, and up to two days, not %', coalesce(park_history.period::text, 'NULL')
      using errcode = '22023', hint = 'For example: period => ''6 hours''';
  end if;
  last_ := date_bin(width, last_, 'epoch');
  first_ := last_ - (ceil(date_part('epoch', park_history.period) / secs) - 1) * width;
  for lot in select p.* from pgpark._visible_pools(park_history.pool) p order by p.name loop
    return query select * from pgpark._history(lot, first_, last_, width);
  end loop;
end
$$;

comment on function pgpark.park_history is
'What a pool (null: each) did in the last period, at most two days: a row for each step (whole minutes), also where nothing
happened, the oldest first; the last step is not over. at: when it began, by the clock of the database. started: attempts;
completed ... dropped: outcomes; retried: attempts that failed and are to be followed by another; lost: leases that lapsed.
wait_*: seconds from when a task could first start (its submit; its run_at; when it parked again) to its start, by its start.
run_*: seconds from the start of an attempt to its outcome or retry, by its end. Means are exact; p50 and p95 are interpolated
within buckets whose bounds are a factor of two to four apart (up to a day). All null where there were none. Errors: 22023, 42704,
42501.';

-- The steps of one pool: so the index of history is walked for that one alone.
create or replace function pgpark._history(lot pgpark.pool, first_ timestamptz, last_ timestamptz, width interval)
returns setof pgpark.history_step
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  return query
  with told as materialized (
    select date_bin(width, h.minute, 'epoch') as at, h.completed, h.failed, h.expired, h.dropped, h.retried, h.lost,
           h.counts, null::real[] as waits, null::real[] as runs, h.wait_secs, h.run_secs
    from history h
    where h.pool_id = lot.pool_id
      and h.minute >= first_
    union all
    select date_bin(width, y.at, 'epoch'), y.completed, y.failed, y.expired, y.dropped, y.retried,
           coalesce(y.lost, 0), y.counts, y.waits, y.runs, coalesce(y.wait_secs, 0), coalesce(y.run_secs, 0)
    from tally y
    where y.pool_id = lot.pool_id
      and y.entry_id > (select f.entry_floor from front f where f.pool_id = lot.pool_id)
      and y.at >= first_
  ),
  counted as (
    select t.at, sum(t.completed)::bigint as completed, sum(t.failed)::bigint as failed,
           sum(t.expired)::bigint as expired, sum(t.dropped)::bigint as dropped, sum(t.retried)::bigint as retried,
           sum(t.lost)::bigint as lost, sum(t.wait_secs) as wait_secs, sum(t.run_secs) as run_secs,
           bool_or(t.counts is not null) as whole  -- each bucket is told of
    from told t
    group by t.at
  ),
  observed as (
    select o.at, array_agg(o.observed order by o.place) as counts,
           sum(o.observed) filter (where o.place <= pgpark._buckets()) as waits,
           sum(o.observed) filter (where o.place > pgpark._buckets()) as runs,
           sum(o.secs) filter (where o.place <= pgpark._buckets()) as wait_secs,
           sum(o.secs) filter (where o.place > pgpark._buckets()) as run_secs
    from (
      select e.at, e.place, sum(e.observed)::bigint as observed, sum(e.secs) as secs
      from (
        select t.at, o.place, o.observed, o.secs
        from told t
        cross join lateral pgpark._observed(t.counts, t.waits, t.runs) o
        union all
        select c.at, p.place, 0, 0
        from counted c
        cross join generate_series(1, 2 * pgpark._buckets()) as p (place)
        where not c.whole
      ) e
      group by e.at, e.place
    ) o
    group by o.at
  )
  select lot.name, g.at, coalesce(o.waits, 0)::bigint, coalesce(c.completed, 0), coalesce(c.failed, 0), coalesce(c.expired, 0),
         coalesce(c.dropped, 0), coalesce(c.retried, 0), coalesce(c.lost, 0),
         (c.wait_secs + o.wait_secs) / nullif(o.waits, 0)::double precision, pgpark._quantile(0.5, o.counts, 1),
         pgpark._quantile(0.95, o.counts, 1),
         (c.run_secs + o.run_secs) / nullif(o.runs, 0)::double precision,
         pgpark._quantile(0.5, o.counts, 1 + pgpark._buckets()), pgpark._quantile(0.95, o.counts, 1 + pgpark._buckets())
  from generate_series(first_, last_, width) as g (at)
  left join (counted c join observed o using (at)) on c.at = g.at
  order by g.at;
end
$$;

-- How many tasks of a kind are counted at most, for a monitor.
create or replace function pgpark._counted() returns int
language sql immutable
as $$
  select 100000;
$$;

create or replace function pgpark._demand(lot pgpark.pool) returns bigint
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  most int := least(greatest(10000, 4 * lot.max_units::bigint), pgpark._counted())::int;
  now_ timestamptz := pgpark._now();
  done timestamptz := (select f.due_to from pgpark._floors(lot.pool_id) f);
begin
  return pgpark._used_units(lot.pool_id) + pgpark._demand_of_lanes(lot, most) + (
    select coalesce(sum(c.units), 0)::bigint
    from (
      (select t.units from pgpark._in_line(lot.pool_id, array[3, 2, 1, 0], most) t limit most)
      union all
      (select t.units  -- due, but there is no worker that would park them
       from task t
       where t.pool_id = lot.pool_id
         and t.state = 'delayed'
         and t.run_at > done
         and t.run_at <= now_
       order by t.run_at
       limit most)
      limit most
    ) c);
end
$$;

-- The units that parked tasks of tenants with a limit ask for, as far as their limits would let them start.
create or replace function pgpark._demand_of_lanes(lot pgpark.pool, most int) returns bigint
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_sort = off
as $$
#variable_conflict use_column
begin
  if not lot.limited then
    return 0::bigint;
  end if;
  return (
    select coalesce(sum(c.units), 0)
    from (
      select least(sum(w.units), w.room) as units
      from (
        select r.tenant, r.room, t.units
        from pgpark._rooms(lot) r
        cross join lateral (
          select t.units from pgpark._in_lanes(lot.pool_id, array[r.tenant], array[3, 2, 1, 0], r.room) t limit r.room
        ) t
        where r.room > 0
        limit most
      ) w
      group by w.tenant, w.room
    ) c)::bigint;
end
$$;

-- Since when the task waits that could start the longest ago: of the first thousand of each priority, and of the first ten of
-- each in a lane. In a fair pool whoever waits has a task among the first.
create or replace function pgpark._longest_waiting(pool_id int) returns timestamptz
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  lanes constant text[] := array(select l from pgpark._lanes(_longest_waiting.pool_id) l);
begin
  return (
    select min(coalesce(t.waits_since, t.created_at))
    from (
      select * from pgpark._in_line(_longest_waiting.pool_id, array[3, 2, 1, 0], 1000)
      union all
      select * from pgpark._in_lanes(_longest_waiting.pool_id, lanes, array[3, 2, 1, 0], 10)
    ) t);
end
$$;

-- What is now.
create or replace function pgpark._gauges(lot pgpark.pool, now_ timestamptz)
returns table (metric text, labels jsonb, value double precision)
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  none constant jsonb := '{}'::jsonb;
  parked int[] := pgpark._parked_by_priority(lot.pool_id, pgpark._counted());
begin
  return query
  select 'pgpark_pool_state', jsonb_build_object('state', s.state), (s.state = lot.state)::int::double precision
  from unnest(array['active', 'paused', 'draining', 'disabled']) as s (state)
  union all
  select 'pgpark_parked_tasks', jsonb_build_object('priority', pgpark._priority_word((p.ord - 1)::smallint)),
         p.parked::double precision
  from unnest(parked) with ordinality as p (parked, ord)
  union all
  values
    ('pgpark_capacity_units', none, lot.max_units::double precision),
    ('pgpark_used_units', none, pgpark._used_units(lot.pool_id)::double precision),
    ('pgpark_demand_units', none, pgpark._demand(lot)::double precision),
    ('pgpark_oldest_parked_seconds', none,
     coalesce(greatest(date_part('epoch', now_ - pgpark._longest_waiting(lot.pool_id)), 0), 0)),
    ('pgpark_overdue_seconds', none,
     coalesce(greatest(date_part('epoch', now_ - pgpark._next_due(lot, now_)), 0), 0));
  return query
  select 'pgpark_running_tasks', none, count(*)::double precision
  from task t
  where t.pool_id = lot.pool_id
    and t.state in ('running', 'cancelling');
  return query
  select 'pgpark_delayed_tasks', none, count(*)::double precision
  from (
    select from task t where t.pool_id = lot.pool_id and t.state = 'delayed' limit pgpark._counted()
  ) t;
  return query
  select 'pgpark_workers', none, count(*)::double precision
  from worker w
  where w.pool_id = lot.pool_id
    and w.seen_at > now_ - greatest(pgpark._secs(lot.lease_secs), interval '1 minute');
  return query
  select 'pgpark_callbacks_due', none, count(*)::double precision
  from (
    select from pgmq.q_pgpark_outbox q
    where lot.notifier is not null  -- else there are none, and those of others need not be looked through
      and q.message ->> 'pool' = lot.name
      and q.vt <= now_
    limit pgpark._counted()
  ) q;
end
$$;

-- What has been since the pool was made.
create or replace function pgpark._counters(lot pgpark.pool)
returns table (metric text, labels jsonb, value double precision)
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
  none constant jsonb := '{}'::jsonb;
  floor_ bigint := (select f.entry_floor from front f where f.pool_id = lot.pool_id);
  sums record;
begin
  select coalesce(sum(y.completed), 0) as completed, coalesce(sum(y.failed), 0) as failed,
         coalesce(sum(y.expired), 0) as expired, coalesce(sum(y.dropped), 0) as dropped,
         coalesce(sum(y.retried), 0) as retried, coalesce(sum(y.lost), 0) as lost,
         coalesce(sum(y.delivered), 0) as delivered, coalesce(sum(y.undelivered), 0) as undelivered,
         coalesce(sum(y.dead), 0) as dead, coalesce(sum(y.wait_secs), 0) as wait_secs, coalesce(sum(y.run_secs), 0) as run_secs
  into sums
  from tally y
  where y.pool_id = lot.pool_id
    and y.entry_id > floor_;
  return query
  values
    ('pgpark_outcomes_total', '{"outcome": "completed"}'::jsonb, sums.completed::double precision),
    ('pgpark_outcomes_total', '{"outcome": "failed"}', sums.failed),
    ('pgpark_outcomes_total', '{"outcome": "expired"}', sums.expired),
    ('pgpark_outcomes_total', '{"outcome": "dropped"}', sums.dropped),
    ('pgpark_retries_total', none, sums.retried),
    ('pgpark_lost_leases_total', none, sums.lost),
    ('pgpark_callbacks_total', '{"result": "delivered"}', sums.delivered),
    ('pgpark_callbacks_total', '{"result": "retry"}', sums.undelivered),
    ('pgpark_callbacks_total', '{"result": "dead"}', sums.dead);
  return query
  with observed as (
    select e.place, sum(e.observed) as observed, sum(e.secs) as secs
    from (
      select o.place, o.observed, o.secs
      from tally y
      cross join lateral pgpark._observed(y.counts, y.waits, y.runs) o
      where y.pool_id = lot.pool_id
        and y.entry_id > floor_
      union all
      select p.place, 0, 0 from generate_series(1, 2 * pgpark._buckets()) as p (place)
    ) e
    group by e.place
  ),
  histogram as (
    select o.place > pgpark._buckets() as of_runs, 1 + (o.place - 1) % pgpark._buckets() as bucket, o.observed, o.secs
    from observed o
  ),
  named as (
    select h.*, case when h.of_runs then 'pgpark_run_seconds' else 'pgpark_wait_seconds' end as name
    from histogram h
  )
  select n.name || '_bucket', jsonb_build_object('le', coalesce((pgpark._bounds())[n.bucket]::text, '+Inf')),
         (sum(n.observed) over (partition by n.of_runs order by n.bucket))::double precision
  from named n
  union all
  select n.name || '_count', none, sum(n.observed)::double precision
  from named n
  group by n.name
  union all
  select n.name || '_sum', none, sum(n.secs) + case when n.of_runs then sums.run_secs else sums.wait_secs end
  from named n
  group by n.name, n.of_runs
  union all
  select 'pgpark_started_total', none, sum(n.observed)::double precision
  from named n
  where not n.of_runs;
end
$$;
