-- Claiming: the heart. Decides, exactly and for any number of workers at once, which parked tasks start now.
-- Called by workers. Keeps invariants 1 (capacity), 3 (order), 4 (deadline), 6 (wake-up).
--
-- Claims of one pool happen one after another: the pool's row is locked first, and units in use are then summed
-- over the running tasks in a later statement, which therefore sees every earlier claim. Nothing is counted in
-- advance, so nothing can drift. Whoever frees units (finish, release, cancel) needs no such lock.

create or replace function pgpark.park_claim(
  pool text,
  worker text,
  max_tasks int default 1,
  max_units int default null)
returns table (task_id bigint, attempt int, payload jsonb, priority text, units int, tenant text, user_id text,
               session_id text, deadline timestamptz, created_at timestamptz)
language plpgsql
set search_path = pgpark, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
  lot pgpark.pool;
  now_ timestamptz;
  free bigint;
  slots int := coalesce(park_claim.max_tasks, 1);
  picked record;
  started bigint[];
  found_ bigint[];
  any_started boolean := false;
begin
  perform pgpark._require_read_committed();
  perform pgpark._check_worker(park_claim.worker, park_claim.max_units);
  if slots < 1 then
    raise exception 'max_tasks must be at least 1, not %', slots using errcode = '22023';
  end if;

  lot := pgpark._lock_pool(park_claim.pool);
  now_ := pgpark._now();
  perform pgpark._expire(lot.pool_id, now_, bite => 500);
  perform pgpark._promote(lot, now_, bite => 500);
  perform pgpark._reclaim(lot, now_, bite => 500);

  while lot.state in ('active', 'draining') loop
    free := pgpark._free_units(lot, park_claim.worker, park_claim.max_units);
    exit when free < 1 or slots < 1;
    now_ := pgpark._now();  -- after the units were summed: what was freed for these tasks ended before they start
    select * into picked from pgpark._pick(lot, now_, free, slots);
    started := picked.ids;
    perform pgpark._start(lot, picked.ids, picked.past_head, park_claim.worker, now_);
    exit when cardinality(started) = 0;
    any_started := true;

    -- The payload is in the pool's queue. A message that somebody deleted there takes its task with it, and so does
    -- one that is another task's: a queue that lost its numbering would hand out foreign payloads.
    found_ := array[]::bigint[];
    for task_id, attempt, payload, priority, units, tenant, user_id, session_id, deadline, created_at in
      execute format(
        'select t.task_id, t.attempt, m.message -> ''payload'', pgpark._priority_word(t.priority), t.units, t.tenant, '
        't.user_id, t.session_id, t.deadline, t.created_at '
        'from pgpark.task t join %s m using (msg_id) where t.task_id = any ($1) '
        'and m.message #>> ''{metadata,task_id}'' = t.task_id::text '
        'order by t.priority desc, t.start_tag, t.task_id', pgpark._messages(lot))
      using started
    loop
      found_ := found_ || park_claim.task_id;
      return next;
    end loop;
    slots := slots - cardinality(found_);
    perform pgpark._conclude_all(
      array(select s.id from unnest(started) as s (id) where s.id <> all (found_)), 'dropped', 'payload lost');
    exit when cardinality(found_) = cardinality(started) and cardinality(started) < pgpark._longest_walk();
  end loop;

  -- A head that started no longer holds up those behind it, and a worker that looked in vain meanwhile must look
  -- again: there is no submit or finish to tell it.
  if any_started and pgpark._may_start(lot, now_) then
    perform pgpark._wake(lot.name);
  end if;
  perform pgpark._seen(lot.pool_id, park_claim.worker, park_claim.max_units, now_);
end
$$;

comment on function pgpark.park_claim is
'Starts the parked tasks of a pool that fit, in rank order, for a worker. max_tasks: at most this many now.
max_units: the whole capacity of this worker in units; what it holds already counts against it (null: only the
pool''s capacity counts). Returns the started tasks, each with a lease of the pool''s lease_secs that park_heartbeat
renews; payload is what was submitted; attempt goes into park_finish. No rows: nothing may start now.
Also does what time has made due in the pool. Errors: 22023, 42704, 25001.';

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

-- What may still be taken: the lesser of what is free in the pool and what is free on this worker.
create or replace function pgpark._free_units(lot pgpark.pool, worker text, worker_units int) returns bigint
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
  used bigint;
  held bigint;
