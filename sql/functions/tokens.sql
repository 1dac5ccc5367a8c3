-- Tokens: whoever calls a gateway has no login of the database, but a token. A gateway sends, in one transaction,
--
--   select * from pgpark.park_enter(TOKEN_HASH);     -- raises 28000 for a token that is unknown, expired or revoked
--   select * from pgpark.park_submit(...);           -- and whatever else the caller wants
--
-- and until that transaction ends every function asks what the token may do, beside what the gateway's own role may
-- (functions/_access.sql). So a gateway in any language keeps tenants apart by the same rules. Only the SHA-256 of a secret
-- is stored or sent here, so neither a backup nor the server's log has what a caller must show. docs/decisions/0020.

create or replace function pgpark.park_enter(token_hash text)
returns table (name text, kinds text[], tenants text[], pools text[], expires_at timestamptz)
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform set_config('pgpark.token', coalesce(nullif(park_enter.token_hash, ''), 'none'), true);
  return query
  select t.name, t.kinds, t.tenants, t.pools, t.expires_at from pgpark._known_token() t;
end
$$;

comment on function pgpark.park_enter is
'Makes the rest of this transaction act for a token: from now on it may do what this role may and the token too, and
nothing else. token_hash: the SHA-256 of the token, as 64 lower-case hexadecimal digits. Returns what the token is
for; null tenants, pools or expires_at: any, any, never. Begin the transaction with it; it ends with the transaction.
Errors: 28000 (there is no such token, or not any more), 42501.';

create or replace function pgpark.park_admit(token_hash text)
returns table (admitted boolean, retry_after_secs double precision, limited boolean)
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  given record;
  now_ constant timestamptz := pgpark._now();
  step interval;         -- between two requests that keep to the limit
  patience interval;     -- how far ahead of these a request may be
  farthest timestamptz;  -- that requests put next_at; where it is beyond, the clock was set back since
begin
  perform pgpark._require_read_committed();
  perform set_config('pgpark.token', coalesce(nullif(park_admit.token_hash, ''), 'none'), true);
  given := pgpark._known_token();
  admitted := true;
  retry_after_secs := 0;
  limited := given.requests_per_sec is not null;
  if not limited then
    if not exists (select from token_use u where u.hash = given.hash and u.used_at > now_ - interval '1 minute') then
      insert into token_use (hash, used_at)
      values (given.hash, now_)
      on conflict on constraint token_use_pkey do update set used_at = excluded.used_at;
    end if;
    return next;
    return;
  end if;
  step := pgpark._secs(1 / given.requests_per_sec);
  patience := (given.burst - 1) * step;
  farthest := now_ + patience + step + interval '1 minute';  -- more than requests wait for one another here
  insert into token_use (hash, used_at)
  values (given.hash, now_)
  on conflict on constraint token_use_pkey do nothing;
  update token_use u
  set next_at = case when u.next_at > farthest then now_ else greatest(u.next_at, now_) end + step,
      used_at = now_
  where u.hash = given.hash
    and (u.next_at <= now_ + patience or u.next_at > farthest);
  admitted := found;
  if not admitted then
    retry_after_secs := (select extract(epoch from u.next_at - patience - now_)::double precision
                         from token_use u where u.hash = given.hash);
  end if;
  return next;
end
$$;

comment on function pgpark.park_admit is
'Counts a request of a token against its limit (requests_per_sec on average, burst at once), for all gateways together, and
says whether it may go on; if not, in how many seconds. Call it in a transaction of its own, before park_enter, so
that requests of one token wait for one another only here. limited: whether the token has a limit, which never changes; for
one that has none, calling this once a minute is enough to note that it is in use.
Errors: 28000 (there is no such token, or not any more), 25001, 42501.';

create or replace function pgpark.park_create_token(
  name text,
  kinds text[],
  tenants text[] default null,
  pools text[] default null,
  expires_at timestamptz default null,
  requests_per_sec double precision default null,
  burst int default null)
returns text
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  now_ constant timestamptz := pgpark._now();
  secret text;
