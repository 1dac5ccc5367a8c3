-- Whether everybody has the rights that park_grant gave, and no others. Called by park_doctor.

-- What roles other than the owner may do with the schema and what is in it, as words: "execute on pgpark.park_stats(text)".
create or replace function pgpark._held_rights() returns table (role text, deed text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
         lower(a.privilege_type) || ' on ' || o.object
  from (
    select 'schema pgpark' as object, n.nspowner as owner, coalesce(n.nspacl, acldefault('n', n.nspowner)) as acl
    from pg_namespace n
    where n.nspname = 'pgpark'
    union all
    select c.oid::regclass::text, c.relowner,
           coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's'::"char" else 'r' end, c.relowner))
    from pg_class c
    where c.relnamespace = 'pgpark'::regnamespace and c.relkind in ('r', 'p', 'S', 'v', 'm')
    union all
    select format('%s.%I', c.oid::regclass, t.attname), c.relowner, t.attacl
    from pg_class c
    join pg_attribute t on t.attrelid = c.oid
    where c.relnamespace = 'pgpark'::regnamespace
    union all
    select p.oid::regprocedure::text, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner))
    from pg_proc p
    where p.pronamespace = 'pgpark'::regnamespace
  ) o
  cross join lateral aclexplode(o.acl) a
  where a.grantee <> o.owner;
$$;

-- What they should: pgpark._open_to gives that.
create or replace function pgpark._due_rights() returns table (role text, deed text)
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  with granted as (
    select quote_ident(r.rolname) as role, array_agg(a.kind) as kinds
    from access a
    join pg_roles r on r.oid = a.role
    group by r.rolname
  )
  select g.role, 'usage on schema pgpark'
  from granted g
  union all
  select g.role, 'execute on ' || b.object
  from granted g
  join blueprint b on b.kind = 'function'
  left join pgpark._calls() c on starts_with(b.object, 'pgpark.' || c.name || '(')
  where c.kinds && g.kinds
     or (c.name is not null and 'admin' = any (g.kinds))
     or b.object = 'pgpark._now()';
end
$$;

-- A finding for each role with rights that it should not have, or without such as it should.
create or replace function pgpark._wrong_rights() returns setof pgpark.finding
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return query
  select 'privileges changed', role,
         concat_ws('; ', 'may and should not: ' || string_agg(deed, ', ' order by deed) filter (where due.here is null),
                         'should and may not: ' || string_agg(deed, ', ' order by deed) filter (where held.here is null)),
         concat_ws(E'\n',
           format('revoke all on all tables in schema pgpark from %s;', role),
           format('revoke all on all sequences in schema pgpark from %s;', role),
           format('revoke all on all functions in schema pgpark from %s;', role),
           format('revoke all on schema pgpark from %s;', role),
           'select pgpark._close();'),
         false
  from (select h.role, h.deed, true as here from pgpark._held_rights() h) held
  full join (select d.role, d.deed, true as here from pgpark._due_rights() d) due using (role, deed)
  where held.here is null
     or due.here is null
  group by role
  order by role;
end
$$;
