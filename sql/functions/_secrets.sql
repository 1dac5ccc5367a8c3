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

-- The notifier of a pool as park_pools shows it.
create or replace function pgpark._shown_notifier(lot pgpark.pool) returns jsonb
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  return lot.notifier || jsonb_build_object(
    'auth_header', (select pgpark._secret_word() from pool_secret s where s.pool_id = lot.pool_id));
end
$$;

-- Stores the secret that a checked config gives, and returns whether it is another one than before. The word that stands
-- for a stored secret leaves it as it is, so that a config that was shown can be put back.
create or replace function pgpark._put_secret(lot pgpark.pool, config jsonb) returns boolean
language plpgsql
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  given constant text := config #>> '{mailbox,notifier,auth_header}';
  stored text;
begin
  select s.auth_header into stored from pool_secret s where s.pool_id = lot.pool_id;
  if given = pgpark._secret_word() then
    if stored is null then
      raise exception 'pools.%.mailbox.notifier.auth_header is %, which stands for the header that is stored, and none is',
                      lot.name, given
        using errcode = '22023', hint = 'Give the header itself, for example "Bearer ..." with your token.';
    end if;
    return false;
  elsif given is not distinct from stored then
    return false;
  end if;
  delete from pool_secret s where s.pool_id = lot.pool_id;
  insert into pool_secret (pool_id, auth_header) select lot.pool_id, given where given is not null;
  return true;
end
$$;
