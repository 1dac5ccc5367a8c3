-- Tenants: whose turn it is in a fair pool, and how much of a pool one of them may hold.
-- Called when tasks park and start. Keeps invariant 3 (order) for pools with fairness: tenant.
--
-- Fair share is start-time fair queueing (Goyal, Vin, Cheng, Start-Time Fair Queuing, 1996): when a task parks it is
-- stamped with the virtual time at which its tenant's turn comes, and rank within a priority is by that stamp. So the
-- line stays one index walk, and nothing is updated by everyone. Each priority of a pool has a virtual time of its own.
--
-- A tenant with max_units waits in a lane of its own (task.lane). Of each lane a claim reads only what the tenant's limit
-- lets start: it costs the same however much waits behind that. Everybody else's tasks are in the rank index.
--
-- '' stands for tasks without a tenant. docs/decisions/0009 and 0010.

-- The lane of a tenant's tasks: its name if it has a limit, else null.
create or replace function pgpark._lane(pool_id int, tenant text) returns text
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return (select n.tenant from tenant n
          where n.pool_id = _lane.pool_id
            and n.tenant = coalesce(_lane.tenant, '')
            and n.max_units is not null);
end
$$;

-- The order of starting.
create or replace function pgpark._ranks_before(one pgpark.candidate, other pgpark.candidate) returns boolean
language sql immutable
as $$
  select (-one.priority, one.start_tag, one.task_id) < (-other.priority, other.start_tag, other.task_id);
$$;

-- Puts running tasks back in their old place, after a lease that lapsed (lost = 1) or a release (lost = 0). The caller holds
-- the locks of their rows.
create or replace function pgpark._park_again(lot pgpark.pool, ids bigint[], lost int) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  parked int;
begin
  with again as (
    update task t
    set state = 'parked',
        losses = t.losses + lost,
        worker = null,
        lease_until = null,
        run_until = null,
        waits_since = pgpark._now(),
        start_tag = case lot.fairness when 'tenant' then t.start_tag else 0 end,
        share = case lot.fairness when 'tenant' then coalesce(t.tenant, '') end,
        lane = pgpark._lane(lot.pool_id, t.tenant)
    from (select k.task_id, k.worker from task k where k.task_id = any (ids)) held  -- which the caller has locked
    where t.task_id = any (array[held.task_id])
      and pgpark._runs(t.state)
      and t.state <> 'cancelling'
    returning t.task_id, t.units, t.attempt, t.tenant, t.priority, held.worker
  ),
  freed as (
    insert into tally (pool_id, worker, units)
    select lot.pool_id, a.worker, -sum(a.units) from again a group by a.worker
  ),
  back as (
    insert into returned (pool_id, task_id) select lot.pool_id, a.task_id from again a
  ),
  noted as (
    insert into audit (at, event, pool, task_id, attempt, worker, tenant, priority, units)
    select pgpark._now(), case lost when 1 then 'lost' else 'released' end, lot.name, a.task_id, a.attempt, a.worker,
           a.tenant, a.priority, a.units
    from again a
    where lot.audit
  )
  select count(*)::int into parked from again;
  if lot.max_queue_depth is not null and parked > 0 then
    perform pgpark._owe_places(lot.pool_id, parked);
  end if;
end
$$;

-- The start tags of tasks that park now, in this order; the arrays run in parallel. null for a null tenant ('' stands
-- for none), whose task is passed over. Submitters hold the tenants' locks, so that tasks of one tenant are stamped one
-- after another.
create or replace function pgpark._stamp(lot pgpark.pool, tenants text[], levels smallint[], units int[])
returns double precision[]
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return array(
    with class as materialized (
      select c.level, pgpark._virtual_time(lot.pool_id, c.level) as now_
      from (select distinct a.level from unnest(tenants, levels) as a (tenant, level) where a.tenant is not null) c
    ),
    parking as (
      select a.*, a.units / pgpark._weight(lot.pool_id, a.tenant) as cost,
             case when row_number() over (partition by a.tenant, a.level order by a.ord) = 1
                  then greatest(c.now_, pgpark._last_turn(lot.pool_id, a.tenant, a.level)) end as turn
      from unnest(tenants, levels, units) with ordinality as a (tenant, level, units, ord)
      left join class c on c.level = a.level and a.tenant is not null
    )
    select first_value(p.turn) over own
           + coalesce(sum(p.cost) over (own rows between unbounded preceding and 1 preceding), 0)
    from parking p
    window own as (partition by p.tenant, p.level order by p.ord)
    order by p.ord);
