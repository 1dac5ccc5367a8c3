-- Where the walks of a pool begin, and what is in use: why a claim costs the same however much runs, has run, or waits.
-- Called by claims, which hold the pool's lock, and by whoever only reads. Keeps invariant 1 (capacity): docs/decisions/0015.
--
-- Units in use, of all and of each worker, are a sum over pgpark.tally: what starts appends its units, what ceases to run
-- appends them with a minus, in the transaction that changes its state. So they are exact at each commit, and nobody waits
-- for anybody to count.
--
-- The index entries of tasks that started stay until vacuum takes them, for hours if some session keeps an old snapshot
-- open, and a walk from the front would step over all of them. So each pool remembers floors: nothing live is below. A
-- floor may be raised to the first live thing that is seen, but not past what somebody has yet to commit. Hence marks:
-- a mark is the last number given out, and a transaction id that is given out after it. Whoever writes tasks, tally
-- entries or entries of pgpark.returned has a transaction id before it takes a number, so once no older transaction is open
-- all numbers up to the mark are in sight. Times are given out in the same order: a deadline or a starting time is later than
-- the moment of its submit, which comes after its transaction id. Only transactions that write hold this up, not old
-- snapshots. What waits again, with an old number or an old deadline, says so in pgpark.returned, in its own transaction;
-- until a claim has lowered the floors to it, whoever else reads them takes them for naught.

-- How far a walk may come from its floor before that is raised.
create or replace function pgpark._stride() returns int
language sql immutable
as $$
  select 1000;
$$;

-- The floors of a pool, by priority, and up to when its deadlines and its delayed tasks are done.
create or replace function pgpark._floors(pool_id int, out tag_floors double precision[], out task_floors bigint[],
                                          out expired_to timestamptz, out due_to timestamptz)
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  floor_ bigint;
begin
  select f.tag_floors, f.task_floors, f.expired_to, f.due_to, f.returned_floor
  into tag_floors, task_floors, expired_to, due_to, floor_
  from front f
  where f.pool_id = _floors.pool_id;
  if exists (select from returned r where r.pool_id = _floors.pool_id and r.entry_id > floor_) then
    tag_floors := '{0,0,0,0}';
    task_floors := '{0,0,0,0}';
    expired_to := timestamptz 'epoch';
    due_to := timestamptz 'epoch';
  end if;
end
$$;

-- Units in use.
create or replace function pgpark._used_units(pool_id int) returns bigint
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  return (
    select coalesce(sum(y.units), 0)::bigint
    from tally y
    where y.pool_id = _used_units.pool_id
      and y.entry_id > (select f.entry_floor from front f where f.pool_id = _used_units.pool_id));
end
$$;

-- The same by worker, in one row or several.
create or replace function pgpark._held_units(pool_id int) returns table (worker text, units bigint)
language sql stable
as $$
  select y.worker, y.units
  from pgpark.front f
  join pgpark.tally y on y.pool_id = f.pool_id and y.entry_id > f.entry_floor
  where f.pool_id = _held_units.pool_id
    and y.worker is not null;
$$;

-- Lowers the floors to what waits again. The caller holds the pool's lock.
create or replace function pgpark._lower_floors(pool_id int) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  floor_ bigint := (select f.returned_floor from front f where f.pool_id = _lower_floors.pool_id);
begin
  if not exists (select from returned r where r.pool_id = _lower_floors.pool_id and r.entry_id > floor_) then
    return;
  end if;
  with returning_ as (
    delete from returned r where r.pool_id = _lower_floors.pool_id and r.entry_id > floor_ returning r.task_id
  ),
  due as (
    select min(t.deadline) - interval '1 microsecond' as deadline,
           min(t.run_at) - interval '1 microsecond' as run_at
    from returning_ r
    join task t using (task_id)
    where t.state in ('parked', 'delayed')
  ),
  lowest as (
    select array_agg(b.start_tag order by g.priority) as tags, array_agg(b.task_id order by g.priority) as ids
    from generate_series(0, 3) as g (priority)
    left join lateral (
      select t.start_tag, t.task_id
      from returning_ r
      join task t using (task_id)
      where t.state = 'parked'
        and t.lane is null
        and t.priority = g.priority
      order by t.start_tag, t.task_id
      limit 1
    ) b on true
  )
  update front f
  set tag_floors = n.tags,
      task_floors = n.ids,
      expired_to = least(f.expired_to, d.deadline),
      due_to = least(f.due_to, d.run_at)
  from due d, (
    select array_agg(case when w.sinks then l.tags[p] else c.tag_floors[p] end order by p) as tags,
           array_agg(case when w.sinks then l.ids[p] else c.task_floors[p] end order by p) as ids
    from lowest l, front c, generate_series(1, 4) as p,
         lateral (select coalesce((l.tags[p], l.ids[p]) < (c.tag_floors[p], c.task_floors[p]), false)) as w (sinks)
    where c.pool_id = _lower_floors.pool_id
  ) n
  where f.pool_id = _lower_floors.pool_id
    and (n.ids <> f.task_floors or d.deadline < f.expired_to or d.run_at < f.due_to);