begin
  perform pgpark._require('{}', null, '{}', 'create tokens');
  perform pgpark._require_read_committed();
  if coalesce(park_create_token.name, '') !~ '^[[:alnum:]_.@ -]{1,100}$' then
    raise exception 'token name % is not possible', coalesce(pgpark._on_one_line(quote_literal(park_create_token.name)), 'NULL')
      using errcode = '22023', hint = 'Use 1 to 100 letters, digits, spaces, and . _ - @.';
  elsif park_create_token.expires_at <= now_ then
    raise exception 'expires_at must be in the future, not %', park_create_token.expires_at using errcode = '22023';
  elsif not (park_create_token.requests_per_sec between 1e-6 and 1e6) then
    raise exception 'requests_per_sec must be from 0.000001 to 1000000, not %', park_create_token.requests_per_sec
      using errcode = '22023', hint = 'Leave it out for a token without a limit.';
  elsif not (park_create_token.burst between 1 and 1000000) then
    raise exception 'burst must be from 1 to 1000000, not %', park_create_token.burst using errcode = '22023';
  elsif park_create_token.burst is not null and park_create_token.requests_per_sec is null then
    raise exception 'burst goes with requests_per_sec' using errcode = '22023';
  end if;
  perform pgpark._check_scope(park_create_token.kinds, park_create_token.tenants, park_create_token.pools);
  delete from token t where t.expires_at < now_ - interval '30 days';
  secret := 'park_' || translate(encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
                                               || uuid_send(gen_random_uuid())), 'base64'), '+/=', '-_');
  insert into token (name, hash, kinds, tenants, pools, requests_per_sec, burst, created_at, expires_at)
  values (park_create_token.name, encode(sha256(convert_to(secret, 'UTF8')), 'hex'), park_create_token.kinds,
          park_create_token.tenants, park_create_token.pools, park_create_token.requests_per_sec,
          coalesce(park_create_token.burst, ceil(park_create_token.requests_per_sec)::int), now_,
          nullif(park_create_token.expires_at, 'infinity'))
  on conflict on constraint token_pkey do nothing;
  if not found then
    raise exception 'there is a token % already', quote_literal(park_create_token.name)
      using errcode = '42710', hint = 'Revoke it first, or choose another name.';
  end if;
  return secret;
end
$$;

comment on function pgpark.park_create_token is
'Makes a token and returns its secret, which is shown this once and stored nowhere. name: for people, to list and revoke it.
kinds: of access, as in park_grant, one or several; tenants and pools bind it to these (tenants: as a producer).
expires_at: from when on it is no good. requests_per_sec: how often it may be used on average, burst: how often at once
(default: the requests of a second). A token never changes: revoke it and make another one. Tokens that expired more than
30 days ago are forgotten here. Errors: 22023, 42704 (no such pool), 42710 (the name is taken), 25001,
42501.';

create or replace function pgpark.park_revoke_token(name text) returns boolean
language plpgsql
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgpark._require('{}', null, '{}', 'revoke tokens');
  perform pgpark._require_read_committed();
  delete from token t where t.name = park_revoke_token.name;
  return found;
end
$$;

comment on function pgpark.park_revoke_token is
'Makes a token useless from the next call on; false if there is none of that name. Errors: 25001, 42501.';

create or replace function pgpark.park_tokens()
returns table (name text, kinds text[], tenants text[], pools text[], requests_per_sec double precision, burst int,
               created_at timestamptz, expires_at timestamptz, used_at timestamptz)
language plpgsql stable
security definer
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
begin
  perform pgpark._require('{}', null, '{}', 'see tokens');
  return query
  select t.name, t.kinds, t.tenants, t.pools, t.requests_per_sec, t.burst, t.created_at, t.expires_at, u.used_at
  from token t
  left join token_use u using (hash)
  order by t.name;
end
$$;

comment on function pgpark.park_tokens is
'A row for each token, also for one that has expired. Null tenants or pools: any; null requests_per_sec: no limit.
used_at: when it was last used, to about a minute; null: never, or not since the server crashed. Errors: 42501.';

-- The token that the transaction acts for. Raises 28000 for one that is not there, or not any more.
create or replace function pgpark._known_token() returns pgpark.token
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
#variable_conflict use_column
declare
  known pgpark.token;
begin
  select t.* into known
  from token t
  where t.hash = pgpark._token()
    and (t.expires_at is null or t.expires_at > pgpark._now());
  if not found then
    raise exception 'unknown token' using errcode = '28000', hint = 'It was revoked, it has expired, or it never was one.';
  end if;
  return known;
end
$$;

-- Raises 42501, saying what the token is for.
create or replace function pgpark._refuse_token(deed text) returns void
language plpgsql stable
set search_path = pgpark, pg_temp
as $$
declare
  known constant pgpark.token := pgpark._known_token();
begin
  raise exception 'token % may not %', quote_literal(known.name), pgpark._on_one_line(deed)
    using errcode = '42501',
          hint = pgpark._on_one_line(
            'It is for: ' || array_to_string(known.kinds, ', ')
            || coalesce(' of tenants ' || array_to_string(known.tenants, ', '), '')
            || coalesce(' in pools ' || array_to_string(known.pools, ', '), '') || '.');
end
$$;