end
$$;

create or replace function pgpark._weight(pool_id int, tenant text) returns double precision
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return coalesce((select n.weight from tenant n where n.pool_id = _weight.pool_id and n.tenant = _weight.tenant), 1);
end
$$;

-- How far a priority of a pool has been served: the tag of the first parked task (not of one in a lane: it may have
-- been passed over for long), at least the greatest that started in order. An idle priority forgets what was used
-- before: then it is the greatest finish tag.
create or replace function pgpark._virtual_time(pool_id int, level smallint) returns double precision
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
  first_ double precision := (
    select t.start_tag
    from task t
    where t.pool_id = _virtual_time.pool_id
      and t.state = 'parked'
      and t.lane is null
      and t.priority = level
    order by t.priority desc, t.start_tag, t.task_id
    limit 1);
begin
  if first_ is not null
     or exists (select from task t
                where t.pool_id = _virtual_time.pool_id and t.state = 'parked' and t.lane is not null)
     or exists (select from task t
                where t.pool_id = _virtual_time.pool_id
                  and t.state in ('running', 'cancelling')
                  and t.priority = level) then
    return greatest(first_, 0, (select max(s.started_tag) from tenant_service s
                                where s.pool_id = _virtual_time.pool_id and s.priority = level));
  end if;
  return coalesce((select max(s.finish_tag) from tenant_service s
                   where s.pool_id = _virtual_time.pool_id and s.priority = level), 0);
end
$$;

-- When a tenant's turn comes at the earliest: after what it has parked and what it was served.
create or replace function pgpark._last_turn(pool_id int, tenant text, level smallint) returns double precision
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
begin
  return greatest(
    (select s.finish_tag from tenant_service s
     where s.pool_id = _last_turn.pool_id and s.tenant = _last_turn.tenant and s.priority = level),
    (select t.start_tag + t.units / pgpark._weight(_last_turn.pool_id, _last_turn.tenant)
     from task t
     where t.pool_id = _last_turn.pool_id
       and t.state = 'parked'
       and t.share = _last_turn.tenant
       and t.priority = level
     order by t.start_tag desc, t.task_id desc
     limit 1));
end
$$;

-- Submitters of one tenant into a fair pool take turns from stamping until they commit.
create or replace function pgpark._lock_tenants(pool_id int, tenants text[]) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
declare
  name text collate "C";
begin
  -- One order for everybody, so that two batches cannot deadlock.
  for name in select distinct 'tenant ' || n.tenant collate "C" from unnest(tenants) as n (tenant) order by 1 loop
    perform pgpark._latch(_lock_tenants.pool_id, name);
  end loop;
end
$$;

-- Remembers how far the tenants of tasks that start have been served. The last past_head of them start past a head: that
-- is their tenant's usage as well, but it does not move virtual time. Else a task from far behind would set the clock to
-- its own turn, and newcomers would come after all that its tenant has parked.
create or replace function pgpark._serve(lot pgpark.pool, ids bigint[], past_head int) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  insert into tenant_service (pool_id, tenant, priority, started_tag, finish_tag)
  select lot.pool_id, coalesce(t.tenant, ''), t.priority,
         coalesce(max(t.start_tag) filter (where i.ord <= cardinality(ids) - past_head), 0),
         max(t.start_tag + t.units / pgpark._weight(lot.pool_id, coalesce(t.tenant, '')))
  from unnest(ids) with ordinality as i (task_id, ord)
  join task t on t.task_id = any (array[i.task_id])
  group by coalesce(t.tenant, ''), t.priority
  on conflict on constraint tenant_service_pkey do update
  set started_tag = greatest(tenant_service.started_tag, excluded.started_tag),
      finish_tag = greatest(tenant_service.finish_tag, excluded.finish_tag);
