-- Claiming: the heart. Decides, exactly and for any number of workers at once, which parked tasks start now.
-- Called by workers. Keeps invariants 1 (capacity), 3 (order), 4 (deadline), 6 (wake-up).
--
-- Claims of one pool happen one after another: the pool's row is locked first, and units in use are then summed in a
-- later statement, which therefore sees every earlier claim (functions/_front.sql). Whoever frees units (finish,
-- release, cancel) needs no such lock.
--
-- A claim is a few statements, each for all its tasks: _take starts the front of the line as far as it fits. Only what
-- is past a head, or behind a task that has to end, or limited by tenant, is walked one by one, by _pick.

create or replace function pgpark.park_claim(
  pool text,
  worker text,
  max_tasks int default 1,
  max_units int default null)
returns table (task_id bigint, attempt int, payload jsonb, priority text, units int, tenant text, user_id text,
               session_id text, deadline timestamptz, created_at timestamptz)
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select * from pgpark._claim(park_claim.pool, park_claim.worker, park_claim.max_tasks, park_claim.max_units, null);
end
$$;

comment on function pgpark.park_claim is
'Starts the parked tasks of a pool that fit, in rank order, for a worker. max_tasks: at most this many now.
max_units: the whole capacity of this worker in units; what it holds already counts against it (null: only the
pool''s capacity counts). Returns the started tasks, each with a lease of the pool''s lease_secs that park_heartbeat
renews; payload is what was submitted; attempt goes into park_finish. No rows: nothing may start now.
Also does what time has made due in the pool. Errors: 22023, 42704, 25001.';

-- park_claim, and the second half of park_next: freed, units that the transaction has freed in this pool and has told
-- nobody of; null where it has not.
create or replace function pgpark._claim(pool text, worker text, max_tasks int, max_units int, freed bigint)
returns table (task_id bigint, attempt int, payload jsonb, priority text, units int, tenant text, user_id text,
               session_id text, deadline timestamptz, created_at timestamptz)
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
  lot pgpark.pool;
  now_ timestamptz;
  looked record;
  free bigint;
  slots int := coalesce(_claim.max_tasks, 1);
  taken record;
  message jsonb;
  found_ int;
  any_started boolean := false;
  reach bigint := 0::bigint;  -- above the floors
