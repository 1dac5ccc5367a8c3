-- How a claim chooses where not all of the front fits: past a head, behind tasks that have to end, and of tenants with a
-- limit, one by one. Called by claims, which hold the pool's lock. Keeps invariants 3 (order) and 4 (deadline).

create or replace function pgpark._bypass_window() returns int
language sql immutable
as $$
  select 1000;
$$;

-- Chooses, in rank order, what starts, and locks it: ids, their messages, what they take and how long they waited. The first
-- task that does not fit is the head: past it at most max_bypass tasks may start in its whole life (task.bypassed counts
-- them), then capacity is held until it starts. The last past_head of ids are those that start past it. A task that its
-- tenant's limit keeps waiting is not in line, so it is no head. One that somebody else holds this moment (a cancel that is not
-- committed) is passed over as if it were gone. more: the walk ended before the line. look_behind: never, as in _front_of_line.
create or replace function pgpark._pick(lot pgpark.pool, tag_floors double precision[], task_floors bigint[],
                                        now_ timestamptz, free bigint, slots int,
                                        out ids bigint[], out msg_ids bigint[], out units bigint, out waited real[],
                                        out past_head int, out more boolean, out look_behind boolean)
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
  msg_id bigint;
  since timestamptz;
  late bigint[] := array[]::bigint[];
  misfit bigint[] := array[]::bigint[];
  head bigint;
  passes int;       -- how many more tasks may start past the head
  looked int := 0;  -- tasks seen behind the head
begin
  ids := '{}';
  msg_ids := '{}';
  units := 0::bigint;
  waited := '{}';
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
      select t.msg_id, coalesce(t.waits_since, t.created_at) into msg_id, since
      from task t
      where t.task_id = candidate.task_id
        and t.state = 'parked'
      for update skip locked;
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
        msg_ids := msg_ids || msg_id;
        units := units + candidate.units;
        waited := waited || pgpark._elapsed(since, now_);
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
  look_behind := false;
  more := cardinality(ids) >= pgpark._longest_walk();
end
$$;