begin
  select coalesce(sum(t.units), 0),
         coalesce(sum(t.units) filter (where t.worker = _free_units.worker), 0)
  into used, held
  from task t
  where t.pool_id = lot.pool_id
    and t.state in ('running', 'cancelling');
  return least(lot.max_units - used, worker_units - held);  -- least() passes over a null
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
create or replace function pgpark._pick(lot pgpark.pool, now_ timestamptz, free bigint, slots int,
                                        out ids bigint[], out past_head int)
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
  if exists (select from task t where t.pool_id = lot.pool_id and t.state = 'parked' and t.lane is not null) then
    lanes := array(
      select l
      from pgpark._read_lanes(
        lot, now_, slots + case when lot.max_bypass > 0 then pgpark._bypass_window() else 0 end, 0) l
      where l.in_line);
  end if;
  for candidate in
    select *
    from (
      (select t.task_id, t.tenant, t.priority, t.start_tag, t.units, t.bypassed, t.deadline, null::int as max_units,
              false as last_look
       from task t
       where t.pool_id = lot.pool_id
         and t.state = 'parked'
         and t.lane is null
       order by t.priority desc, t.start_tag, t.task_id
       limit 10000)  -- _longest_walk(), as a constant: so the planner knows that this is a walk and not a sort
      union all
      select l.task_id, l.tenant, l.priority, l.start_tag, l.units, l.bypassed, l.deadline, l.max_units, l.last_look
      from unnest(lanes) l
    ) line  -- merged as it is walked: both are in this order
    order by line.priority desc, line.start_tag, line.task_id
  loop
    if head is not null then
      looked := looked + 1;
      exit when looked > pgpark._bypass_window();
      continue when candidate.units > free and not candidate.last_look;
    end if;
    perform from task t where t.task_id = candidate.task_id and t.state = 'parked' for update skip locked;
    if not found then
      null;
    elsif candidate.deadline <= now_ then
      late := late || candidate.task_id;
      exit when cardinality(late) >= 1000;  -- a bite; the rest is due too, so the next claim comes at once
    elsif candidate.units > least(lot.max_units, candidate.max_units) then
      -- Put back into a pool that was shrunk meanwhile: it would hold up the lot for ever.
      misfit := misfit || candidate.task_id;
    elsif lot.limited and candidate.max_units is null and pgpark._lane(lot.pool_id, candidate.tenant) is not null then
      -- Parked while the limit of its tenant was being set, so it stands in the wrong line: the next claim finds it.
      update task t set lane = pgpark._lane(lot.pool_id, t.tenant) where t.task_id = candidate.task_id;
      exit;
    elsif candidate.units <= free then
      ids := ids || candidate.task_id;
      free := free - candidate.units;
      past_head := past_head + (head is not null)::int;
    elsif head is null then
      head := candidate.task_id;
      passes := lot.max_bypass - candidate.bypassed;
    end if;
    exit when free < 1 or cardinality(ids) >= slots or past_head >= passes or candidate.last_look;
  end loop;
  if past_head > 0 then
    update task t set bypassed = t.bypassed + past_head where t.task_id = head;
  end if;
  perform pgpark._conclude_all(late, 'expired', 'deadline_expired');
  perform pgpark._conclude_all(misfit, 'dropped', 'too_large');
end
$$;

-- Whether a parked task would start now on a worker with room enough: the first of the line, whatever its deadline, fits
-- what is free in the pool. What is too large for the pool or its tenant ends at the next claim and is passed over.
create or replace function pgpark._may_start(lot pgpark.pool, now_ timestamptz) returns boolean
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
  if lot.state in ('paused', 'disabled') then
    return false;
  end if;
  select t.task_id, t.tenant, t.priority, t.start_tag, t.units, t.bypassed
  into first_.task_id, first_.tenant, first_.priority, first_.start_tag, first_.units, first_.bypassed
  from task t
  where t.pool_id = lot.pool_id
    and t.state = 'parked'
    and t.lane is null
    and t.units <= lot.max_units
  order by t.priority desc, t.start_tag, t.task_id
  limit 1;
  if exists (select from task t where t.pool_id = lot.pool_id and t.state = 'parked' and t.lane is not null) then
    select l.* into of_lanes
    from pgpark._read_lanes(lot, now_, 1, 0) l
    where l.in_line
      and l.units <= least(lot.max_units, l.max_units)
    limit 1;
    if first_.task_id is null or pgpark._ranks_before(of_lanes, first_) then
      first_ := of_lanes;
    end if;
  end if;
  return first_.task_id is not null
         and pgpark._free_units(lot, null, null)
             >= case when first_.bypassed < lot.max_bypass then 1 else first_.units end;
end
$$;

-- Marks tasks that _pick has locked as running, and books what they take: of their tenants' shares, and of the lot.
create or replace function pgpark._start(lot pgpark.pool, ids bigint[], past_head int, worker text, now_ timestamptz)
returns void
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
  if cardinality(ids) = 0 then
    return;
  end if;
  update task t
  set state = 'running',
      attempt = t.attempt + 1,
      bypassed = 0,
      worker = _start.worker,
      started_at = now_,
      lease_until = now_ + pgpark._secs(lot.lease_secs),
      run_until = now_ + pgpark._secs(lot.run_timeout_secs)
  where t.task_id = any (ids);
  if lot.fairness = 'tenant' then
    perform pgpark._serve(lot, ids, past_head);
  end if;
  if lot.max_queue_depth is not null then
    perform pgpark._give_places(lot.pool_id, cardinality(ids));
  end if;
end
$$;
