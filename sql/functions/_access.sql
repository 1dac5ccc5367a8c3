-- Whether the session's role may do what it asks for. Every public function runs with the rights of the schema's owner, so
-- each asks here first. The owner, its members and superusers may do everything; everybody else what park_grant gave
-- (functions/access.sql). What a role may not see is to it as if it were not there; what it may not do is error 42501.
--
-- A transaction that acts for a token (functions/tokens.sql) says so in the setting pgpark.token. Then the role must be
-- allowed to, and the token too, the owner's included: whoever forges that setting can only lose rights by it.

-- The role that the session acts as. Not current_user, which is the owner in here; and not the owner of a function that
-- was called around ours, so no such function lends its rights to whoever may call it.
create or replace function pgpark._caller() returns name
language sql stable
as $$
  select case current_setting('role') when 'none' then session_user else current_setting('role')::name end;
$$;

-- The hash of the token that the transaction acts for; '' for none.
create or replace function pgpark._token() returns text
language sql stable
as $$
  select coalesce(current_setting('pgpark.token', true), '');
$$;

-- Whether anything has to be asked. Part of every call, so it reads no table.
create or replace function pgpark._is_stranger() returns boolean
language sql stable
as $$
  select pgpark._caller() <> current_user or pgpark._token() <> '';
$$;

-- Whether the caller has access of one of these kinds, or is an admin, in this pool (null: in any) to all of these tenants.
-- {null}: to tasks without a tenant, which only those may see who are not bound to tenants; {}: to nobody's in particular.
create or replace function pgpark._may(kinds text[], pool text, tenants text[]) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
set jit = off
as $$
#variable_conflict use_column
declare
  caller constant name := pgpark._caller();
begin
  if pgpark._token() <> '' and not pgpark._token_may(_may.kinds, _may.pool, _may.tenants) then
    return false;
  end if;
  return pg_has_role(caller, current_user, 'usage') or exists (
    select from access a
    where (a.kind = any (kinds) or a.kind = 'admin')
      and (a.pools is null or _may.pool is null or a.pools @> array[_may.pool])
      and (a.tenants is null or a.tenants @> _may.tenants)
      and pg_has_role(caller, a.role::oid, 'usage'));
end
$$;

-- The same for the token alone; false for one that is not there, or not any more.
create or replace function pgpark._token_may(kinds text[], pool text, tenants text[]) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
set jit = off
as $$
#variable_conflict use_column
begin
  return exists (
    select from token t
    cross join unnest(t.kinds) k (kind)
    where t.hash = pgpark._token()
      and (t.expires_at is null or t.expires_at > pgpark._now())
      and (k.kind = any (_token_may.kinds) or k.kind = 'admin')
      and (t.pools is null or _token_may.pool is null or t.pools @> array[_token_may.pool])
      and (t.tenants is null or k.kind <> 'producer' or t.tenants @> _token_may.tenants));
end
$$;

-- The same for the pool and the tenant of a task, live or ended; false for one that is not there.
create or replace function pgpark._may_on(kinds text[], task_id bigint) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return coalesce(
    (select pgpark._may(kinds, p.name, array[t.tenant])
     from task t
     join pool p using (pool_id)
     where t.task_id = _may_on.task_id),
    (select pgpark._may(kinds, m.pool, array[m.tenant]) from mailbox m where m.task_id = _may_on.task_id),
    false);
end
$$;

-- These ids, in order, with null for each task that the caller has no such access to.
create or replace function pgpark._own(kinds text[], task_ids bigint[]) returns bigint[]
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  return array(
    select case when pgpark._may_on(kinds, i.task_id) then i.task_id end
    from unnest(task_ids) with ordinality as i (task_id, ord)
    order by i.ord);
end
$$;

-- Raises 42501 unless _may. deed: what the caller wants, as words after "may not".
create or replace function pgpark._require(kinds text[], pool text, tenants text[], deed text) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  granted text;
begin
  if pgpark._may(kinds, _require.pool, _require.tenants) then
    return;
  elsif pgpark._token() <> '' and not pgpark._token_may(_require.kinds, _require.pool, _require.tenants) then
    perform pgpark._refuse_token(deed);
  end if;
  select string_agg(a.kind || coalesce(' of tenants ' || array_to_string(a.tenants, ', '), '')
                    || coalesce(' in pools ' || array_to_string(a.pools, ', '), ''), '; ' order by a.kind)
  into granted
  from access a
  where pg_has_role(pgpark._caller(), a.role::oid, 'usage');
  raise exception 'role % may not %', quote_literal(pgpark._caller()), pgpark._on_one_line(deed)
    using errcode = '42501',
          hint = coalesce('Granted to it: ' || granted, 'Nothing is granted to it') || '. Who may change that: pgpark grant.';
end
$$;

-- The same for one kind and one pool. deed: the verb.
create or replace function pgpark._require_pool(kind text, pool text, deed text) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  perform pgpark._require(array[kind], _require_pool.pool, '{}', format('%s pool %L', deed, _require_pool.pool));
end
$$;

-- Kinds of access that are not admin.
create or replace function pgpark._kinds() returns text[]
language sql immutable
as $$
  select array['producer', 'reader', 'worker'];
$$;

-- One pool, or all for null, as far as the caller may see their numbers.
create or replace function pgpark._visible_pools(name text) returns setof pgpark.pool
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
begin
  if pgpark._is_stranger() then
    perform pgpark._require(pgpark._kinds(), _visible_pools.name, array[null], 'see numbers of '
                            || coalesce('pool ' || quote_literal(_visible_pools.name), 'pools'));
  end if;
  return query
  select p.*
  from pgpark._pools(_visible_pools.name) p
  where not pgpark._is_stranger()
     or pgpark._may(pgpark._kinds(), p.name, array[null]);
end
$$;

-- A reason as it is told: what pgpark gave itself to everybody, a handler's own words to who may hear them.
create or replace function pgpark._reason_for(reason text, told boolean) returns text
language sql immutable
as $$
  select case when told or reason in ('deadline_expired', 'lost worker', 'run_timeout', 'cancelled', 'too_large', 'overflow',
                                      'payload lost', 'pool_dropped')
              then reason end;
$$;
