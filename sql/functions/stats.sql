-- Numbers for people and monitors. Reads the live tasks, the running tally and the worker table; never the mailbox,
-- so its cost does not grow with the outcomes kept.

create or replace function pgpark.park_stats(pool text default null) returns setof pgpark.pool_stats
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  now_ timestamptz := pgpark._now();
begin
  return query
  select p.name, p.state, p.max_units, live.used_units, live.running, waiting.parked, waiting.delayed,
         extract(epoch from now_ - oldest.created_at)::double precision,
         (select count(*)::int from worker w
          where w.pool_id = p.pool_id
            and w.seen_at > now_ - greatest(pgpark._secs(p.lease_secs), interval '1 minute')),
         outcomes.completed, outcomes.failed, outcomes.expired, outcomes.dropped, outcomes.retried
  from pgpark._visible_pools(park_stats.pool) p
  cross join lateral (
    select coalesce(sum(t.units), 0)::int as used_units, count(*)::int as running
    from task t
    where t.pool_id = p.pool_id
      and t.state in ('running', 'cancelling')
  ) live
  cross join lateral (
    select pgpark._count_parked(p.pool_id) as parked,
           (select count(*)::int from task t where t.pool_id = p.pool_id and t.state = 'delayed') as delayed
  ) waiting
  cross join lateral (
    -- In a pool that is not fair the oldest of each priority stands at the front of its part of the rank index (ordered
    -- as the index is, so that it is what the planner takes). Tasks with a share or a lane are all looked at.
    select least(min(f.created_at),
                 (select min(t.created_at) from task t
                  where t.pool_id = p.pool_id and t.state = 'parked' and t.share is not null),
                 (select min(t.created_at) from task t
                  where t.pool_id = p.pool_id and t.state = 'parked' and t.lane is not null)) as created_at
    from pgpark._floors(p.pool_id) n
    cross join generate_series(0, 3) as g (priority)
    cross join lateral (
      select t.created_at
      from task t
      where t.pool_id = p.pool_id
        and t.state = 'parked'
        and t.lane is null
        and t.priority between g.priority::smallint and g.priority::smallint
        and (t.start_tag, t.task_id) >= (n.tag_floors[g.priority + 1], n.task_floors[g.priority + 1])
      order by t.priority desc, t.start_tag, t.task_id
      limit 1
    ) f
  ) oldest
  cross join lateral (
    select coalesce(sum(y.completed), 0)::bigint as completed, coalesce(sum(y.failed), 0)::bigint as failed,
           coalesce(sum(y.expired), 0)::bigint as expired, coalesce(sum(y.dropped), 0)::bigint as dropped,
           coalesce(sum(y.retried), 0)::bigint as retried
    from tally y
    where y.pool_id = p.pool_id
      and y.entry_id > (select f.entry_floor from front f where f.pool_id = p.pool_id)
  ) outcomes
  order by p.name;
end
$$;

comment on function pgpark.park_stats is
'A row for a pool (null: for each). used_units and running include tasks that are being cancelled. workers: those that
claimed or sent a heartbeat within a minute, or a lease where that is longer. completed ... retried: since the pool was
made. Errors: 42704, 42501.';