begin
  -- A call of a function costs more than the rest of a check, so each is asked for only where something is wrong.
  if pgpark._sees_the_past() then
    perform pgpark._require_read_committed();
  elsif pgpark._is_bad_worker(_claim.worker, _claim.max_units) then
    perform pgpark._check_worker(_claim.worker, _claim.max_units);
  elsif slots < 1 then
    raise exception 'max_tasks must be at least 1, not %', slots using errcode = '22023';
  end if;

  lot := pgpark._lock_pool(_claim.pool);
  loop
    now_ := pgpark._now();
    select * into looked from pgpark._look(lot, now_, _claim.worker, _claim.max_units);
    if looked.due then
      perform pgpark._expire(lot.pool_id, now_, bite => 500);
      perform pgpark._promote(lot, now_, bite => 500);
      perform pgpark._reclaim(lot, now_, bite => 500);
      perform pgpark._note_next_lapse(lot, now_);
      perform pgpark._lower_floors(lot.pool_id);
      select * into looked from pgpark._look(lot, now_, _claim.worker, _claim.max_units);
    end if;
    free := pgpark._free_units(lot, looked.used, looked.held, _claim.max_units);
    exit when free < 1 or slots < 1 or lot.state in ('paused', 'disabled');
    now_ := pgpark._now();  -- after the units were summed: what was freed for these tasks ended before they start
    select * into taken from pgpark._take(
      lot, looked.tag_floors, looked.task_floors, now_, free, slots, _claim.worker);
    exit when cardinality(taken.ids) = 0;
    any_started := true;
    reach := greatest(reach, taken.reach);
    looked.used := looked.used + taken.units;

    -- The payload is in the pool's queue. A message that somebody deleted there takes its task with it, and so does
    -- one that is another task's: a queue that lost its numbering would hand out foreign payloads.
    if cardinality(taken.ids) = 1 then
      message := pgpark._read_message(lot, taken.msg_ids[1]);
      return query
      select t.task_id, t.attempt, message -> 'payload', pgpark._priority_word(t.priority), t.units, t.tenant,
             t.user_id, t.session_id, t.deadline, t.created_at
      from task t
      where t.task_id = taken.ids[1]
        and message #>> '{metadata,task_id}' = t.task_id::text;
    else
      return query
      select t.task_id, t.attempt, r.message -> 'payload', pgpark._priority_word(t.priority), t.units, t.tenant,
             t.user_id, t.session_id, t.deadline, t.created_at
      from rows from (unnest(taken.ids), pgpark._read_messages(lot, taken.msg_ids)) with ordinality
             as r (id, message, ord)
      join task t on t.task_id = r.id
      where r.message #>> '{metadata,task_id}' = r.id::text
      order by r.ord;
    end if;
    get diagnostics found_ = row_count;
    slots := slots - found_;
    exit when found_ = cardinality(taken.ids) and not taken.more;
    if found_ < cardinality(taken.ids) then
      perform pgpark._conclude_all(
        array(select r.id
              from rows from (unnest(taken.ids), pgpark._read_messages(lot, taken.msg_ids)) as r (id, message)
              where r.message #>> '{metadata,task_id}' is distinct from r.id::text), 'dropped', 'payload lost');
    end if;
  end loop;

  -- A worker with a capacity of its own may have looked in vain because of a head that was too wide for it. That head
  -- no longer holds up those behind it, and there is no submit or finish to say so. Anybody else who looked in vain did
  -- so for want of units, and is told by who frees some; or here, if those that we have freed are what was wanting.
  if ((any_started and looked.narrow)
      or (freed > 0 and (looked.narrow or lot.limited or lot.max_bypass > 0
                         or not pgpark._may_start(lot, now_, lot.max_units - looked.used - freed))))
     and looked.used < lot.max_units and pgpark._may_start(lot, now_, lot.max_units - looked.used) then
    perform pgpark._wake(lot.name);
  end if;
  if greatest(reach, looked.reach) > pgpark._stride() then
    perform pgpark._raise_floors(lot, now_);
  end if;
  if looked.entries > 40 then
    perform pgpark._fold_tally(lot.pool_id);
  end if;
  if not looked.seen then
    perform pgpark._seen(lot.pool_id, _claim.worker, _claim.max_units, now_);
  end if;
end
$$;

create or replace function pgpark._is_bad_worker(worker text, max_units int) returns boolean
language sql immutable
as $$
  select coalesce(worker, '') = '' or octet_length(worker) > 255 or coalesce(max_units < 1, false);
$$;

create or replace function pgpark._check_worker(worker text, max_units int) returns void
language plpgsql immutable
set search_path = pgpark, pg_temp
as $$
begin
  if coalesce(_check_worker.worker, '') = '' or octet_length(_check_worker.worker) > 255 then
    raise exception 'worker must be a name of 1 to 255 bytes' using errcode = '22023';
  elsif _check_worker.max_units < 1 then
    raise exception 'max_units must be at least 1, not %', _check_worker.max_units
      using errcode = '22023', hint = 'Leave it out for a worker that is limited by the pool alone.';
  end if;
end
$$;

-- Remembers that a worker is alive; written at most every five seconds, so that claiming does not bloat the table.
create or replace function pgpark._seen(pool_id int, worker text, max_units int, now_ timestamptz) returns void
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
begin
  if exists (select from worker w
             where w.pool_id = _seen.pool_id
               and w.worker = _seen.worker
               and w.max_units is not distinct from _seen.max_units
               and w.seen_at > now_ - interval '5 seconds') then
    return;
  end if;
  insert into worker (pool_id, worker, max_units, seen_at)
  values (_seen.pool_id, _seen.worker, _seen.max_units, now_)
  on conflict on constraint worker_pkey do update
  set max_units = excluded.max_units,
      seen_at = excluded.seen_at;
end
$$;

-- What a claim must know of its pool before it takes anything; all in one statement. due: something that time has made
-- due may wait. used: units in use; held: those of this worker, if it has a limit. seen: _seen has nothing to write.
-- reach: how far the tally goes above its floor. narrow: some worker has a capacity of its own.
create or replace function pgpark._look(lot pgpark.pool, now_ timestamptz, worker text, worker_units int,
                                        out due boolean, out used bigint, out held bigint, out seen boolean,
                                        out tag_floors double precision[], out task_floors bigint[],
                                        out entries int, out reach bigint, out narrow boolean)
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
begin
  select f.next_lapse <= now_
         or exists (select from returned r where r.pool_id = lot.pool_id)
         or exists (select from task t
                    where t.pool_id = lot.pool_id and t.state in ('parked', 'delayed')
                      and t.deadline > f.expired_to and t.deadline <= now_)
         or exists (select from task t
                    where t.pool_id = lot.pool_id and t.state = 'delayed' and t.run_at <= now_),
         y.units, f.tag_floors, f.task_floors, y.entries, y.last_entry - f.entry_floor,
         exists (select from worker w
                 where w.pool_id = lot.pool_id
                   and w.worker = _look.worker
                   and w.max_units is not distinct from worker_units
                   and w.seen_at > now_ - interval '5 seconds'),
         exists (select from worker w where w.pool_id = lot.pool_id and w.max_units is not null)
  into due, used, tag_floors, task_floors, entries, reach, seen, narrow
  from front f
  cross join lateral (
    select coalesce(sum(y.units), 0)::bigint as units, count(*)::int as entries, max(y.entry_id) as last_entry
    from tally y
    where y.pool_id = lot.pool_id
      and y.entry_id > f.entry_floor
  ) y
  where f.pool_id = lot.pool_id;
  if worker_units is not null then
    held := (select coalesce(sum(t.units), 0) from task t
             where t.pool_id = lot.pool_id and t.state in ('running', 'cancelling') and t.worker = _look.worker);
  end if;
end
$$;

-- What may still be taken: the lesser of what is free in the pool and what is free on this worker.
create or replace function pgpark._free_units(lot pgpark.pool, used bigint, held bigint, worker_units int)
returns bigint
language sql immutable
as $$
  select least(lot.max_units - used, worker_units - held);  -- least() passes over a null
$$;

-- The message of a task; null if it is not there.
create or replace function pgpark._read_message(lot pgpark.pool, msg_id bigint) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  message jsonb;
begin
  execute format('select m.message from %s m where m.msg_id = $1', pgpark._messages(lot)) into message using msg_id;
  return message;
end
$$;

-- The messages of tasks, one for each number, in order; null for one that is not there.
create or replace function pgpark._read_messages(lot pgpark.pool, msg_ids bigint[]) returns setof jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  return query execute format(
    'select m.message from unnest($1) with ordinality as i (msg_id, ord) left join %s m on m.msg_id = i.msg_id '
    'order by i.ord', pgpark._messages(lot))
  using msg_ids;
end
$$;

-- Starts what is first in line and fits, and books what it takes. reach: how far above its floor it came. more: the walk
-- ended before the line.
create or replace function pgpark._take(lot pgpark.pool, tag_floors double precision[], task_floors bigint[],
                                        now_ timestamptz, free bigint, slots int, worker text,
                                        out ids bigint[], out msg_ids bigint[], out units bigint, out reach bigint,
                                        out more boolean)
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  most int := least(slots, free, pgpark._longest_walk())::int;
  first_ record;
  seen int;
  waits boolean;  -- the first that did not start: whether it waits for units alone
  picked record;
begin
  reach := 0::bigint;
  more := false;
  if lot.limited then  -- tenants have lines of their own
    ids := '{}';
    msg_ids := '{}';
    units := 0::bigint;
  elsif most = 1 then  -- the same as below, in simpler statements: here what a statement costs by itself is most of it
    ids := '{}';
    msg_ids := '{}';
    units := 0::bigint;
    select c.*, c.units <= lot.max_units and coalesce(c.deadline > now_, true) as able,
           c.task_id - task_floors[g.level + 1] as above
    into first_
    from unnest(array[3, 2, 1, 0]) as g (level)
    cross join lateral (
      select t.task_id, t.msg_id, t.units, t.deadline
      from task t
      where t.pool_id = lot.pool_id
        and t.state = 'parked'
        and t.lane is null
        and t.priority = g.level
        and (t.start_tag, t.task_id) >= (tag_floors[g.level + 1], task_floors[g.level + 1])
      order by t.priority desc, t.start_tag, t.task_id
      for update skip locked
      limit 1
    ) c
    limit 1;
    if not found then
      return;
    end if;
    waits := first_.able;
    if first_.able and first_.units <= free then
      update task t
      set state = 'running',
          attempt = t.attempt + 1,
          bypassed = 0,
          worker = _take.worker,
          started_at = now_,
          lease_until = now_ + pgpark._secs(lot.lease_secs),
          run_until = now_ + pgpark._secs(lot.run_timeout_secs)
      where t.task_id = first_.task_id;
      insert into tally (pool_id, units) values (lot.pool_id, first_.units);
      ids := array[first_.task_id];
      msg_ids := array[first_.msg_id];
      units := first_.units::bigint;
      reach := first_.above;
      if lot.fairness = 'tenant' or lot.max_queue_depth is not null then
        perform pgpark._book_start(lot, ids, 0);
      end if;
      return;
    elsif waits and lot.max_bypass = 0 then
      return;
    end if;
  else
    with line as (
      -- What cannot start at all counts as wider than any pool. Nobody behind the first that does not fit starts here.
      select l.*, sum(case when l.able then l.units::double precision else 'infinity' end)
                    over (rows unbounded preceding) as up_to,
             row_number() over () as nth
      from (
        select c.task_id, c.task_id - task_floors[g.level + 1] as above, c.units <= lot.max_units
                 and coalesce(c.deadline > now_, true) as able, c.units
        from unnest(array[3, 2, 1, 0]) as g (level)
        cross join lateral (
          select t.task_id, t.units, t.deadline
          from task t
          where t.pool_id = lot.pool_id
            and t.state = 'parked'
            and t.lane is null
            and t.priority = g.level
            and (t.start_tag, t.task_id) >= (tag_floors[g.level + 1], task_floors[g.level + 1])
          order by t.priority desc, t.start_tag, t.task_id
          for update skip locked
        ) c
        limit most
      ) l
    ),
    started as (
      update task t
      set state = 'running',
          attempt = t.attempt + 1,
          bypassed = 0,
          worker = _take.worker,
          started_at = now_,
          lease_until = now_ + pgpark._secs(lot.lease_secs),
          run_until = now_ + pgpark._secs(lot.run_timeout_secs)
      from line l
      where t.task_id = l.task_id
        and l.up_to <= free
      returning t.task_id, t.msg_id, t.units, l.nth, l.above
    ),
    booked as (
      insert into tally (pool_id, units)
      select lot.pool_id, sum(s.units) from started s having count(*) > 0
    )
    select coalesce(array_agg(s.task_id order by s.nth), '{}'), coalesce(array_agg(s.msg_id order by s.nth), '{}'),
           coalesce(sum(s.units), 0)::bigint, coalesce(max(s.above), 0), (select count(*) from line)::int,
           (select l.able from line l where l.up_to > free limit 1)
    into ids, msg_ids, units, reach, seen, waits
    from started s;
    if lot.fairness = 'tenant' or lot.max_queue_depth is not null then
      perform pgpark._book_start(lot, ids, 0);
    end if;
    more := seen = pgpark._longest_walk();
    if waits is null or (waits and lot.max_bypass = 0) then
      return;
    end if;
  end if;

  if units < free and cardinality(ids) < slots then
    select * into picked from pgpark._pick(
      lot, tag_floors, task_floors, now_, free - units, slots - cardinality(ids));
    select _take.ids || picked.ids, _take.msg_ids || s.msg_ids, _take.units + s.units
    into ids, msg_ids, units
    from pgpark._start(lot, picked.ids, picked.past_head, _take.worker, now_) s;
    more := more or picked.more;
  end if;
end
$$;

-- How many tasks one walk looks at: from the front, and behind a head. Bounds what a claim costs, whatever waits.
create or replace function pgpark._longest_walk() returns int
language sql immutable
as $$
  select 10000;
$$;

create or replace function pgpark._bypass_window() returns int
language sql immutable
as $$
  select 1000;
$$;

-- Chooses, in rank order, what starts, and locks it. The first task that does not fit is the head: past it at most
-- max_bypass tasks may start in its whole life (task.bypassed counts them), then capacity is held until it starts. The
-- last past_head of ids are those that start past it. A task that its tenant's limit keeps waiting is not in line, so
-- it is no head. One that somebody else holds this moment (a cancel that is not committed) is passed over as if it were
-- gone.
create or replace function pgpark._pick(lot pgpark.pool, tag_floors double precision[], task_floors bigint[],
                                        now_ timestamptz, free bigint, slots int,
                                        out ids bigint[], out past_head int, out more boolean)
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
  lanes pgpark.candidate[];  -- what is in line of the tenants with a limit
  candidate record;
  late bigint[] := array[]::bigint[];
  misfit bigint[] := array[]::bigint[];
  head bigint;
  passes int;       -- how many more tasks may start past the head
  looked int := 0;  -- tasks seen behind the head
begin
  ids := array[]::bigint[];
  past_head := 0;
  if lot.limited then
    lanes := array(
      select l
      from pgpark._read_lanes(
        lot, now_, slots + case when lot.max_bypass > 0 then pgpark._bypass_window() else 0 end, 0) l
      where l.in_line);
  end if;
  <<walk>>
  for level in reverse 3 .. 0 loop
    for candidate in
      select *
      from (
        (select t.task_id, t.tenant, t.priority, t.start_tag, t.units, t.bypassed, t.deadline, null::int as max_units,
                false as last_look
         from task t
         where t.pool_id = lot.pool_id
           and t.state = 'parked'
           and t.lane is null
           and t.priority = level
           and (t.start_tag, t.task_id) >= (tag_floors[level + 1], task_floors[level + 1])
         order by t.start_tag, t.task_id
         limit 10000)  -- _longest_walk(), as a constant: so the planner knows that this is a walk and not a sort
        union all
        select l.task_id, l.tenant, l.priority, l.start_tag, l.units, l.bypassed, l.deadline, l.max_units, l.last_look
        from unnest(lanes) l
        where l.priority = level
      ) line  -- merged as it is walked: both are in this order
      order by line.start_tag, line.task_id
    loop
      if head is not null then
        looked := looked + 1;
        exit walk when looked > pgpark._bypass_window();
        continue when candidate.units > free and not candidate.last_look;
      end if;
      perform from task t where t.task_id = candidate.task_id and t.state = 'parked' for update skip locked;
      if not found then
        null;
      elsif candidate.deadline <= now_ then
        late := late || candidate.task_id;
        exit walk when cardinality(late) >= 1000;  -- a bite; the rest is due too, so the next claim comes at once
      elsif candidate.units > least(lot.max_units, candidate.max_units) then
        -- Put back into a pool that was shrunk meanwhile: it would hold up the lot for ever.
        misfit := misfit || candidate.task_id;
      elsif lot.limited and candidate.max_units is null and pgpark._lane(lot.pool_id, candidate.tenant) is not null then
        -- Parked while the limit of its tenant was being set, so it stands in the wrong line: the next claim finds it.
        update task t set lane = pgpark._lane(lot.pool_id, t.tenant) where t.task_id = candidate.task_id;
        exit walk;
      elsif candidate.units <= free then
        ids := ids || candidate.task_id;
        free := free - candidate.units;
        past_head := past_head + (head is not null)::int;
      elsif head is null then
        head := candidate.task_id;
        passes := lot.max_bypass - candidate.bypassed;
      end if;
      exit walk when free < 1 or cardinality(ids) >= slots or past_head >= passes or candidate.last_look;
    end loop;
  end loop;
  if past_head > 0 then
    update task t set bypassed = t.bypassed + past_head where t.task_id = head;
  end if;
  perform pgpark._conclude_all(late, 'expired', 'deadline_expired');
  perform pgpark._conclude_all(misfit, 'dropped', 'too_large');
  more := cardinality(ids) >= pgpark._longest_walk();
end
$$;

-- Whether a parked task would start now on a worker with room enough: the first of the line, whatever its deadline, fits
-- what is free in the pool. What is too large for the pool or its tenant ends at the next claim and is passed over.
create or replace function pgpark._may_start(lot pgpark.pool, now_ timestamptz, free bigint) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  first_ pgpark.candidate;
  of_lanes pgpark.candidate;
begin
  if free < 1 or lot.state in ('paused', 'disabled') then
    return false;
  end if;
  select c.*
  into first_.task_id, first_.tenant, first_.priority, first_.start_tag, first_.units, first_.bypassed
  from pgpark._floors(lot.pool_id) f
  cross join unnest(array[3, 2, 1, 0]) as g (level)
  cross join lateral (
    select t.task_id, t.tenant, t.priority, t.start_tag, t.units, t.bypassed
    from task t
    where t.pool_id = lot.pool_id
      and t.state = 'parked'
      and t.lane is null
      and t.priority = g.level
      and t.units <= lot.max_units
      and (t.start_tag, t.task_id) >= (f.tag_floors[g.level + 1], f.task_floors[g.level + 1])
    order by t.priority desc, t.start_tag, t.task_id
    limit 1
  ) c
  limit 1;
  if lot.limited then
    select l.* into of_lanes
    from pgpark._read_lanes(lot, now_, 1, 0) l
    where l.in_line
      and l.units <= least(lot.max_units, l.max_units)
    limit 1;
    if first_.task_id is null or pgpark._ranks_before(of_lanes, first_) then
      first_ := of_lanes;
    end if;
  end if;
  return first_.task_id is not null and free >= case when first_.bypassed < lot.max_bypass then 1 else first_.units end;
end
$$;

-- Marks tasks that _pick has locked as running, and books what they take.
create or replace function pgpark._start(lot pgpark.pool, ids bigint[], past_head int, worker text, now_ timestamptz,
                                         out msg_ids bigint[], out units bigint)
language plpgsql
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
begin
  with started as (
    update task t
    set state = 'running',
        attempt = t.attempt + 1,
        bypassed = 0,
        worker = _start.worker,
        started_at = now_,
        lease_until = now_ + pgpark._secs(lot.lease_secs),
        run_until = now_ + pgpark._secs(lot.run_timeout_secs)
    from unnest(ids) with ordinality as i (task_id, ord)
    where t.task_id = i.task_id
    returning t.msg_id, t.units, i.ord
  ),
  booked as (
    insert into tally (pool_id, units)
    select lot.pool_id, sum(s.units) from started s having count(*) > 0
  )
  select coalesce(array_agg(s.msg_id order by s.ord), '{}'), coalesce(sum(s.units), 0)::bigint
  into msg_ids, units
  from started s;
  perform pgpark._book_start(lot, ids, past_head);
end
$$;

-- What else a start takes: of its tenant's share, and of the waiting places.
create or replace function pgpark._book_start(lot pgpark.pool, ids bigint[], past_head int) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
begin
  if cardinality(ids) = 0 then
    return;
  end if;
  if lot.fairness = 'tenant' then
    perform pgpark._serve(lot, ids, past_head);
  end if;
  if lot.max_queue_depth is not null then
    perform pgpark._give_places(lot.pool_id, cardinality(ids));
  end if;
end
$$;
