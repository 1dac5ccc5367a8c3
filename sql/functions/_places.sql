-- Places: how max_queue_depth is exact although submitters neither wait for one another nor count.
-- Called wherever a task begins to wait or ceases to. Keeps invariant 5 (depth): docs/decisions/0001.
--
-- Escrow (O'Neil, The escrow transactional method, 1986): the free places of a pool are dealt out over rows, its
-- stripes. Who needs places takes them from stripes that nobody else holds, and holds these until it commits; who gives
-- some back adds them to any such stripe. At every commit
--   sum(free) = max_queue_depth - parked - delayed
-- Stripe 0 is a debt: a task that comes back (released, retried, lost with its worker) always gets in; where no place
-- is free it owes one, and the next to be free pays it. A pool without max_queue_depth has no rows here.
--
-- Submitters take places before they write tasks, everybody else gives and owes after. So whoever holds all rows of a
-- pool may count its waiting tasks anew: what is under way has neither been seen nor booked, or holds a row.

-- How many places a submit gets: as many as it wants while there are that many. It never waits while enough are free
-- that nobody holds; else it waits for those who hold the last ones, and who may take them or roll back.
create or replace function pgpark._take_places(pool_id int, wanted int) returns int
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  taken int := 0;
  debt int := pgpark._debt(_take_places.pool_id);
begin
  if debt > 0 then  -- pay it, and take what is left: who holds rows already does not wait for others
    perform pgpark._give_places(_take_places.pool_id, pgpark._grab_places(_take_places.pool_id, debt));
    return case when pgpark._debt(_take_places.pool_id) > 0 then 0
                else pgpark._grab_places(_take_places.pool_id, wanted) end;
  end if;
  if not exists (select from place p where p.pool_id = _take_places.pool_id and p.stripe > 0 and p.free > 0) then
    return 0;
  end if;
  begin
    taken := pgpark._grab_places(_take_places.pool_id, wanted);
    if taken < wanted then
      raise sqlstate 'PP001';  -- lets go of every row: also of those that were locked and then found empty
    end if;
    return taken;
  exception
    when sqlstate 'PP001' then
      taken := 0;
  end;
  -- One at a time waits, so that no two wait for each other: others may hold rows, but wait for nothing.
  perform pgpark._latch(_take_places.pool_id, 'depth');
  loop
    taken := taken + pgpark._grab_places(_take_places.pool_id, wanted - taken);
    exit when taken = wanted;
    perform from place p
    where p.pool_id = _take_places.pool_id
      and p.stripe > 0
      and p.free > 0
    order by p.stripe
    limit 1
    for update;
    exit when not found;
  end loop;
  return taken;
end
$$;

-- Takes up to so many places from stripes that nobody holds, without waiting, and returns how many it got. Begins at a
-- random stripe, so that submitters spread out.
create or replace function pgpark._grab_places(pool_id int, wanted int) returns int
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  from_stripe int := pgpark._random_stripe();
  grabbed int := 0;
  stripe_ record;
begin
  while grabbed < wanted loop
    select p.place_id, least(p.free, wanted - grabbed) as part into stripe_
    from place p
    where p.pool_id = _grab_places.pool_id
      and p.stripe >= from_stripe
      and p.free > 0
    order by p.stripe
    limit 1
    for update skip locked;
    if found then
      -- A statement of its own: its snapshot has the row as it was locked.
      update place p set free = p.free - stripe_.part where p.place_id = stripe_.place_id;
      grabbed := grabbed + stripe_.part;
    else
      exit when from_stripe = 1;
      from_stripe := 1;
    end if;
  end loop;
  return grabbed;
end
$$;

-- Waiting tasks of a pool with max_queue_depth are fewer by so many.
create or replace function pgpark._give_places(pool_id int, given int) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  left_ int := given;
  from_stripe int := pgpark._random_stripe();
  row_ bigint;
begin
  if pgpark._debt(_give_places.pool_id) > 0 then
    left_ := pgpark._pay_debt(_give_places.pool_id, left_);
  end if;
  while left_ > 0 loop
    select p.place_id into row_
    from place p
    where p.pool_id = _give_places.pool_id
      and p.stripe >= from_stripe
    order by p.stripe
    limit 1
    for update skip locked;
    if found then
      update place p set free = p.free + left_ where p.place_id = row_;
      exit;
    elsif from_stripe = 1 then  -- all are held: a row more, until _recount_places deals anew
      insert into place (pool_id, stripe, free)
      values (_give_places.pool_id, pgpark._random_stripe(), left_);
      exit;
    end if;
    from_stripe := 1;
  end loop;
end
$$;

-- Waiting tasks of a pool with max_queue_depth are more by so many, whether or not there is room.
create or replace function pgpark._owe_places(pool_id int, owed int) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  left_ int := owed - pgpark._grab_places(_owe_places.pool_id, owed);
  row_ bigint;
begin
  if left_ < 1 then
    return;
  end if;
  select p.place_id into row_
  from place p
  where p.pool_id = _owe_places.pool_id
    and p.stripe = 0
  limit 1
  for update skip locked;
  if found then
    update place p set free = p.free - left_ where p.place_id = row_;
  else
    insert into place (pool_id, stripe, free) values (_owe_places.pool_id, 0, -left_);
  end if;
end
$$;

create or replace function pgpark._debt(pool_id int) returns int
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return (select coalesce(-sum(p.free), 0)::int from place p where p.pool_id = _debt.pool_id and p.stripe = 0);
end
$$;

-- Pays debts with so many places, and returns what is left of them.
create or replace function pgpark._pay_debt(pool_id int, places int) returns int
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  debt record;
  left_ int := places;
begin
  for debt in
    select p.place_id, p.free
    from place p
    where p.pool_id = _pay_debt.pool_id
      and p.stripe = 0
      and p.free < 0
    for update skip locked
  loop
    exit when left_ < 1;
    update place p set free = p.free + least(left_, -debt.free) where p.place_id = debt.place_id;
    left_ := greatest(left_ + debt.free, 0);
  end loop;
  return left_;
end
$$;

-- Counts what waits and deals the free places out anew, over rows that replace those there. The caller holds the
-- entrance of the pool alone, or all its rows.
create or replace function pgpark._deal_places(lot pgpark.pool, now_ timestamptz) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  held bigint[] := array(
    select p.place_id from place p where p.pool_id = lot.pool_id order by p.place_id for update);
  stripes int := case when lot.max_queue_depth is not null then least(pgpark._stripes(), lot.max_queue_depth) end;
  free int;
begin
  -- What waits, and the rows that somebody added since, as one snapshot sees them: whoever is not in it adds to the
  -- rows below what he takes out of the lot, or owes what he brings back.
  select lot.max_queue_depth - pgpark._count_waiting(lot.pool_id) - coalesce(sum(p.free), 0)::int into free
  from place p
  where p.pool_id = lot.pool_id
    and p.place_id <> all (held);
  delete from place p where p.place_id = any (held);
  insert into place (pool_id, stripe, free, counted_at)
  select lot.pool_id, s.stripe,
         case when s.stripe = 0 then least(free, 0)
              else greatest(free, 0) / stripes + (s.stripe <= greatest(free, 0) % stripes)::int end,
         now_
  from generate_series(0, stripes) as s (stripe);  -- no row without max_queue_depth
end
$$;

-- Once a minute, while nobody holds a row: brings places that were booked wrongly back in line, and the rows back to
-- their number. Wrong they can be where a pool without a depth was given one while a task was on its way out or back,
-- or where somebody deleted tasks by hand.
create or replace function pgpark._recount_places(lot pgpark.pool, now_ timestamptz) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  held bigint;
begin
  if lot.max_queue_depth is null
     or exists (select from place p where p.pool_id = lot.pool_id and p.counted_at > now_ - interval '1 minute') then
    return;
  end if;
  select count(*) into held
  from (select from place p where p.pool_id = lot.pool_id for update skip locked) mine;
  if held = (select count(*) from place p where p.pool_id = lot.pool_id) then
    perform pgpark._deal_places(lot, now_);
  end if;
end
$$;

create or replace function pgpark._count_waiting(pool_id int) returns int
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  return pgpark._count_parked(_count_waiting.pool_id)
         + (select count(*)::int from task t where t.pool_id = _count_waiting.pool_id and t.state = 'delayed');
end
$$;

create or replace function pgpark._count_parked(pool_id int) returns int
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
  -- Not one condition for both: each has an index of its own. Nothing is below the floors.
  return (select coalesce(sum(c.parked), 0)::int
          from pgpark._floors(_count_parked.pool_id) f
          cross join unnest(array[3, 2, 1, 0]) as g (level)
          cross join lateral (
            select count(*) as parked
            from task t
            where t.pool_id = _count_parked.pool_id
              and t.state = 'parked'
              and t.lane is null
              and t.priority = g.level
              and (t.start_tag, t.task_id) >= (f.tag_floors[g.level + 1], f.task_floors[g.level + 1])
          ) c)
         + (select count(*)::int from task t
            where t.pool_id = _count_parked.pool_id and t.state = 'parked' and t.lane is not null);
end
$$;

-- Over how many rows the places of a pool are dealt out, at most: so many submitters of it do not meet.
create or replace function pgpark._stripes() returns int
language sql immutable
as $$
  select 64;
$$;

create or replace function pgpark._random_stripe() returns int
language sql volatile
as $$
  select 1 + floor(random() * pgpark._stripes())::int;
$$;