end
$$;

-- Forgets tenants whose turn comes at once anyway: virtual time has passed their finish tag. With them the latches of
-- tenants that have nothing parked.
create or replace function pgpark._forget_service(pool_id int) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  delete from tenant_service s
  where (s.pool_id, s.tenant, s.priority) in (
    select f.pool_id, f.tenant, f.priority
    from (
      select max(g.started_tag) as reached, g.priority
      from tenant_service g
      where g.pool_id = _forget_service.pool_id
      group by g.priority
    ) class
    join tenant_service f on f.pool_id = _forget_service.pool_id
                         and f.priority = class.priority
                         and f.finish_tag <= class.reached
    limit 1000
    for update of f skip locked);
  delete from latch l
  where (l.pool_id, l.name) in (
    select g.pool_id, g.name
    from latch g
    where g.pool_id = _forget_service.pool_id
      and g.name like 'tenant %'
      and not exists (select from task t
                      where t.pool_id = g.pool_id and t.state = 'parked' and t.share = substr(g.name, 8))
    limit 1000
    for update skip locked);
end
$$;

-- Brings the parked tasks of a pool in line with changed tenants and fairness. The caller holds the entrance alone, and
-- the pool. reweighted: the tenants of a fair pool whose weight is another one now.
create or replace function pgpark._line_up(before pgpark.pool, after_ pgpark.pool, reweighted text[]) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  fair boolean := after_.fairness = 'tenant';
  anew boolean := before.fairness <> after_.fairness;
begin
  update task t
  set lane = s.lane
  from (
    select p.task_id, (select n.tenant from tenant n
                       where n.pool_id = p.pool_id and n.tenant = coalesce(p.tenant, '') and n.max_units is not null
                      ) as lane
    from task p
    where p.pool_id = after_.pool_id
      and p.state = 'parked'
  ) s
  where t.task_id = s.task_id
    and t.lane is distinct from s.lane;

  if anew then
    delete from tenant_service s where s.pool_id = after_.pool_id;
  end if;
  update task t
  set start_tag = s.tag,
      share = s.share
  from (
    select p.task_id, case when fair then p.tenant end as share,
           case when fair
                then case when anew then 0 else first_value(p.start_tag) over turn end
                     + coalesce(sum(p.units / p.weight) over before_it, 0)
                else 0 end as tag
    from (
      select p.task_id, coalesce(p.tenant, '') as tenant, p.priority, p.start_tag, p.units,
             coalesce((select n.weight from tenant n
                       where n.pool_id = p.pool_id and n.tenant = coalesce(p.tenant, '')), 1) as weight
      from task p
      where p.pool_id = after_.pool_id
        and p.state = 'parked'
        and (anew or coalesce(p.tenant, '') = any (reweighted))
    ) p
    window turn as (partition by p.tenant, p.priority order by p.start_tag, p.task_id),
           before_it as (turn rows between unbounded preceding and 1 preceding)
  ) s
  where t.task_id = s.task_id
    and (t.start_tag <> s.tag or t.share is distinct from s.share);
end
$$;

-- Puts tasks of a pool that is not fair back in their order that parked as if it were: while that was being changed.
create or replace function pgpark._straighten(pool_id int) returns void
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
  perform from pool p where p.pool_id = _straighten.pool_id and p.fairness = 'fifo' for no key update skip locked;
  if not found then
    return;
  end if;
  update task t
  set start_tag = 0,
      share = null
  where t.task_id in (
    select b.task_id
    from task b
    where b.pool_id = _straighten.pool_id and b.state = 'parked' and b.share is not null
    for update skip locked);
  perform pgpark._reset_front(_straighten.pool_id);
end
$$;

