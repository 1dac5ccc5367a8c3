-- The secrets of a pool's config, and its notifier: taken out of what is kept and shown, and stored apart.
-- Called by park_put_pool, park_drop_pool and park_pools.

-- What stands in a config for a secret that is stored.
create or replace function pgpark._secret_word() returns text
language sql immutable
as $$
  select '(secret)';
$$;

-- A checked config as it may be shown. `database` is for the client that reads the config file, not for the database.
create or replace function pgpark._without_secrets(config jsonb) returns jsonb
language sql immutable
as $$
  select case
    when config #>> '{mailbox,notifier,auth_header}' is null then config - 'database'
    else jsonb_set(config - 'database', '{mailbox,notifier,auth_header}', to_jsonb(pgpark._secret_word()))
  end;
$$;

-- mailbox.notifier of a checked config, defaults filled in and without its secret; null for none.
create or replace function pgpark._notifier(config jsonb) returns jsonb
language sql immutable
as $$
  select jsonb_build_object(
    'type', coalesce(n.given ->> 'type', 'http'),
    'base_url', n.given ->> 'base_url',
    'timeout_secs', coalesce(n.given ->> 'timeout_secs', '10')::double precision,
    'max_attempts', coalesce((n.given ->> 'max_attempts')::numeric::int, 20))
  from (select nullif(config #> '{mailbox,notifier}', 'null') as given) n
  where n.given is not null;
$$;

-- Whether a checked config gives another secret than the one that is stored. The word that stands for a stored secret
-- leaves it as it is, so that a config that was shown can be put back; 22023 where none is stored.
create or replace function pgpark._other_secret(lot pgpark.pool, config jsonb) returns boolean
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  given constant text := config #>> '{mailbox,notifier,auth_header}';
  stored constant text := (select s.auth_header from pool_secret s where s.pool_id = lot.pool_id);
begin
  if given = pgpark._secret_word() and stored is null then
    raise exception 'pools.%.mailbox.notifier.auth_header is %, which stands for the header that is stored, and none is',
                    lot.name, given
      using errcode = '22023', hint = 'Give the header itself, for example "Bearer ..." with your token.';
  end if;
  return given is distinct from stored and given is distinct from pgpark._secret_word();
end
$$;

-- Stores the secret that a checked config gives, and returns whether it is another one than before.
create or replace function pgpark._put_secret(lot pgpark.pool, config jsonb) returns boolean
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  given constant text := config #>> '{mailbox,notifier,auth_header}';
begin
  if not pgpark._other_secret(lot, config) then
    return false;
  end if;
  delete from pool_secret s where s.pool_id = lot.pool_id;
  insert into pool_secret (pool_id, auth_header) select lot.pool_id, given where given is not null;
  return true;
end
$$;