end
$$;

-- Nothing is known any more: the order of what is parked, or when leases end, was changed. The caller holds the lock.
create or replace function pgpark._reset_front(pool_id int) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  update front f
  set next_lapse = 'epoch',
      expired_to = 'epoch',
      due_to = 'epoch',
      tag_floors = '{0,0,0,0}',
      task_floors = '{0,0,0,0}'
  where f.pool_id = _reset_front.pool_id;
end
$$;

-- Whether no transaction is open that is older than xmin, that of a mark. Transaction ids go round; one that seems to be
-- more than 2^30 ahead is an old one.
create or replace function pgpark._all_in_sight(xmin xid) returns boolean
language sql stable
as $$
  select (xmin::text::bigint - pg_snapshot_xmin(pg_current_snapshot())::text::bigint) & 4294967295
         not between 1 and 1073741824;
$$;

-- Raises the floors to what is in sight, if all up to the last mark is, and sets a new mark. The caller holds the pool's
-- lock.
create or replace function pgpark._raise_floors(lot pgpark.pool, now_ timestamptz) returns void
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  last_entry bigint := coalesce(pg_sequence_last_value('pgpark.tally_entry_id_seq'), 0);
  last_task bigint := coalesce(pg_sequence_last_value('pgpark.task_task_id_seq'), 0);
  last_returned bigint := coalesce(pg_sequence_last_value('pgpark.returned_entry_id_seq'), 0);
begin
  if not (select pgpark._all_in_sight(m.xmin) from mark m where m.pool_id = lot.pool_id) then
    return;
  end if;
  update front f
  set expired_to = greatest(f.expired_to, least(m.marked_at, (
        select t.deadline - interval '1 microsecond'
        from task t
        where t.pool_id = lot.pool_id
          and t.state in ('parked', 'delayed')
          and t.deadline is not null
          and t.deadline > f.expired_to
        order by t.deadline
        limit 1))),
      due_to = greatest(f.due_to, least(m.marked_at, (
        select t.run_at - interval '1 microsecond'
        from task t
        where t.pool_id = lot.pool_id
          and t.state = 'delayed'
          and t.run_at > f.due_to
        order by t.run_at
        limit 1))),
      entry_floor = least(m.entry_id, (
        select y.entry_id - 1
        from tally y
        where y.pool_id = lot.pool_id
          and y.entry_id > f.entry_floor
        order by y.entry_id
        limit 1)),
      returned_floor = least(m.returned_id, (
        select r.entry_id - 1
        from returned r
        where r.pool_id = lot.pool_id
          and r.entry_id > f.returned_floor
        order by r.entry_id
        limit 1)),
      -- The turns of a fair pool do not rise with the numbers of its tasks: its floors stay where they are.
      tag_floors = case lot.fairness when 'fifo' then n.tags else f.tag_floors end,
      task_floors = case lot.fairness when 'fifo' then n.ids else f.task_floors end
  from mark m, front o
  cross join lateral (
    select array_agg(0::double precision) as tags,
           array_agg(least(m.task_id + 1, (
             select t.task_id
             from task t
             where t.pool_id = lot.pool_id
               and t.state = 'parked'
               and t.lane is null
               and t.priority = g.priority
               and (t.start_tag, t.task_id) >= (o.tag_floors[g.priority + 1], o.task_floors[g.priority + 1])
             order by t.priority desc, t.start_tag, t.task_id
             limit 1)) order by g.priority) as ids
    from generate_series(0, 3) as g (priority)
  ) n
  where f.pool_id = lot.pool_id
    and m.pool_id = lot.pool_id
    and o.pool_id = lot.pool_id;
  begin  -- a subtransaction has a transaction id of its own: later than the last numbers, which were read before
    update mark m
    set entry_id = last_entry,
        task_id = last_task,
        returned_id = last_returned,
        marked_at = now_
    where m.pool_id = lot.pool_id;
  exception
    when sqlstate 'PP002' then  -- which nobody raises
      null;
  end;
end
$$;
