-- What park_put_pool would change. Called by `pgpark apply --dry-run`, and by whoever wants to compare first.
-- Stand-in: it tries the change and takes it back.

create or replace function pgpark.park_plan_pool(name text, config jsonb)
returns table (key text, before jsonb, after jsonb)
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  old jsonb;
  new jsonb;
  kept jsonb;
begin
  begin
    old := (select p.settings from pgpark.park_pools() p where p.name = park_plan_pool.name);
    perform pgpark.park_put_pool(park_plan_pool.name, park_plan_pool.config);
    new := (select p.settings from pgpark.park_pools() p where p.name = park_plan_pool.name);
    kept := jsonb_build_array(old, new);
    raise exception 'taken back' using errcode = 'PGPLN';
  exception when sqlstate 'PGPLN' then
    null;
  end;
  return query
  select coalesce(o.path, n.path), o.value, n.value
  from pgpark._flat(kept -> 0) o
  full join pgpark._flat(kept -> 1) n on o.path = n.path
  where o.value is distinct from n.value
  order by 1;
end
$$;

comment on function pgpark.park_plan_pool is
'What park_put_pool(name, config) would change, without changing it: a row (key, before, after) per setting, key as in
''queue.type'' (a pool that is not there yet: before is null). No row: nothing. Errors: those of park_put_pool.';

-- The leaves of an object with their dotted paths; null is as if it were left out.
create or replace function pgpark._flat(settings jsonb) returns table (path text, value jsonb)
language sql immutable
set search_path = pgpark, pg_temp
as $$
  with recursive node (path, value) as (
    select e.key, e.value from jsonb_each(nullif(settings, 'null')) e
    union all
    select n.path || '.' || e.key, e.value
    from node n
    cross join lateral jsonb_each(case jsonb_typeof(n.value) when 'object' then n.value end) e
  )
  select n.path, n.value from node n where jsonb_typeof(n.value) not in ('object', 'null');
$$;