-- The tenants that have tasks in a lane.
create or replace function pgpark._lanes(pool_id int) returns setof text
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
begin
  return query
  with recursive lane (tenant) as (  -- from one to the next by index, whatever waits in each
    (select t.lane
     from task t
     where t.pool_id = _lanes.pool_id and t.state = 'parked' and t.lane is not null
     order by t.lane
     limit 1)
    union all
    select (select t.lane
            from task t
            where t.pool_id = _lanes.pool_id and t.state = 'parked' and t.lane is not null and t.lane > l.tenant
            order by t.lane
            limit 1)
    from lane l
    where l.tenant is not null
  )
  select l.tenant from lane l where l.tenant is not null;
end
$$;

-- The tenants that have tasks in a lane, and how many units each may still take.
create or replace function pgpark._rooms(lot pgpark.pool) returns table (tenant text, room int)
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
  used constant jsonb := (
    select coalesce(jsonb_object_agg(u.tenant, u.units), '{}')
    from (
      select coalesce(t.tenant, '') as tenant, sum(t.units) as units
      from task t
      where t.pool_id = lot.pool_id
        and t.state in ('running', 'cancelling')
      group by 1
    ) u);
begin
  return query
  select l.tenant,
         greatest(coalesce((select n.max_units from tenant n where n.pool_id = lot.pool_id and n.tenant = l.tenant),
                           lot.max_units)
                  - coalesce((used ->> l.tenant)::bigint, 0), 0)::int
  from pgpark._lanes(lot.pool_id) as l (tenant);
end
$$;

-- The fronts of the lanes: of each tenant with a limit its first parked tasks, all in rank order. in_line are those that
-- the limit lets start: the first so many whose units fit together with those of the tenant's running tasks. Reads at
-- most depth of these from a lane (last_look: there may be more), and beyond of those that the limit keeps waiting. A
-- task past its deadline, or too large for its tenant, ends at the next claim and takes no room; for such a few more are
-- read. tenants: of their lanes alone; null: of all.
create or replace function pgpark._read_lanes(lot pgpark.pool, now_ timestamptz, depth int, beyond int,
                                              tenants text[] default null)
returns setof pgpark.candidate
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  used jsonb;
begin
  if not lot.limited then
    return;
  end if;
  used := (
    select jsonb_object_agg(u.tenant, u.units)
    from (
      select coalesce(t.tenant, '') as tenant, sum(t.units) as units
      from task t
      where t.pool_id = lot.pool_id
        and t.state in ('running', 'cancelling')
      group by 1
    ) u);
  return query
  with lane as materialized (
    select r.*, case when r.room > 0 then least(r.room, depth) + 8 else 0 end + beyond as deepest
    from (
      select l.tenant, l.max_units,
             coalesce(l.max_units, lot.max_units) - coalesce((used ->> l.tenant)::bigint, 0) as room
      from (
        -- Looked up one by one: a join may be planned when there is hardly a tenant.
        select l.tenant, (select n.max_units from tenant n
                          where n.pool_id = lot.pool_id and n.tenant = l.tenant) as max_units
        from pgpark._lanes(lot.pool_id) as l (tenant)
        where tenants is null
           or l.tenant = any (tenants)
      ) l
    ) r
  ),
  waiting as (
    select w.*, l.room, l.max_units, l.deepest,
           sum(case when w.deadline <= now_ or w.units > least(lot.max_units, l.max_units) then 0 else w.units end)
             over (partition by l.tenant order by w.priority desc, w.start_tag, w.task_id) as up_to,
           row_number() over (partition by l.tenant order by w.priority desc, w.start_tag, w.task_id) as nth
    from lane l
    cross join lateral (
      select t.task_id, l.tenant, t.priority, t.start_tag, t.units, t.bypassed, t.deadline
      from task t
      where t.pool_id = lot.pool_id
        and t.state = 'parked'
        and t.lane is not null
        and t.lane = l.tenant
      order by t.priority desc, t.start_tag, t.task_id
      limit l.deepest
    ) w
  )
  select w.task_id, w.tenant, w.priority, w.start_tag, w.units, w.bypassed, w.deadline,
         w.max_units, w.up_to <= w.room, w.nth = w.deepest and w.up_to < w.room
  from waiting w
  order by w.priority desc, w.start_tag, w.task_id;
end
$$;
