-- A full lot: which of the newcomers get a place, and which parked tasks make room for them.
-- Called by submits into a pool with max_queue_depth. Keeps invariants 3 (order) and 5 (depth).

-- Places in the lot for the drafts that are not refused yet, first come, first served; the rest is refused as
-- queue_full. With overflow: drop_lowest, what is too much goes from the bottom: each time the lowest parked task ends as
-- dropped if a newcomer has a higher priority than it, else the lowest newcomer is refused. Returns the refusals.
create or replace function pgpark._find_places(lot pgpark.pool, drafts pgpark.draft[], refusals text[]) returns text[]
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  newcomers int[];            -- by their place in drafts, the lowest first
  newcomer_levels smallint[];
  wanted int;
  granted int;
  lowest bigint[];            -- what may be dropped, the lowest first
  lowest_levels smallint[];
  dropped int := 0;
  refused int := 0;
begin
  select array_agg(n.ord order by n.rank_, n.ord desc), array_agg(n.level order by n.rank_, n.ord desc)
  into newcomers, newcomer_levels
  from (
    select d.ord, pgpark._priority_level(d.priority) as level,
           case lot.overflow when 'drop_lowest' then pgpark._priority_level(d.priority) end as rank_
    from unnest(drafts) d
    where refusals[d.ord] is null
  ) n;
  wanted := cardinality(newcomers);
  granted := pgpark._take_places(lot.pool_id, wanted);
  if granted = wanted then
    return refusals;
  end if;
  if lot.overflow = 'drop_lowest' then
    select array_agg(l.task_id order by l.nth), array_agg(l.priority order by l.nth)
    into lowest, lowest_levels
    from pgpark._lock_lowest(lot.pool_id, newcomer_levels[wanted], wanted - granted) l;
  end if;
  while refused + dropped < wanted - granted loop
    if lowest_levels[dropped + 1] < newcomer_levels[refused + 1] then
      dropped := dropped + 1;
    else
      refused := refused + 1;
    end if;
  end loop;
  if dropped > 0 then
    perform pgpark._conclude_all(lowest[:dropped], 'dropped', 'overflow');
    perform pgpark._owe_places(lot.pool_id, dropped);  -- the newcomers have what these gave back
  end if;
  return array(
    select case when n.nth <= refused then 'queue_full' else r.refusal end
    from unnest(refusals) with ordinality as r (refusal, ord)
    left join unnest(newcomers) with ordinality as n (ord, nth) using (ord)
    order by r.ord);
end
$$;

-- Locks the lowest ranked parked tasks of a pool below a priority and returns them, the lowest first. One that somebody
-- else holds is passed over.
create or replace function pgpark._lock_lowest(pool_id int, below smallint, tasks int)
returns table (task_id bigint, priority smallint, nth int)
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  candidate record;
begin
  nth := 0;
  for candidate in
    select w.*
    from (
      (select t.task_id, t.priority, t.start_tag
       from task t
       where t.pool_id = _lock_lowest.pool_id and t.state = 'parked' and t.lane is null and t.priority < below
       order by t.priority, t.start_tag desc, t.task_id desc
       limit tasks + 100)  -- a few more, for those that are passed over
      union all
      select f.*
      from pgpark._lanes(_lock_lowest.pool_id) as l (tenant)
      cross join lateral (
        select t.task_id, t.priority, t.start_tag
        from task t
        where t.pool_id = _lock_lowest.pool_id and t.state = 'parked' and t.lane is not null and t.lane = l.tenant
          and t.priority < below
        order by t.priority, t.start_tag desc, t.task_id desc
        limit tasks + 100
      ) f
    ) w
    order by w.priority, w.start_tag desc, w.task_id desc
  loop
    exit when nth = tasks;
    perform from task t where t.task_id = candidate.task_id and t.state = 'parked' for update skip locked;
    continue when not found;
    task_id := candidate.task_id;
    priority := candidate.priority;
    nth := nth + 1;
    return next;
  end loop;
end
$$;
