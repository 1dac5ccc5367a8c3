-- Granting access: what a role that is not the owner of the schema may do. Called by whoever installed pgpark, and admins.
-- Who asks at each call is functions/_access.sql; here a role gets the right to call at all.

create or replace function pgpark.park_grant(
  role text,
  kind text,
  tenants text[] default null,
  pools text[] default null)
returns void
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgpark._require('{}', null, '{}', 'grant access');
  perform pgpark._require_read_committed();
  perform pgpark._lock_entrance(0, alone => true);  -- two that change rights of one function at once would fail
  perform pgpark._check_grant(park_grant.role, park_grant.kind, park_grant.tenants, park_grant.pools);
  insert into access (role, kind, tenants, pools)
  values (quote_ident(park_grant.role)::regrole, park_grant.kind, park_grant.tenants, park_grant.pools)
  on conflict on constraint access_pkey do update
  set tenants = excluded.tenants,
      pools = excluded.pools;
  perform pgpark._open_to(park_grant.role);
end
$$;

comment on function pgpark.park_grant is
'Gives a role that is there already access of one kind, instead of what it had of that kind. producer: submits, cancels,
follows and fetches; with tenants only theirs, with pools only in these. worker: claims, finishes, and delivers callbacks;
with pools only of these. reader: numbers of pools, no payloads. admin: everything but migrating. A role may have several
kinds; members of it have them too. Errors: 42704 (no such role, no such pool), 22023, 25001, 42501 (the
caller is no admin).';

create or replace function pgpark.park_revoke(role text, kind text default null) returns int
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  revoked int;
begin
  perform pgpark._require('{}', null, '{}', 'revoke access');
  perform pgpark._require_read_committed();
  perform pgpark._lock_entrance(0, alone => true);
  perform pgpark._check_grant(park_revoke.role, coalesce(park_revoke.kind, 'reader'), null, null);
  delete from access a
  where a.role = quote_ident(park_revoke.role)::regrole
    and (park_revoke.kind is null or a.kind = park_revoke.kind);
  get diagnostics revoked = row_count;
  perform pgpark._open_to(park_revoke.role);
  return revoked;
end
$$;

comment on function pgpark.park_revoke is
'Takes access of one kind (null: of every kind) from a role; returns how many kinds it had of those. A role that has none
left can be dropped. Errors: 42704, 22023, 25001, 42501.';

create or replace function pgpark.park_grants()
returns table (role text, kind text, tenants text[], pools text[])
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgpark._require('{}', null, '{}', 'see who has access');
  return query
  select r.rolname::text, a.kind, a.tenants, a.pools
  from access a
  join pg_roles r on r.oid = a.role
  order by 1, 2;
end
$$;

comment on function pgpark.park_grants is
'A row for each role and kind of access; null tenants or pools: any. Errors: 42501.';

-- Which kinds may call what; an admin may call everything.
create or replace function pgpark._calls() returns table (name text, kinds text[])
language sql immutable
as $$
  values
    ('park_submit',          array['producer']),
    ('park_submit_many',     array['producer']),
    ('park_cancel',          array['producer']),
    ('park_retry',           array['producer']),
    ('park_status',          array['producer']),
    ('park_result',          array['producer']),
    ('park_parts',           array['producer']),
    ('park_fetch',           array['producer']),
    ('park_fetch_of',        array['producer']),
    ('park_ack',             array['producer']),
    ('park_claim',           array['worker']),
    ('park_next',            array['worker']),
    ('park_finish',          array['worker']),
    ('park_finish_many',     array['worker']),
    ('park_release',         array['worker']),
    ('park_heartbeat',       array['worker']),
    ('park_emit',            array['worker']),
    ('park_emit_many',       array['worker']),
    ('park_follow',          array['producer']),
    ('park_enter',           array['producer', 'reader', 'worker']),
    ('park_admit',           array['producer', 'reader', 'worker']),
    ('park_traces',          array['worker']),
    ('park_callbacks',       array['worker']),
    ('park_callback_done',   array['worker']),
    ('park_callbacks_due',   array['reader', 'worker']),
    ('park_explain',         array['reader', 'worker']),
    ('park_audit',           array['producer', 'reader']),
    ('park_maintain',        array['producer', 'worker']),
    ('park_prune',           array['producer', 'worker']),
    ('park_stats',           array['producer', 'reader', 'worker']),
    ('park_lot',             array['producer', 'reader', 'worker']),
    ('park_pools',           array['producer', 'reader', 'worker']),
    ('park_history',         array['producer', 'reader', 'worker']),
    ('park_metrics',         array['producer', 'reader', 'worker']),
    ('park_demand',          array['producer', 'reader', 'worker']),
    ('park_llm_units',       array['producer', 'reader', 'worker']),
    ('park_llm_capacity',    array['producer', 'reader', 'worker']),
    ('park_config_schema',   array['producer', 'reader', 'worker']),
    ('park_put_pool',        '{}'),
    ('park_plan_pool',       '{}'),
    ('park_change_pool',     '{}'),
    ('park_set_pool_state',  '{}'),
    ('park_drop_pool',       '{}'),
    ('park_dead_letters',    '{}'),
    ('park_retry_callbacks', '{}'),
    ('park_grant',           '{}'),
    ('park_revoke',          '{}'),
    ('park_grants',          '{}'),
    ('park_create_token',    '{}'),
    ('park_revoke_token',    '{}'),
    ('park_tokens',          '{}'),
    ('park_doctor',          '{}');
