-- The tenants in the picture of a pool. Called by park_lot (lot.sql), which says who may see what.

-- Who holds units and who waits, of the tasks looked at: the first twenty.
create or replace function pgpark._lot_tenants(lot pgpark.pool, running pgpark.task[], parked pgpark.task[]) returns jsonb
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
  return (
    select coalesce(jsonb_agg(jsonb_build_object(
             'tenant', nullif(s.tenant, ''), 'running', s.running, 'running_units', s.running_units, 'parked', s.parked,
             'parked_units', s.parked_units, 'weight', coalesce(n.weight, 1), 'max_units', n.max_units)
             order by s.running_units desc, s.parked_units desc, s.tenant), '[]')
    from (
      select coalesce(l.tenant, '') as tenant,
             count(*) filter (where l.runs) as running, coalesce(sum(l.units) filter (where l.runs), 0) as running_units,
             count(*) filter (where not l.runs) as parked, coalesce(sum(l.units) filter (where not l.runs), 0) as parked_units
      from (
        select r.tenant, r.units, true as runs from unnest(running) r
        union all
        select p.tenant, p.units, false from unnest(parked) p
      ) l
      group by 1
      order by 3 desc, 5 desc, 1
      limit 20
    ) s
    left join tenant n on n.pool_id = lot.pool_id and n.tenant = s.tenant);
end
$$;
