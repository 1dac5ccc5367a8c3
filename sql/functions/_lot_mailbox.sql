-- What became of tasks, in the picture of a pool. Called by park_lot (lot.sql), which says who may see what.

-- The latest outcomes of a pool, those that did not complete among them for an hour, and these by their reasons.
create or replace function pgpark._lot_mailbox(lot pgpark.pool, own text[], told boolean, now_ timestamptz, most int) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  latest constant pgpark.ended[] := array(
    select m from pgpark._latest_outcomes(lot, own) m
    where m.pool_id = lot.pool_id and pgpark._is_shown(m.tenant, own));
  failures constant pgpark.ended[] := array(
    select m from pgpark._latest_failures(lot.pool_id) m
    where m.created_at > now_ - interval '1 hour' and pgpark._is_shown(m.tenant, own));
begin
  return jsonb_build_object(
    'latest', (
      select coalesce(jsonb_agg(jsonb_build_object(
               'task_id', m.task_id, 'status', m.status, 'reason', pgpark._reason_for(m.reason, told),
               'units', m.units, 'priority', pgpark._priority_word(m.priority), 'tenant', m.tenant, 'attempt', m.attempt,
               'secs', pgpark._seconds(m.created_at, now_), 'wait_secs', pgpark._seconds(m.submitted_at, m.started_at),
               'run_secs', pgpark._seconds(m.started_at, m.created_at),
               'retry', m.status <> 'completed' and lot.archive and m.msg_id is not null)
               order by m.message_id desc), '[]')
      from (
        select * from unnest(latest)
        union
        select * from unnest(failures)
        order by message_id desc
        limit most
      ) m),
    'failures', (
      select coalesce(jsonb_agg(to_jsonb(g) order by g.count desc, g.secs), '[]')
      from (
        select m.status, pgpark._reason_for(m.reason, told) as reason, count(*),
               pgpark._seconds(max(m.created_at), now_) as secs, max(m.task_id) as task_id
        from unnest(failures) m
        group by 1, 2
        order by 3 desc, 4
        limit 20
      ) g),
    'failed', cardinality(failures),
    'more', cardinality(failures) >= pgpark._lot_reach());
end
$$;

-- The latest outcomes in the storage of this pool, those of other pools among them; of own tenants, whatever their storage.
-- What had no worker when it ended did not run then, though it may have started before: it was waiting again.
create or replace function pgpark._latest_outcomes(lot pgpark.pool, own text[]) returns setof pgpark.ended
language plpgsql stable
set search_path = pgpark, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
begin
  if own is null then
    return query
    select m.message_id, m.task_id, m.pool_id, m.tenant, m.status, left(m.reason, 200), m.priority, m.units, m.attempt,
           m.submitted_at, case when m.worker is not null then m.started_at end, m.created_at, m.msg_id
    from mailbox m
    where m.storage = lot.mailbox_table
    order by m.message_id desc
    limit pgpark._lot_reach();
  else
    return query
    select l.*
    from unnest(own) as o (tenant)
    cross join lateral (
      select m.message_id, m.task_id, m.pool_id, m.tenant, m.status, left(m.reason, 200), m.priority, m.units, m.attempt,
             m.submitted_at, case when m.worker is not null then m.started_at end, m.created_at, m.msg_id
      from mailbox m
      where m.tenant = o.tenant
      order by m.message_id desc
      limit greatest(pgpark._lot_reach() / cardinality(own), 1)
    ) l;
  end if;
end
$$;

create or replace function pgpark._latest_failures(pool_id int) returns setof pgpark.ended
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
  select m.message_id, m.task_id, m.pool_id, m.tenant, m.status, left(m.reason, 200), m.priority, m.units, m.attempt,
         m.submitted_at, case when m.worker is not null then m.started_at end, m.created_at, m.msg_id
  from mailbox m
  where m.pool_id = _latest_failures.pool_id
    and m.status <> 'completed'
  order by m.message_id desc
  limit pgpark._lot_reach();
end
$$;