$$;

create or replace function pgpark._check_grant(role text, kind text, tenants text[], pools text[]) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  if not exists (select from pg_roles r where r.rolname = _check_grant.role) then
    raise exception 'unknown role %', coalesce(pgpark._on_one_line(quote_literal(_check_grant.role)), 'NULL')
      using errcode = '42704', hint = 'Make it first: create role ... login';
  elsif _check_grant.role = current_user then
    raise exception 'role % owns pgpark and may do everything: there is nothing to grant it or to revoke',
                    quote_literal(_check_grant.role)
      using errcode = '22023';
  end if;
  perform pgpark._check_scope(array[_check_grant.kind], _check_grant.tenants, _check_grant.pools);
end
$$;

-- What is wrong with access of these kinds to these tenants and pools, of a role or of a token.
create or replace function pgpark._check_scope(kinds text[], tenants text[], pools text[]) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  unknown text;
begin
  if array_ndims(_check_scope.kinds) is distinct from 1 then
    raise exception 'kinds must be a plain list with at least one of producer, worker, reader or admin'
      using errcode = '22023';
  end if;
  select coalesce(pgpark._on_one_line(quote_literal(k.kind)), 'NULL') into unknown
  from unnest(_check_scope.kinds) as k (kind)
  where coalesce(k.kind in ('producer', 'worker', 'reader', 'admin'), false) is false
  limit 1;
  if found then
    raise exception 'unknown kind of access %; use producer, worker, reader or admin', unknown using errcode = '22023';
  elsif _check_scope.tenants is not null and 'producer' <> all (_check_scope.kinds) then
    raise exception 'tenants go with producer, not with %', array_to_string(_check_scope.kinds, ', ')
      using errcode = '22023';
  elsif (_check_scope.pools is not null or _check_scope.tenants is not null) and 'admin' = any (_check_scope.kinds) then
    raise exception 'an admin has all pools and tenants; name them with producer, worker and reader'
      using errcode = '22023';
  elsif greatest(array_ndims(_check_scope.tenants), array_ndims(_check_scope.pools)) > 1 then
    raise exception 'tenants and pools must be plain lists of names, not lists of lists' using errcode = '22023';
  elsif 0 in (cardinality(_check_scope.tenants), cardinality(_check_scope.pools))
        or array_position(_check_scope.tenants, null) > 0 or array_position(_check_scope.pools, null) > 0 then
    raise exception 'tenants and pools must name at least one each, or be left out for any' using errcode = '22023';
  end if;
  select n.name into unknown
  from unnest(_check_scope.pools) as n (name)
  where not exists (select from pool p where p.name = n.name)
  limit 1;
  if found then
    perform pgpark._unknown_pool(unknown);
  end if;
end
$$;

-- Lets a role call what its kinds of access are for, and nothing else. Each may read the clock.
create or replace function pgpark._open_to(role text) returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  granted constant text[] := array(select a.kind from access a where a.role = quote_ident(_open_to.role)::regrole);
  callable regprocedure;
begin
  execute format('revoke all on all functions in schema pgpark from %I', _open_to.role);
  execute format('revoke all on schema pgpark from %I', _open_to.role);
  if cardinality(granted) = 0 then
    return;
  end if;
  execute format('grant usage on schema pgpark to %I', _open_to.role);
  for callable in
    select f.oid::regprocedure
    from pg_proc f
    left join pgpark._calls() c on c.name = f.proname
    where f.pronamespace = 'pgpark'::regnamespace
      and (c.kinds && granted or (c.name is not null and 'admin' = any (granted)) or f.proname = '_now')
  loop
    execute format('grant execute on function %s to %I', callable, _open_to.role);
  end loop;
end
$$;

-- Closes the schema to everybody but its owner and those who were granted access. Called by each migration, because what a
-- function file makes anew is open to everybody.
create or replace function pgpark._close() returns void
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  revoke all on schema pgpark from public;
  revoke all on all tables in schema pgpark from public;
  revoke all on all sequences in schema pgpark from public;
  revoke all on all functions in schema pgpark from public;
  delete from access a where not exists (select from pg_roles r where r.oid = a.role);
  perform pgpark._open_to(r.rolname)
  from pg_roles r
  where r.oid in (select a.role from access a);
end
$$;
