-- Claiming: the heart. Decides, exactly and for any number of workers at once, which parked tasks start now.
-- Called by workers. Keeps invariants 1 (capacity), 3 (order), 4 (deadline), 6 (wake-up).
--
-- Claims of one pool happen one after another: the pool's row is locked first, and units in use are then summed in a
-- later statement, which therefore sees every earlier claim (functions/_front.sql). Whoever frees units (finish,
-- release, cancel) needs no such lock.
--
-- A claim is a few statements, each for all its tasks: it starts the front of the line as far as it fits
-- (functions/_front_of_line.sql). Only what is past a head, or behind a task that has to end, or limited by tenant, is
-- walked one by one (functions/_pick.sql).

create or replace function pgpark.park_claim(
  pool text,
  worker text,
  max_tasks int default 1,
  max_units int default null)
returns table (task_id bigint, attempt int, payload jsonb, priority text, units int, tenant text, user_id text,
               session_id text, deadline timestamptz, created_at timestamptz)
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  if pgpark._is_stranger() then
    perform pgpark._require_pool('worker', park_claim.pool, 'claim from');
  end if;
  return query
  select * from pgpark._claim(park_claim.pool, park_claim.worker, park_claim.max_tasks, park_claim.max_units, null);
end
$$;

comment on function pgpark.park_claim is
'Starts the parked tasks of a pool that fit, in rank order, for a worker. max_tasks: at most this many now.
max_units: the whole capacity of this worker in units; what it holds already counts against it (null: only the
pool''s capacity counts). Returns the started tasks, each with a lease of the pool''s lease_secs that park_heartbeat
renews; payload is what was submitted; attempt goes into park_finish. No rows: nothing may start now.
Also does what time has made due in the pool. Errors: 22023, 42704, 25001, 42501.';

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
  free_before bigint;  -- what was free before the transaction freed some
  slots int := coalesce(_claim.max_tasks, 1);
  behind boolean := false;  -- the front has been taken, as far as it fits
  chosen record;
  found_ int;
  any_started boolean := false;
  first_units int;  -- of the first task that started from the front of the line
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
  slots := least(slots, lot.max_units);  -- each task holds a unit or more
  loop
    now_ := pgpark._now();
    looked := pgpark._look(lot, now_, _claim.worker, _claim.max_units);
    if looked.due and not behind then
      perform pgpark._expire(lot.pool_id, now_, bite => 500);
      perform pgpark._promote(lot, now_, bite => 500);
      perform pgpark._reclaim(lot, now_, bite => 500);
      perform pgpark._note_next_lapse(lot, now_);
      perform pgpark._lower_floors(lot.pool_id);
      looked := pgpark._look(lot, now_, _claim.worker, _claim.max_units);
    end if;
    free := pgpark._free_units(lot, looked.used, looked.held, _claim.max_units);
    free_before := coalesce(free_before, lot.max_units - looked.used - freed);
    exit when free < 1 or slots < 1 or lot.state in ('paused', 'disabled');
    now_ := pgpark._now();  -- after the units were summed: what was freed for these tasks ended before they start
    if behind or lot.limited then  -- tenants with limits have lines of their own
      chosen := pgpark._pick(lot, looked.tag_floors, looked.task_floors, now_, free, slots);
    else
      chosen := pgpark._front_of_line(lot, looked.tag_floors, looked.task_floors, now_, free, slots);
      behind := chosen.look_behind;
      first_units := coalesce(first_units, chosen.first_units);
      reach := greatest(reach, chosen.reach);
    end if;
    exit when cardinality(chosen.ids) = 0 and not chosen.look_behind;

    -- The payload is in the pool's queue. A message that somebody deleted there takes its task with it, and so does
    -- one that is another task's: a queue that lost its numbering would hand out foreign payloads.
    return query
    update task t
    set state = 'running',
        attempt = t.attempt + 1,
        bypassed = 0,
        worker = _claim.worker,
        started_at = now_,
        lease_until = now_ + pgpark._secs(lot.lease_secs),
        run_until = now_ + pgpark._secs(lot.run_timeout_secs)
    from rows from (unnest(chosen.ids), pgpark._read_messages(lot, chosen.msg_ids)) as c (task_id, message)
    cross join lateral (  -- so the order is that of ids, whatever the planner thinks
      select k.ctid from task k where k.task_id = c.task_id offset 0
    ) k
    where t.ctid = k.ctid
      and c.message #>> '{metadata,task_id}' = c.task_id::text
    returning t.task_id, t.attempt, c.message -> 'payload', pgpark._priority_word(t.priority), t.units, t.tenant,
              t.user_id, t.session_id, t.deadline, t.created_at;
    get diagnostics found_ = row_count;
    if found_ < cardinality(chosen.ids) then
      perform pgpark._conclude_all(
        array(select t.task_id from task t where t.task_id = any (chosen.ids) and t.state = 'parked'),
        'dropped', 'payload lost');
      chosen.more := true;
      select coalesce(array_agg(t.task_id order by c.ord), '{}'), coalesce(sum(t.units), 0),
             array_agg(pgpark._elapsed(coalesce(t.waits_since, t.created_at), now_))
      into chosen.ids, chosen.units, chosen.waited
      from unnest(chosen.ids) with ordinality as c (task_id, ord)
      join task t on t.task_id = any (array[c.task_id]);
    end if;
    if found_ > 0 then
      perform pgpark._book_start(lot, _claim.worker, chosen.ids, chosen.units, chosen.waited, chosen.past_head,
                                 now_);
      any_started := true;
      looked.used := looked.used + chosen.units;
      slots := slots - found_;
    end if;
    exit when not chosen.more and not chosen.look_behind;
  end loop;

  -- A worker with a capacity of its own may have looked in vain because of a head that was too wide for it. That head
  -- no longer holds up those behind it, and there is no submit or finish to say so. Anybody else who looked in vain did
  -- so for want of units, and is told by who frees some; or here, if those that we have freed are what was wanting.
  if looked.used < lot.max_units
     and (case
            when looked.narrow then any_started or freed > 0
            when coalesce(freed, 0) = 0 then false
            when lot.limited or lot.max_bypass > 0 then true
            else coalesce(first_units > free_before, true)
          end)
     and pgpark._may_start(lot, now_, lot.max_units - looked.used) then
    perform pgpark._wake(lot.name);
  end if;
  if greatest(reach, looked.reach) > pgpark._stride() then
    perform pgpark._raise_floors(lot, now_);
  end if;
  if pgpark._are_many(looked.entries, looked.workers) then
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
                                        out entries int, out workers int, out reach bigint,
                                        out narrow boolean)
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
         or exists (select from returned r where r.pool_id = lot.pool_id and r.entry_id > f.returned_floor)
         or exists (select from task t
                    where t.pool_id = lot.pool_id and t.state in ('parked', 'delayed')
                      and t.deadline > f.expired_to and t.deadline <= now_)
         or exists (select from task t
                    where t.pool_id = lot.pool_id and t.state = 'delayed'
                      and t.run_at > f.due_to and t.run_at <= now_),
         y.units, case when worker_units is not null then y.held end, f.tag_floors, f.task_floors, y.entries, y.workers,
         y.last_entry - f.entry_floor,
         exists (select from worker w
                 where w.pool_id = lot.pool_id
                   and w.worker = _look.worker
                   and w.max_units is not distinct from worker_units
                   and w.seen_at > now_ - interval '5 seconds'),
         exists (select from worker w where w.pool_id = lot.pool_id and w.max_units is not null)
  into due, used, held, tag_floors, task_floors, entries, workers, reach, seen, narrow
  from front f
  cross join lateral (
    select coalesce(sum(y.units), 0)::bigint as units,
           coalesce(sum(y.units) filter (where y.worker = _look.worker), 0)::bigint as held,
           count(*)::int as entries, count(distinct y.worker)::int as workers, max(y.entry_id) as last_entry
    from tally y
    where y.pool_id = lot.pool_id
      and y.entry_id > f.entry_floor
  ) y
  where f.pool_id = lot.pool_id;
end
$$;

-- What may still be taken: the lesser of what is free in the pool and what is free on this worker.
create or replace function pgpark._free_units(lot pgpark.pool, used bigint, held bigint, worker_units int)
returns bigint
language sql immutable
as $$
  select least(lot.max_units - used, worker_units - held);  -- least() passes over a null
$$;

-- The messages of tasks, one for each number, in order; null for one that is not there, or no row at the end.
create or replace function pgpark._read_messages(lot pgpark.pool, msg_ids bigint[]) returns setof jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  if cardinality(msg_ids) = 1 then  -- what is read is planned each time, which then is most of it
    return query execute format('select m.message from %s m where m.msg_id = $1', pgpark._messages(lot))
    using msg_ids[1];
  else
    return query execute format(
      'select m.message from unnest($1) with ordinality as i (msg_id, ord) '
      'left join %s m on m.msg_id = any (array[i.msg_id]) order by i.ord', pgpark._messages(lot))
    using msg_ids;
  end if;
end
$$;

